"""`kron_apply`: a function of a low-rank-plus-tail Kronecker operator, on a batch of matrices."""

from __future__ import annotations

from torch import Tensor

from laplace_kernels.dispatch import register_op
from laplace_kernels.op import Op
from laplace_kernels.ops.checks import accumulation_dtype, check_companion, check_float


def check(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> None:
    """In the order of the schema."""
    check_float("W", W, 3)
    check_float("U", U, 2)
    _, r, d = W.shape
    k = U.shape[1]
    if k > d:
        raise ValueError(f"U must have orthonormal columns, at most d = {d} of them, got {k}")
    for name, tensor, shape in (
        ("U", U, (d, k)),
        ("V", V, (r, r)),
        ("core", core, (r, k)),
        ("tail", tail, (r,)),
    ):
        check_float(name, tensor, len(shape))
        check_companion(name, tensor, shape, "W", W)


def fake(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> Tensor:
    """Of the shape of W."""
    return W.new_empty(W.shape, dtype=accumulation_dtype(W.dtype))


def reference(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> Tensor:
    """f(H) W, f(H) given by its eigenvalues `core` on V x U and `tail` on V x (complement of U)."""
    dtype = accumulation_dtype(W.dtype)
    W, U, V, core, tail = (t.to(dtype) for t in (W, U, V, core, tail))
    rotated = V.mT @ W
    projected = rotated @ U
    if U.shape[0] == U.shape[1]:  # no complement: skip the tail, which would only cancel
        return V @ ((core * projected) @ U.mT)
    tail = tail[:, None]
    return V @ (((core - tail) * projected) @ U.mT + tail * rotated)


OP = register_op(
    Op(
        "kron_apply(Tensor W, Tensor U, Tensor V, Tensor core, Tensor tail) -> Tensor",
        probe="W",
        check=check,
        reference=reference,
        fake=fake,
    )
)
