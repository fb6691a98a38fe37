"""Low rank as a plug: options, passes and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.likelihoods import Fisher, Likelihood
from laplace_lora_fast.likelihoods.fisher import checked_fisher, fisher_passes
from laplace_lora_fast.options import positive_integer, register
from laplace_lora_fast.structures.base import Ability, Problem, Stage, Structure, Verdict
from laplace_lora_fast.structures.cost import Cost
from laplace_lora_fast.structures.jacobians import bytes_of_maps
from laplace_lora_fast.structures.low_rank.algebra import BLOCK, LowRankCurvature
from laplace_lora_fast.structures.low_rank.fit import LowRankAccumulator
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.predict import RowPredictor
from laplace_lora_fast.structures.rows.sketches.energies import shapes_of, spread_stages
from laplace_lora_fast.structures.rows.sketches.sketch import checked_columns, features_for, mean_columns
from laplace_lora_fast.weights import LayerWeights, WeightName, kept_features, kept_widths

_LARGEST = 4096  # rank, where the budget allows for more
_SPARE = (
    16  # directions, and a quarter, more than rows: their number may be an estimate, and none is to be lost
)
_SMALLEST = 256  # that "auto" takes, unless there are fewer rows
_SKETCH, _TEST = 8, 2  # bytes of an entry: of the sketch, in fp64, and of its test matrix, in fp16


@register
@dataclass(frozen=True)
class LowRank(Structure):
    """The leading directions of the exact GGN, for any number of examples: one pass, predictions independent of it.

    A Nystrom approximation in the features of sketched rows. It leaves curvature out, so that variances are at least
    those of the GGN, and are close to them from a rank of about the effective number of parameters on.

    Args:
        rank: k; None for as many as the memory budget holds, at most 4,096 and little more than there are rows.
        columns: of a sketched Jacobian row, m a LoRA weight; exact from a layer's width on. None for as many over all
            weights as the rank asks for, spread by the energy of the first batch's Jacobians: 40 features a rank and
            at least 50,000, all of them where that is most of them.
        fisher: "exact" (GGN), "empirical", or "mc" or `MonteCarlo(samples)`.

    Raises:
        ValueError: a value is not one of its choices.
    """

    rank: int | None = None
    columns: int | None = None
    fisher: Fisher = "exact"

    preference = 20

    def __post_init__(self) -> None:
        if self.rank is not None:
            object.__setattr__(self, "rank", positive_integer("rank", self.rank))
        object.__setattr__(self, "columns", checked_columns(self.columns))
        object.__setattr__(self, "fisher", checked_fisher(self.fisher))

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.SAMPLES})

    @property
    def uses_budget(self) -> bool:
        return self.rank is None

    @property
    def needs_size(self) -> bool:
        return self.rank is None

    def suits(self, problem: Problem) -> Verdict:
        """Where the budget holds a rank of 256, or of all rows."""
        rank = self._rank(problem)
        features = self._features(problem, rank)
        rows = self._rows(problem)
        needed = min(_SMALLEST, features, features if rows is None else rows)
        size = f"rank {rank} of {features} features, {_entry(problem) * features * rank / 2**20:.0f} MiB"
        if rank < needed:
            return Verdict(False, f"the budget holds less than rank {needed} of {features} features")
        return Verdict(True, f"{size}, suits low rank")

    def cost(self, problem: Problem) -> Cost | None:
        rows, examples = self._rows(problem), problem.n_examples
        if rows is None or not examples:
            return None
        item = lk.accumulation_dtype(problem.layers[0].matrices[0].dtype).itemsize
        rank = max(1, self._rank(problem))
        features, columns = self._features(problem, rank), self._columns(problem, rank)
        directions, kept, projections, wide = min(rank, rows), [], 0, 0
        kept_item = 2 if item == 4 and columns < max(width for _, width in shapes_of(problem)) else item
        for layer in problem.layers:
            widths = kept_widths(layer, columns)
            own = sum(width * kept for width, kept in widths) * (2 if item == 4 else item)
            rows_of_layer = directions * layer.rank * sum(kept for _, kept in widths) * kept_item
            kept.append(own + rows_of_layer + layer.rank * sum(width for width, _ in widths) * item)
            projections += own
            wide += (
                sum(width * kept for width, kept in widths) * item * (item == 4)
            )  # sketches for fp32 streams
        square = 8 * rank**2
        widest = max(layer.rank * most for layer in problem.layers for _, most in kept_widths(layer, columns))
        # beside the sketch: its test matrix with a block of it in fp64, or what finds directions; then the rows
        beside = _TEST * rank * features + max(8 * rank * min(features, BLOCK), 5 * square)
        rows_made = directions * (item * features + 8 * min(widest, BLOCK)) + square
        return Cost(
            layers=kept,
            fitting=projections
            + wide
            + bytes_of_maps(problem.layers)
            + _SKETCH * rank * features
            + max(beside, rows_made),
            solving=sum(kept) + 4 * square,
            least=_entry(problem) * self._features(problem, 1) if self.rank is None else 0,
            backward=rows / examples,
            forward=1,
            operations=4.0 * rows * features * rank + 5.0 * features * rank**2 + 20.0 * rank**3,
        )

    def stages(self, problem: Problem) -> list[Stage]:
        """Raises ValueError where the budget holds no rank at all."""
        rank = self._rank(problem)
        if rank < 1:
            least = _entry(problem) * self._features(problem, 1)
            raise ValueError(
                f"a budget of {problem.budget} bytes holds no direction of the curvature: pass at least {least}"
            )

        def accumulator(columns: Sequence[int] | None) -> LowRankAccumulator:
            own = self._columns(problem, rank) if columns is None else columns
            return LowRankAccumulator(
                problem.layers, problem.likelihood, self.fisher, own, rank, problem.seed
            )

        features = features_for(rank, shapes_of(problem)) if self.columns is None else None
        return spread_stages(problem, features, accumulator)

    def _rows(self, problem: Problem) -> int | None:
        if self.fisher == "exact" or problem.n_examples is None:
            return problem.n_functions
        return problem.n_examples * fisher_passes(self.fisher, 1)

    def _columns(self, problem: Problem, rank: int) -> int:
        """Of a weight, in the mean."""
        return mean_columns(rank, shapes_of(problem)) if self.columns is None else self.columns

    def _features(self, problem: Problem, rank: int) -> int:
        return kept_features(problem.layers, self._columns(problem, rank))

    def _rank(self, problem: Problem) -> int:
        """At most as many as features; 0 where the budget holds none."""
        if self.rank is not None:
            return min(self.rank, self._features(problem, self.rank))
        rows = self._rows(problem)
        low, high = 0, _LARGEST if rows is None else min(_LARGEST, rows * 5 // 4 + _SPARE)
        while low < high:  # features grow with the rank
            middle = (low + high + 1) // 2
            fits = _entry(problem) * middle * self._features(problem, middle) <= problem.budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return min(low, self._features(problem, max(1, low)))

    def predictor(
        self, curvature: RowCurvature, layers: Sequence[LayerWeights], prior_precisions: Tensor
    ) -> RowPredictor:
        parts, solvers = curvature.solvers_of(prior_precisions)
        return RowPredictor(layers, curvature.rows, curvature.projections, parts, solvers, refitted=False)

    def rebuild(
        self,
        names: list[WeightName],
        tensors: dict[str, Tensor],
        devices: Sequence[torch.device],
        likelihood: Likelihood,
    ) -> LowRankCurvature:
        return LowRankCurvature.low_rank_from(RowCurvature.from_tensors(names, tensors, devices), tensors)


def _entry(problem: Problem) -> int:
    """Most bytes of a feature and a rank: the sketch, with its test matrix before and the rows made of it after."""
    item: int = lk.accumulation_dtype(problem.layers[0].matrices[0].dtype).itemsize
    return _SKETCH + max(_TEST, item)
