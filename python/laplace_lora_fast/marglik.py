"""The marginal likelihood of a fit, and the prior precision and noise that maximise it.

log p(D) = log p(D | theta) - 1/2 [ sum_blocks lambda ||theta - mean||^2 + logdet(H + Lambda) - logdet Lambda ]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.errors import NotFittedError, NumericalError
from laplace_lora_fast.evidence import evidence_noise
from laplace_lora_fast.fit import Fit


@dataclass(frozen=True)
class Evidence:
    """What the marginal likelihood is made of.

    Attributes:
        fit: the fit, at unit noise.
        prior_mean: of each block, or None for zero.
        regression: whether the likelihood is Gaussian, with a noise scale.
    """

    fit: Fit
    prior_mean: Sequence[Tensor] | None
    regression: bool

    def log_marginal_likelihood(self, prior_precision: Tensor, sigma_noise: float) -> Tensor:
        """fp64 scalar.

        Args:
            prior_precision: of each block, fp64 [n_blocks].
            sigma_noise: of a regression.

        Raises:
            NotFittedError: the fit saw batches without labels.
        """
        penalty = (prior_precision * torch.tensor(self.squared_norms(), dtype=torch.float64)).sum()
        curvature = self.fit.curvature.scaled(self._scale(sigma_noise))
        return curvature.log_marginal_likelihood(
            prior_precision, self._log_likelihood(sigma_noise), float(penalty)
        )

    def maximise(self, keys: Sequence[str], sigma_noise: float) -> dict[str, float]:
        """The best prior precision of each group at a given noise.

        Args:
            keys: for each block the key of its group.
            sigma_noise: of a regression.

        Raises:
            NumericalError: the evidence has no maximum; names the group.
        """
        curvature = self.fit.curvature.scaled(self._scale(sigma_noise))
        return curvature.maximise_evidence(keys, self.squared_norms())

    def maximise_with_noise(self, keys: Sequence[str], sigma_noise: float) -> tuple[dict[str, float], float]:
        """The best prior precision of each group and the best noise, together.

        Coordinate ascent from `sigma_noise`: each step is the exact maximum over one of the two.

        Raises:
            NotFittedError: the fit saw batches without labels.
            NumericalError: the evidence has no maximum.
        """
        residuals, count = -2 * self._known_log_likelihood(), self.fit.n_examples * self.fit.n_outputs
        if not residuals > 0:
            raise NumericalError(
                "the model interpolates its targets: the evidence has no maximum in sigma_noise"
            )
        for _ in range(500):
            best, before = self.maximise(keys, sigma_noise), sigma_noise
            precisions = torch.tensor([best[key] for key in keys], dtype=torch.float64)
            sigma_noise = evidence_noise(*self.fit.curvature.whitened_spectrum(precisions), residuals, count)
            if abs(math.log(sigma_noise / before)) < 1e-12:
                break
        return self.maximise(keys, sigma_noise), sigma_noise

    def squared_norms(self) -> list[float]:
        """||theta - prior mean||^2 of each block."""
        weights = self.fit.curvature.means
        means = self.prior_mean or [torch.zeros((), dtype=torch.float64)] * len(weights)
        return [
            float((weight.double() - mean.to(weight.device).double()).square().sum())
            for weight, mean in zip(weights, means, strict=True)
        ]

    def _scale(self, sigma_noise: float) -> float:
        return 1 / sigma_noise**2 if self.regression else 1.0

    def _known_log_likelihood(self) -> float:
        if self.fit.log_likelihood is None:
            raise NotFittedError(
                "the evidence needs 'labels' in every batch of train_loader: fit again with them"
            )
        return self.fit.log_likelihood

    def _log_likelihood(self, sigma_noise: float) -> float:
        if not self.regression:
            return self._known_log_likelihood()
        count = self.fit.n_examples * self.fit.n_outputs
        normaliser = count * math.log(sigma_noise * math.sqrt(2 * math.pi))
        return self._known_log_likelihood() / sigma_noise**2 - normaliser
