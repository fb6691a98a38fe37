"""`jacobian`: sums over tokens of outer products, one matrix an example."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_kernels.dispatch import register_op
from laplace_kernels.halves import halves
from laplace_kernels.op import Op
from laplace_kernels.ops import blocks
from laplace_kernels.ops.checks import accumulation_dtype, check_companion, check_float, check_mask


def check(small: Tensor, large: Tensor, mask: Tensor | None) -> None:
    """In the order of the schema."""
    check_float("small", small, 3)
    check_float("large", large, 3)
    N, T, _ = small.shape
    check_companion("large", large, (N, T, large.shape[2]), "small", small)
    check_mask("mask", mask, (N, T), large)


def fake(small: Tensor, large: Tensor, mask: Tensor | None) -> Tensor:
    """[N, r, d]."""
    shape = small.shape[0], small.shape[2], large.shape[2]
    return large.new_empty(shape, dtype=accumulation_dtype(large.dtype))


def reference(small: Tensor, large: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over tokens of small (x) large."""
    keep = None if mask is None else mask[..., None]
    if blocks.sums_in_fp32(large):
        return contract(blocks.select(small, keep).mT, blocks.select(large, keep))
    N, T, r = small.shape
    d = large.shape[2]
    out = fake(small, large, mask)
    block = max(1, blocks.BLOCK_ELEMENTS // max(1, T * max(r, d)))
    for start in range(0, N, block):
        n = slice(start, start + block)
        kept = None if keep is None else keep[n]
        small_block, large_block = (blocks.select(x[n], kept, out.dtype) for x in (small, large))
        torch.bmm(small_block.mT, large_block, out=out[n])
    return out


def contract(small: Tensor, large: Tensor) -> Tensor:
    """[N, r, T] @ [N, T, d] with fp32 sums where `sums_in_fp32(large)`; `small` at its own precision."""
    out = accumulation_dtype(large.dtype)
    if small.dtype == large.dtype:
        return torch.bmm(small, large, out_dtype=out)
    high, low, scale = halves(small.to(out), large.dtype)
    both = torch.bmm(torch.cat([high, low], 1), large, out_dtype=out)
    total = both[:, : small.shape[1]] + both[:, small.shape[1] :]
    return total if scale is None else total / scale


OP = register_op(
    Op(
        "jacobian(Tensor small, Tensor large, Tensor? mask) -> Tensor",
        probe="large",
        check=check,
        reference=reference,
        fake=fake,
    )
)
