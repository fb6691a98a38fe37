"""The ops and their baselines, over d and T."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import laplace_kernels as lk
from bench.gpu.timing import Call, Variant, inputs_beyond_cache, measure, recording

EXAMPLES, CLASSES, RANK, BASIS, SKETCH, SAMPLES, GROUP = 8, 4, 8, 64, 64, 16, 32


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        flops: Of the operation itself, whatever a variant executes.
        nbytes: That must be read and written at least.
        operands: Makes one set of inputs.
        run: The op on one set of inputs.
        baseline: What a user would write with the library's products.
        capture: Whether the op may be captured in a CUDA graph.
    """

    op: str
    d: int
    T: int
    flops: float
    nbytes: float
    operands: Callable[[], tuple[Any, ...]]
    run: Callable[..., object]
    baseline: Callable[..., object]
    capture: bool = True


def cases(widths: tuple[int, ...], tokens: tuple[int, ...], device: torch.device) -> Iterator[Case]:
    """Every op over all sizes; kron_apply does not depend on T."""
    for d in widths:
        for T in tokens:
            yield _gram(d, T, device, masked=False)
            yield _gram(d, T, device, masked=True)
            yield _gram_sketch(d, T, device)
            yield _jacobian_stats(d, T, device)
        yield _kron_apply(d, device)
    for T in tokens:
        yield _gram_group(widths[0] // 4, T, device)


def measure_ops(
    widths: tuple[int, ...], tokens: tuple[int, ...], device: torch.device, rounds: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """One record per case that is reached before the deadline; it says what failed."""
    for case in cases(widths, tokens, device):
        if time.monotonic() > deadline:
            return
        record: dict[str, Any] = {"op": case.op, "d": case.d, "T": case.T, "gflop": case.flops / 1e9}
        record |= {"megabytes": case.nbytes / 1e6, "microseconds": {}, "failed": {}}
        with recording(record["failed"], "every variant"):
            record |= run_case(case, device, rounds)
        yield record


def run_case(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times of the baseline and of each backend that serves the case."""
    sets = [case.operands() for _ in range(inputs_beyond_cache(int(case.nbytes), device))]
    variants = {"baseline": Variant([_bind(case.baseline, operands) for operands in sets])}
    unavailable = {}
    for backend in lk.backends():
        with lk.use_backend(backend):
            choice = lk.explain(case.op.split()[0], device, torch.bfloat16)
        if choice.backend == backend:
            calls = [_bind(case.run, operands) for operands in sets]
            variants[backend] = Variant(calls, partial(lk.use_backend, backend))
        else:
            unavailable[backend] = choice.reason
    times, failed = measure(variants, device, rounds, case.capture)
    return {
        "executed_gflop": {name: _executed(case, name, device) / 1e9 for name in times},
        "microseconds": {name: asdict(spread) for name, spread in times.items()},
        "unavailable": unavailable,
        "failed": failed,
    }


def _executed(case: Case, variant: str, device: torch.device) -> float:
    """Operations that a variant of `gram_` executes: the Triton kernel skips the tiles above the diagonal."""
    if variant != "triton" or case.op not in ("gram_", "gram_ masked"):
        return case.flops
    from laplace_kernels.triton import gram, launch

    arch = launch.architecture(device)
    masked = case.op != "gram_" or arch not in gram.TMA_TILES
    tiles = gram.pointer_tiles(arch, torch.bfloat16, aligned=True) if masked else gram.TMA_TILES[arch]
    tile = gram.choose_tile(tiles, case.d, launch.multiprocessors(device))
    return 2.0 * case.T * gram.lower_tiles(case.d, tile) * tile.rows * tile.columns


def _bind(function: Callable[..., object], operands: tuple[Any, ...]) -> Call:
    return lambda: function(*operands)


def _random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """A product of bf16 matrices with a fp32 result, where the library has one."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _gram(d: int, T: int, device: torch.device, masked: bool) -> Case:
    def operands() -> tuple[Any, ...]:
        keep = torch.rand(T, device=device) < 0.8 if masked else None
        return torch.zeros(d, d, device=device), _random(T, d, device=device), keep

    def baseline(C: Tensor, X: Tensor, keep: Tensor | None) -> None:
        X = X if keep is None else torch.where(keep[:, None], X, 0)
        C.add_(_mm(X.mT, X))

    name = "gram_ masked" if masked else "gram_"
    return Case(name, d, T, 2.0 * T * d * d, 2.0 * T * d + 4.0 * d * d, operands, lk.gram_, baseline)


def _gram_group(d: int, T: int, device: torch.device) -> Case:
    def operands() -> tuple[Any, ...]:
        Cs = [torch.zeros(d, d, device=device) for _ in range(GROUP)]
        return Cs, [_random(T, d, device=device) for _ in range(GROUP)]

    def baseline(Cs: list[Tensor], Xs: list[Tensor]) -> None:
        for C, X in zip(Cs, Xs, strict=True):
            C.add_(_mm(X.mT, X))

    nbytes = GROUP * (2.0 * T * d + 4.0 * d * d)
    flops = GROUP * 2.0 * T * d * d
    return Case("gram_group_", d, T, flops, nbytes, operands, lk.gram_group_, baseline, capture=False)


def _gram_sketch(d: int, T: int, device: torch.device) -> Case:
    def operands() -> tuple[Any, ...]:
        omega = _random(d, SKETCH, device=device, dtype=torch.float32) / d**0.5
        return torch.zeros(d, SKETCH, device=device), _random(T, d, device=device), omega

    def baseline(Y: Tensor, X: Tensor, omega: Tensor) -> None:
        Y.add_(_mm(X.mT, X @ omega.bfloat16()))

    return Case("gram_sketch_", d, T, 4.0 * T * d * SKETCH, 2.0 * T * d, operands, lk.gram_sketch_, baseline)


def _jacobian_stats(d: int, T: int, device: torch.device) -> Case:
    tokens = T // EXAMPLES

    def operands() -> tuple[Any, ...]:
        small = _random(EXAMPLES, CLASSES, tokens, RANK, device=device)
        basis = _random(d, BASIS, device=device, dtype=torch.float32) / d**0.5
        return small, _random(EXAMPLES, 1, tokens, d, device=device), basis

    def baseline(small: Tensor, large: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        stacked = small.mT.reshape(EXAMPLES, CLASSES * RANK, tokens)
        jacobian = torch.bmm(stacked, large[:, 0]).view(EXAMPLES, CLASSES, RANK, d)
        return jacobian @ basis.bfloat16(), torch.einsum("ncji,neji->njce", jacobian, jacobian)

    flops = 2.0 * EXAMPLES * CLASSES * RANK * d * (tokens + BASIS + CLASSES)
    return Case("jacobian_stats", d, T, flops, 2.0 * T * d, operands, lk.jacobian_stats, baseline)


def _kron_apply(d: int, device: torch.device) -> Case:
    def operands() -> tuple[Any, ...]:
        shapes = ((SAMPLES, RANK, d), (d, BASIS), (RANK, RANK), (RANK, BASIS), (RANK,))
        return tuple(_random(*shape, device=device, dtype=torch.float32) for shape in shapes)

    def baseline(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> Tensor:
        rotated = V.mT @ W
        projected = rotated @ U
        return V @ ((core * projected) @ U.mT + tail[:, None] * (rotated - projected @ U.mT))

    flops = 4.0 * SAMPLES * RANK * d * (BASIS + RANK)
    return Case("kron_apply", d, 0, flops, 8.0 * SAMPLES * RANK * d, operands, lk.kron_apply, baseline)
