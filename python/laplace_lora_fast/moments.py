"""Second moments of per-example Jacobians in a fixed basis: the EKFAC correction and the diagonal structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.blocks import BlockCurvature, DiagBlock, KronBlock
from laplace_lora_fast.distributed import Ranks
from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.fit import Accumulator
from laplace_lora_fast.jacobians import JacobianObserver, jacobian
from laplace_lora_fast.taps import Site


class EkfacAccumulator(JacobianObserver, Accumulator):
    """Re-measures the eigenvalues of KFAC's blocks in their eigenbasis (George et al. 2018, "EKFAC").

    core[j, i] = sum over rows of (v_j^T J u_i)^2, the best diagonal in that basis; tail[j] spreads what is left of
    ||v_j^T J||^2 over the directions the u_i leave out.

    Args:
        sites: the tapped layers.
        kfac: their KFAC blocks.
    """

    def __init__(self, sites: Sequence[Site], kfac: BlockCurvature) -> None:
        self._kfac = kfac
        self._blocks = [block for block in kfac.blocks if isinstance(block, KronBlock)]
        super().__init__(sites, [block.small_vectors for block in self._blocks])
        self._core = [torch.zeros_like(block.core) for block in self._blocks]
        self._rest = [torch.zeros_like(block.tail) for block in self._blocks]

    def start(self, groups: list[int]) -> None:
        self.groups = groups

    def observe_jacobian(self, block: int, small: Tensor, large: Tensor) -> None:
        projected, row_grams = self._blocks[block].statistics(small, large)
        kept = projected[:, 0].double().square()
        self._core[block] += kept.sum(0)
        if row_grams is not None:
            self._rest[block] += (row_grams[:, :, 0, 0].double() - kept.sum(-1)).sum(0)

    def finish_batch(self) -> None:
        self.forget()

    def join(self, ranks: Ranks) -> None:
        ranks.sum_([*self._core, *self._rest])

    def curvature(self) -> BlockCurvature:
        """The blocks with measured eigenvalues."""
        blocks = [
            replace(block, core=core, tail=rest.clamp_min(0) / max(block.large.dim - block.large.rank, 1))
            for block, core, rest in zip(self._blocks, self._core, self._rest, strict=True)
        ]
        return BlockCurvature("ekfac", self._kfac.names, blocks)


class DiagAccumulator(JacobianObserver, Accumulator):
    """The exact diagonal of the GGN: sum over rows of J^2, elementwise.

    Args:
        sites: the tapped layers.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites, [None] * (2 * len(sites)))
        self._names = [(site.name, side) for site in sites for side in "AB"]
        self._means = [weight for site in sites for weight in (site.A, site.B.mT)]
        self._sums = [
            torch.zeros_like(
                mean, dtype=lk.accumulation_dtype(mean.dtype), memory_format=torch.contiguous_format
            )
            for mean in self._means
        ]

    def start(self, groups: list[int]) -> None:
        self.groups = groups

    def observe_jacobian(self, block: int, small: Tensor, large: Tensor) -> None:
        self._sums[block] += jacobian(small, large).square().sum((0, 1))

    def finish_batch(self) -> None:
        self.forget()

    def join(self, ranks: Ranks) -> None:
        ranks.sum_(self._sums)

    def curvature(self) -> BlockCurvature:
        """The diagonal blocks.

        Raises:
            NumericalError: a value is not finite; names the layer.
        """
        for (layer, _), values in zip(self._names, self._sums, strict=True):
            if not values.isfinite().all():
                raise NumericalError(f"the curvature of layer {layer!r} is not finite: the model overflows")
        means = [mean.clone(memory_format=torch.contiguous_format) for mean in self._means]
        blocks = [DiagBlock(mean, values) for mean, values in zip(means, self._sums, strict=True)]
        return BlockCurvature("diag", self._names, blocks)
