"""The prior precision by leaving out one training example at a time: no held-out data, no model pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from laplace_lora_fast.options import register
from laplace_lora_fast.prediction import Block
from laplace_lora_fast.prior.grid import checked_grid, checked_link, least, scores, warn_of_edge
from laplace_lora_fast.prior.tuning import Fitted, Tuned, Tuning
from laplace_lora_fast.progress import track
from laplace_lora_fast.structures.base import Ability


@register
@dataclass(frozen=True)
class LeaveOneOut(Tuning):
    """Minimises the leave-one-out negative log-likelihood of the training examples over a grid.

    Needs a structure that refits, `Rows(refit=True)`. Good on the language model of the demo; on an encoder with a
    freshly initialised head it chose precisions 30 to 100 times too large, because a trained kernel has learnt its
    labels: prefer `HeldOut` where there are data to hold out.

    Args:
        grid: ascending values; None for 1e-4 to 1e6, ten a decade. Of a regression with open noise they are products
            of prior precision and noise variance.
        link_approx: predictive link of a classification; None for "probit".
        n_samples: of the "mc" link.

    Warns:
        LaplaceWarning: the minimum lies on the edge of the grid.

    Raises:
        NumericalError: a refit does not converge, or an NLL is not a number.
        ValueError: the structure cannot leave examples out, or an argument would not be looked at.
    """

    grid: Sequence[float] | None = None
    link_approx: str | None = None
    n_samples: int | None = None

    def __post_init__(self) -> None:
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(float(value) for value in self.grid))

    def choose(self, fitted: Fitted, progress: bool) -> Tuned:
        structure = fitted.fit.structure
        if Ability.LEAVE_ONE_OUT not in structure.abilities:
            raise ValueError(f"LeaveOneOut needs structure=Rows(refit=True), the fit has {structure!r}")
        link, n_samples = checked_link(fitted.likelihood, self.link_approx, self.n_samples)
        grid = checked_grid(self.grid, torch.float64)
        noise = None if fitted.tunes_noise else fitted.noise
        unit = fitted.fit.curvature
        curvature = unit if noise is None else unit.scaled(noise**-2)
        ones = torch.ones(len(unit.names), dtype=torch.float64)
        nlls, noises = [], []
        for value in track(grid, "leave one out", progress):
            left_out = curvature.leave_one_out(value * ones)  # type: ignore[attr-defined]
            blocks = [Block(examples, mean, cov[None], targets) for examples, mean, cov, targets in left_out]
            nll, best = scores(fitted.likelihood, blocks, link, n_samples, fitted.seed, noise)
            nlls.append(nll)
            noises.append(best)
        index = least(torch.cat(nlls), grid)
        warn_of_edge([grid[index]], grid)
        tuned_noise = noises[index]
        if tuned_noise is None:
            return Tuned(grid[index])
        return Tuned(grid[index] / float(tuned_noise) ** 2, float(tuned_noise))
