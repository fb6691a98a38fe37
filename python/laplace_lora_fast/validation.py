"""Choosing the prior precision by held-out likelihood: one pass over the validation data, no model pass per value."""

from __future__ import annotations

import itertools
import math
import warnings

import torch
from torch import Tensor

from laplace_lora_fast.errors import LaplaceWarning
from laplace_lora_fast.likelihoods import Link, probabilities

DEFAULT_GRID = tuple(torch.logspace(-4, 6, 101, dtype=torch.float64).tolist())


def best_prior_precision(nll: Tensor, grid: Tensor) -> list[float]:
    """The grid values at the minimum of a table of held-out NLL with one axis per prior group.

    Warns:
        LaplaceWarning: the minimum lies on the edge of the grid.
    """
    flat = int(nll.argmin())
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), nll.shape)]
    if any(i in (0, len(grid) - 1) for i in place):
        warnings.warn(
            f"the best prior precision lies on the edge of the grid [{grid[0]:g}, {grid[-1]:g}]: widen it",
            LaplaceWarning,
            stacklevel=4,
        )
    return [float(grid[i]) for i in place]


def classification_nll(
    mean: Tensor, parts: Tensor, labels: Tensor, link: Link, n_samples: int, generator: torch.Generator
) -> Tensor:
    """Mean held-out NLL for every combination of grid values.

    Args:
        mean: [N, C - 1] contrasts.
        parts: [parts, G, N, C - 1, C - 1] covariance of each prior group at each grid value; they add up.
        labels: [N].
        link: predictive link.
        n_samples: of the Monte-Carlo link.
        generator: of the Monte-Carlo link.

    Returns:
        fp64, one axis of length G per part.
    """
    state = generator.get_state()

    def nll(cov: Tensor) -> Tensor:
        generator.set_state(state)  # common random numbers: the curve is smooth in the prior precision
        probs = probabilities(link, mean, cov, n_samples, generator).double()
        return -probs[:, torch.arange(len(labels)), labels].log().mean(-1)

    return _table(parts, nll)


def regression_nll(mean: Tensor, parts: Tensor, targets: Tensor, sigma_noise: float) -> Tensor:
    """Mean held-out Gaussian NLL (marginal per output) for every combination of grid values; as above."""

    def nll(cov: Tensor) -> Tensor:
        variance = cov.double().diagonal(dim1=-2, dim2=-1) + sigma_noise**2
        return 0.5 * ((targets - mean).double().square() / variance + (2 * math.pi * variance).log()).sum(
            -1
        ).mean(-1)

    return _table(parts, nll)


def _table(parts: Tensor, nll: object) -> Tensor:
    """Evaluates `nll` [G, ...] -> [G] on every sum of one covariance per part, the last part's axis at once."""
    *leading, last = parts
    shape = [part.shape[0] for part in parts]
    rows = [nll(last + sum(choice)) for choice in itertools.product(*leading)]  # type: ignore[operator]
    return torch.stack(rows).reshape(shape)
