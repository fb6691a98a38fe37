"""The library's 16-bit products with fp32 results, which it has for GPUs only, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from laplace_kernels.ops import blocks


def _wide(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.to(out_dtype) @ b.to(out_dtype)


def _wide_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(_wide(a, b, out_dtype))


@contextmanager
def sixteen_bit_products() -> Iterator[None]:
    """Ops multiply 16-bit CPU tensors as they would those of a GPU."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in ("mm", "bmm"):
            library.impl(f"{name}.dtype", _wide, "CPU")
            library.impl(f"{name}.dtype_out", _wide_out, "CPU")
        with mock.patch.object(blocks, "sums_in_fp32", lambda X: X.itemsize == 2):
            yield
