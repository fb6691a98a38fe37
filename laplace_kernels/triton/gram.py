"""`gram_`: SYRK over the tiles of the lower triangle, each summed in registers and added to C once.

Two kernels. On sm_90 and sm_100, unmasked 16-bit rows go through tensor descriptors: TMA loads, and a TMA
reduction into C, so that C is never loaded. Everything else (masks, fp32, ragged strides, sm_80, AMD) goes
through pointers, where a mask is a load predicate.

Where the tiles of the triangle would leave multiprocessors idle, the tokens are split among several programs
per tile, which add to C in any order. With `torch.use_deterministic_algorithms(True)` they are not split.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from laplace_kernels.triton import launch
from laplace_kernels.triton.triangle import Tile, is_aligned, lower_tile, lower_tiles, pointer_tiles

# Largest tile first. Chosen by register and shared memory use; no timing stands behind them yet.
TMA_TILES = {
    "sm_90": (Tile(256, 128, 64, 4, 8, slices=4), Tile(128, 128, 64, 4, 8, slices=2)),
    "sm_100": (Tile(128, 128, 64, 4, 8, slices=2),),
}
_TOKENS_PER_PROGRAM = 512  # at least, when tokens are split
_MOST_WAVES = 8
# Of one multiprocessor of a H100: dense 16-bit products as published; the others are estimates, of no timing.
_FLOP_PER_CLOCK, _L2_BYTES_PER_CLOCK, _REDUCED_BYTES_PER_CLOCK = 4096, 64, 32


def gram_(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Lower triangle of C += alpha * X^T X over the unmasked rows."""
    T, d = X.shape
    if T == 0 or d == 0:
        return
    X = launch.contiguous_rows(X)
    arch = launch.architecture(X.device)
    through_tma = (
        arch in TMA_TILES and mask is None and _fits_tma(X) and _fits_tma(C) and X.element_size() == 2
    )
    candidates = TMA_TILES[arch] if through_tma else pointer_tiles(arch, X.dtype, is_aligned(X))
    most_splits = 1 if torch.are_deterministic_algorithms_enabled() else max(1, T // _TOKENS_PER_PROGRAM)
    tile, splits = schedule(candidates, d, T, launch.multiprocessors(X.device), most_splits)
    tiles = lower_tiles(d, tile)
    tokens_per_split = triton.cdiv(triton.cdiv(T, splits), tile.tokens) * tile.tokens
    grid = (tiles * splits,)
    with launch.on(X.device):
        if through_tma:
            _gram_tma[grid](
                TensorDescriptor.from_tensor(X, [tile.tokens, tile.rows]),
                TensorDescriptor.from_tensor(X, [tile.tokens, tile.columns]),
                TensorDescriptor.from_tensor(C, [tile.rows, tile.columns // tile.slices]),
                T,
                alpha,
                tiles,
                tokens_per_split,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                TOKENS=tile.tokens,
                SLICES=tile.slices,
                num_stages=tile.stages,
                num_warps=tile.warps,
            )
        else:
            _gram_pointer[grid](
                X,
                C,
                X if mask is None else mask.contiguous().view(torch.uint8),
                T,
                d,
                X.stride(0),
                C.stride(0),
                alpha,
                tiles,
                tokens_per_split,
                HAS_MASK=mask is not None,
                PRECISION=launch.fp32_precision(X.dtype),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                TOKENS=tile.tokens,
                num_stages=tile.stages,
                num_warps=tile.warps,
            )


@functools.lru_cache(maxsize=4096)
def schedule(tiles: tuple[Tile, ...], d: int, T: int, processors: int, most_splits: int) -> tuple[Tile, int]:
    """The tile, and the number of parts of the tokens, that should take least time.

    Programs run in waves of one a multiprocessor. Splitting fills the last wave; every part pays for adding its tile
    to C once more.
    """
    plans = [
        (tile, min(most_splits, max(1, splits)))
        for tile in tiles
        for n in range(1, _MOST_WAVES + 1)
        for splits in (
            n,
            n * processors // lower_tiles(d, tile),
        )  # a few parts, or as many as fill a few waves
    ]

    def clocks(plan: tuple[Tile, int]) -> float:
        tile, splits = plan
        area = tile.rows * tile.columns
        per_token = max(2 * area / _FLOP_PER_CLOCK, 2 * (tile.rows + tile.columns) / _L2_BYTES_PER_CLOCK)
        per_program = math.ceil(T / splits) * per_token + 4 * area / _REDUCED_BYTES_PER_CLOCK
        return math.ceil(lower_tiles(d, tile) * splits / processors) * per_program

    return min(plans, key=clocks)


def _fits_tma(X: Tensor) -> bool:
    """Base and rows on 16-byte boundaries, and rows that do not overlap."""
    row_stride = X.stride(0)
    aligned = X.data_ptr() % 16 == 0 and row_stride * X.element_size() % 16 == 0
    return aligned and X.stride(1) == 1 and row_stride >= X.shape[1]


@triton.jit(do_not_specialize=["T", "tiles", "tokens_per_split"])
def _gram_tma(
    x_rows,
    x_columns,
    c,
    T,
    alpha,
    tiles,
    tokens_per_split,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLICES: tl.constexpr,
):
    row, column = lower_tile(tl.program_id(0) % tiles, ROWS // COLUMNS)
    start = tl.program_id(0) // tiles * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, T)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for t in tl.range(start, stop, TOKENS):
        a = x_rows.load([t, row * ROWS])
        b = x_columns.load([t, column * COLUMNS])
        total = tl.dot(a.T, b, total)
    total *= alpha
    _reduce_into(c, row * ROWS, column * COLUMNS, total, ROWS, COLUMNS, SLICES)


@triton.jit
def _reduce_into(c, row, column, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr):
    if SLICES == 1:
        c.atomic_add([row, column], tile)
    else:
        left, right = tile.reshape((ROWS, 2, COLUMNS // 2)).permute((0, 2, 1)).split()
        _reduce_into(c, row, column, left, ROWS, COLUMNS // 2, SLICES // 2)
        _reduce_into(c, row, column + COLUMNS // 2, right, ROWS, COLUMNS // 2, SLICES // 2)


@triton.jit(do_not_specialize=["T", "tiles", "tokens_per_split"])
def _gram_pointer(
    x,
    c,
    mask,
    T,
    d,
    x_stride,
    c_stride,
    alpha,
    tiles,
    tokens_per_split,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row, column = lower_tile(tl.program_id(0) % tiles, ROWS // COLUMNS)
    start = tl.program_id(0) // tiles * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, T)
    i = row * ROWS + tl.arange(0, ROWS)
    j = column * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(start, stop, TOKENS):
        t = first + tl.arange(0, TOKENS)
        keep = t < stop
        if HAS_MASK:
            keep = keep & (tl.load(mask + t, mask=keep, other=0) != 0)
        x_t = x + t[:, None].to(tl.int64) * x_stride
        a = tl.load(x_t + i[None, :], mask=keep[:, None] & (i < d)[None, :], other=0.0)
        b = tl.load(x_t + j[None, :], mask=keep[:, None] & (j < d)[None, :], other=0.0)
        total = tl.dot(a.T, b, total, input_precision=PRECISION)
    c_tile = c + i[:, None].to(tl.int64) * c_stride + j[None, :]
    inside = (i < d)[:, None] & (j < d)[None, :]
    tl.atomic_add(c_tile, total * alpha, mask=inside, sem="relaxed")
