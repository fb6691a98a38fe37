"""`kron_apply`: two kernels around the [r, k] core.

With S = V [ (core - tail) * (V^T W U) ] the result is S U^T + (V diag(tail) V^T) W. The first kernel reads W
and U and writes S, the second reads S, U and W and writes the result; no intermediate of the size of W
exists. Everything is multiplied in fp32. More than 64 rows do not fit on chip; the reference serves those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from laplace_kernels.ops.kron_apply import reference
from laplace_kernels.triton import launch

MAX_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """Columns of W and of U per step, and how the loops over them are pipelined."""

    width: int
    basis: int
    stages: int
    warps: int


# Chosen by register and shared memory use; no timing stands behind them yet.
TILES = {
    "sm_80": Tile(32, 32, 2, 4),
    "sm_90": Tile(64, 32, 3, 4),
    "sm_100": Tile(32, 16, 2, 4),
    "gfx942": Tile(32, 16, 2, 4),
}


def kron_apply(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> Tensor:
    """f(H) W, f(H) given by its eigenvalues `core` on V x U and `tail` on V x (complement of U)."""
    B, r, d = W.shape
    k = U.shape[1]
    if r > MAX_ROWS or 0 in (B, r, d, k):
        return reference(W, U, V, core, tail)
    device = W.device
    arch = launch.architecture(device)
    tile = TILES[arch]
    S = torch.empty((B, r, k), dtype=torch.float32, device=device)
    out = torch.empty((B, r, d), dtype=torch.float32, device=device)
    core, tail = core.contiguous(), tail.contiguous()
    options = {
        "HAS_TAIL": k < d,
        "PRECISION": launch.fp32_precision(W.dtype),
        "ROWS": max(16, triton.next_power_of_2(r)),
        "WIDTH": tile.width,
        "BASIS": tile.basis,
        "num_stages": tile.stages,
        "num_warps": tile.warps,
    }
    rotation = (V.float() * tail.float()) @ V.mT.float()
    strides = (*W.stride(), *U.stride())
    with launch.on(device):
        _project[(B, triton.cdiv(k, tile.basis))](
            W, U, V, core, tail, S, r, d, k, *strides, *V.stride(), **options
        )
        _expand[(B, triton.cdiv(d, tile.width))](W, U, rotation, S, out, r, d, k, *strides, **options)
    return out


@triton.jit
def _project(
    w,
    u,
    v,
    core,
    tail,
    s,
    r,
    d,
    k,
    w_batch_stride,
    w_row_stride,
    w_column_stride,
    u_row_stride,
    u_column_stride,
    v_row_stride,
    v_column_stride,
    HAS_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BASIS: tl.constexpr,
):
    """S = V [ (core - tail) * (V^T W U) ] for one matrix and one block of columns of U."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, ROWS)
    column = tl.program_id(1) * BASIS + tl.arange(0, BASIS)
    w_rows = w + b * w_batch_stride + j[:, None].to(tl.int64) * w_row_stride
    u_columns = u + column[None, :].to(tl.int64) * u_column_stride
    total = tl.zeros((ROWS, BASIS), tl.float32)
    for first in tl.range(0, d, WIDTH):
        i = first + tl.arange(0, WIDTH).to(tl.int64)
        w_tile = tl.load(
            w_rows + i[None, :] * w_column_stride, mask=(j < r)[:, None] & (i < d)[None, :], other=0.0
        )
        u_tile = tl.load(
            u_columns + i[:, None] * u_row_stride, mask=(i < d)[:, None] & (column < k)[None, :], other=0.0
        )
        total = tl.dot(w_tile.to(tl.float32), u_tile.to(tl.float32), total, input_precision=PRECISION)
    square = (j < r)[:, None] & (j < r)[None, :]
    v_tile = tl.load(v + j[:, None] * v_row_stride + j[None, :] * v_column_stride, mask=square, other=0.0)
    v_tile = v_tile.to(tl.float32)
    inside = (j < r)[:, None] & (column < k)[None, :]
    scale = tl.load(core + j[:, None] * k + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_TAIL:
        scale -= tl.load(tail + j, mask=j < r, other=0.0).to(tl.float32)[:, None]
    projected = scale * tl.dot(v_tile.T, total, input_precision=PRECISION)
    result = tl.dot(v_tile, projected, input_precision=PRECISION)
    tl.store(s + (b * r + j[:, None]) * k + column[None, :], result, mask=inside)


@triton.jit
def _expand(
    w,
    u,
    rotation,
    s,
    out,
    r,
    d,
    k,
    w_batch_stride,
    w_row_stride,
    w_column_stride,
    u_row_stride,
    u_column_stride,
    HAS_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BASIS: tl.constexpr,
):
    """S U^T + rotation W for one matrix and one block of its columns."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, ROWS)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (j < r)[:, None] & (i < d)[None, :]
    u_rows = u + i[None, :].to(tl.int64) * u_row_stride
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in tl.range(0, k, BASIS):
        column = first + tl.arange(0, BASIS)
        s_tile = tl.load(
            s + (b * r + j[:, None]) * k + column[None, :],
            mask=(j < r)[:, None] & (column < k)[None, :],
            other=0.0,
        )
        u_tile = tl.load(
            u_rows + column[:, None].to(tl.int64) * u_column_stride,
            mask=(column < k)[:, None] & (i < d)[None, :],
            other=0.0,
        )
        total = tl.dot(s_tile, u_tile.to(tl.float32), total, input_precision=PRECISION)
    if HAS_TAIL:
        square = (j < r)[:, None] & (j < r)[None, :]
        rotation_tile = tl.load(rotation + j[:, None] * r + j[None, :], mask=square, other=0.0)
        w_rows = w + b * w_batch_stride + j[:, None].to(tl.int64) * w_row_stride
        w_tile = tl.load(w_rows + i[None, :].to(tl.int64) * w_column_stride, mask=inside, other=0.0)
        total = tl.dot(rotation_tile, w_tile.to(tl.float32), total, input_precision=PRECISION)
    tl.store(out + (b * r + j[:, None]) * d + i[None, :], total, mask=inside)
