"""Every op in plain PyTorch: the definition of each op, and the implementation for CPU.

Low-precision inputs are converted to fp32 a block at a time, so that memory stays bounded.
Masked rows are replaced by zeros (`torch.where`), never multiplied by zero: 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from laplace_kernels.checks import accumulation_dtype

_BLOCK_ELEMENTS = 1 << 24  # elements converted or masked at a time: 64 MiB of fp32
# Rows of C (at most) and of X per GEMM of `_syrk_` on CPU; measured for d in 256..4096, T in 64..2048, one and two
# threads. Narrow panels skip more of the upper triangle, and suit short blocks of X.
_SYRK_PANEL, _SYRK_ROWS = 256, 512


def gram_(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Lower triangle of C += alpha * X^T X over the unmasked rows."""
    native = X.dtype in (torch.bfloat16, torch.float16) and X.is_cuda and torch.version.cuda is not None
    for x in _row_blocks(X, mask, X.dtype if native else C.dtype):
        if native:  # tensor cores read the low-precision rows, accumulate and write fp32
            C.add_(torch.mm(x.mT, x, out_dtype=C.dtype), alpha=alpha)
        else:
            _syrk_(C, x, alpha)


def gram_sketch_(Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Y += alpha * X^T (X Omega) over the unmasked rows."""
    omega = Omega.to(Y.dtype)
    for x in _row_blocks(X, mask, Y.dtype):
        Y.addmm_(x.mT, x @ omega, alpha=alpha)


def gram_group_(
    Cs: Sequence[Tensor], Xs: Sequence[Tensor], masks: Sequence[Tensor | None], alphas: Sequence[float]
) -> None:
    """`gram_` for every member of the group."""
    for C, X, mask, alpha in zip(Cs, Xs, masks, alphas, strict=True):
        gram_(C, X, mask, alpha)


def jacobian_stats(
    small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None, row_grams: bool
) -> tuple[Tensor, Tensor]:
    """P = Jt basis and the row Grams D of the per-example Jacobians Jt (D is empty when not asked for)."""
    N, Cs, T, r = small.shape
    _, Cl, _, d = large.shape
    C, k = max(Cs, Cl), basis.shape[1]
    dtype = accumulation_dtype(large.dtype)
    basis = basis.to(dtype)
    # multiply-adds per example of (large basis) first, against those of P from an already formed Jt
    project_first = T * k * (Cl * d + C * r) < C * r * d * (k if row_grams else k + T)

    P = large.new_empty((N, C, r, k), dtype=dtype)
    D = large.new_empty((N, r, C, C) if row_grams else (0,), dtype=dtype)
    block = max(1, _BLOCK_ELEMENTS // max(1, Cl * T * d, C * r * d))
    for start in range(0, N, block):
        n = slice(start, start + block)
        keep = None if mask is None else mask[n, None, :, None]
        s, g = _select(small[n], keep, dtype).mT, _select(large[n], keep, dtype)
        jacobian = _contract_tokens(s, g) if row_grams or not project_first else None
        if jacobian is None or project_first:
            P[n] = _contract_tokens(s, g @ basis)
        else:
            P[n] = jacobian @ basis
        if jacobian is not None and row_grams:
            rows = jacobian.transpose(1, 2).contiguous()  # batched GEMMs want it so
            D[n] = rows @ rows.mT
    return P, D


def kron_apply(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> Tensor:
    """f(H) W, f(H) given by its eigenvalues `core` on V x U and `tail` on V x (complement of U)."""
    dtype = accumulation_dtype(W.dtype)
    W, U, V, core, tail = (t.to(dtype) for t in (W, U, V, core, tail))
    rotated = V.mT @ W
    projected = rotated @ U
    if U.shape[0] == U.shape[1]:  # no complement: skip the tail, which would only cancel
        return V @ ((core * projected) @ U.mT)
    tail = tail[:, None]
    return V @ (((core - tail) * projected) @ U.mT + tail * rotated)


def mirror_(C: Tensor) -> None:
    """Copy the lower triangle of C to the upper one, in place, a row panel at a time."""
    for start in range(0, C.shape[0], _SYRK_PANEL):
        panel = slice(start, start + _SYRK_PANEL)
        diagonal = C[panel, panel]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)
        C[:start, panel].copy_(C[panel, :start].mT)


def _syrk_(C: Tensor, X: Tensor, alpha: float) -> None:
    """C += alpha * X^T X in row panels up to the diagonal; one whole product where unmeasured."""
    d = C.shape[0]
    if C.device.type != "cpu":
        C.addmm_(X.mT, X, alpha=alpha)
        return
    panel = min(_SYRK_PANEL, max(128, d // 8))
    for x in X.split(_SYRK_ROWS):
        for start in range(0, d, panel):
            stop = min(start + panel, d)
            C[start:stop, :stop].addmm_(x[:, start:stop].mT, x[:, :stop], alpha=alpha)


def _row_blocks(X: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """The rows of X in `dtype`, masked ones zeroed: X itself if that takes no copy, else in blocks."""
    if mask is None and X.dtype == dtype:
        yield X
        return
    rows = max(1, _BLOCK_ELEMENTS // max(1, X.shape[1]))
    for start in range(0, X.shape[0], rows):
        block = slice(start, start + rows)
        yield _select(X[block], None if mask is None else mask[block, None], dtype)


def _select(X: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """X in `dtype`, zero where `keep` is False."""
    X = X.to(dtype)
    return X if keep is None else torch.where(keep, X, 0)


def _contract_tokens(s: Tensor, g: Tensor) -> Tensor:
    """Sum over tokens of s [N, Cs, r, T] (x) g [N, Cl, T, e], class axes broadcast: [N, C, r, e]."""
    N, Cs, r, T = s.shape
    if g.shape[1] == 1:  # classes stacked into rows, so that they share one read of g
        return (s.reshape(N, Cs * r, T) @ g[:, 0]).view(N, Cs, r, g.shape[3])
    return s @ g
