"""Sketched Jacobians: of each [r, d] matrix J, J Omega [r, m] is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.options import positive_integer

_UNKNOWN = 128  # columns, where the number of rows is not known
_FEATURES, _A_ROW = 50_000, 40
_MOST = 2 / 3  # of all features: from there on they are all kept
_POWER = 0.5  # of a weight's energy
_STEP = 4  # columns come in fours: quarters of them tell a sketch's error
_LARGEST, _SMALLEST = 3e4, 1e-3  # entry, root mean square of entries, that fp16 keeps to 11 bits


def checked_columns(value: object) -> int | None:
    """The option `columns`. Raises ValueError unless it is None or an integer of at least 2."""
    if value is None:
        return None
    columns = positive_integer("columns", value)
    if columns < 2:
        raise ValueError("columns must be at least 2: the two halves of a sketch tell its error, got 1")
    return columns


def features_for(rows: int, shapes: Sequence[tuple[int, int]]) -> int | None:
    """How many features of a Jacobian row to keep where that is left open; None for all of them.

    50,000, so that the variance of one prediction is within a few per cent, and 40 a row, so that there is little to
    correct (precisions/equivalent.py); both measured by bench/sketches.py. All of them where that is most of them.

    Args:
        rows: R, or the rank that stands for them.
        shapes: rank r and width d of every weight: r d features.
    """
    wanted = max(_FEATURES, _A_ROW * rows)
    return None if wanted > _MOST * sum(rank * width for rank, width in shapes) else wanted


def mean_columns(rows: int | None, shapes: Sequence[tuple[int, int]]) -> int:
    """The same in columns a weight, alike for all; the largest width for all of them."""
    if rows is None:
        return _UNKNOWN
    features = features_for(rows, shapes)
    if features is None:
        return max(width for _, width in shapes)
    return max(_STEP, features // sum(rank for rank, _ in shapes) // _STEP * _STEP)


def spread(features: int, energies: Sequence[float], shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Columns of every weight, about so many features together: more where a row has more of its energy.

    An inner product's error is least for columns in proportion to the energy; but what the training rows leave of a new
    row lies elsewhere, and one batch tells energies roughly: columns go with the root (measured).

    Args:
        features: r m over all weights.
        energies: mean squared norm of every weight's Jacobian; of any scale.
        shapes: rank r and width d of every weight.
    """
    most = [max(_STEP, (width - 1) // _STEP * _STEP) for _, width in shapes]
    each = [energy / rank for energy, (rank, _) in zip(energies, shapes, strict=True)]
    shares = [(energy / max(each)) ** _POWER if max(each) > 0 else 1.0 for energy in each]

    def at(factor: float) -> list[int]:
        return [
            min(limit, max(_STEP, int(factor * share) // _STEP * _STEP))
            for share, limit in zip(shares, most, strict=True)
        ]

    low, high = 0.0, float(features)
    for _ in range(60):
        middle = (low + high) / 2
        kept = sum(rank * columns for (rank, _), columns in zip(shapes, at(middle), strict=True))
        low, high = (middle, high) if kept <= features else (low, middle)
    return at(low)


def in_16_bits(
    rows: list[Tensor], projections: Sequence[Tensor], kept: Callable[[Tensor], Tensor] = lambda rows: rows
) -> list[Tensor]:
    """Rows of a sketch in fp16, whose rounding is far below the sketch's error; as they are where fp16 is too narrow.

    Rows that are not sketched, or in fp64, stay as they are. The rounding is of 2^-11 an entry, independent: a row's
    squared length changes by less than 1e-7.

    Args:
        rows: [R, r m] of every weight; emptied one by one.
        projections: Omega [d, m] of every weight.
        kept: puts what is new where rows live.
    """
    sketched_rows = any(omega.shape[1] < omega.shape[0] for omega in projections)
    if not sketched_rows or any(each.dtype != torch.float32 for each in rows):
        return rows
    largest = max(_norms([each for each in rows if each.numel()], torch.inf), default=0.0)
    energy = sum(norm**2 for norm in _norms(rows, 2))
    typical = (energy / max(1, sum(each.numel() for each in rows))) ** 0.5
    if largest > _LARGEST or typical < _SMALLEST:
        return rows
    for index in range(len(rows)):
        rows[index] = kept(rows[index].half())
    return rows


def _norms(tensors: Sequence[Tensor], order: float) -> list[float]:
    """Of every tensor; the device is waited for once."""
    norms: list[Tensor] = [torch.linalg.vector_norm(each, order) for each in tensors]
    return torch.stack([each.to(norms[0].device) for each in norms]).tolist() if norms else []


def random_projection(dim: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Omega [d, min(m, d)] with orthogonal columns of length sqrt(d / m); the identity for m >= d.

    In bf16 unless the model is in fp64: any Omega will do, and this one is multiplied with 16-bit streams as it is. It
    takes half of the memory, too.
    """
    dtype = lk.accumulation_dtype(like.dtype)
    kept = dtype if dtype == torch.float64 else torch.bfloat16
    if columns >= dim:
        return torch.eye(dim, dtype=kept, device=like.device)
    noise = torch.randn(dim, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    basis: Tensor = torch.linalg.qr(noise).Q.contiguous()
    omega: Tensor = (basis * (dim / columns) ** 0.5).to(like.device, kept)
    return omega


def sketched(small: Tensor, large: Tensor, projection: Tensor) -> Tensor:
    """J Omega of every sequence in one backward pass, [S, r m]."""
    projected, _ = lk.jacobian_stats(small, large, projection.to(small.dtype), row_grams=False)
    return projected.flatten(1)
