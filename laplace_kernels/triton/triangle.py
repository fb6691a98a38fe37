"""The tiles of a lower triangle: what `gram_` and `gram_group_` have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Tile of C, tokens per step, and how the loop over tokens is pipelined."""

    rows: int
    columns: int
    tokens: int
    stages: int
    warps: int
    slices: int = 1  # parts in which the tile is written, to need less shared memory


# For kernels that read through pointers, largest tile first. Chosen by register and shared memory use; no timing
# stands behind them yet.
POINTER_TILES = {
    "sm_80": (Tile(128, 64, 32, 4, 8), Tile(64, 64, 64, 4, 4)),
    # Of 128 x 128, Triton 3.6 makes products that wait for each other where there is a mask.
    "sm_90": (Tile(128, 64, 64, 5, 8), Tile(64, 64, 64, 5, 4)),
    "sm_100": (Tile(128, 128, 64, 5, 8), Tile(64, 64, 64, 5, 4)),
    "gfx942": (Tile(128, 128, 64, 2, 8), Tile(64, 64, 64, 2, 4)),
}
FP32_TILES = {
    "sm_80": (Tile(64, 64, 16, 4, 4),),
    "sm_90": (Tile(128, 64, 32, 3, 8), Tile(64, 64, 32, 3, 4)),
    "sm_100": (Tile(128, 64, 32, 3, 8), Tile(64, 64, 32, 3, 4)),
    "gfx942": (Tile(64, 64, 32, 2, 4),),
}


def pointer_tiles(arch: str, dtype: torch.dtype, aligned: bool) -> tuple[Tile, ...]:
    """Tiles for the kernels that read through pointers; rows read element by element need the smallest."""
    tiles = (FP32_TILES if dtype == torch.float32 else POINTER_TILES)[arch]
    return tiles if aligned else tiles[-1:]


def is_aligned(X: Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time."""
    return all(n % 16 == 0 for n in (X.data_ptr(), X.stride(0), X.shape[1]))


def lower_tiles(d: int, tile: Tile) -> int:
    """Tiles on or below the diagonal of a [d, d] matrix."""
    rows = triton.cdiv(d, tile.rows)
    return int(rows * (rows + 1) // 2 * (tile.rows // tile.columns))


@triton.jit
def lower_tile(index, RATIO: tl.constexpr):
    """Row and column of the index-th tile of the lower triangle, RATIO tiles wide per diagonal block."""
    pair = index // RATIO
    row = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > pair, row - 1, row)  # the root is rounded
    row = tl.where((row + 1) * (row + 2) // 2 <= pair, row + 1, row)
    return row, (pair - row * (row + 1) // 2) * RATIO + index % RATIO
