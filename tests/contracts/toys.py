"""A structure, a task, a likelihood and a link from outside the package, as a user would write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.likelihoods import Categorical, Likelihood
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.options import register
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.base import (
    Ability,
    Accumulator,
    Curvature,
    Predictor,
    Problem,
    Stage,
    Step,
    Structure,
    Verdict,
)
from laplace_lora_fast.structures.jacobians import JacobianListener, jacobian
from laplace_lora_fast.structures.search import evidence_root
from laplace_lora_fast.tasks import Task
from laplace_lora_fast.weights import LayerWeights, WeightName, matrices, weight_names


class IsotropicCurvature(Curvature):
    """H = h I in every weight, h the mean of the GGN's diagonal there."""

    def __init__(self, names: list[WeightName], means: list[Tensor], values: Tensor) -> None:
        self.names, self.means, self.values = names, means, values

    def scaled(self, factor: float) -> IsotropicCurvature:
        return IsotropicCurvature(self.names, self.means, self.values * factor)

    @property
    def _sizes(self) -> Tensor:
        return torch.tensor([float(mean.numel()) for mean in self.means], dtype=torch.float64)

    def whitened_spectrum(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]:
        return self.values / prior_precision, self._sizes

    def effective_parameters(self, prior_precision: Tensor) -> Tensor:
        return self._sizes * self.values / (self.values + prior_precision)

    def maximise_evidence(self, keys: Sequence[str], squared_norms: Sequence[float]) -> dict[str, float]:
        best = {}
        for key in dict.fromkeys(keys):
            members = [index for index, other in enumerate(keys) if other == key]
            distance = sum(squared_norms[index] for index in members)
            best[key] = evidence_root(self.values[members], self._sizes[members], distance, key)
        return best

    def sample(self, n: int, generator: torch.Generator, prior_precision: Tensor) -> list[Tensor]:
        return [
            mean + torch.randn(n, *mean.shape, generator=generator, dtype=torch.float64) / (h + lam).sqrt()
            for mean, h, lam in zip(self.means, self.values, prior_precision, strict=True)
        ]

    def covariance(self, weight: int, prior_precision: Tensor) -> Tensor:
        size = self.means[weight].numel()
        return torch.eye(size, dtype=torch.float64) / (self.values[weight] + prior_precision[weight])

    def damaged(self) -> list[int]:
        return (~self.values.isfinite()).nonzero().flatten().tolist()

    def describe(self) -> list[dict[str, str]]:
        return [{"curvature": f"{value:.3g}"} for value in self.values.tolist()]

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values} | {f"mean.{i}": mean for i, mean in enumerate(self.means)}


class IsotropicAccumulator(JacobianListener, Accumulator):
    """Sums the squares of all Jacobians of every weight."""

    def __init__(self, problem: Problem) -> None:
        self._layers = problem.layers
        self._means = matrices(problem.layers)
        super().__init__(problem.layers, [None] * len(self._means))
        self._squares = torch.zeros(len(self._means), dtype=torch.float64)

    def start(self, step: Step) -> Tensor:
        super().start(step)
        self._functions = step.functions
        return step.functions.spread(step.fisher("exact"))

    def observe_jacobian(self, weight: int, small: Tensor, large: Tensor) -> None:
        rows = self._functions.by_example(jacobian(small, large)[:, 0])
        self._squares[weight] += rows.double().square().sum()

    def join(self, ranks: Ranks) -> None:
        ranks.sum_([self._squares])

    def result(self) -> IsotropicCurvature:
        sizes = torch.tensor([float(mean.numel()) for mean in self._means], dtype=torch.float64)
        names = weight_names(self._layers)
        return IsotropicCurvature(names, [mean.clone() for mean in self._means], self._squares / sizes)


class IsotropicPredictor(JacobianListener, Predictor[tuple[Tensor, Tensor]]):
    """Adds J J^T / (h + lambda) of every weight."""

    def __init__(self, curvature: IsotropicCurvature, layers: Sequence[LayerWeights], priors: Tensor) -> None:
        super().__init__(layers, [None] * len(curvature.means))
        self._weights = 1 / (curvature.values[:, None] + priors)  # [n_weights, G]
        self._rows: dict[int, list[Tensor]] = {}

    def start(self, step: Step) -> Tensor:
        self._functions, self._rows = step.functions, {}
        self._means = step.functions.values(step.u)
        return super().start(step)

    def observe_jacobian(self, weight: int, small: Tensor, large: Tensor) -> None:
        self._rows.setdefault(weight, []).append(jacobian(small, large)[:, 0].flatten(1))

    def seen(self) -> list[tuple[Tensor, Tensor]]:
        covs: list[Any] = [0] * len(self._means)
        for weight, passes in self._rows.items():
            for block, rows in enumerate(self._functions.combine(passes)):
                covs[block] = covs[block] + torch.einsum(
                    "g,nkp,nlp->gnkl", self._weights[weight].to(rows), rows, rows
                )
        return list(zip(self._means, covs, strict=True))

    def gaussians(self, groups: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
        return [
            (torch.cat([mean for mean, _ in group]), torch.cat([cov for _, cov in group], 1))
            for group in groups
        ]


@register
@dataclass(frozen=True)
class Isotropic(Structure):
    """One number a weight: coarser than any structure of the package."""

    fisher: str = "exact"

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.SAMPLES})

    def suits(self, problem: Problem) -> Verdict:
        return Verdict(False, "it is a toy")

    def stages(self, problem: Problem) -> list[Stage]:
        return [Stage("fit", lambda _: IsotropicAccumulator(problem))]

    def predictor(
        self, curvature: IsotropicCurvature, layers: Sequence[LayerWeights], prior_precisions: Tensor
    ) -> IsotropicPredictor:
        return IsotropicPredictor(curvature, layers, prior_precisions)

    def rebuild(
        self,
        names: list[WeightName],
        tensors: dict[str, Tensor],
        devices: Sequence[torch.device],
        likelihood: Likelihood,
    ) -> IsotropicCurvature:
        means = [tensors[f"mean.{index}"].to(device) for index, device in enumerate(devices)]
        return IsotropicCurvature(names, means, tensors["values"])


class ScoreHead(Head):
    """One score a sequence: the logit of a token at the last position. Examples are groups of sequences."""

    grouped = True

    def __init__(self, model: nn.Module, token: int) -> None:
        super().__init__(model)
        self._token = token

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        rows = torch.arange(inputs.n_sequences)
        return output.logits[rows, inputs.last][:, self._token, None]


@register
@dataclass(frozen=True)
class BestOf(Task):
    """Which sequence of a group scores highest: softmax over the group, ragged. "group" [S] tells who belongs where.

    Args:
        token: whose logit at the end is the score.
    """

    token: int = field(default=3)

    def head(self, model: nn.Module) -> Head:
        return ScoreHead(model, self.token)

    @property
    def likelihood(self) -> Likelihood:
        return Categorical()
