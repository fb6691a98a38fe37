"""Points that stand for a Gaussian: a scrambled Sobol sequence, whose means converge faster than those of a sample."""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_POINTS = 1024


def gaussian_points(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Points [n, size] fp64 of a standard Gaussian (Owen 1998, "Scrambling Sobol' and Niederreiter-Xing points").

    Args:
        n: how many; a power of two spreads them best.
        size: of each, at most 21,201.
        generator: seeds the scrambling, on the CPU.

    Raises:
        ValueError: `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"n_samples must be at least 1, got {n}")
    seed = int(torch.randint(2**31, (), generator=generator))
    uniform = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    inside = uniform.clamp(2.0**-31, 1 - 2.0**-31)  # the engine's own resolution; 0 and 1 would be infinite
    points: Tensor = torch.special.ndtri(inside)
    return points


def gaussian_values(mean: Tensor, cov: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Values [.., N, n, K] fp64 of Gaussians N(mean [.., N, K], cov [.., N, K, K]): the same points for each."""
    values, vectors = torch.linalg.eigh(cov.double())  # unlike Cholesky, at ease with a singular covariance
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    points = gaussian_points(n, mean.shape[-1], generator).to(root.device)
    found: Tensor = mean.double()[..., None, :] + points @ root.mT
    return found
