"""Whole rankings: Plackett and Luce's model of an order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.likelihoods.categorical import Categorical
from laplace_lora_fast.likelihoods.draws import gaussian_values
from laplace_lora_fast.options import register

MOST_RANKED = 12  # the Fisher information goes through 2^C sets of what is left


@register
@dataclass(frozen=True)
class PlackettLuce(Categorical):
    """The best of all, then the best of the rest, and so on, each by softmax (Plackett 1975; Luce 1959).

    Targets are rankings [N, C], the place of the best one first. Functions are the contrasts f_c - f_0; the answer is
    the probability of each to be the best, so for C = 2 all is as in `Categorical`.

    The Hessian depends on the ranking that was seen. What is taken is its expectation under the model, the Fisher
    information, as for every other likelihood here.
    """

    name = "ranking"
    links: ClassVar[Sequence[str]] = ("mc",)
    needs_samples: ClassVar[Sequence[str]] = ("mc",)

    def check(self, outputs: Tensor) -> None:
        super().check(outputs)
        if outputs.shape[1] > MOST_RANKED:
            raise InvalidBatchError(
                f"a ranking of {outputs.shape[1]} sequences is too long, at most {MOST_RANKED} go: rank the best ones"
            )

    def targets(self, labels: Tensor | None, outputs: Tensor, checks: DeferredChecks) -> Tensor | None:
        if labels is None:
            return None
        n, size = outputs.shape
        if labels.dim() != 2 or len(labels) != n or labels.shape[1] < size or labels.is_floating_point():
            raise InvalidBatchError(
                f"'labels' must hold {n} rankings of {size} sequences, the best first, got shape "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
        own, rest = labels[:, :size].long(), labels[:, size:]
        complete = (own.sort(1).values == torch.arange(size, device=own.device)).all() & (rest == -1).all()
        checks.require(
            complete, "'labels' must name each sequence of an example once, and -1 behind its last one"
        )
        return to_device(own, outputs.device).clamp(0, size - 1)  # in range even while a check is pending

    def judged_by(self, targets: Tensor) -> Tensor:
        """The best one."""
        return targets[:, 0]

    def log_likelihood(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _log_probability(outputs.double(), targets).sum()

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        ordered = outputs.gather(1, targets)
        before = (-_log_left(ordered)).logcumsumexp(1)  # of all choices that an entry took part in
        return torch.zeros_like(outputs).scatter(1, targets, (ordered + before).exp() - 1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.rand(outputs.shape, generator=generator, dtype=torch.float64)
        gumbel = -(-noise.clamp_min(torch.finfo(noise.dtype).tiny).log()).log()
        return (outputs.double() + to_device(gumbel, outputs.device)).argsort(dim=1, descending=True)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """Root [N, C, C - 1] of the expected Hessian, a sum over the sets that may be left to choose from."""
        fisher = _fisher(outputs.double())[:, 1:, 1:]
        values, vectors = torch.linalg.eigh(fisher)
        root = vectors * values.clamp_min(0).sqrt()[:, None, :]
        return torch.cat([-root.sum(1, keepdim=True), root], 1).to(outputs.dtype)  # rows sum to zero

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
        """Of whole rankings; the same points for every prior."""
        state = generator.get_state()
        scores = []
        for one, own in zip(mean.expand(cov.shape[:-1]), cov, strict=True):
            generator.set_state(state)
            outputs = torch.nn.functional.pad(gaussian_values(one, own, n_samples, generator), (1, 0))
            log_p = _log_probability(outputs, targets[:, None].expand(outputs.shape))
            scores.append(-(log_p.logsumexp(1) - math.log(n_samples)).mean())
        return torch.stack(scores), None


def _log_left(ordered: Tensor) -> Tensor:
    """Log of the sum of exp over each entry and all behind it."""
    return ordered.flip(-1).logcumsumexp(-1).flip(-1)


def _log_probability(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log probability [..] of rankings [.., C]."""
    ordered = outputs.gather(-1, targets)
    return (ordered - _log_left(ordered)).sum(-1)


def _fisher(outputs: Tensor) -> Tensor:
    """Expected Hessian [N, C, C]: for each set of what is left, how likely it comes to that, times softmax's own."""
    n, size = outputs.shape
    reached = outputs.new_zeros(n, 2**size)
    reached[:, -1] = 1
    fisher = outputs.new_zeros(n, size, size)
    for left in range(2**size - 1, 0, -1):
        members = [place for place in range(size) if left >> place & 1]
        if len(members) < 2:
            continue
        p = outputs[:, members].softmax(1)
        weighted = reached[:, left, None] * p
        own = torch.diag_embed(weighted) - weighted[:, :, None] * p[:, None, :]
        index = torch.tensor(members, device=outputs.device)
        fisher[:, index[:, None], index] += own
        for place, share in zip(members, weighted.unbind(1), strict=True):
            reached[:, left ^ (1 << place)] += share
    return fisher
