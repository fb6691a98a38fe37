"""Arguments of every op, in the order of its schema: what the tests of all ops are parametrised with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import laplace_kernels as lk
from tests.kernels import inputs

Sample = list[Any]


def sample(
    op: str,
    dtype: torch.dtype = torch.float32,
    T: int = 7,
    d: int = 5,
    masked: bool = False,
    poisoned: bool = False,
) -> Sample:
    """Arguments of an op that has T rows of width d.

    Args:
        op: Its name.
        dtype: Of the rows; what an op may be given more precisely is so.
        T: Rows, or tokens of each of two examples, or matrices.
        d: Their width.
        masked: Whether some rows do not count, where the op has a mask.
        poisoned: Whether those are NaN and infinity; everything else is as it is without.
    """
    generator = torch.Generator().manual_seed(0)
    return _SAMPLES[op](_Maker(dtype, generator, masked, poisoned), T, d)


class _Maker:
    """Random tensors: rows in a dtype, companions in the dtype of the sum."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator, masked: bool, poisoned: bool) -> None:
        self.dtype, self.accumulate = dtype, lk.accumulation_dtype(dtype)
        self._generator, self._masked, self._poisoned = generator, masked, poisoned

    def rows(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)

    def companion(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.accumulate)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.accumulate)

    def mask(self, X: Tensor) -> Tensor | None:
        """For the rows of X, which it poisons."""
        return (
            inputs.poisoned_mask(X if self._poisoned else X.clone(), self._generator)
            if self._masked
            else None
        )


def _gram(make: _Maker, T: int, d: int) -> Sample:
    X = make.rows(T, d)
    return [make.zeros(d, d), X, make.mask(X), 0.5]


def _gram_sketch(make: _Maker, T: int, d: int) -> Sample:
    X = make.rows(T, d)
    return [make.zeros(d, 4), X, make.companion(d, 4), make.mask(X), -2.0]


def _gram_group(make: _Maker, T: int, d: int) -> Sample:
    Xs = [make.rows(T, d), make.rows(2 * T, d + 1)]
    return [[make.zeros(d, d), make.zeros(d + 1, d + 1)], Xs, [None, make.mask(Xs[1])], [1.0, 0.5]]


def _project(make: _Maker, T: int, d: int) -> Sample:
    return [make.zeros(T, 4), make.rows(T, d), make.companion(d, 4)]


def _jacobian(make: _Maker, T: int, d: int) -> Sample:
    small, large = make.companion(2, T, 4), make.rows(2, T, d)
    return [small, large, make.mask(large)]


def _jacobian_stats(make: _Maker, T: int, d: int) -> Sample:
    small, large = make.rows(2, 3, T, 4), make.rows(2, 1, T, d)
    return [small, large, make.companion(d, d - 1), make.mask(large[:, 0]), True]


def _kron_apply(make: _Maker, T: int, d: int) -> Sample:
    return [make.rows(T, 3, d), make.companion(d, 2), *(make.companion(*s) for s in ((3, 3), (3, 2), (3,)))]


_SAMPLES: dict[str, Callable[[_Maker, int, int], Sample]] = {
    "gram_": _gram,
    "gram_sketch_": _gram_sketch,
    "gram_group_": _gram_group,
    "jacobian": _jacobian,
    "jacobian_stats": _jacobian_stats,
    "kron_apply": _kron_apply,
    "project_": _project,
}


def outcome(op: str, args: Sample) -> list[Tensor]:
    """What an op gives: its results, and what it has changed."""
    results = lk.call(lk.OPS[op], *args)
    results = [results] if isinstance(results, Tensor) else list(results or ())
    return results + [tensor for _, tensor, written in lk.OPS[op].tensors(args) if written]


def replaced(op: str, args: Sample, tensors: dict[str, Tensor]) -> Sample:
    """The arguments with some tensors replaced, named as in errors: X, Xs[0]."""

    def member(name: str, value: Any) -> Any:
        return tensors.get(name, value)

    return [
        [member(f"{name}[{i}]", value) for i, value in enumerate(arg)]
        if isinstance(arg, list)
        else member(name, arg)
        for name, arg in zip(lk.OPS[op].arguments, args, strict=True)
    ]
