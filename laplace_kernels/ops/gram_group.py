"""`gram_group_`: `gram_` for many matrices at once."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_kernels.dispatch import register_op
from laplace_kernels.op import Op
from laplace_kernels.ops import gram


def check(Cs: list[Tensor], Xs: list[Tensor], masks: list[Tensor | None], alphas: list[float]) -> None:
    """Lists of one length, each member as in `gram_`, one dtype and device for all."""
    for name, sequence in (("Xs", Xs), ("masks", masks), ("alphas", alphas)):
        if len(sequence) != len(Cs):
            raise ValueError(f"{name} must have as many members as Cs ({len(Cs)}), got {len(sequence)}")
    for i, (C, X, mask, alpha) in enumerate(zip(Cs, Xs, masks, alphas, strict=True)):
        gram.check(C, X, mask, alpha, suffix=f"s[{i}]")
        if X.dtype != Xs[0].dtype or X.device != Xs[0].device:
            raise ValueError(
                f"Xs[{i}] must have the dtype and device of Xs[0] ({Xs[0].dtype}, {Xs[0].device}), "
                f"got {X.dtype}, {X.device}"
            )


def reference(Cs: list[Tensor], Xs: list[Tensor], masks: list[Tensor | None], alphas: list[float]) -> None:
    """`gram_` for every member of the group."""
    for C, X, mask, alpha in zip(Cs, Xs, masks, alphas, strict=True):
        gram.reference(C, X, mask, alpha)


OP = register_op(
    Op(
        "gram_group_(Tensor(a!)[] Cs, Tensor[] Xs, Tensor?[] masks, float[] alphas) -> ()",
        probe="Xs",
        check=check,
        reference=reference,
        tags=(torch.Tag.cudagraph_unsafe,),  # a backend may read the addresses from host memory
    )
)
