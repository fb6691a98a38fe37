"""Rows in the dtype of the sum, a block at a time: what is converted or masked needs bounded memory.

Masked rows are replaced by zeros (`torch.where`), never multiplied by zero: 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # elements converted or masked at a time: 64 MiB of fp32


def sums_in_fp32(X: Tensor) -> bool:
    """Whether the library multiplies X with 16-bit matrices and sums in fp32: cuBLAS; the meta device stands for it."""
    if X.dtype not in (torch.bfloat16, torch.float16):
        return False
    return X.device.type == "meta" or (X.is_cuda and torch.version.cuda is not None)


def row_blocks(X: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of X in `dtype`, masked ones zeroed: X itself if that takes no copy, else in blocks."""
    if mask is None and X.dtype == dtype:
        yield X
        return
    rows = max(1, BLOCK_ELEMENTS // max(1, X.shape[1]))
    for start in range(0, X.shape[0], rows):
        block = slice(start, start + rows)
        yield select(X[block], None if mask is None else mask[block, None], dtype)


def select(X: Tensor, keep: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """X in `dtype` (None: its own), zero where `keep` is False."""
    X = X if dtype is None else X.to(dtype)
    return X if keep is None else torch.where(keep, X, 0)
