"""Choosing among values of a grid by the likelihood of data that a prediction has not seen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from laplace_lora_fast.errors import LaplaceWarning, NumericalError
from laplace_lora_fast.likelihoods import Likelihood
from laplace_lora_fast.options import check_choice, positive_integer
from laplace_lora_fast.prediction import Block
from laplace_lora_fast.prior.precision import require_representable

DEFAULT_GRID = tuple(torch.logspace(-4, 6, 101, dtype=torch.float64).tolist())
DEFAULT_SAMPLES = 1000
_CHUNK = 64  # priors integrated at a time


def checked_link(
    likelihood: Likelihood, link: str | None, n_samples: int | None, also: Sequence[str] = ()
) -> tuple[str | None, int]:
    """The link by its name and its number of samples.

    Args:
        likelihood: whose links there are.
        link: None for its default.
        n_samples: None for the default number.
        also: more names that are allowed where there are links.

    Raises:
        ValueError: the likelihood has no such link, or the link does not sample.
    """
    if not likelihood.links:
        if link is not None or n_samples is not None:
            raise ValueError(
                f"{type(likelihood).__name__} predictions have no link: leave out link_approx and n_samples"
            )
        return None, DEFAULT_SAMPLES
    name = (
        likelihood.links[0] if link is None else check_choice("link_approx", link, [*likelihood.links, *also])
    )
    if n_samples is None:
        return name, DEFAULT_SAMPLES
    if name not in likelihood.needs_samples:
        raise ValueError(f"n_samples has no effect on link_approx={name!r}: leave it out, or use 'mc'")
    return name, positive_integer("n_samples", n_samples)


def checked_grid(grid: Iterable[float] | None, dtype: torch.dtype) -> list[float]:
    """Python floats. Raises ValueError unless they ascend and predictions in `dtype` can use them."""
    values = [float(value) for value in (DEFAULT_GRID if grid is None else grid)]
    if (
        len(values) < 2
        or not all(a < b for a, b in pairwise(values))
        or not 0 < values[0] < values[-1] < math.inf
    ):
        raise ValueError("grid must hold at least two ascending positive values")
    require_representable(values[0], dtype)
    return values


def scores(
    likelihood: Likelihood,
    blocks: Iterable[Block],
    link: str | None,
    n_samples: int,
    seed: int,
    noise: float | None,
) -> tuple[Tensor, Tensor | None]:
    """NLL [G] of all blocks together, and the best noise [G] where it is open; the same samples for every prior."""
    nlls, counts, best = [], [], None
    for block in blocks:
        assert block.targets is not None
        means = block.mean.expand(len(block.cov), *block.mean.shape[-2:])
        chunks = [
            likelihood.score(
                mean, cov, block.targets, link, n_samples, torch.Generator().manual_seed(seed), noise
            )
            for mean, cov in zip(means.split(_CHUNK), block.cov.split(_CHUNK), strict=True)
        ]
        nlls.append(torch.cat([nll for nll, _ in chunks]))
        counts.append(len(block.examples))
        noises = [each for _, each in chunks if each is not None]
        best = torch.cat(noises) if noises else None
    if len(nlls) == 1:
        return nlls[0], best
    weights = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return torch.einsum("bg,b->g", torch.stack(nlls).cpu(), weights), best


def least(nll: Tensor, tried: Sequence[object]) -> int:
    """Where the NLL [G] is least. Raises NumericalError if one is NaN, or none is finite."""
    for index in nll.isnan().nonzero().flatten().tolist():
        raise NumericalError(f"the negative log-likelihood at prior precision {tried[index]} is not a number")
    best = int(nll.argmin())
    if not nll[best].isfinite():
        raise NumericalError("the negative log-likelihood is infinite at every value of the grid")
    return best


def warn_of_edge(best: Sequence[float], grid: Sequence[float]) -> None:
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
        stacklevel=5,
    )
