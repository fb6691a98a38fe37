"""What each op has to compute, written naively in fp64 with loops over rows and examples that count."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(X: Tensor, mask: Tensor | None = None) -> Tensor:
    rows = kept(X, mask)
    return torch.einsum("ti,tj->ij", rows, rows)


def gram_sketch(X: Tensor, Omega: Tensor, mask: Tensor | None = None) -> Tensor:
    return gram(X, mask) @ Omega.double()


def jacobians(small: Tensor, large: Tensor, mask: Tensor | None = None) -> Tensor:
    """[N, C, r, d], one example and class at a time."""
    N, C = small.shape[0], max(small.shape[1], large.shape[1])
    out = small.new_zeros((N, C, small.shape[3], large.shape[3]), dtype=torch.float64)
    for n in range(N):
        keep = None if mask is None else mask[n]
        for c in range(C):
            s = kept(small[n, min(c, small.shape[1] - 1)], keep)
            g = kept(large[n, min(c, large.shape[1] - 1)], keep)
            out[n, c] = torch.einsum("tj,ti->ji", s, g)
    return out


def jacobian_stats(
    small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    J = jacobians(small, large, mask)
    return torch.einsum("ncji,ik->ncjk", J, basis.double()), torch.einsum("ncji,ndji->njcd", J, J)


def kron_apply(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> Tensor:
    """By the dense [r d, r d] matrix f(H), built from its eigenvectors v_j x u_i."""
    W, U, V, core, tail = (t.double() for t in (W, U, V, core, tail))
    r, d = W.shape[1:]
    complement = torch.eye(d, dtype=torch.float64) - U @ U.T
    f = torch.zeros(r * d, r * d, dtype=torch.float64)
    for j in range(r):
        column_function = U @ torch.diag(core[j]) @ U.T + tail[j] * complement
        f += torch.kron(torch.outer(V[:, j], V[:, j]), column_function)
    return (W.reshape(-1, r * d) @ f.T).view_as(W)


def kept(X: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of X that count, in fp64."""
    return (X if mask is None else X[mask]).double()


def assert_near(actual: Tensor, exact: Tensor, tolerance: float | None = None) -> None:
    """Finite, and within the rounding of the dtype of `actual` relative to the largest exact entry."""
    if tolerance is None:
        tolerance = 1e-12 if actual.dtype == torch.float64 else 5e-6
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    if exact.numel():
        error = (actual.double() - exact).abs().max()
        assert error <= tolerance * exact.abs().max().clamp(min=1.0), error
