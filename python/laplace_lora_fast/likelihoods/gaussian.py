"""Regression with Gaussian noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.likelihoods.base import Likelihood, one_label_per_output
from laplace_lora_fast.options import positive_number, register


@register
@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Independent Gaussian noise of one scale; labels are real targets [N] or [N, C], functions the outputs.

    All methods are at unit noise: the scale divides the curvature outside.

    Args:
        noise: its standard deviation; None to have it tuned with the prior precision.
    """

    noise: float | None = None

    name = "regression"
    has_noise = True

    def __post_init__(self) -> None:
        if self.noise is not None:
            object.__setattr__(self, "noise", positive_number("noise", self.noise))

    def targets(self, labels: Tensor | None, outputs: Tensor, checks: DeferredChecks) -> Tensor | None:
        if labels is None:
            return None
        targets = one_label_per_output(labels, outputs, "real numbers").to(outputs.dtype)
        checks.require(targets.isfinite().all(), "'labels' hold a value that is not finite")
        return to_device(targets, outputs.device).clone()  # a loader may fill the same memory again

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -0.5 * (outputs.double() - targets.double()).square().sum()

    @staticmethod
    def log_normaliser(count: int, noise: float) -> float:
        """What a noise scale adds to minus the log-likelihood of `count` scalar targets."""
        return count * math.log(noise * math.sqrt(2 * math.pi))

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        return outputs + to_device(noise.to(outputs.dtype), outputs.device)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        n, size = outputs.shape
        return torch.eye(size, dtype=outputs.dtype, device=outputs.device).expand(n, size, size)

    def answer(
        self, mean: Tensor, cov: Tensor, link: str | None, n_samples: int, generator: torch.Generator
    ) -> Tensor:
        """The mean [.., N, C], under every covariance."""
        return mean.expand(*cov.shape[:-1])

    def plain_answer(self, outputs: Tensor) -> Tensor:
        return outputs

    def score(
        self,
        mean: Tensor,
        cov: Tensor,
        targets: Tensor,
        link: str | None,
        n_samples: int,
        generator: torch.Generator,
        noise: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Marginal in each output.

        At unit noise and prior precision mu the curvature's covariance is V, say; at noise s and precision mu / s^2 it
        is s^2 V, and the mean is the same. So the best s for each mu is in closed form: s^2 is the mean of
        (y - f)^2 / (V + 1).
        """
        variance = cov.double().diagonal(dim1=-2, dim2=-1)
        squares = (targets - mean).double().square()
        if noise is not None:
            return _score(squares, variance + noise**2), None
        best = (squares / (variance + 1)).mean((-2, -1)).sqrt()
        return _score(squares, (variance + 1) * best[:, None, None] ** 2), best

    def uncertainty(
        self, mean: Tensor, cov: Tensor, n_samples: int | None, generator: torch.Generator, noise: float
    ) -> tuple[Tensor, Tensor]:
        """Variances [N, C] of the targets, in closed form: with that of the outputs, and the noise alone."""
        if n_samples is not None:
            raise ValueError("the uncertainty of a regression is in closed form: leave n_samples out")
        variance = cov.double().diagonal(dim1=-2, dim2=-1)
        aleatoric = torch.full_like(variance, noise**2)
        return variance + aleatoric, aleatoric


def _score(squares: Tensor, variance: Tensor) -> Tensor:
    terms = squares / variance + (2 * math.pi * variance).log()
    return 0.5 * terms.sum(-1).mean(-1)
