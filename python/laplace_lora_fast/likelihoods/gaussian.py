"""Regression with Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.likelihoods.base import Likelihood, one_label_per_output
from laplace_lora_fast.options import positive_number, register


@register
@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Independent Gaussian noise; labels are real targets [N] or [N, C], functions the outputs.

    All methods are at unit noise: its square divides the curvature outside.

    Args:
        noise: its standard deviation; None to have it tuned with the prior precision.
        scales: what it is multiplied with for each of C outputs; None for one noise of all.

    Raises:
        ValueError: a value is not positive and finite.
    """

    noise: float | None = None
    scales: Sequence[float] | None = None

    name = "regression"
    has_noise = True

    def __post_init__(self) -> None:
        if self.noise is not None:
            object.__setattr__(self, "noise", positive_number("noise", self.noise))
        if self.scales is not None:
            object.__setattr__(self, "scales", tuple(positive_number("scales", each) for each in self.scales))

    @property
    def is_unit(self) -> bool:
        return self.scales is None

    def check(self, outputs: Tensor) -> None:
        if self.scales is not None and len(self.scales) != outputs.shape[1]:
            raise InvalidBatchError(
                f"scales are those of {len(self.scales)} outputs, this model gives {outputs.shape[1]}"
            )

    def of_outputs(self, like: Tensor) -> Tensor:
        """The scale of each output, [C] or a scalar 1."""
        return like.new_tensor(1.0 if self.scales is None else self.scales)

    def targets(self, labels: Tensor | None, outputs: Tensor, checks: DeferredChecks) -> Tensor | None:
        if labels is None:
            return None
        targets = one_label_per_output(labels, outputs, "real numbers").to(outputs.dtype)
        checks.require(targets.isfinite().all(), "'labels' hold a value that is not finite")
        return to_device(targets, outputs.device).clone()  # a loader may fill the same memory again

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        errors = outputs.double() - targets.double()
        return -0.5 * (errors / self.of_outputs(errors)).square().sum()

    def log_normaliser(self, count: int, noise: float) -> float:
        """What a noise scale adds to minus the log-likelihood of `count` scalar targets."""
        scales = [1.0] if self.scales is None else self.scales
        mean_log = sum(math.log(scale) for scale in scales) / len(scales)
        return count * (math.log(noise * math.sqrt(2 * math.pi)) + mean_log)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self.of_outputs(outputs).square()

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        return outputs + self.of_outputs(outputs) * to_device(noise.to(outputs.dtype), outputs.device)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        n, size = outputs.shape
        unit = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
        return (unit / self.of_outputs(outputs)).expand(n, size, size)

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
        scales = self.of_outputs(cov.double())
        variance = cov.double().diagonal(dim1=-2, dim2=-1) / scales.square()
        squares = ((targets - mean).double() / scales).square()
        shift = scales.log().expand(cov.shape[-1]).sum()  # of densities of targets, not of scaled ones
        if noise is not None:
            return _score(squares, variance + noise**2) + shift, None
        best = (squares / (variance + 1)).mean((-2, -1)).sqrt()
        return _score(squares, (variance + 1) * best[:, None, None] ** 2) + shift, best

    def noise_variance(self, noise: float, like: Tensor) -> Tensor:
        return (noise * self.of_outputs(like)).square()

    def uncertainty(
        self, mean: Tensor, cov: Tensor, n_samples: int | None, generator: torch.Generator, noise: float
    ) -> tuple[Tensor, Tensor]:
        """Variances [N, C] of the targets, in closed form: with that of the outputs, and the noise alone."""
        if n_samples is not None:
            raise ValueError("the uncertainty of a regression is in closed form: leave n_samples out")
        variance = cov.double().diagonal(dim1=-2, dim2=-1)
        aleatoric = self.noise_variance(noise, variance).expand_as(variance)
        return variance + aleatoric, aleatoric


def _score(squares: Tensor, variance: Tensor) -> Tensor:
    terms = squares / variance + (2 * math.pi * variance).log()
    return 0.5 * terms.sum(-1).mean(-1)
