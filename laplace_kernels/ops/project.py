"""`project_`: a stream of rows times a thin matrix, summed in fp32 without a fp32 copy of the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_kernels.dispatch import register_op
from laplace_kernels.halves import halves
from laplace_kernels.op import Op
from laplace_kernels.ops import blocks
from laplace_kernels.ops.checks import check_accumulator, check_companion, check_float

_NARROW = {torch.bfloat16, torch.float16, torch.float32}


def check(Z: Tensor, X: Tensor, W: Tensor) -> None:
    """X, W, Z."""
    if _fits(Z, X, W):
        return
    check_float("X", X, 2)
    check_float("W", W, 2)
    (T, d), n = X.shape, W.shape[1]
    check_companion("W", W, (d, n), "X", X)
    check_accumulator("Z", Z, (T, n), "X", X)


def _fits(Z: Tensor, X: Tensor, W: Tensor) -> bool:
    """Whether nothing is wrong with arguments as they usually are, in less time than it takes to say what is."""
    if (
        type(Z) is not Tensor
        or type(X) is not Tensor
        or type(W) is not Tensor
        or X.dim() != 2
        or W.dim() != 2
    ):
        return False
    dtype, device = X.dtype, X.device
    return (
        Z.dtype is torch.float32
        and dtype in _NARROW
        and W.dtype in _NARROW
        and Z.device == device
        and W.device == device
        and W.shape[0] == X.shape[1]
        and Z.shape == (X.shape[0], W.shape[1])
        and Z.is_contiguous()
        and X.layout is torch.strided
        and W.layout is torch.strided
    )


def reference(Z: Tensor, X: Tensor, W: Tensor) -> None:
    """Z = X W, W at its own precision."""
    if blocks.sums_in_fp32(X):
        if W.dtype == X.dtype:
            torch.mm(X, W, out_dtype=Z.dtype, out=Z)
            return
        high, low, scale = halves(W.to(Z.dtype), X.dtype)
        torch.mm(X, high, out_dtype=Z.dtype, out=Z)
        Z += torch.mm(X, low, out_dtype=Z.dtype)
        if scale is not None:
            Z /= scale
        return
    W, done = W.to(Z.dtype), 0
    for x in blocks.row_blocks(X, None, Z.dtype):
        torch.mm(x, W, out=Z[done : done + len(x)])
        done += len(x)


OP = register_op(
    Op("project_(Tensor(a!) Z, Tensor X, Tensor W) -> ()", probe="X", check=check, reference=reference)
)
