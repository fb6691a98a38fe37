"""The prior precision by the marginal likelihood of the training data.

log p(D) = log p(D | theta) - 1/2 [ sum_weights lambda ||theta - mean||^2 + logdet(H + Lambda) - logdet Lambda ]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.errors import NotFittedError, NumericalError
from laplace_lora_fast.fitting.fit import Fit
from laplace_lora_fast.likelihoods import Gaussian, Likelihood
from laplace_lora_fast.options import check_choice, register
from laplace_lora_fast.prior.precision import PER, from_groups, group_keys
from laplace_lora_fast.prior.tuning import Fitted, Tuned, Tuning


@register
@dataclass(frozen=True)
class Evidence(Tuning):
    """Maximises the marginal likelihood: milliseconds, no model pass, but a poor guide once an adapter interpolates.

    Args:
        per: "all" for one prior precision, "side" for one for all lora_A, one for all lora_B and one for trained
            heads, "head" for one for all LoRA weights and one for trained heads, "layer" for one a layer.
            Only "all" with `Rows(refit=True)`.

    Raises:
        NotFittedError: the fit saw batches without labels, and the noise of a regression is to be tuned.
        NumericalError: the evidence has no maximum.
        ValueError: `per` is not one of its choices.
    """

    per: str = "all"

    def __post_init__(self) -> None:
        check_choice("per", self.per, PER)

    def choose(self, fitted: Fitted, progress: bool) -> Tuned:
        keys = group_keys(self.per, fitted.fit.curvature.names)
        evidence = MarginalLikelihood(fitted.fit, fitted.prior_mean, fitted.likelihood)
        if not fitted.tunes_noise:
            return Tuned(from_groups(evidence.maximise(keys, fitted.noise)))
        best, noise = evidence.maximise_with_noise(keys)
        return Tuned(from_groups(best), noise)


@dataclass(frozen=True)
class MarginalLikelihood:
    """What the marginal likelihood is made of.

    Attributes:
        fit: the fit, at unit noise.
        prior_mean: of each weight, or None for zero.
        likelihood: of the outputs.

    Raises:
        ValueError: there is no evidence.
    """

    fit: Fit
    prior_mean: Sequence[Tensor] | None
    likelihood: Likelihood

    def __post_init__(self) -> None:
        if self.likelihood.sampled:
            raise ValueError(
                "there is no evidence for Tokens: log-determinants of a curvature estimated with few sampled labels "
                "are too small, by how much depends on the data; pass HeldOut(loader)"
            )

    def at(self, prior_precision: Tensor, noise: float | None) -> Tensor:
        """Laplace's estimate, fp64 scalar.

        Args:
            prior_precision: of each weight, fp64 [n_weights].
            noise: of a regression.

        Raises:
            NotFittedError: the fit saw batches without labels.
        """
        penalty = (prior_precision * torch.tensor(self.squared_norms(), dtype=torch.float64)).sum()
        curvature = self.fit.curvature.scaled(_scale(noise))
        return curvature.log_marginal_likelihood(prior_precision, self._log_likelihood(noise), float(penalty))

    def maximise(self, keys: Sequence[str], noise: float | None) -> dict[str, float]:
        """The best prior precision of each group at a given noise.

        Args:
            keys: for each weight the key of its group.
            noise: of a regression.

        Raises:
            NumericalError: the evidence has no maximum; names the group.
        """
        return self.fit.curvature.scaled(_scale(noise)).maximise_evidence(keys, self.squared_norms())

    def maximise_with_noise(self, keys: Sequence[str]) -> tuple[dict[str, float], float]:
        """The best prior precision of each group and the best noise, together.

        Coordinate ascent from noise 1: each step is the exact maximum over one of the two. A curvature whose evidence
        is not the trained model's, a refitted one, does both in its own way.

        Raises:
            NotFittedError: the fit saw batches without labels.
            NumericalError: the evidence has no maximum.
        """
        both = self.fit.curvature.maximise_evidence_with_noise(keys)
        if both is not None:
            return both
        noise = 1.0
        for _ in range(500):
            best, before = self.maximise(keys, noise), noise
            noise = self.best_noise(torch.tensor([best[key] for key in keys], dtype=torch.float64))
            if abs(math.log(noise / before)) < 1e-12:
                break
        return self.maximise(keys, noise), noise

    def best_noise(self, prior_precision: Tensor) -> float:
        """The noise that maximises the evidence at a prior precision, fp64 [n_weights].

        Raises:
            NotFittedError: the fit saw batches without labels.
            NumericalError: the model interpolates its targets.
        """
        residuals, count = -2 * self._known_log_likelihood(), self._n_targets
        if not residuals > 0:
            raise NumericalError(
                "the model interpolates its targets: the evidence has no maximum in the noise; pass "
                "Regression(noise=..)"
            )
        return self.fit.curvature.best_noise(prior_precision, residuals, count)

    def squared_norms(self) -> list[float]:
        """||theta - prior mean||^2 of each weight."""
        weights = self.fit.curvature.means
        means = self.prior_mean or [torch.zeros((), dtype=torch.float64)] * len(weights)
        return [
            float((weight.double() - mean.to(weight.device).double()).square().sum())
            for weight, mean in zip(weights, means, strict=True)
        ]

    @property
    def _n_targets(self) -> int:
        return self.fit.n_examples * self.fit.n_outputs

    def _known_log_likelihood(self) -> float:
        if self.fit.log_likelihood is None:
            raise NotFittedError(
                "the evidence needs 'labels' in every batch of train_loader: fit again with them"
            )
        return self.fit.log_likelihood

    def _log_likelihood(self, noise: float | None) -> float:
        if noise is None:
            return self._known_log_likelihood()
        normaliser = getattr(self.likelihood, "log_normaliser", Gaussian().log_normaliser)(
            self._n_targets, noise
        )
        return self._known_log_likelihood() / noise**2 - float(normaliser)


def _scale(noise: float | None) -> float:
    return 1.0 if noise is None else 1 / noise**2
