"""Independent yes-or-no labels: multi-label classification."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.likelihoods.base import Likelihood, one_label_per_output
from laplace_lora_fast.likelihoods.draws import DEFAULT_POINTS, gaussian_points
from laplace_lora_fast.options import check_choice, register


@register
@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """A logistic likelihood of each of C labels; labels are [N, C] zeros and ones, functions the logits."""

    name = "multi_label"
    links = ("probit", "mc")
    needs_samples = ("mc",)

    def targets(self, labels: Tensor | None, outputs: Tensor, checks: DeferredChecks) -> Tensor | None:
        if labels is None:
            return None
        labels = one_label_per_output(labels, outputs, "zeros and ones")
        checks.require(((labels == 0) | (labels == 1)).all(), "'labels' must be zeros and ones")
        return to_device(labels.to(outputs.dtype), outputs.device).clone()

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -torch.nn.functional.binary_cross_entropy_with_logits(
            outputs.double(), targets.double(), reduction="sum"
        )

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sigmoid() - targets

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand(outputs.shape, generator=generator, dtype=torch.float64)
        return (to_device(noise, outputs.device) < outputs.double().sigmoid()).to(outputs.dtype)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """Diagonal, sqrt(p (1 - p)); neither factor is a difference of nearly equal numbers."""
        half = 0.5 * torch.nn.functional.logsigmoid(outputs)
        return torch.diag_embed((half + 0.5 * torch.nn.functional.logsigmoid(-outputs)).exp())

    def answer(
        self, mean: Tensor, cov: Tensor, link: str | None, n_samples: int, generator: torch.Generator
    ) -> Tensor:
        """Probability of each label [.., N, C], marginal in it.

        "probit" is MacKay's (1992): sigmoid(m / sqrt(1 + pi / 8 v)).
        """
        return self._probability(torch.ones_like(mean), mean, cov, link, n_samples, generator)

    def _probability(
        self,
        sign: Tensor,
        mean: Tensor,
        cov: Tensor,
        link: str | None,
        n_samples: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Of "yes" where `sign` is 1, of "no" where it is -1: no 1 - p, which is 0 for a p near 1."""
        link = check_choice("link_approx", link or self.links[0], self.links)
        variance = cov.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        if link == "probit":
            return (sign * mean / (1 + math.pi / 8 * variance).sqrt()).sigmoid()
        noise = torch.randn(n_samples, generator=generator, dtype=torch.float64).to(mean)
        total = torch.zeros_like(variance)
        for each in noise:  # a sample at a time: priors x examples x labels are many
            total += (sign * (mean + variance.sqrt() * each)).sigmoid()
        return total / n_samples

    def plain_answer(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def score(
        self,
        mean: Tensor,
        cov: Tensor,
        targets: Tensor,
        link: str | None,
        n_samples: int,
        generator: torch.Generator,
        noise: float | None,
    ) -> tuple[Tensor, None]:
        sign = (2 * targets - 1).double()
        of_label = self._probability(sign, mean.double(), cov.double(), link, n_samples, generator)
        return -of_label.log().sum(-1).mean(-1), None

    def uncertainty(
        self, mean: Tensor, cov: Tensor, n_samples: int | None, generator: torch.Generator, noise: float
    ) -> tuple[Tensor, Tensor]:
        """Entropies [N, C] in nats of each label, marginal in it."""
        points = gaussian_points(DEFAULT_POINTS if n_samples is None else n_samples, 1, generator).to(
            cov.device
        )
        sd = cov.double().diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        logits = mean.double()[..., None] + sd[..., None] * points[:, 0]  # [N, C, n]
        yes, no = (torch.nn.functional.logsigmoid(sign * logits) for sign in (1, -1))
        mean_yes, mean_no = (each.logsumexp(-1) - math.log(len(points)) for each in (yes, no))
        return _entropy(mean_yes, mean_no), _entropy(yes, no).mean(-1)


def _entropy(yes: Tensor, no: Tensor) -> Tensor:
    """Of log probabilities."""
    return -(yes.exp() * yes + no.exp() * no)
