"""`jacobian_stats`: the per-example Jacobian is formed tile by tile on chip and never written.

A program takes one example, some of the r rows, and some blocks of the d columns. It forms the transposed
tile [columns, classes x rows]: with `large` transposed by the hardware as the left operand, the few classes
and rows lie along the axis that a tensor core can cut to 8, and one read of a shared `large` serves all
classes. Programs of the same example write partial sums side by side, which are added in a fixed order: the
result is the same in every run.

Two operands of one 16-bit dtype are multiplied as they are; a fp32 `small` beside a bf16 `large` as two bf16
parts, 16 bits together; anything else in fp32.

More than 128 basis columns, or more than 32 classes, do not fit on chip; the reference serves those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from laplace_kernels.ops.jacobian_stats import reference
from laplace_kernels.triton import launch
from laplace_kernels.triton.parts import bf16_parts

MAX_BASIS, MAX_CLASSES = 128, 32


@dataclass(frozen=True)
class Tile:
    """Step sizes: tokens, columns of `large`, classes x rows of `small`; and the pipelining of the steps."""

    tokens: int
    width: int
    class_rows: int
    stages: int
    warps: int
    least: int = 8  # of classes x rows


# Chosen by register and shared memory use; no timing stands behind them yet.
TILES = {
    "sm_80": Tile(64, 64, 16, 3, 8),
    "sm_90": Tile(64, 64, 32, 4, 8, least=16),  # Triton 3.6 takes 8 by HMMA, its loads not pipelined
    "sm_100": Tile(64, 64, 32, 3, 8),
    "gfx942": Tile(64, 64, 16, 2, 8),
}
FP32_TILES = {
    "sm_80": Tile(32, 32, 32, 2, 8),
    "sm_90": Tile(32, 32, 32, 2, 8),
    "sm_100": Tile(32, 32, 32, 2, 8),
    "gfx942": Tile(32, 64, 16, 2, 8),
}


def jacobian_stats(
    small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None, row_grams: bool
) -> tuple[Tensor, Tensor]:
    """P = Jt basis and the row Grams D of the per-example Jacobians Jt (D is empty when not asked for)."""
    N, Cs, T, r = small.shape
    _, Cl, _, d = large.shape
    C, k = max(Cs, Cl), basis.shape[1]
    if k > MAX_BASIS or C > MAX_CLASSES or 0 in (N, T, r, d, k):
        return reference(small, large, basis, mask, row_grams)
    small, large = launch.contiguous_rows(small), launch.contiguous_rows(large)
    device = large.device
    arch = launch.architecture(device)
    in_16_bits = large.dtype == small.dtype != torch.float32
    in_parts = large.dtype == torch.bfloat16 and small.dtype == torch.float32
    tile = (TILES if in_16_bits or in_parts else FP32_TILES)[arch]
    classes = triton.next_power_of_2(C)
    rows = min(max(triton.next_power_of_2(r), tile.least // classes), max(1, tile.class_rows // classes))
    row_groups = triton.cdiv(r, rows)
    wanted = triton.cdiv(2 * launch.multiprocessors(device), N * row_groups)
    splits = min(wanted, triton.cdiv(d, tile.width))
    P = torch.empty((splits, N, C, r, k), dtype=torch.float32, device=device)
    D = torch.empty((splits, N, r, C, C) if row_grams else (0,), dtype=torch.float32, device=device)
    with launch.on(device):
        _jacobian_stats[(N * row_groups, splits)](
            small,
            large,
            basis,
            large if mask is None else mask.contiguous().view(torch.uint8),
            P,
            D,
            N,
            T,
            r,
            d,
            k,
            small.stride(0),
            small.stride(1) if Cs > 1 else 0,
            small.stride(2),
            large.stride(0),
            large.stride(1),
            large.stride(2),
            *basis.stride(),
            row_groups,
            HAS_MASK=mask is not None,
            ROW_GRAMS=row_grams,
            C=C,
            LARGE_CLASSES=Cl,
            PRECISION=launch.fp32_precision(large.dtype),
            CLASSES=classes,
            ROWS=rows,
            BASIS=max(16, triton.next_power_of_2(k)),
            TOKENS=tile.tokens,
            WIDTH=tile.width,
            num_stages=tile.stages,
            num_warps=tile.warps,
        )
    if splits == 1:
        return P[0], D[0] if row_grams else D
    return P.sum(0), D.sum(0) if row_grams else D


@triton.jit(do_not_specialize=["N", "T", "row_groups"])
def _jacobian_stats(
    small,
    large,
    basis,
    mask,
    p,
    grams,
    N,
    T,
    r,
    d,
    k,
    small_example_stride,
    small_class_stride,
    small_token_stride,
    large_example_stride,
    large_class_stride,
    large_token_stride,
    basis_row_stride,
    basis_column_stride,
    row_groups,
    HAS_MASK: tl.constexpr,
    ROW_GRAMS: tl.constexpr,
    C: tl.constexpr,
    LARGE_CLASSES: tl.constexpr,
    PRECISION: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    BASIS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = (tl.program_id(0) // row_groups).to(tl.int64)
    split = tl.program_id(1)
    q = tl.arange(0, CLASSES * ROWS)  # a class and a row of the Jacobian
    c = q // ROWS
    j = tl.program_id(0) % row_groups * ROWS + q % ROWS
    exists = (c < C) & (j < r)
    column = tl.arange(0, BASIS)
    small += n * small_example_stride
    large += n * large_example_stride
    mask += n * T
    steps = tl.cdiv(T, TOKENS)

    projection = tl.zeros((BASIS, CLASSES * ROWS), tl.float32)
    gram = tl.zeros((CLASSES * ROWS, CLASSES * ROWS), tl.float32)
    for first_column in tl.range(split * WIDTH, d, tl.num_programs(1) * WIDTH):
        i = first_column + tl.arange(0, WIDTH)
        tile = tl.zeros((WIDTH, CLASSES * ROWS), tl.float32)
        for step in tl.range(
            0, LARGE_CLASSES * steps
        ):  # one loop over classes and tokens, to be pipelined as one
            large_class = step // steps
            t = step % steps * TOKENS + tl.arange(0, TOKENS)
            keep = t < T
            if HAS_MASK:
                keep = keep & (tl.load(mask + t, mask=keep, other=0) != 0)
            row = t[:, None].to(tl.int64)
            g = tl.load(
                large + large_class.to(tl.int64) * large_class_stride + row * large_token_stride + i[None, :],
                mask=keep[:, None] & (i < d)[None, :],
                other=0.0,
            )
            here = exists & ((c == large_class) | (LARGE_CLASSES == 1))
            s = tl.load(
                small + c[None, :].to(tl.int64) * small_class_stride + row * small_token_stride + j[None, :],
                mask=keep[:, None] & here[None, :],
                other=0.0,
            )
            if g.dtype == s.dtype and g.dtype != tl.float32:
                tile = tl.dot(g.T, s, tile)
            elif g.dtype == tl.bfloat16 and s.dtype == tl.float32:
                high, low = bf16_parts(s)
                tile = tl.dot(g.T, high, tile)
                tile = tl.dot(g.T, low, tile)
            else:
                tile = tl.dot(g.to(tl.float32).T, s.to(tl.float32), tile, input_precision=PRECISION)
        u = tl.load(
            basis + i[None, :].to(tl.int64) * basis_row_stride + column[:, None] * basis_column_stride,
            mask=(i < d)[None, :] & (column < k)[:, None],
            other=0.0,
        )
        projection = tl.dot(u.to(tl.float32), tile, projection, input_precision=PRECISION)
        if ROW_GRAMS:
            gram = tl.dot(tile.T, tile, gram, input_precision=PRECISION)

    example = split.to(tl.int64) * N + n
    p_rows = p + ((example * C + c) * r + j) * k
    tl.store(p_rows[None, :] + column[:, None], projection, mask=exists[None, :] & (column < k)[:, None])
    if ROW_GRAMS:
        same_row = (j[:, None] == j[None, :]) & exists[:, None] & exists[None, :]
        tl.store(grams + (((example * r + j) * C + c) * C)[:, None] + c[None, :], gram, mask=same_row)
