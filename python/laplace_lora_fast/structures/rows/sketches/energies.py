"""How much of a Jacobian row's energy lies in each weight: where a sketch is to spend its columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.base import Accumulator, Problem, Stage
from laplace_lora_fast.structures.rows.listener import RowListener
from laplace_lora_fast.structures.rows.sketches.sketch import random_projection, spread
from laplace_lora_fast.structures.state import State
from laplace_lora_fast.weights import LayerWeights, kept_widths, matrices

_COLUMNS = 16  # of a sketch that is for squared norms only, summed over a batch


class EnergyAccumulator(RowListener, Accumulator):
    """Listener that adds up squared norms of the Jacobians; the first rank with data decides for all.

    Args:
        layers: the tapped layers.
        seed: of the sketch.
    """

    def __init__(self, layers: Sequence[LayerWeights], seed: int) -> None:
        weights = matrices(layers)
        super().__init__(
            layers,
            [
                random_projection(each.shape[1], _COLUMNS, seed + index, each)
                for index, each in enumerate(weights)
            ],
        )
        self._energies = [torch.zeros(1, dtype=torch.float64, device=each.device) for each in weights]
        self._seen = False

    def observe_rows(self, weight: int, rows: Tensor) -> None:
        self._energies[weight] += torch.linalg.vector_norm(rows, dtype=torch.float64).square()

    def finish(self) -> None:
        self._seen = True
        super().finish()

    def state(self) -> State:
        return State(values={"seen": self._seen}, tensors={"energies": self._joined()})

    def restore(self, state: State) -> None:
        self._seen = state.values["seen"]
        for own, saved in zip(self._energies, state.tensors["energies"], strict=True):
            own.copy_(saved)

    def join(self, ranks: Ranks) -> None:
        energies = ranks.from_rank(ranks.first(self._seen), self._joined())
        self._energies = list(energies.split(1))

    def result(self) -> list[float]:  # type: ignore[override]
        """Of every weight; of what is not finite 0."""
        return self._joined().nan_to_num(0.0, 0.0, 0.0).tolist()

    def _joined(self) -> Tensor:
        home = self._energies[0].device
        return torch.cat([each.to(home) for each in self._energies])


def shapes_of(problem: Problem) -> list[tuple[int, int]]:
    """Rank and width of every weight."""
    return [(layer.rank, width) for layer in problem.layers for width, _ in kept_widths(layer, 1)]


def spread_stages(
    problem: Problem, features: int | None, accumulator: Callable[[Sequence[int] | None], Accumulator]
) -> list[Stage]:
    """The passes of a fit: before it, where features are to be spread by energy, one over the first batch.

    Args:
        problem: what is fitted.
        features: over all weights; None where each weight's columns are given.
        accumulator: of the fit, from the columns of every weight; from None where they are given.
    """
    if features is None:
        return [Stage("fit", lambda _: accumulator(None))]
    whole = [
        width == kept for layer in problem.layers for width, kept in kept_widths(layer, 1)
    ]  # small heads

    def spread_out(energies: Sequence[float]) -> Accumulator:
        sketched = [energy * (not kept) for energy, kept in zip(energies, whole, strict=True)]
        return accumulator(spread(features, sketched, shapes_of(problem)))

    probe = Stage(
        "energies", lambda _: EnergyAccumulator(problem.layers, problem.seed), first_batch_only=True
    )
    return [probe, Stage("fit", spread_out)]
