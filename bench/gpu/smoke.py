"""Every op by every backend, once, at one shape of a 7B model, against its own definition in fp64: a minute at most."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import laplace_kernels as lk
from bench.gpu.ops import make_problem

Case = tuple[str, int, int]  # op and variation, d, T
_BOUND = 1e-4  # of the largest entry: fp32 sums of bf16 numbers, fp32 companions at their own precision


def cases(dry: bool) -> list[Case]:
    """In the order of how much a fit depends on them."""
    d, T = (64, 32) if dry else (4096, 2048)
    names = ("project_", "jacobian", "gram_", "gram_ masked", "gram_group_", "gram_sketch_", "jacobian_stats")
    return [*((name, d, T) for name in names), ("kron_apply", d, 0)]


def describe(case: Case) -> dict[str, Any]:
    """What names a case in the report."""
    return dict(zip(("op", "d", "T"), case, strict=True))


def measure(case: Case, device: str) -> Iterator[dict[str, Any]]:
    """A record for each backend that serves the op: its largest error, and the seconds of the first call."""
    torch.manual_seed(0)
    problem = make_problem(case, torch.device(device))
    assert problem.run is not None
    operands = problem.operands()
    exact = _outcome(problem.run, _copied(operands, torch.float64))
    for backend in lk.backends():
        with lk.use_backend(backend):
            if lk.explain(case[0].split()[0], device, torch.bfloat16).backend != backend:
                continue
            record = {**describe(case), "backend": backend}
            start = time.perf_counter()
            try:
                found = _outcome(problem.run, _copied(operands, None))
                errors = [_error(*pair) for pair in zip(found, exact, strict=True)]
                record |= {"seconds": time.perf_counter() - start, "error": max(errors)}
                record["right"] = max(errors) <= _BOUND
            except Exception as error:
                traceback.print_exc()
                record |= {
                    "right": False,
                    "failed": " ".join(f"{type(error).__name__}: {error}".split())[:500],
                }
        yield record


def refused(records: list[dict[str, Any]]) -> dict[str, str]:
    """Backends that gave something wrong, and what: one that is wrong has no speed."""
    wrong = [record for record in records if not record.get("right", True) and "backend" in record]
    return {record["backend"]: f"{record['op']} is wrong" for record in wrong}


def _copied(value: Any, dtype: torch.dtype | None) -> Any:
    """Operands of their own, in another dtype where they are floats."""
    if isinstance(value, list | tuple):
        return type(value)(_copied(each, dtype) for each in value)
    if not isinstance(value, Tensor):
        return value
    copy = value.clone()
    return copy if dtype is None or not copy.is_floating_point() else copy.to(dtype)


def _outcome(run: Any, operands: Any) -> list[Tensor]:
    """What comes out; of a Gram matrix its lower triangle, which is all that is promised."""
    result = run(*operands)
    tensors = operands[0] if result is None else result
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    in_place = [each.tril() for each in tensors] if _is_gram(operands, tensors) else tensors
    return [each for each in in_place if each is not None]


def _is_gram(operands: Any, tensors: list[Tensor]) -> bool:
    first = operands[0] if isinstance(operands[0], list) else [operands[0]]
    return tensors[0] is first[0] and tensors[0].shape[0] == tensors[0].shape[1]


def _error(found: Tensor, exact: Tensor) -> float:
    """NaN counts as infinite."""
    error = (found.double() - exact).abs().max() / exact.abs().max()
    return float(error.nan_to_num(nan=torch.inf))
