"""The predictive of independent blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_lora_fast.likelihoods.functions import Functions
from laplace_lora_fast.structures.base import Predictor, Step
from laplace_lora_fast.structures.blocks.algebra import Block
from laplace_lora_fast.structures.jacobians import JacobianListener, jacobian
from laplace_lora_fast.weights import LayerWeights, long_side_is_input, weight_names

Gaussian = tuple[Tensor, Tensor]  # mean and covariance of a block of examples


class BlockPredictor(JacobianListener, Predictor[Gaussian]):
    """Covariances of independent blocks, summed as their Jacobians come.

    What waits for the last of P passes is, per layer, the [S, P, T, r] gradient at lora_A's output and lora_B's
    [S, P, r, d_out] Jacobian; nothing with P = 1.

    Args:
        layers: the tapped layers.
        blocks: one a weight.
        prior_precisions: fp64 [n_weights, G], one column per prior to evaluate.
    """

    def __init__(
        self, layers: Sequence[LayerWeights], blocks: Sequence[Block], prior_precisions: Tensor
    ) -> None:
        super().__init__(layers, [block.rotation() for block in blocks])
        self._blocks = blocks
        self._long_side_is_input = [long_side_is_input(name.side) for name in weight_names(layers)]
        rows = [
            row.unique(return_inverse=True) for row in prior_precisions
        ]  # a grid over groups repeats its values
        self._precisions = [
            (values.to(block.mean.device), inverse.to(block.mean.device))
            for (values, inverse), block in zip(rows, blocks, strict=True)
        ]
        self._waiting: dict[int, list[Tensor]] = {}
        self._passes = 1
        self._functions: Functions | None = None
        self._means: list[Tensor] = []
        self._covs: list[Tensor | None] = []

    def start(self, step: Step) -> Tensor:
        cotangents = super().start(step)
        self._passes, self._functions = cotangents.shape[2], step.functions
        self._means = step.functions.values(step.u)
        self._covs = [None] * len(self._means)
        return cotangents

    def seen(self) -> list[Gaussian]:
        pairs = zip(self._means, self._covs, strict=True)
        return [(mean, cov) for mean, cov in pairs if cov is not None]

    def gaussians(self, groups: Sequence[Sequence[Gaussian]]) -> list[Gaussian]:
        return [
            (torch.cat([mean for mean, _ in group]), torch.cat([cov for _, cov in group], 1))
            for group in groups
        ]

    def observe_jacobian(self, weight: int, small: Tensor, large: Tensor) -> None:
        assert self._functions is not None
        if self._functions.one_sequence:
            self._of_sequences(weight, small, large)
            return
        for block, rows in enumerate(self._functions.combine([jacobian(small, large)[:, 0]])):
            self._add_rows(block, weight, rows)

    def _of_sequences(self, weight: int, small: Tensor, large: Tensor) -> None:
        if self._passes == 1:
            self._add(0, weight, small, large)
            return
        # x is the same in every pass, g is not
        shares_large = self._long_side_is_input[weight] and not self.varies(weight)
        waiting = self._waiting.setdefault(weight, [])
        waiting.append(small if shares_large else jacobian(small, large))
        if len(waiting) < self._passes:
            return
        stacked = torch.cat(self._waiting.pop(weight), 1)
        if shares_large:
            self._add(0, weight, stacked, large)
        else:
            self._add_rows(0, weight, stacked)

    def forget(self) -> None:
        super().forget()
        self._waiting.clear()

    def _add_rows(self, block: int, weight: int, jacobians: Tensor) -> None:
        """Jacobians [N, K, r, d], as if each of their rows were a token."""
        unit = torch.eye(jacobians.shape[2], dtype=jacobians.dtype, device=jacobians.device)
        self._add(block, weight, unit.expand(len(jacobians), 1, -1, -1), jacobians)

    def _add(self, block: int, weight: int, small: Tensor, large: Tensor) -> None:
        values, inverse = self._precisions[weight]
        cov = self._blocks[weight].variances(small, large, values)
        if len(inverse) > len(values) or len(values) > 1:
            cov = cov[inverse]
        total = self._covs[block]
        self._covs[block] = cov if total is None else total.add_(cov.to(total.device))
