"""`gram_`: the Gram matrix of rows, added to the lower triangle of an accumulator."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_kernels.dispatch import register_op
from laplace_kernels.op import Op
from laplace_kernels.ops import blocks
from laplace_kernels.ops.checks import check_accumulator, check_float, check_mask, check_number

# Rows of C (at most) and of X per GEMM of `_syrk_` on CPU; measured for d in 256..4096, T in 64..2048, one and two
# threads. Narrow panels skip more of the upper triangle, and suit short blocks of X.
SYRK_PANEL, _SYRK_ROWS = 256, 512


def check(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float, suffix: str = "") -> None:
    """X, C, mask, alpha; `suffix` marks the member of a group."""
    check_float(f"X{suffix}", X, 2)
    T, d = X.shape
    check_accumulator(f"C{suffix}", C, (d, d), f"X{suffix}", X)
    check_mask(f"mask{suffix}", mask, (T,), X)
    check_number(f"alpha{suffix}", alpha)


def reference(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Lower triangle of C += alpha * X^T X over the unmasked rows."""
    native = blocks.sums_in_fp32(X)
    for x in blocks.row_blocks(X, mask, X.dtype if native else C.dtype):
        if native:  # tensor cores read the low-precision rows, accumulate and write fp32
            C.add_(torch.mm(x.mT, x, out_dtype=C.dtype), alpha=alpha)
        else:
            _syrk_(C, x, alpha)


def _syrk_(C: Tensor, X: Tensor, alpha: float) -> None:
    """C += alpha * X^T X in row panels up to the diagonal; one whole product where unmeasured."""
    d = C.shape[0]
    if C.device.type != "cpu":
        C.addmm_(X.mT, X, alpha=alpha)
        return
    panel = min(SYRK_PANEL, max(128, d // 8))
    for x in X.split(_SYRK_ROWS):
        for start in range(0, d, panel):
            stop = min(start + panel, d)
            C[start:stop, :stop].addmm_(x[:, start:stop].mT, x[:, :stop], alpha=alpha)


OP = register_op(
    Op(
        "gram_(Tensor(a!) C, Tensor X, Tensor? mask, float alpha) -> ()",
        probe="X",
        check=check,
        reference=reference,
    )
)
