"""Second moments of Jacobians in a fixed basis: the EKFAC correction and the diagonal structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.likelihoods import Fisher
from laplace_lora_fast.likelihoods.functions import Functions
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.base import Accumulator, Step, require_finite
from laplace_lora_fast.structures.blocks.algebra import DiagBlock, KronBlock
from laplace_lora_fast.structures.blocks.curvature import BlockCurvature
from laplace_lora_fast.structures.jacobians import JacobianListener, jacobian
from laplace_lora_fast.structures.state import State, numbered
from laplace_lora_fast.weights import LayerWeights, matrices, weight_names


class MomentAccumulator(JacobianListener, Accumulator):
    """Listener for Fisher-weighted Jacobians.

    Args:
        layers: the tapped layers.
        fisher: whose cotangents are sent back.
        rotations: as for `JacobianListener`.
    """

    def __init__(
        self, layers: Sequence[LayerWeights], fisher: Fisher, rotations: Sequence[Tensor | None]
    ) -> None:
        super().__init__(layers, rotations)
        self._fisher = fisher
        self._functions: Functions | None = None

    def start(self, step: Step) -> Tensor:
        super().start(step)
        self._functions = step.functions
        return step.functions.spread(step.fisher(self._fisher))

    def _of_examples(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        """The same Jacobians, one an example, as token streams [N, 1, T, r] and [N, 1, T, d]."""
        assert self._functions is not None
        if self._functions.one_sequence:
            return small, large
        rows = self._functions.by_example(
            jacobian(small, large)[:, 0]
        )  # [N, r, d], as if each row were a token
        unit = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        return unit.expand(len(rows), 1, -1, -1), rows[:, None]


class EkfacAccumulator(MomentAccumulator):
    """Re-measures the eigenvalues of KFAC's blocks in their eigenbasis (George et al. 2018, "EKFAC").

    core[j, i] = sum over rows of (v_j^T J u_i)^2, the best diagonal in that basis; tail[j] spreads what is left of
    ||v_j^T J||^2 over the directions the u_i leave out.

    Args:
        layers: the tapped layers.
        fisher: whose cotangents are sent back.
        kfac: their KFAC blocks.
    """

    def __init__(self, layers: Sequence[LayerWeights], fisher: Fisher, kfac: BlockCurvature) -> None:
        self._kfac = kfac
        self._blocks = [block for block in kfac.blocks if isinstance(block, KronBlock)]
        super().__init__(layers, fisher, [block.small_vectors for block in self._blocks])
        self._core = [torch.zeros_like(block.core) for block in self._blocks]
        self._rest = [torch.zeros_like(block.tail) for block in self._blocks]

    def observe_jacobian(self, weight: int, small: Tensor, large: Tensor) -> None:
        projected, row_grams = self._blocks[weight].statistics(*self._of_examples(small, large))
        kept = projected[:, 0].double().square()
        self._core[weight] += kept.sum(0)
        if row_grams is not None:
            self._rest[weight] += (row_grams[:, :, 0, 0].double() - kept.sum(-1)).sum(0)

    def state(self) -> State:
        return State(tensors=numbered(core=self._core, rest=self._rest))

    def restore(self, state: State) -> None:
        for key, own in self.state().tensors.items():
            own.copy_(state.tensors[key])

    def join(self, ranks: Ranks) -> None:
        ranks.sum_([*self._core, *self._rest])

    def result(self) -> BlockCurvature:
        """The blocks with measured eigenvalues."""
        blocks = [
            replace(block, core=core, tail=rest.clamp_min(0) / max(block.large.dim - block.large.rank, 1))
            for block, core, rest in zip(self._blocks, self._core, self._rest, strict=True)
        ]
        return BlockCurvature(self._kfac.names, blocks)


class DiagonalAccumulator(MomentAccumulator):
    """The exact diagonal of the Fisher information: sum over rows of J^2, elementwise.

    Args:
        layers: the tapped layers.
        fisher: whose cotangents are sent back.
    """

    def __init__(self, layers: Sequence[LayerWeights], fisher: Fisher) -> None:
        self._names, self._means = weight_names(layers), matrices(layers)
        super().__init__(layers, fisher, [None] * len(self._names))
        self._sums = [
            torch.zeros_like(
                mean, dtype=lk.accumulation_dtype(mean.dtype), memory_format=torch.contiguous_format
            )
            for mean in self._means
        ]

    def observe_jacobian(self, weight: int, small: Tensor, large: Tensor) -> None:
        self._sums[weight] += jacobian(*self._of_examples(small, large)).square().sum((0, 1))

    def state(self) -> State:
        return State(tensors=numbered(sums=self._sums))

    def restore(self, state: State) -> None:
        for key, own in self.state().tensors.items():
            own.copy_(state.tensors[key])

    def join(self, ranks: Ranks) -> None:
        ranks.sum_(self._sums)

    def result(self) -> BlockCurvature:
        """The diagonal blocks.

        Raises:
            NumericalError: a value is not finite; names the layer.
        """
        require_finite(self._names, self._sums, "curvature")
        means = [mean.clone(memory_format=torch.contiguous_format) for mean in self._means]
        blocks = [DiagBlock(mean, values) for mean, values in zip(means, self._sums, strict=True)]
        return BlockCurvature(self._names, blocks)
