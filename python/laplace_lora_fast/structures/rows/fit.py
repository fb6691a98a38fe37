"""Keeps the Jacobian rows of the training data and, for a refit, what else that needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.errors import InvalidBatchError, NumericalError
from laplace_lora_fast.likelihoods import Fisher, Likelihood
from laplace_lora_fast.likelihoods.functions import Functions
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.base import Accumulator, Step, require_finite
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.listener import RowListener
from laplace_lora_fast.structures.rows.refit import RefittedCurvature
from laplace_lora_fast.structures.rows.refits.mode import Observations
from laplace_lora_fast.structures.rows.sketches.sketch import in_16_bits, random_projection
from laplace_lora_fast.structures.rows.store import RowStore
from laplace_lora_fast.structures.state import State
from laplace_lora_fast.weights import LayerWeights, kept_columns, matrices, weight_names


class Pieces:
    """What comes block by block of each batch, [N_b, ..], joined by the blocks' number of rows."""

    def __init__(self) -> None:
        self._of_size: dict[int, list[Tensor]] = {}

    def append(self, size: int, piece: Tensor) -> None:
        self._of_size.setdefault(size, []).append(piece)

    def take(self, other: Pieces) -> None:
        """Moves what another one holds to the end of this one."""
        for size, pieces in other._of_size.items():
            self._of_size.setdefault(size, []).extend(pieces)
        other._of_size.clear()

    def clear(self) -> None:
        self._of_size.clear()

    def grown(self, name: str) -> dict[str, Sequence[Tensor]]:
        """As `State.grown` has it."""
        return {f"{name}.{size}": pieces for size, pieces in self._of_size.items()}

    def restore(self, name: str, grown: Mapping[str, Sequence[Tensor]], device: torch.device) -> None:
        for key, pieces in grown.items():
            if key.startswith(f"{name}."):
                size = int(key.rpartition(".")[2])
                self._of_size[size] = [piece.to(device) for piece in pieces]

    def joined(self, sizes: Sequence[int]) -> list[Tensor]:
        """One tensor for each size, those of all batches one after the other."""
        return [torch.cat(self._of_size[size]) for size in sizes]

    def gather(self, ranks: Ranks, sizes: Sequence[int]) -> None:
        """Takes in the pieces of all ranks, for all sizes that any of them has."""
        for size in sizes:
            mine = self._of_size.get(size)
            self._of_size[size] = [ranks.gather(torch.cat(mine) if mine else None)]


