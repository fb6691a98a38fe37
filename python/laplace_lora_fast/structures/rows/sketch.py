"""Sketched Jacobians: of each [r, d] matrix J, J Omega [r, m] is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.options import positive_integer

_UNKNOWN, _FEWEST = 128, 16  # columns
_A_ROW, _NOISE = 50, 130_000  # features
_LARGEST, _SMALLEST = 3e4, 1e-3  # entry, root mean square of entries, that fp16 keeps to 11 bits


def checked_columns(value: object) -> int | None:
    """The option `columns`. Raises ValueError unless it is None or an integer of at least 2."""
    if value is None:
        return None
    columns = positive_integer("columns", value)
    if columns < 2:
        raise ValueError("columns must be at least 2: the two halves of a sketch tell its error, got 1")
    return columns


def columns_for(rows: int | None, shapes: Sequence[tuple[int, int]]) -> int:
    """How many columns of a Jacobian row to keep where that is left open: the largest width for all of them.

    Features, (LoRA weights) x r x m, are to be 50 for every row, so that little is to be corrected (equivalent.py),
    and 130,000 times the share of columns that is left out, so that the variance of one prediction is within a few per
    cent (bench/sketches.py). From half of the columns on all are kept.

    Args:
        rows: R; None where that is unknown.
        shapes: rank and width of every weight.
    """
    if rows is None:
        return _UNKNOWN
    widest, whole = max(width for _, width in shapes), sum(rank * width for rank, width in shapes)
    for columns in range(_FEWEST, widest // 2, 4):
        kept = sum(rank * min(width, columns) for rank, width in shapes)
        if kept >= max(_A_ROW * rows, _NOISE * (1 - kept / whole)):
            return columns
    return widest


def in_16_bits(rows: list[Tensor], projections: Sequence[Tensor]) -> list[Tensor]:
    """Rows of a sketch in fp16, whose rounding is far below the sketch's error; as they are where fp16 is too narrow.

    Rows that are not sketched, or in fp64, stay as they are. The rounding is of 2^-11 an entry, independent: a row's
    squared length changes by less than 1e-7.

    Args:
        rows: [R, r m] of every weight; emptied one by one.
        projections: Omega [d, m] of every weight.
    """
    sketched_rows = any(omega.shape[1] < omega.shape[0] for omega in projections)
    if not sketched_rows or any(each.dtype != torch.float32 for each in rows):
        return rows
    largest = max(
        (float(torch.linalg.vector_norm(each, torch.inf)) for each in rows if each.numel()), default=0.0
    )
    energy = sum(float(torch.linalg.vector_norm(each)) ** 2 for each in rows)
    typical = (energy / max(1, sum(each.numel() for each in rows))) ** 0.5
    if largest > _LARGEST or typical < _SMALLEST:
        return rows
    for index in range(len(rows)):
        rows[index] = rows[index].half()
    return rows


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
