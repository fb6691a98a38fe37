"""Sketched Jacobians: of each [r, d] matrix J, J Omega [r, m] is kept."""

from __future__ import annotations

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.options import positive_integer


def checked_columns(value: object) -> int:
    """The option `columns`. Raises ValueError unless it is an integer of at least 2."""
    columns = positive_integer("columns", value)
    if columns < 2:
        raise ValueError("columns must be at least 2: the two halves of a sketch tell its error, got 1")
    return columns


def random_projection(dim: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Omega [d, min(m, d)] with orthogonal columns of length sqrt(d / m); the identity for m >= d.

    In bf16 unless the model is in fp64: any Omega will do, and this one is multiplied with 16-bit streams as it is. It
    takes half of the memory, too.
    """
    dtype = lk.accumulation_dtype(like.dtype)
    kept = dtype if dtype == torch.float64 else torch.bfloat16
    if columns >= dim:
        return torch.eye(dim, dtype=kept, device=like.device)
    noise = torch.randn(dim, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    basis: Tensor = torch.linalg.qr(noise).Q.contiguous()
    omega: Tensor = (basis * (dim / columns) ** 0.5).to(like.device, kept)
    return omega


def sketched(small: Tensor, large: Tensor, projection: Tensor) -> Tensor:
    """J Omega of every sequence in one backward pass, [S, r m]."""
    projected, _ = lk.jacobian_stats(small, large, projection.to(small.dtype), row_grams=False)
    return projected.flatten(1)
