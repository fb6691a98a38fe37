"""Softmax classification.

Everything works on contrasts of logits, so that what softmax cannot see (a shift of all logits) has no influence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.likelihoods.base import Likelihood
from laplace_lora_fast.likelihoods.draws import DEFAULT_POINTS, gaussian_values
from laplace_lora_fast.likelihoods.links import LINKS, SAMPLING_LINKS, probabilities
from laplace_lora_fast.options import register


@register
@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax over C >= 2 classes; labels are class indices [N], functions the contrasts f_c - f_0."""

    name = "classification"
    links: ClassVar[Sequence[str]] = LINKS
    needs_samples: ClassVar[Sequence[str]] = SAMPLING_LINKS
    gives_classes = True

    def check(self, outputs: Tensor) -> None:
        if outputs.shape[1] < 2:
            raise InvalidBatchError(
                "classification needs at least 2 logits an example, this model gives 1: pass Regression(), or "
                "Outputs with a function that returns [0, logit] for a binary classifier"
            )

    def targets(self, labels: Tensor | None, outputs: Tensor, checks: DeferredChecks) -> Tensor | None:
        if labels is None:
            return None
        n, classes = outputs.shape
        if labels.shape != (n,) or labels.is_floating_point():
            raise InvalidBatchError(
                f"'labels' must hold {n} class indices, got shape {tuple(labels.shape)} of {labels.dtype}: pass one "
                "integer an example"
            )
        valid = ((labels >= 0) & (labels < classes)).all()
        checks.require(valid, f"'labels' must lie in [0, {classes}): leave them out where there are none")
        targets = to_device(labels.long(), outputs.device)
        return targets.clamp(0, classes - 1)  # in range even while a check is pending

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.double().log_softmax(1).gather(1, targets[:, None]).sum()

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        classes = torch.arange(outputs.shape[1], device=outputs.device)
        return outputs.softmax(1) - (targets[:, None] == classes).to(outputs.dtype)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand(outputs.shape, generator=generator, dtype=torch.float64)
        gumbel = -(-noise.clamp_min(torch.finfo(noise.dtype).tiny).log()).log()
        return (outputs.double() + to_device(gumbel, outputs.device)).argmax(1)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """Columns of diag(q) Q with q = sqrt(p) and Q an orthonormal basis of q's complement, [N, C, C - 1].

        diag(p) - p p^T = diag(q) (I - q q^T) diag(q). Q is the Householder reflection that sends e_0 to -q without its
        first column; no entry is a difference of nearly equal numbers, so confident predictions keep their digits.
        """
        q = (0.5 * outputs.log_softmax(1)).exp()
        first, rest = q[:, :1], q[:, 1:]
        v = torch.cat([first + 1, rest], 1)
        ratio = rest / (1 + first)
        root = -(q * v)[:, :, None] * ratio[:, None, :]
        # The diagonal is q_j (1 - q_j^2 / (1 + q_0)); write 1 - q_j^2 as the sum of the other probabilities.
        p = q * q
        others = (p @ (1 - torch.eye(p.shape[1], dtype=p.dtype, device=p.device)))[:, 1:]
        root.diagonal(offset=-1, dim1=1, dim2=2).copy_(rest * (first + others) / (1 + first))
        return root

    def functions(self, outputs: int) -> Tensor:
        """Contrasts f_c - f_0, c = 1 .. C - 1."""
        return torch.cat([-torch.ones(1, outputs - 1), torch.eye(outputs - 1)])

    def from_functions(self, functions: Tensor) -> Tensor:
        return torch.nn.functional.pad(functions, (1, 0))

    def answer(
        self, mean: Tensor, cov: Tensor, link: str | None, n_samples: int, generator: torch.Generator
    ) -> Tensor:
        """Class probabilities [.., N, C]; rows sum to one."""
        return probabilities(link or self.links[0], mean, cov, n_samples, generator)

    def plain_answer(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1)

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
        # in fp64, where a probability of 0 needs a margin of 745; fp32's 104 is within reach
        probs = self.answer(mean.double(), cov.double(), link, n_samples, generator)
        return -probs[:, torch.arange(len(targets)), targets].log().mean(-1), None

    def uncertainty(
        self, mean: Tensor, cov: Tensor, n_samples: int | None, generator: torch.Generator, noise: float
    ) -> tuple[Tensor, Tensor]:
        """Entropies [N] in nats: H[E p] and E H[p] (Depeweg et al. 2018); their difference is mutual information."""
        functions = gaussian_values(mean, cov, DEFAULT_POINTS if n_samples is None else n_samples, generator)
        log_probs = torch.nn.functional.pad(functions, (1, 0)).log_softmax(-1)  # [N, n, C]
        log_mean = log_probs.logsumexp(-2) - math.log(log_probs.shape[-2])
        return _entropy(log_mean), _entropy(log_probs).mean(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)