class RowAccumulator(RowListener, Accumulator):
    """Listener that keeps the sketched Jacobian rows of every weight, example by example.

    With the exact Fisher they are the rows of the examples' functions, which vanish nowhere and serve any root of the
    Hessian; otherwise those of the Fisher's own directions.

    Args:
        layers: the tapped layers.
        likelihood: of the outputs.
        fisher: exact, sampled or empirical.
        columns: m, one for all weights or each its own.
        budget: bytes of rows before they leave the device.
        seed: of Omega.
    """

    pieces: ClassVar[tuple[str, ...]] = ("roots",)  # what is kept of every example beside its rows

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        likelihood: Likelihood,
        fisher: Fisher,
        columns: int | Sequence[int],
        budget: int,
        seed: int,
    ) -> None:
        self._names, self._means = weight_names(layers), matrices(layers)
        of_weights = [columns] * len(self._names) if isinstance(columns, int) else columns
        projections = [
            random_projection(mean.shape[1], kept_columns(name.side, mean.shape, most), seed + index, mean)
            for index, (name, mean, most) in enumerate(zip(self._names, self._means, of_weights, strict=True))
        ]
        super().__init__(layers, projections)
        self._likelihood, self._fisher = likelihood, fisher
        self._store = RowStore(len(self._names), budget)
        self._batch: list[list[Tensor]] = [[] for _ in self._names]  # [S, r m] a pass
        self._sizes: list[Tensor] = []
        self._pieces = {name: Pieces() for name in self.pieces}
        self._of_batch = {name: Pieces() for name in self.pieces}
        self._functions: Functions | None = None
        self._n_sequences = 0

    def start(self, step: Step) -> Tensor:
        plain = super().start(step)
        self._functions, self._n_sequences = step.functions, len(step.u)
        if self._fisher == "exact":
            for size, outputs in zip(step.functions.sizes, step.outputs, strict=True):
                self._of_batch["roots"].append(size, self._likelihood.functions_root(outputs))
            return plain
        cotangents = step.functions.spread(step.fisher(self._fisher))
        passes = cotangents.shape[2]
        unit = torch.eye(passes, dtype=cotangents.dtype, device=cotangents.device)
        self._of_batch["roots"].append(passes, unit.expand(step.functions.n_examples, -1, -1))
        return cotangents

    def observe_rows(self, weight: int, rows: Tensor) -> None:
        self._batch[weight].append(rows)

    def finish_pass(self) -> None:
        """Weights that the backward pass did not reach have zero rows."""
        super().finish_pass()
        passes = max(len(rows) for rows in self._batch)
        for rows, mean, projection in zip(self._batch, self._means, self._projections, strict=True):
            if len(rows) < passes:
                shape = self._n_sequences, mean.shape[0] * projection.shape[1]
                rows.append(projection.new_zeros(shape, dtype=lk.accumulation_dtype(mean.dtype)))

    def finish(self) -> None:
        """A batch is over: its rows are complete, example by example. Only now it is taken in."""
        functions = self._functions
        assert functions is not None
        exact, passes = self._fisher == "exact", len(self._batch[0])
        layout = (
            Layout.of_batch(functions.examples, functions.sizes)
            if exact
            else Layout(torch.full((functions.n_examples,), passes))
        )
        if passes == 1 and functions.one_sequence:  # they are as they should be
            self._store.extend([rows[0] for rows in self._batch])
        else:
            self._store.extend([layout.join(self._blocks(rows, exact)) for rows in self._batch])
        for rows in self._batch:
            rows.clear()
        self._sizes.append(layout.sizes)
        for name, pieces in self._pieces.items():
            pieces.take(self._of_batch[name])
        super().finish()

    def _blocks(self, rows: Sequence[Tensor], exact: bool) -> list[Tensor]:
        """Of all passes of a weight the rows of each block's functions, [N_b, K, r m]."""
        assert self._functions is not None
        if exact:
            return self._functions.combine(rows)
        return [torch.stack([self._functions.by_example(each) for each in rows], 1)]

    def forget(self) -> None:
        super().forget()
        for rows in self._batch:
            rows.clear()
        for pieces in self._of_batch.values():
            pieces.clear()

    def state(self) -> State:
        grown: dict[str, Sequence[Tensor]] = {"sizes": self._sizes}
        grown |= {f"rows.{weight}": chunks for weight, chunks in enumerate(self._store.chunks)}
        for name, pieces in self._pieces.items():
            grown |= pieces.grown(name)
        return State(grown=grown)

    def restore(self, state: State) -> None:
        self._sizes = list(state.grown["sizes"])
        for weight, mean in enumerate(self._means):
            for rows in state.grown[f"rows.{weight}"]:
                self._store.append(weight, rows.to(mean.device))
        for name, pieces in self._pieces.items():
            pieces.restore(name, state.grown, self._means[0].device)

    def join(self, ranks: Ranks) -> None:
        """Takes in the rows of all ranks: each then holds them all."""
        if ranks.size > 1:
            self._store = self._store.gathered(ranks, [mean.device for mean in self._means])
            self._sizes = [ranks.gather(torch.cat(self._sizes) if self._sizes else None)]
            for pieces in self._pieces.values():
                pieces.gather(ranks, self._layout().block_sizes)

    def _layout(self) -> Layout:
        return Layout(torch.cat(self._sizes))

    def result(self) -> RowCurvature:
        """The curvature of all rows.

        Raises:
            NumericalError: a row is not finite; names the layer.
        """
        rows, layout = self._store.matrices(), self._layout()
        require_finite(self._names, rows, "Jacobian")
        rows = in_16_bits(rows, self._projections, self._store.kept)
        means = [mean.clone(memory_format=torch.contiguous_format) for mean in self._means]
        roots = BlockDiagonal(layout, self._pieces["roots"].joined(layout.block_sizes))
        return RowCurvature(self._names, means, rows, self._projections, roots)


class RefitAccumulator(RowAccumulator):
    """Keeps, beside the rows, targets and the functions with the adapter switched off."""

    pieces = ("roots", "targets", "prior")

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        likelihood: Likelihood,
        columns: int | Sequence[int],
        budget: int,
        seed: int,
    ) -> None:
        super().__init__(layers, likelihood, "exact", columns, budget, seed)

    def start(self, step: Step) -> Tensor:
        """Raises InvalidBatchError for a batch without labels."""
        cotangents = super().start(step)
        if step.targets is None:
            raise InvalidBatchError("Rows(refit=True) needs 'labels' in every batch of train_loader")
        prior = step.functions.values(step.prior_u().double())
        for size, targets, functions in zip(step.functions.sizes, step.targets, prior, strict=True):
            self._of_batch["targets"].append(size, targets)
            self._of_batch["prior"].append(size, functions)
        return cotangents

    def result(self) -> RefittedCurvature:
        rows = super().result()
        home, sizes = rows.home, rows.roots.layout.block_sizes
        prior = [each.to(home) for each in self._pieces["prior"].joined(sizes)]
        if not all(each.isfinite().all() for each in prior):
            raise NumericalError("without its adapter the model gives logits that are not finite")
        targets = [
            (each.double() if each.is_floating_point() else each).to(home)
            for each in self._pieces["targets"].joined(sizes)
        ]
        return RefittedCurvature(rows, Observations(rows.roots.layout, self._likelihood, prior, targets))
