"""Softmax at many tokens of a sequence, by labels drawn from the model.

With l_t the logits at labelled position t and p_t their softmax, the Hessian of the sum over positions is
sum_t J_t^T (diag p_t - p_t p_t^T) J_t. For labels y_t drawn from p_t, c_t = p_t - e_y is the gradient of
-log p_t(y_t), E c_t = 0 and E c_t c_t^T = diag p_t - p_t p_t^T, independent over positions: so the gradient of the
drawn sequence's -log p, summed over its positions, is one row whose outer product is unbiased for the sequence's
Hessian. The model's head draws M such sequences and gives their scores, whose Hessian is then I / M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.likelihoods.base import Likelihood
from laplace_lora_fast.options import positive_number, register


@register
@dataclass(frozen=True)
class SampledTokens(Likelihood):
    """Scores -log p(y) [N, M] of M label sequences an example, drawn from the model (Kunstner et al. 2019, eq. 3).

    Only their gradients mean anything: there is nothing to predict and no evidence.

    Args:
        weight: of the likelihood against the prior: below 1 where the tokens of a text say less than as many
            independent ones would.

    Raises:
        ValueError: `weight` is not positive and finite.
    """

    weight: float = 1.0

    name = "tokens"
    sampled = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", positive_number("weight", self.weight))

    def targets(self, labels: Tensor | None, outputs: Tensor, checks: DeferredChecks) -> None:
        """The head has taken the labels apart."""
        return

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """I sqrt(weight / M), [N, M, M]."""
        n, samples = outputs.shape
        unit = torch.eye(samples, dtype=outputs.dtype, device=outputs.device)
        return (unit * math.sqrt(self.weight / samples)).expand(n, -1, -1)

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError(_MEANINGLESS)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError(_MEANINGLESS)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        raise ValueError(_MEANINGLESS)

    def answer(self, *_: Any) -> Tensor:
        raise ValueError(_MEANINGLESS)

    def plain_answer(self, outputs: Tensor) -> Tensor:
        raise ValueError(_MEANINGLESS)

    def score(self, *_: Any) -> tuple[Tensor, None]:
        raise ValueError(_MEANINGLESS)


_MEANINGLESS = "Tokens has no answer of its own: see token_uncertainty, generate and sequence_log_prob"
