"""Random inputs of awkward shapes, strides and dtypes for the kernel tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
dtypes = st.sampled_from(DTYPES)
sizes = st.integers(1, 33)
token_counts = st.integers(0, 40)
layouts = st.sampled_from(("contiguous", "padded rows", "every second row", "transposed"))
seeds = st.integers(0, 2**31)


def rows(T: int, d: int, dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """[T, d] standard normal, laid out in memory as named."""
    X = torch.randn(T, d, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "contiguous":
        return X
    if layout == "transposed":
        return X.T.contiguous().T
    big = torch.full((2 * T, d + 3), torch.nan, dtype=dtype)
    view = big[::2, :d] if layout == "every second row" else big[:T, :d]
    return view.copy_(X)


def accumulator(d: int, dtype: torch.dtype) -> Tensor:
    """A [d, d] accumulator that is not zero, with padded rows."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.linspace(-1, 1, d * (d + 2), dtype=accumulate).view(d, d + 2)[:, :d]


def poisoned_mask(X: Tensor, generator: torch.Generator) -> Tensor:
    """A random mask over the leading axes of X [..., T, d], with NaN and infinity in the rows it drops."""
    mask = torch.rand(X.shape[:-1], generator=generator) < 0.6
    X[~mask] = torch.nan
    X[~mask, ..., 0] = torch.inf
    return mask


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def keep(*shape: int, device: str | None = None) -> Tensor:
    """A mask that keeps everything."""
    return torch.ones(shape, dtype=torch.bool, device=device)


def orthogonal(d: int, k: int, generator: torch.Generator) -> Tensor:
    """[d, k] with orthonormal columns, fp64."""
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q
