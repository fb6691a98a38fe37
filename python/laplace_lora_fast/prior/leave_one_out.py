"""The prior precision by leaving out one training example at a time: no held-out data, no model pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from laplace_lora_fast.errors import LaplaceWarning, NumericalError
from laplace_lora_fast.options import register
from laplace_lora_fast.prediction import Block
from laplace_lora_fast.prior.evidence import Evidence
from laplace_lora_fast.prior.grid import checked_grid, checked_link, least, scores, warn_of_edge
from laplace_lora_fast.prior.tuning import Fitted, Tuned, Tuning
from laplace_lora_fast.structures.base import Ability
from laplace_lora_fast.structures.search import lowest

# So many times the evidence's precision say that the kernel may have learnt its labels. Measured: 26 to 53 on five
# over-trained encoders, where leave-one-out was clearly worse than the evidence; 11 at most on their ten shorter
# trainings, and 14 on nine of a language model, where it was better.
SUSPICIOUS = 20


@register
@dataclass(frozen=True)
class LeaveOneOut(Tuning):
    """Minimises the leave-one-out negative log-likelihood of the training examples over a grid, coarse to fine.

    Needs a structure that refits, `Rows(refit=True)`. Good on the language model of the demo; on an encoder with a
    freshly initialised head it chose precisions 30 to 100 times too large, because a trained kernel has learnt its
    labels: prefer `HeldOut` where there are data to hold out.

    Args:
        grid: ascending values; None for 1e-4 to 1e6, ten a decade. Of a regression with open noise they are products
            of prior precision and noise variance.
        link_approx: predictive link of a classification; None for "probit".
        n_samples: of the "mc" link.

    Warns:
        LaplaceWarning: the minimum lies on the edge of the grid, or far above the evidence's: see `SUSPICIOUS`.

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
        """Of the default grid about a fifth is looked at."""
        structure = fitted.fit.structure
        if Ability.LEAVE_ONE_OUT not in structure.abilities:
            raise ValueError(f"LeaveOneOut needs structure=Rows(refit=True), the fit has {structure!r}")
        link, n_samples = checked_link(fitted.likelihood, self.link_approx, self.n_samples)
        grid = checked_grid(self.grid, torch.float64)
        noise = None if fitted.tunes_noise else fitted.noise
        unit = fitted.fit.curvature
        curvature = unit if noise is None else unit.scaled(noise**-2)
        left_out = structure.left_out(curvature)
        found: dict[int, tuple[float, float | None]] = {}  # by place in the grid: NLL, best noise

        def nll_at(place: int) -> float:
            gaussians = left_out(grid[place])
            blocks = [Block(examples, mean, cov[None], targets) for examples, mean, cov, targets in gaussians]
            nll, best = scores(fitted.likelihood, blocks, link, n_samples, fitted.seed, noise)
            found[place] = float(nll), None if best is None else float(best)
            return float(nll)

        index = lowest(nll_at, len(grid))
        tried = sorted(found)
        least(torch.tensor([found[place][0] for place in tried]), [grid[place] for place in tried])
        warn_of_edge([grid[index]], grid)
        tuned_noise = found[index][1]
        chosen = grid[index] if tuned_noise is None else grid[index] / tuned_noise**2
        warn_of_leak(chosen, fitted)
        return Tuned(chosen, tuned_noise)


def warn_of_leak(chosen: float, fitted: Fitted) -> None:
    """A precision far above the evidence's says that examples which are left out have stayed in the kernel."""
    try:
        by_evidence = Evidence().choose(fitted, progress=False).prior_precision
    except NumericalError:  # there is none to compare with
        return
    assert isinstance(by_evidence, float)
    if chosen > SUSPICIOUS * by_evidence:
        warnings.warn(
            f"leave-one-out chose the prior precision {chosen:.3g}, {chosen / by_evidence:.0f} times the evidence's "
            f"{by_evidence:.3g}: the kernel of the trained model may have learnt the labels that were left out. Take "
            "Evidence(), CrossFit(..) or, with held-out data, HeldOut(..), or compare their precisions on such data",
            LaplaceWarning,
            stacklevel=2,
        )
