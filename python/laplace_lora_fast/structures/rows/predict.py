"""Predictions from Jacobian rows: the covariance and, for a refitted model, the mean at new inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.likelihoods.functions import Functions
from laplace_lora_fast.structures.base import Predictor, Step
from laplace_lora_fast.structures.rows.listener import RowListener
from laplace_lora_fast.structures.rows.solver import Solver
from laplace_lora_fast.weights import LayerWeights


@dataclass
class Products:
    """Inner products of a block's Jacobian rows with each other and with the training rows, fp64.

    Attributes:
        mean: [N, K] of the model that the linearised one is an expansion of.
        own: J* J*^T of every part, [parts, N, K, K].
        cross: J* J^T of every part, [parts, N, K, R].
    """

    mean: Tensor
    own: Tensor
    cross: Tensor


class RowPredictor(RowListener, Predictor[Products]):
    """Covariances J* Lambda^-1 J*^T - K*R (I + K)^-1 KR* under G priors.

    Rows of weights in one part, which share their prior precision under each of the priors, are summed on the way; rows
    are read once a batch.

    Args:
        layers: the tapped layers.
        rows: of every weight, [R, r m].
        projections: Omega of every weight.
        parts: for each weight its part.
        solvers: one a prior; gone through once a call of `gaussians`, and not kept.
        refitted: whether the solvers move the mean, from the functions with the adapter switched off.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        rows: Sequence[Tensor],
        projections: Sequence[Tensor],
        parts: Sequence[int],
        solvers: Iterable[Solver],
        refitted: bool,
    ) -> None:
        super().__init__(layers, projections)
        self._rows, self._parts, self._solvers = rows, parts, solvers
        self._refitted, self._passes = refitted, 1
        self._features: dict[int, list[Tensor]] = {}
        self._functions: Functions | None = None
        self._blocks: list[Products] = []

    def start(self, step: Step) -> Tensor:
        cotangents = super().start(step)
        self._passes, self._functions = cotangents.shape[2], step.functions
        home, parts = self._rows[0].device, 1 + max(self._parts)
        zeros = torch.zeros(0, dtype=torch.float64, device=home)
        means = step.functions.values(step.prior_u() if self._refitted else step.u)
        self._blocks = [
            Products(
                mean,
                zeros.new_zeros(parts, *mean.shape, mean.shape[1]),
                zeros.new_zeros(parts, *mean.shape, len(self._rows[0])),
            )
            for mean in means
        ]
        return cotangents

    def seen(self) -> list[Products]:
        return self._blocks

    def gaussians(self, groups: Sequence[Sequence[Products]]) -> list[tuple[Tensor, Tensor]]:
        """No more than one prior's solution is held."""
        joined = [
            Products(
                torch.cat([each.mean for each in group]),
                torch.cat([each.own for each in group], 1),
                torch.cat([each.cross for each in group], 1),
            )
            for group in groups
        ]
        shifts: list[dict[int, Tensor]] = [{} for _ in joined]
        covs: list[dict[int, Tensor]] = [{} for _ in joined]
        for solver in self._solvers:
            for index, block in enumerate(joined):
                covs[index][solver.prior] = solver.covariance(block.own, block.cross).to(block.mean)
                if self._refitted:
                    shifts[index][solver.prior] = solver.shift(block.cross).to(block.mean)
        return [
            (block.mean + _in_order(shift) if self._refitted else block.mean, _in_order(cov))
            for block, shift, cov in zip(joined, shifts, covs, strict=True)
        ]

    def observe_rows(self, weight: int, rows: Tensor) -> None:
        waiting = self._features.setdefault(weight, [])
        waiting.append(rows)
        if len(waiting) < self._passes:
            return
        assert self._functions is not None
        part = self._parts[weight]
        combined = self._functions.combine(self._features.pop(weight))  # [N, K, r m] each
        for block, features in zip(self._blocks, combined, strict=True):
            features = features.double()
            block.own[part] += (features @ features.mT).to(block.own.device)
            block.cross[part] += (features @ self._rows[weight].to(features).mT).to(block.cross.device)

    def forget(self) -> None:
        super().forget()
        self._features.clear()


def _in_order(of_priors: dict[int, Tensor]) -> Tensor:
    """[G, ..] in the order of the priors, which solvers come in as it suits them."""
    return torch.stack([of_priors[prior] for prior in range(len(of_priors))])
