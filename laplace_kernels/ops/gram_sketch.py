"""`gram_sketch_`: the Gram matrix of rows times a test matrix, added to an accumulator."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_kernels.dispatch import register_op
from laplace_kernels.halves import halves
from laplace_kernels.op import Op
from laplace_kernels.ops import blocks
from laplace_kernels.ops.checks import (
    check_accumulator,
    check_companion,
    check_float,
    check_mask,
    check_number,
)

_CACHED_BYTES = 24 << 20  # of X a block: the second product finds it in the L2 cache, of 50 MB on an H100


def check(Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None, alpha: float) -> None:
    """X, Omega, Y, mask, alpha."""
    check_float("X", X, 2)
    check_float("Omega", Omega, 2)
    (T, d), m = X.shape, Omega.shape[1]
    check_companion("Omega", Omega, (d, m), "X", X)
    check_accumulator("Y", Y, (d, m), "X", X)
    check_mask("mask", mask, (T,), X)
    check_number("alpha", alpha)


def reference(Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Y += alpha * X^T (X Omega) over the unmasked rows."""
    if blocks.sums_in_fp32(X):
        _add_16_bits(Y, X, Omega, mask, alpha)
        return
    omega = Omega.to(Y.dtype)
    for x in blocks.row_blocks(X, mask, Y.dtype):
        Y.addmm_(x.mT, x @ omega, alpha=alpha)


def _add_16_bits(Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Two products a block of rows that the cache keeps, as precise as Omega is; no fp32 copy of X."""
    m = Omega.shape[1]
    exact = Omega.dtype == X.dtype
    high, low, scale = (Omega, Omega[:, :0], None) if exact else halves(Omega.to(Y.dtype), X.dtype)
    columns = torch.cat([high.mT, low.mT]).mT
    rows = max(1, _CACHED_BYTES // max(1, X.shape[1] * X.element_size()))
    for start in range(0, X.shape[0], rows):
        block = slice(start, start + rows)
        x = blocks.select(X[block], None if mask is None else mask[block, None])
        z = torch.mm(x, columns, out_dtype=Y.dtype)
        if exact:
            Y.add_(torch.mm(x.mT, z.to(x.dtype), out_dtype=Y.dtype), alpha=alpha)
            continue
        z_high, z_low, z_scale = halves(z[:, :m] + z[:, m:], x.dtype)
        both = torch.mm(x.mT, torch.cat([z_high, z_low], 1), out_dtype=Y.dtype)
        total = both[:, :m] + both[:, m:]
        for factor in (scale, z_scale):
            total = total if factor is None else total / factor
        Y.add_(total, alpha=alpha)


OP = register_op(
    Op(
        "gram_sketch_(Tensor(a!) Y, Tensor X, Tensor Omega, Tensor? mask, float alpha) -> ()",
        probe="X",
        check=check,
        reference=reference,
    )
)
