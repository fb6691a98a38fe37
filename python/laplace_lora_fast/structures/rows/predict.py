"""Predictions from Jacobian rows: the covariance and, for a refitted model, the mean at new inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laplace_lora_fast.devices import brought
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
        cross: J* J^T of every part, [parts, N, K, R], once it is there.
        features: J* Omega of every weight [N, K, r m], until then.
    """

    mean: Tensor
    own: Tensor
    cross: Tensor | None = None
    features: dict[int, Tensor] = field(default_factory=dict)


class RowPredictor(RowListener, Predictor[Products]):
    """Covariances J* Lambda^-1 J*^T - K*R (I + K)^-1 KR* under G priors.

    Rows of weights in one part, which share their prior precision under each of the priors, are summed on the way. The
    training rows are read, and put into fp64, once for `together` functions, whose own rows wait for it.

    Args:
        layers: the tapped layers.
        rows: of every weight, [R, r m].
        projections: Omega of every weight.
        parts: for each weight its part.
        solvers: one a prior; gone through once a call of `gaussians`, and not kept.
        refitted: whether the solvers move the mean, from the functions with the adapter switched off.
    """

    together = 64

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
        self._home = projections[0].device
        if any(each.device != omega.device for each, omega in zip(rows, projections, strict=True)):
            self.together *= 8  # they come from afar
        self._refitted, self._passes = refitted, 1
        self._features: dict[int, list[Tensor]] = {}
        self._functions: Functions | None = None
        self._blocks: list[Products] = []
        self._waiting: list[Products] = []  # for their products with the training rows

    def start(self, step: Step) -> Tensor:
        cotangents = super().start(step)
        self._passes, self._functions = cotangents.shape[2], step.functions
        home, parts = self._home, 1 + max(self._parts)
        zeros = torch.zeros(0, dtype=torch.float64, device=home)
        means = step.functions.values(step.prior_u() if self._refitted else step.u)
        self._blocks = [Products(mean, zeros.new_zeros(parts, *mean.shape, mean.shape[1])) for mean in means]
        return cotangents

    def seen(self) -> list[Products]:
        self._waiting += self._blocks
        if sum(block.mean.numel() for block in self._waiting) >= self.together:
            self._multiply()
        return self._blocks

    def _multiply(self) -> None:
        """What waits with the training rows."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        home, size = self._home, len(self._rows[0])
        for block in waiting:
            block.cross = block.own.new_zeros(len(block.own), *block.mean.shape, size)
        # batch by batch, in the order in which the rows came: sums are the same, to the last bit, however many wait
        devices: dict[int, torch.device] = {}
        for block in waiting:
            for weight, features in block.features.items():
                devices.setdefault(weight, features.device)
        near = brought([self._rows[weight] for weight in devices], list(devices.values()))
        for weight, rows in zip(devices, near, strict=True):
            columns = rows.double().mT
            for block in waiting:
                if weight in block.features and block.cross is not None:
                    features = block.features.pop(weight)
                    block.cross[self._parts[weight]] += (features.double() @ columns).to(home)

    def gaussians(self, groups: Sequence[Sequence[Products]]) -> list[tuple[Tensor, Tensor]]:
        """No more than one prior's solution is held."""
        self._multiply()
        joined = [_joined(group) for group in groups]
        shifts: list[dict[int, Tensor]] = [{} for _ in joined]
        covs: list[dict[int, Tensor]] = [{} for _ in joined]
        for solver in self._solvers:
            for index, block in enumerate(joined):
                _, own, cross = block
                covs[index][solver.prior] = solver.covariance(own, cross).to(block[0])
                if self._refitted:
                    shifts[index][solver.prior] = solver.shift(cross).to(block[0])
        return [
            (mean + _in_order(shift) if self._refitted else mean, _in_order(cov))
            for (mean, _, _), shift, cov in zip(joined, shifts, covs, strict=True)
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
            wide = features.double()
            block.own[part] += (wide @ wide.mT).to(block.own.device)
            block.features[weight] = features

    def forget(self) -> None:
        super().forget()
        self._features.clear()


def _joined(group: Sequence[Products]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, own and cross of all blocks of a group."""
    cross = [each.cross for each in group if each.cross is not None]
    return (
        torch.cat([each.mean for each in group]),
        torch.cat([each.own for each in group], 1),
        torch.cat(cross, 1),
    )


def _in_order(of_priors: dict[int, Tensor]) -> Tensor:
    """[G, ..] in the order of the priors, which solvers come in as it suits them."""
    return torch.stack([of_priors[prior] for prior in range(len(of_priors))])
