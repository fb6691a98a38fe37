"""`gram_group_`: the lower-triangle tiles of many Gram matrices in one launch.

A table in device memory tells each program where its matrix is. It is filled on the host and copied once,
from pinned memory, without waiting for the device; the replay of a captured copy would read memory that has
been freed, so capture is refused. A tile has one program: the result is the same bit for bit in every run.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from laplace_kernels.triton import launch
from laplace_kernels.triton.triangle import Tile, is_aligned, lower_tile, lower_tiles, pointer_tiles

_FIELDS = 9  # of a row of the table: x, c, mask, T, d, stride of x, stride of c, alpha, first tile


def gram_group_(
    Cs: Sequence[Tensor], Xs: Sequence[Tensor], masks: Sequence[Tensor | None], alphas: Sequence[float]
) -> None:
    """`gram_` for every member of the group."""
    members = [
        (C, launch.contiguous_rows(X), None if mask is None else mask.contiguous(), alpha)
        for C, X, mask, alpha in zip(Cs, Xs, masks, alphas, strict=True)
        if X.numel() > 0
    ]
    if not members:
        return
    device, dtype = Xs[0].device, Xs[0].dtype
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "gram_group_ cannot be captured in a CUDA graph: use gram_, or the reference backend"
        )
    arch = launch.architecture(device)
    aligned = all(is_aligned(X) for _, X, *_ in members)
    tile = _choose_tile(
        pointer_tiles(arch, dtype, aligned),
        [C.shape[0] for C, *_ in members],
        launch.multiprocessors(device),
    )
    rows, tiles = [], 0
    for C, X, mask, alpha in members:
        address = 0 if mask is None else mask.data_ptr()
        rows.append(
            (X.data_ptr(), C.data_ptr(), address, *X.shape, X.stride(0), C.stride(0), _bits(alpha), tiles)
        )
        tiles += lower_tiles(C.shape[0], tile)
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    with launch.on(device):
        _gram_group[(tiles,)](
            table.to(device, non_blocking=True),
            members[0][1],
            len(rows),
            ALIGNED=aligned,
            FIELDS=_FIELDS,
            MEMBERS=triton.next_power_of_2(len(rows)),
            PRECISION=launch.fp32_precision(dtype),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            TOKENS=tile.tokens,
            num_stages=tile.stages,
            num_warps=tile.warps,
        )


def _choose_tile(tiles: tuple[Tile, ...], sizes: list[int], processors: int) -> Tile:
    """The largest tile of which the group has one for every processor, or else the smallest."""
    return next((tile for tile in tiles if sum(lower_tiles(d, tile) for d in sizes) >= processors), tiles[-1])


def _bits(value: float) -> int:
    """The bits of a fp32 number, to keep it in a table of integers."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@triton.jit(do_not_specialize=["members"])
def _gram_group(
    table,
    x_like,
    members,
    ALIGNED: tl.constexpr,
    FIELDS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    all_members = tl.arange(0, MEMBERS)
    first_tiles = tl.load(table + all_members * FIELDS + 8, mask=all_members < members, other=0x7FFFFFFF)
    member = tl.sum((first_tiles <= tl.program_id(0)).to(tl.int32)) - 1
    entry = table + member * FIELDS
    x = tl.load(entry).to(tl.pointer_type(x_like.dtype.element_ty))
    c = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    mask = tl.load(entry + 2).to(tl.pointer_type(tl.uint8))
    T = tl.load(entry + 3).to(tl.int32)
    masked_rows = tl.where(tl.load(entry + 2) == 0, 0, T)
    d = tl.load(entry + 4).to(tl.int32)
    x_stride = tl.load(entry + 5)
    c_stride = tl.load(entry + 6)
    alpha = tl.load(entry + 7).to(tl.int32).to(tl.float32, bitcast=True)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        x_stride = tl.multiple_of(x_stride, 16)
        d = tl.multiple_of(d, 16)

    row, column = lower_tile(tl.program_id(0) - tl.load(entry + 8).to(tl.int32), ROWS // COLUMNS)
    i = row * ROWS + tl.arange(0, ROWS)
    j = column * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, T, TOKENS):
        t = first + tl.arange(0, TOKENS)
        keep = (tl.load(mask + t, mask=t < masked_rows, other=1) != 0) & (t < T)
        x_t = x + t[:, None].to(tl.int64) * x_stride
        a = tl.load(x_t + i[None, :], mask=keep[:, None] & (i < d)[None, :], other=0.0)
        b = tl.load(x_t + j[None, :], mask=keep[:, None] & (j < d)[None, :], other=0.0)
        total = tl.dot(a.T, b, total, input_precision=PRECISION)
    c_tile = c + i[:, None].to(tl.int64) * c_stride + j[None, :]
    inside = (i < d)[:, None] & (j < d)[None, :]
    tl.atomic_add(c_tile, total * alpha, mask=inside, sem="relaxed")
