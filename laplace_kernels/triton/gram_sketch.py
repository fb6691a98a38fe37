"""`gram_sketch_`: two skinny products per block of tokens, which stays in the L2 cache between them.

The first kernel writes Z = X Omega for a block, the second adds X^T Z to Y; X comes from device memory once
and from L2 once. A block of wide rows has few tokens: then the first kernel splits the columns of X among
programs too, and a third one adds up what they found, in a fixed order.

bf16 rows are multiplied by bf16 parts: a fp32 Omega as a high and a low part, and then Z too; a bf16 Omega as
it is, with Z rounded to bf16. Everything else is multiplied in fp32.

The second kernel splits the tokens among programs, which add to Y in any order, unless
`torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from laplace_kernels.triton import launch
from laplace_kernels.triton.parts import bf16_parts


@dataclass(frozen=True)
class Tiles:
    """Columns of Omega per program, at most; tokens by columns of X that each of the two kernels takes per step."""

    columns: int
    project: tuple[int, int]
    accumulate: tuple[int, int]
    stages: int
    warps: int


# Fewest columns first. Chosen by register and shared memory use; no timing stands behind them yet.
BF16_TILES = {
    "sm_80": (
        Tiles(64, project=(64, 64), accumulate=(32, 64), stages=3, warps=4),
        Tiles(128, project=(64, 64), accumulate=(64, 128), stages=3, warps=8),
    ),
    "sm_90": (
        Tiles(64, project=(64, 64), accumulate=(64, 128), stages=4, warps=4),
        Tiles(128, project=(64, 64), accumulate=(64, 64), stages=4, warps=4),
    ),
    "sm_100": (
        Tiles(64, project=(64, 64), accumulate=(64, 128), stages=4, warps=4),
        Tiles(128, project=(128, 64), accumulate=(64, 128), stages=3, warps=8),
    ),
    "gfx942": (Tiles(64, project=(64, 32), accumulate=(32, 64), stages=2, warps=4),),
}
FP32_TILES = {
    "sm_80": (Tiles(64, project=(64, 32), accumulate=(32, 64), stages=2, warps=8),),
    "sm_90": (Tiles(64, project=(64, 32), accumulate=(32, 64), stages=3, warps=8),),
    "sm_100": (Tiles(64, project=(64, 32), accumulate=(32, 64), stages=3, warps=8),),
    "gfx942": (Tiles(64, project=(64, 32), accumulate=(32, 64), stages=2, warps=8),),
}
_CACHED_BYTES = 24 << 20  # of X per block of tokens: half of the L2 cache of an H100
_TOKENS_PER_PROGRAM = 512  # at least, when tokens are split
_COLUMNS_PER_PROGRAM = 512  # of X, at least, when they are split
_ELEMENTS = 1024  # of Z per program that adds up


def gram_sketch_(Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Y += alpha * X^T (X Omega) over the unmasked rows."""
    T, d = X.shape
    m = Omega.shape[1]
    if T == 0 or d == 0 or m == 0:
        return
    X = launch.contiguous_rows(X)
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    block = max(256, _CACHED_BYTES // (d * X.element_size()))
    bf16 = X.dtype == torch.bfloat16
    parts = 2 if bf16 and Omega.dtype != torch.bfloat16 else 1
    Z = X.new_empty((parts, min(T, block), m), dtype=torch.bfloat16 if bf16 else torch.float32)
    with launch.on(X.device):
        for first in range(0, T, block):
            rows = slice(first, first + block)
            _launch_block(Y, X[rows], Omega, None if mask is None else mask[rows], alpha, Z)


def _launch_block(Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None, alpha: float, Z: Tensor) -> None:
    T, d = X.shape
    m = Omega.shape[1]
    arch = launch.architecture(X.device)
    table = (BF16_TILES if X.dtype == torch.bfloat16 else FP32_TILES)[arch]
    tiles = next(
        (tiles for tiles in table if m <= tiles.columns), table[-1]
    )  # X is read once per block of columns
    columns = min(tiles.columns, max(16, triton.next_power_of_2(m)))
    column_blocks = triton.cdiv(m, columns)
    options = {
        "HAS_MASK": mask is not None,
        "PARTS": Z.shape[0],
        "PRECISION": launch.fp32_precision(X.dtype),
        "COLUMNS": columns,
        "num_stages": tiles.stages,
        "num_warps": tiles.warps,
    }
    mask = X if mask is None else mask
    _launch_projection(Z, X, Omega, mask, tiles.project, column_blocks, options)
    tokens, width = tiles.accumulate
    row_blocks = triton.cdiv(d, width)
    splits = 1
    if not torch.are_deterministic_algorithms_enabled():
        processors = launch.multiprocessors(X.device)
        splits = max(1, min(triton.cdiv(processors, row_blocks * column_blocks), T // _TOKENS_PER_PROGRAM))
    tokens_per_split = triton.cdiv(triton.cdiv(T, splits), tokens) * tokens
    _accumulate[(row_blocks * splits, column_blocks)](
        X, Y, Z, mask, T, d, m, X.stride(0), Y.stride(0), Z.stride(0), alpha, row_blocks, tokens_per_split,
        **options, TOKENS=tokens, WIDTH=width,
    )  # fmt: skip


def _launch_projection(
    Z: Tensor,
    X: Tensor,
    Omega: Tensor,
    mask: Tensor,
    tile: tuple[int, int],
    column_blocks: int,
    options: dict[str, Any],
) -> None:
    """Z = X Omega, in parts."""
    T, d = X.shape
    m = Omega.shape[1]
    tokens, width = tile
    token_blocks = triton.cdiv(T, tokens)
    processors = launch.multiprocessors(X.device)
    splits = max(1, min(triton.cdiv(processors, token_blocks * column_blocks), d // _COLUMNS_PER_PROGRAM))
    steps_per_split = triton.cdiv(triton.cdiv(d, splits), width)
    splits = triton.cdiv(d, steps_per_split * width)
    found = Z if splits == 1 else X.new_empty((splits, T, m), dtype=torch.float32)
    _project[(token_blocks * splits, column_blocks)](
        X, Omega, found, mask, T, d, m, X.stride(0), *Omega.stride(), found.stride(0), token_blocks,
        steps_per_split, **options, SPLIT=splits > 1, TOKENS=tokens, WIDTH=width,
    )  # fmt: skip
    if splits > 1:
        _add_up[(triton.cdiv(T * m, _ELEMENTS),)](
            found, Z, T * m, splits, Z.stride(0), PARTS=Z.shape[0], ELEMENTS=_ELEMENTS
        )


@triton.jit(do_not_specialize=["T", "token_blocks", "steps_per_split"])
def _project(
    x,
    omega,
    z,
    mask,
    T,
    d,
    m,
    x_stride,
    omega_row_stride,
    omega_column_stride,
    z_part_stride,
    token_blocks,
    steps_per_split,
    HAS_MASK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    split = tl.program_id(0) // token_blocks
    stop = tl.minimum((split + 1) * steps_per_split, tl.cdiv(d, WIDTH))
    t = tl.program_id(0) % token_blocks * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    keep = t < T
    if HAS_MASK:
        keep = keep & (tl.load(mask + t, mask=keep, other=0) != 0)
    x_t = x + t[:, None].to(tl.int64) * x_stride
    omega_column = omega + column[None, :].to(tl.int64) * omega_column_stride
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    # By steps: of an offset that is not a multiple of WIDTH for sure, 16-bit numbers are read one by one.
    for step in tl.range(split * steps_per_split, stop):
        i = step * WIDTH + tl.arange(0, WIDTH)
        rows = tl.load(x_t + i[None, :], mask=keep[:, None] & (i < d)[None, :], other=0.0)
        inside = (i < d)[:, None] & (column < m)[None, :]
        w = tl.load(omega_column + i[:, None].to(tl.int64) * omega_row_stride, mask=inside, other=0.0)
        if PARTS == 2:
            high, low = bf16_parts(w.to(tl.float32))
            total = tl.dot(rows, high, total)
            total = tl.dot(rows, low, total)
        elif rows.dtype == tl.bfloat16:
            total = tl.dot(rows, w, total)
        else:
            total = tl.dot(rows.to(tl.float32), w.to(tl.float32), total, input_precision=PRECISION)
    z_tile = z + t[:, None].to(tl.int64) * m + column[None, :]
    inside = (t < T)[:, None] & (column < m)[None, :]
    if SPLIT:
        tl.store(z_tile + split.to(tl.int64) * z_part_stride, total, mask=inside)
    else:
        store_parts(z_tile, z_part_stride, total, inside, PARTS)


@triton.jit(do_not_specialize=["size"])
def _add_up(found, z, size, splits, z_part_stride, PARTS: tl.constexpr, ELEMENTS: tl.constexpr):
    """Z, in parts, from the sums that each split found."""
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < size
    total = tl.zeros((ELEMENTS,), tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(found + tl.cast(split, tl.int64) * size + element, mask=inside, other=0.0)
    store_parts(z + element, z_part_stride, total, inside, PARTS)


@triton.jit
def store_parts(z, z_part_stride, value, inside, PARTS: tl.constexpr):
    """A fp32 value as it is kept in Z: as two bf16 numbers, or rounded to the one number that Z has for it."""
    if PARTS == 2:
        high, low = bf16_parts(value)
        tl.store(z, high, mask=inside)
        tl.store(z + z_part_stride, low, mask=inside)
    else:
        tl.store(z, value.to(z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "row_blocks", "tokens_per_split"])
def _accumulate(
    x,
    y,
    z,
    mask,
    T,
    d,
    m,
    x_stride,
    y_stride,
    z_part_stride,
    alpha,
    row_blocks,
    tokens_per_split,
    HAS_MASK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    start = tl.program_id(0) // row_blocks * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, T)
    i = tl.program_id(0) % row_blocks * WIDTH + tl.arange(0, WIDTH)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((WIDTH, COLUMNS), tl.float32)
    for first in tl.range(start, stop, TOKENS):
        t = first + tl.arange(0, TOKENS)
        inside = (t < stop)[:, None] & (column < m)[None, :]
        keep = t < stop
        if HAS_MASK:
            keep = keep & (tl.load(mask + t, mask=keep, other=0) != 0)
        x_tile = x + t[:, None].to(tl.int64) * x_stride + i[None, :]
        rows = tl.load(x_tile, mask=keep[:, None] & (i < d)[None, :], other=0.0)
        z_tile = z + t[:, None].to(tl.int64) * m + column[None, :]
        high = tl.load(z_tile, mask=inside, other=0.0)
        if PARTS == 2:
            low = tl.load(z_tile + z_part_stride, mask=inside, other=0.0)
            total = tl.dot(rows.T, high, total)
            total = tl.dot(rows.T, low, total)
        elif rows.dtype == tl.bfloat16:
            total = tl.dot(rows.T, high, total)
        else:
            total = tl.dot(rows.to(tl.float32).T, high, total, input_precision=PRECISION)
    y_tile = y + i[:, None].to(tl.int64) * y_stride + column[None, :]
    inside = (i < d)[:, None] & (column < m)[None, :]
    tl.atomic_add(y_tile, total * alpha, mask=inside, sem="relaxed")
