"""`jacobian_stats`: per-example Jacobians, projected and multiplied with each other, never kept."""

from __future__ import annotations

from torch import Tensor

from laplace_kernels.dispatch import register_op
from laplace_kernels.op import Op
from laplace_kernels.ops import blocks
from laplace_kernels.ops.checks import (
    accumulation_dtype,
    check_bool,
    check_companion,
    check_float,
    check_mask,
)
from laplace_kernels.ops.jacobian import contract


def check(small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None, row_grams: bool) -> None:
    """In the order of the schema."""
    check_float("small", small, 4)
    check_float("large", large, 4)
    check_float("basis", basis, 2)
    N, Cs, T, _ = small.shape
    Cl, d = large.shape[1], large.shape[3]
    if min(Cs, Cl) < 1 or (Cs != Cl and 1 not in (Cs, Cl)):
        raise ValueError(f"small and large must have the same number of classes, or 1, got {Cs} and {Cl}")
    check_companion("large", large, (N, Cl, T, d), "small", small)
    check_companion("basis", basis, (d, basis.shape[1]), "large", large)
    check_mask("mask", mask, (N, T), large)
    check_bool("row_grams", row_grams)


def fake(
    small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None, row_grams: bool
) -> tuple[Tensor, Tensor]:
    """P, and D or an empty tensor."""
    N, Cs, _, r = small.shape
    C = max(Cs, large.shape[1])
    dtype = accumulation_dtype(large.dtype)
    P = large.new_empty((N, C, r, basis.shape[1]), dtype=dtype)
    return P, large.new_empty((N, r, C, C) if row_grams else (0,), dtype=dtype)


def reference(
    small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None, row_grams: bool
) -> tuple[Tensor, Tensor]:
    """P = Jt basis and the row Grams D of the per-example Jacobians Jt (D is empty when not asked for)."""
    N, Cs, T, r = small.shape
    _, Cl, _, d = large.shape
    C, k = max(Cs, Cl), basis.shape[1]
    P, D = fake(small, large, basis, mask, row_grams)
    basis = basis.to(P.dtype)
    if blocks.sums_in_fp32(large):
        return _from_16_bits(small, large, basis, mask, row_grams)
    # multiply-adds per example of (large basis) first, against those of P from an already formed Jt
    project_first = T * k * (Cl * d + C * r) < C * r * d * (k if row_grams else k + T)

    block = max(1, blocks.BLOCK_ELEMENTS // max(1, Cl * T * d, C * r * d))
    for start in range(0, N, block):
        n = slice(start, start + block)
        keep = None if mask is None else mask[n, None, :, None]
        s, g = blocks.select(small[n], keep, P.dtype).mT, blocks.select(large[n], keep, P.dtype)
        jacobian = _contract_tokens(s, g) if row_grams or not project_first else None
        if jacobian is None or project_first:
            P[n] = _contract_tokens(s, g @ basis)
        else:
            P[n] = jacobian @ basis
        if jacobian is not None and row_grams:
            D[n] = _row_grams(jacobian)
    return P, D


def _from_16_bits(
    small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None, row_grams: bool
) -> tuple[Tensor, Tensor]:
    """Without a fp32 copy of `large`: the Jacobians first, whose sums are fp32."""
    N, Cs, T, r = small.shape
    _, Cl, _, d = large.shape
    keep = None if mask is None else mask[:, None, :, None]
    small, large = blocks.select(small, keep).mT, blocks.select(large, keep)
    if Cl == 1:
        jacobian = contract(small.reshape(N, Cs * r, T), large[:, 0]).view(N, Cs, r, d)
    else:
        C = max(Cs, Cl)
        small = small.expand(N, C, r, T).flatten(0, 1)
        jacobian = contract(small, large.flatten(0, 1)).view(N, C, r, d)
    empty = jacobian.new_empty(0)
    return jacobian @ basis, _row_grams(jacobian) if row_grams else empty


def _row_grams(jacobian: Tensor) -> Tensor:
    """[N, C, r, d] -> [N, r, C, C]."""
    rows = jacobian.transpose(1, 2).contiguous()  # batched GEMMs want it so
    return rows @ rows.mT


def _contract_tokens(s: Tensor, g: Tensor) -> Tensor:
    """Sum over tokens of s [N, Cs, r, T] (x) g [N, Cl, T, e], class axes broadcast: [N, C, r, e]."""
    N, Cs, r, T = s.shape
    if g.shape[1] == 1:  # classes stacked into rows, so that they share one read of g
        return (s.reshape(N, Cs * r, T) @ g[:, 0]).view(N, Cs, r, g.shape[3])
    return s @ g


OP = register_op(
    Op(
        "jacobian_stats(Tensor small, Tensor large, Tensor basis, Tensor? mask, bool row_grams) -> (Tensor, Tensor)",
        probe="large",
        check=check,
        reference=reference,
        fake=fake,
    )
)
