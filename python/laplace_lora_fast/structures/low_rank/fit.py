"""Streams the Nystrom sketch of the GGN: one pass, of the same size whatever the number of examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import laplace_kernels as lk
from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.likelihoods import Fisher, Likelihood
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.low_rank.algebra import (
    LowRankCurvature,
    add_rows_,
    as_curvature,
    as_rows,
    nystrom,
    test_matrix,
)
from laplace_lora_fast.structures.rows.fit import Pieces, RowAccumulator
from laplace_lora_fast.structures.rows.layout import BlockDiagonal
from laplace_lora_fast.structures.rows.store import RowStore
from laplace_lora_fast.structures.state import State
from laplace_lora_fast.weights import LayerWeights

_NO_LIMIT = 2**62  # bytes of one batch's rows, which stay on the device


class LowRankAccumulator(RowAccumulator):
    """Listener that adds every batch's weighted rows to Y = H Omega', and drops them.

    Y is in fp64: rounded to fp32 it would lose all directions whose curvature is less than 1e-6 of the largest one,
    which is where small prior precisions are decided.

    Args:
        layers: the tapped layers.
        likelihood: of the outputs.
        fisher: exact, sampled or empirical.
        columns: m, one for all weights or each its own.
        rank: k.
        seed: of both sketches.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        likelihood: Likelihood,
        fisher: Fisher,
        columns: int | Sequence[int],
        rank: int,
        seed: int,
    ) -> None:
        super().__init__(layers, likelihood, fisher, columns, _NO_LIMIT, seed)
        features = sum(
            mean.shape[0] * omega.shape[1] for mean, omega in zip(self._means, self._projections, strict=True)
        )
        home = self._means[0].device
        self._omega = test_matrix(features, min(rank, features), seed + len(self._means), home)
        self._sketch = torch.zeros_like(self._omega, dtype=torch.float64)
        self._totals = torch.zeros(2, dtype=torch.float64, device=home)  # trace of H, number of rows

    def finish(self) -> None:
        super().finish()
        layout = self._layout()
        roots = BlockDiagonal(layout, self._pieces["roots"].joined(layout.block_sizes))
        home, dtype = self._sketch.device, self._sketch.dtype
        rows = torch.cat([each.to(home, dtype) for each in self._store.matrices()], 1)
        blocks = [block.to(home, dtype) for block in roots.blocks]
        weighted = BlockDiagonal(layout, blocks).transposed_times(rows)
        add_rows_(self._sketch, self._omega, weighted)
        self._totals[0] += weighted.square().sum()
        self._totals[1] += len(weighted)
        self._store, self._sizes = RowStore(len(self._names), _NO_LIMIT), []
        self._pieces = {"roots": Pieces()}

    def state(self) -> State:
        return State(tensors={"sketch": self._sketch, "totals": self._totals})

    def restore(self, state: State) -> None:
        self._sketch.copy_(state.tensors["sketch"])
        self._totals.copy_(state.tensors["totals"])

    def join(self, ranks: Ranks) -> None:
        """The sum over the ranks."""
        ranks.sum_([self._sketch, self._totals])

    def result(self) -> LowRankCurvature:
        """The curvature of the leading directions.

        Raises:
            NumericalError: something is not finite; names the layer.
        """
        widths = [
            mean.shape[0] * omega.shape[1] for mean, omega in zip(self._means, self._projections, strict=True)
        ]
        for name, part in zip(self._names, self._sketch.split(widths), strict=True):
            if not part.isfinite().all():
                raise NumericalError(
                    f"the Jacobian of layer {name.layer!r} is not finite: the model overflows or a batch holds NaN. "
                    "Load the model in bfloat16 or float32, or pad on the other side"
                )
        trace, count = self._totals.tolist()
        means = [mean.clone(memory_format=torch.contiguous_format) for mean in self._means]
        dtype, back = lk.accumulation_dtype(means[0].dtype), nystrom(self._sketch, self._omega)
        del self._omega  # as large as the rows will be
        rows = [
            as_rows(part, back, dtype).to(mean.device)
            for part, mean in zip(self._sketch.split(widths), means, strict=True)
        ]
        return as_curvature(self._names, means, self._projections, rows, trace, round(count))
