"""Which Fisher information a curvature is made of, as cotangents of the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.likelihoods.base import Likelihood
from laplace_lora_fast.options import check_choice, positive_integer, register


@register
@dataclass(frozen=True)
class MonteCarlo:
    """The Fisher information estimated with labels drawn from the model.

    Args:
        samples: labels an example.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", positive_integer("samples", self.samples))


Fisher = str | MonteCarlo  # "exact": the GGN; "empirical": the given labels


def checked_fisher(fisher: Fisher) -> Fisher:
    """The Fisher information by its name: "exact", "empirical", "mc" or an object. Raises ValueError otherwise."""
    if isinstance(fisher, MonteCarlo):
        return fisher
    check_choice("fisher", fisher, ["exact", "empirical", "mc"])
    return MonteCarlo() if fisher == "mc" else fisher


def fisher_passes(fisher: Fisher, rank: int) -> int:
    """Cotangents an example: `rank` is that of its likelihood's Hessian."""
    if isinstance(fisher, MonteCarlo):
        return fisher.samples
    return rank if fisher == "exact" else 1


def fisher_cotangents(
    likelihood: Likelihood,
    fisher: Fisher,
    outputs: Tensor,
    targets: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Cotangents [N, C, K] whose backward passes give the output gradients of the chosen Fisher information.

    Args:
        likelihood: of the outputs.
        fisher: exact (K = rank of the Hessian), sampled (K = samples) or empirical (K = 1).
        outputs: [N, C], detached.
        targets: needed for the empirical Fisher.
        generator: draws the labels of the sampled Fisher, on the CPU.

    Raises:
        InvalidBatchError: the empirical Fisher was asked for without labels.
    """
    if isinstance(fisher, MonteCarlo):
        draws: Sequence[Tensor] = [
            likelihood.residual(outputs, likelihood.sample(outputs, generator)) for _ in range(fisher.samples)
        ]
        return torch.stack(list(draws), -1) / math.sqrt(fisher.samples)
    if fisher == "exact":
        return likelihood.hessian_root(outputs)
    if targets is None:
        raise InvalidBatchError("fisher='empirical' needs 'labels' in every batch")
    return likelihood.residual(outputs, targets)[..., None]
