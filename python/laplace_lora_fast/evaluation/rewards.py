"""Scores of groups of sequences with their uncertainty: which is the best, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rewards:
    """For each example the Gaussian over the scores of its C sequences; C may differ.

    Scores are known up to a shift that an example's sequences have in common: comparisons, which are all that a model
    is trained on, do not determine it. `mean`, `sd` and `lower_bound` of single scores include that shift with its
    uncertainty, the prior's where nothing tells; differences, `best_probability` and the correlations in `covariance`
    do not suffer from it.

    Attributes:
        mean: [C] of each example, fp64 on the CPU.
        covariance: [C, C] of each example.
    """

    mean: list[Tensor]
    covariance: list[Tensor]

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):
            value = [each.detach().cpu().double() for each in getattr(self, name)]
            object.__setattr__(self, name, value)

    @classmethod
    def of_groups(cls, groups: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Rewards:
        """From examples with equally many sequences: their places [N_c], means [N_c, C] and covariances [N_c, C, C]."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for places, means, covariances in groups:
            found.update(zip(places.tolist(), zip(means, covariances, strict=True), strict=True))
        ordered = [found[place] for place in sorted(found)]
        return cls([mean for mean, _ in ordered], [covariance for _, covariance in ordered])

    @property
    def sd(self) -> list[Tensor]:
        """Standard deviation of each score, [C] of each example."""
        return [covariance.diagonal().clamp_min(0).sqrt() for covariance in self.covariance]

    def best_probability(self, n_samples: int = 10_000, seed: int = 0) -> list[Tensor]:
        """The probability of each sequence to have the highest score of its group, [C] of each example.

        Args:
            n_samples: drawn from the joint Gaussian of each group; the error is at most 0.5 / sqrt(n_samples).
            seed: of the draws, the same for every example: a result does not depend on the others.
        """
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        found = []
        for mean, covariance in zip(self.mean, self.covariance, strict=True):
            values, vectors = torch.linalg.eigh(covariance)  # unlike Cholesky, at ease with a singular one
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(n_samples, len(mean), generator=generator, dtype=torch.float64)
            scores = mean + (noise * values.clamp_min(0).sqrt()) @ vectors.mT
            found.append(torch.bincount(scores.argmax(1), minlength=len(mean)).double() / n_samples)
        return found

    def lower_bound(self, k: float) -> list[Tensor]:
        """Mean - k sd of each score, [C] of each example."""
        return [mean - k * sd for mean, sd in zip(self.mean, self.sd, strict=True)]

    def best(self, k: float = 0.0) -> Tensor:
        """Best of n: which sequence of each example has the highest lower bound, [N]; k = 0 takes the highest mean."""
        return torch.stack([bound.argmax() for bound in self.lower_bound(k)])
