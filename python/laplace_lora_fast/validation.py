"""Choosing the prior precision by the likelihood of data the posterior has not seen: held out, or left out one by one.

One pass over the validation data, none over the training data; no model pass per value.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.errors import InvalidBatchError, LaplaceWarning
from laplace_lora_fast.likelihoods import Link, probabilities
from laplace_lora_fast.predictive import LinearisedModel, distribution
from laplace_lora_fast.progress import track
from laplace_lora_fast.refit import RefittedCurvature

DEFAULT_GRID = tuple(torch.logspace(-4, 6, 101, dtype=torch.float64).tolist())
_CHUNK = 64  # priors integrated at a time


def minimise_nll(
    linearised: LinearisedModel,
    keys: Sequence[str],
    loader: Iterable[Mapping[str, Any]],
    cotangents: Tensor,
    grid: Sequence[float],
    link: Link,
    n_samples: int,
    sigma_noise: float,
    seed: int,
    progress: bool,
) -> dict[str, float]:
    """The prior precision of each group, among all combinations of grid values, with the least held-out NLL.

    Args:
        linearised: the model and its curvature.
        keys: for each block the key of its group; at most two groups.
        loader: labelled batches.
        cotangents: [C, K], contrasts or outputs.
        grid: ascending values.
        link: predictive link of a classification.
        n_samples: of the Monte-Carlo link.
        sigma_noise: of a regression.
        seed: of the Monte-Carlo link.
        progress: show a bar.

    Warns:
        LaplaceWarning: the minimum lies on the edge of the grid.

    Raises:
        InvalidBatchError: the loader is empty, or without labels.
        ValueError: the grid is not ascending and positive, or there are more than two groups.
    """
    _check_grid(grid)
    groups = list(dict.fromkeys(keys))
    if len(groups) > 2:
        raise ValueError(
            "method='val_nll' tunes prior_structure 'scalar' or 'ab': few examples decide no more"
        )
    choices = torch.tensor(list(itertools.product(grid, repeat=len(groups))), dtype=torch.float64)
    precisions = choices.mT[[groups.index(key) for key in keys]]  # [n_blocks, G^groups]
    mean, cov, labels = distribution(linearised, precisions, loader, cotangents, "validate", progress)
    if labels is None:
        raise InvalidBatchError("method='val_nll' needs 'labels' in every batch of val_loader")
    if linearised.likelihood.name == "regression":
        nll = _regression_nll(mean, cov, labels, sigma_noise)
    else:
        means = mean.expand(len(cov), *mean.shape[-2:])
        chunks = [
            _classification_nll(mu, part, labels, link, n_samples, seed)
            for mu, part in zip(means.split(_CHUNK), cov.split(_CHUNK), strict=True)
        ]
        nll = torch.cat(chunks)
    best = choices[nll.argmin()].tolist()
    _warn_of_edge(best, grid)
    return dict(zip(groups, best, strict=True))


def minimise_loo_nll(
    curvature: RefittedCurvature,
    grid: Sequence[float],
    link: Link,
    n_samples: int,
    seed: int,
    progress: bool,
) -> float:
    """The prior precision of all blocks, among grid values, with the least leave-one-out NLL of the training data.

    Args:
        curvature: refitted at each value: a few factorisations of an [R, R] matrix, no model pass.
        grid: ascending values.
        link: predictive link of a classification.
        n_samples: of the Monte-Carlo link.
        seed: of the Monte-Carlo link.
        progress: show a bar.

    Warns:
        LaplaceWarning: the minimum lies on the edge of the grid.

    Raises:
        NumericalError: a refit does not converge.
        ValueError: the grid is not ascending and positive.
    """
    _check_grid(grid)
    observed, ones = curvature.observed, torch.ones(len(curvature.names), dtype=torch.float64)
    nll = {}
    for value in track(grid, "leave one out", progress):
        mean, cov = curvature.leave_one_out(value * ones)
        if observed.is_classification:
            nll[value] = _classification_nll(mean, cov[None], observed.targets, link, n_samples, seed)
        else:
            nll[value] = _regression_nll(mean, cov[None], observed.targets, observed.precision**-0.5)
    best = min(nll, key=lambda value: float(nll[value]))
    _warn_of_edge([best], grid)
    return best


def _check_grid(grid: Sequence[float]) -> None:
    if len(grid) < 2 or any(a >= b for a, b in pairwise(grid)) or not (grid[0] > 0 and grid[-1] < math.inf):
        raise ValueError("grid must hold at least two ascending positive values")


def _warn_of_edge(best: Sequence[float], grid: Sequence[float]) -> None:
    if any(value in (grid[0], grid[-1]) for value in best):
        warnings.warn(
            f"the best prior precision lies on the edge of the grid [{grid[0]:g}, {grid[-1]:g}]: widen it",
            LaplaceWarning,
            stacklevel=4,
        )


def _classification_nll(
    mean: Tensor, cov: Tensor, labels: Tensor, link: Link, n_samples: int, seed: int
) -> Tensor:
    """Mean NLL [G] under contrasts N(mean [(G,) N, K], cov [G, N, K, K]); the same noise for every prior."""
    probs = probabilities(link, mean, cov, n_samples, torch.Generator().manual_seed(seed)).double()
    return -probs[:, torch.arange(len(labels)), labels].log().mean(-1)


def _regression_nll(mean: Tensor, cov: Tensor, targets: Tensor, sigma_noise: float) -> Tensor:
    """Mean Gaussian NLL [G], marginal per output."""
    variance = cov.double().diagonal(dim1=-2, dim2=-1) + sigma_noise**2
    terms = (targets - mean).double().square() / variance + (2 * math.pi * variance).log()
    return 0.5 * terms.sum(-1).mean(-1)
