"""`gram_sketch_`: the Gram matrix of rows times a test matrix, added to an accumulator."""

from __future__ import annotations

from torch import Tensor

from laplace_kernels.dispatch import register_op
from laplace_kernels.op import Op
from laplace_kernels.ops.blocks import row_blocks
from laplace_kernels.ops.checks import (
    check_accumulator,
    check_companion,
    check_float,
    check_mask,
    check_number,
)


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
    omega = Omega.to(Y.dtype)
    for x in row_blocks(X, mask, Y.dtype):
        Y.addmm_(x.mT, x @ omega, alpha=alpha)


OP = register_op(
    Op(
        "gram_sketch_(Tensor(a!) Y, Tensor X, Tensor Omega, Tensor? mask, float alpha) -> ()",
        probe="X",
        check=check,
        reference=reference,
    )
)
