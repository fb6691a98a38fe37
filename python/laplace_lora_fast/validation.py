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

from laplace_lora_fast.errors import InvalidBatchError, LaplaceWarning, NumericalError
from laplace_lora_fast.likelihoods import Link, probabilities
from laplace_lora_fast.predictive import LinearisedModel, distribution
from laplace_lora_fast.prior import require_representable
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
        NumericalError: an NLL is not a number, or none is finite.
        ValueError: the grid is not ascending and positive, or there are more than two groups.
    """
    grid = _checked_grid(grid, linearised.sites[0].A.dtype)
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
    best = choices.tolist()[_least(nll, choices.tolist())]
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
        NumericalError: a refit does not converge, or an NLL is not a number.
        ValueError: the grid is not ascending and positive.
    """
    grid = _checked_grid(grid, curvature.observed.prior_outputs.dtype)
    observed, ones = curvature.observed, torch.ones(len(curvature.names), dtype=torch.float64)
    nll = []
    for value in track(grid, "leave one out", progress):
        mean, cov = curvature.leave_one_out(value * ones)
        if observed.is_classification:
            nll.append(_classification_nll(mean, cov[None], observed.targets, link, n_samples, seed))
        else:
            nll.append(_regression_nll(mean, cov[None], observed.targets, observed.precision**-0.5))
    best = grid[_least(torch.cat(nll), grid)]
    _warn_of_edge([best], grid)
    return best


def _checked_grid(grid: Iterable[float], dtype: torch.dtype) -> list[float]:
    """Python floats. Raises ValueError unless they ascend and predictions in `dtype` can use them."""
    values = [float(value) for value in grid]
    if (
        len(values) < 2
        or not all(a < b for a, b in pairwise(values))
        or not 0 < values[0] < values[-1] < math.inf
    ):
        raise ValueError("grid must hold at least two ascending positive values")
    require_representable(values[0], dtype)
    return values


def _least(nll: Tensor, tried: Sequence[object]) -> int:
    """Where the NLL [G] is least. Raises NumericalError if one is NaN, or none is finite."""
    for index in nll.isnan().nonzero().flatten().tolist():
        raise NumericalError(f"the negative log-likelihood at prior precision {tried[index]} is not a number")
    best = int(nll.argmin())
    if not nll[best].isfinite():
        raise NumericalError("the negative log-likelihood is infinite at every value of the grid")
    return best


def _warn_of_edge(best: Sequence[float], grid: Sequence[float]) -> None:
    """The upper edge has a meaning of its own: the better the smaller the uncertainty."""
    if grid[-1] in best:
        what = "the mean's own predictions with hardly any uncertainty; there may be larger ones as good"
    elif grid[0] in best:
        what = "there may be better ones below"
    else:
        return
    warnings.warn(
        f"the best prior precision lies on the edge of the grid [{grid[0]:g}, {grid[-1]:g}]: {what}",
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
