"""Sketched Jacobians: of each [r, d] matrix J, J Omega [r, m] is kept."""

from __future__ import annotations

import torch
from torch import Tensor

import laplace_kernels as lk


def random_projection(dim: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Omega [d, min(m, d)] with orthogonal columns of length sqrt(d / m); the identity for m >= d."""
    dtype = lk.accumulation_dtype(like.dtype)
    if columns >= dim:
        return torch.eye(dim, dtype=dtype, device=like.device)
    noise = torch.randn(dim, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    basis: Tensor = torch.linalg.qr(noise).Q.contiguous()
    omega: Tensor = (basis * (dim / columns) ** 0.5).to(like.device, dtype)
    return omega


def sketched(small: Tensor, large: Tensor, projection: Tensor) -> Tensor:
    """J Omega of every sequence in one backward pass, [S, r m]."""
    projected, _ = lk.jacobian_stats(small, large, projection.to(small.dtype), row_grams=False)
    return projected.flatten(1)
