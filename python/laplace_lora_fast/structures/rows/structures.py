"""Exact rows as a plug: options, passes and predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.likelihoods import Fisher, Likelihood
from laplace_lora_fast.likelihoods.fisher import checked_fisher, fisher_passes
from laplace_lora_fast.options import register
from laplace_lora_fast.structures.base import Ability, Problem, Stage, Structure, Verdict
from laplace_lora_fast.structures.cost import Cost
from laplace_lora_fast.structures.jacobians import bytes_of_maps
from laplace_lora_fast.structures.low_rank.structures import LowRank
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.fit import RefitAccumulator, RowAccumulator
from laplace_lora_fast.structures.rows.predict import RowPredictor
from laplace_lora_fast.structures.rows.refit import RefittedCurvature
from laplace_lora_fast.structures.rows.refits.left_out import LeftOut
from laplace_lora_fast.structures.rows.refits.path import LeaveOneOutPath
from laplace_lora_fast.structures.rows.sketches.energies import shapes_of, spread_stages
from laplace_lora_fast.structures.rows.sketches.sketch import checked_columns, features_for, mean_columns
from laplace_lora_fast.weights import LayerWeights, WeightName, kept_features, kept_widths

_MOST_ROWS = 4096  # an eigendecomposition of R x R, which tuning takes: about a minute on two cores here


@register
@dataclass(frozen=True)
class Rows(Structure):
    """The exact GGN in row space, for training sets with fewer rows than there are weights.

    Args:
        columns: of a sketched Jacobian row, m a LoRA weight; exact from a layer's width on. None for as many over all
            weights as the number of rows asks for, spread by the energy of the first batch's Jacobians: 40 features a
            row and at least 50,000, all of them where that is most of them; 128 where the loader has no length.
        refit: whether the outputs are centred on the linearised model's own optimum under the prior, starting from the
            model without its adapter (Immer, Korzepa and Bauer 2021), rather than on the trained model. It needs
            labels, costs one more forward pass a batch, and can choose its prior precision by `LeaveOneOut`.
        fisher: "exact" (GGN), "empirical", or "mc" or `MonteCarlo(samples)`.
        rank: keeps the leading directions of the GGN instead of all rows: `Rows(rank=k)` makes a `LowRank(k)`.

    Raises:
        ValueError: a value is not one of its choices, or `refit` goes with a rank, or with another Fisher than
            the exact one.
    """

    columns: int | None = None
    refit: bool = False
    fisher: Fisher = "exact"
    rank: InitVar[int | None] = None

    preference = 10

    def __new__(
        cls,
        columns: int | None = None,
        refit: bool = False,
        fisher: Fisher = "exact",
        rank: int | None = None,
    ) -> Any:
        if rank is None:
            return super().__new__(cls)
        if refit:
            raise ValueError("refit=True needs all rows: leave out rank, or refit")
        return LowRank(rank, columns, fisher)

    def __post_init__(self, rank: int | None) -> None:
        object.__setattr__(self, "columns", checked_columns(self.columns))
        if not isinstance(self.refit, bool):
            raise ValueError(f"refit must be True or False, got {self.refit!r}")
        object.__setattr__(self, "fisher", checked_fisher(self.fisher))
        if self.refit and self.fisher != "exact":
            raise ValueError(f"refit=True needs fisher='exact', got {self.fisher!r}")

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.LEAVE_ONE_OUT if self.refit else Ability.SAMPLES})

    @property
    def uses_budget(self) -> bool:
        return True

    @property
    def needs_size(self) -> bool:
        return self.columns is None

    @property
    def starts_without_adapter(self) -> bool:
        return self.refit

    def suits(self, problem: Problem) -> Verdict:
        """Where the rows are fewer than the weights and than 4,096, and fit the budget."""
        rows = problem.n_functions
        if rows is None or problem.n_examples is None:
            return Verdict(False, "the loader has no length, so the number of rows is unknown")
        if self.fisher != "exact":
            rows = problem.n_examples * fisher_passes(self.fisher, 1)
        row_bytes = 4 * rows * kept_features(problem.layers, self._columns(problem))
        kernel_bytes = 3 * 8 * rows**2  # K, its factor and its eigenvectors
        facts = (
            f"about {rows} rows, {problem.n_parameters} weights, {(row_bytes + kernel_bytes) / 2**20:.0f} MiB"
        )
        few = rows < min(problem.n_parameters, _MOST_ROWS) and row_bytes + kernel_bytes <= problem.budget
        return Verdict(few, f"{facts} suit exact rows" if few else f"{facts} do not suit exact rows")

    def cost(self, problem: Problem) -> Cost | None:
        rows, examples = self._rows(problem), problem.n_examples
        if rows is None or not examples:
            return None
        item = lk.accumulation_dtype(problem.layers[0].matrices[0].dtype).itemsize
        most, widest = self._columns(problem), max(width for _, width in shapes_of(problem))
        omega = 2 if item == 4 else item  # bytes of a number: of sketches, and of their rows
        kept_item = 2 if item == 4 and most < widest else item
        kept, chunks, largest, features, wide = [], 0, 0, 0, 0
        for layer in problem.layers:
            bytes_of_layer = 0
            for width, columns in kept_widths(layer, most):
                entries = rows * layer.rank * columns
                chunks += entries * (item - kept_item)
                wide += (
                    width * columns * item if omega < item else 0
                )  # sketches for streams that are not of 16 bits
                # where columns follow the energy, one weight has several times the mean
                most_entries = (
                    entries if self.columns is not None else min(4 * entries, entries * width // columns)
                )
                largest, features = max(largest, most_entries * item), features + layer.rank * columns
                bytes_of_layer += entries * kept_item + width * (columns * omega + layer.rank * item)
            kept.append(bytes_of_layer)
        roots, kernel = rows * rows // examples * item, 8 * rows**2
        in_fp64 = largest * 8 // item
        return Cost(
            layers=kept,
            # chunks become one matrix, weight by weight
            fitting=sum(kept) + chunks + wide + bytes_of_maps(problem.layers) + roots + largest,
            solving=sum(kept) + roots + max(4 * kernel, 2 * kernel + in_fp64),
            least=0,
            backward=rows / examples,
            forward=1 + self.refit,
            operations=2.0 * rows**2 * features + 10.0 * rows**3,
        )

    def _rows(self, problem: Problem) -> int | None:
        if self.fisher == "exact" or problem.n_examples is None:
            return problem.n_functions
        return problem.n_examples * fisher_passes(self.fisher, 1)

    def _columns(self, problem: Problem) -> int:
        return mean_columns(self._rows(problem), shapes_of(problem)) if self.columns is None else self.columns

    def stages(self, problem: Problem) -> list[Stage]:
        def accumulator(columns: Sequence[int] | None) -> RowAccumulator:
            rest = self._columns(problem) if columns is None else columns, problem.budget, problem.seed
            if self.refit:
                return RefitAccumulator(problem.layers, problem.likelihood, *rest)
            return RowAccumulator(problem.layers, problem.likelihood, self.fisher, *rest)

        rows = self._rows(problem)
        features = (
            None if self.columns is not None or rows is None else features_for(rows, shapes_of(problem))
        )
        return spread_stages(problem, features, accumulator)

    def predictor(
        self, curvature: RowCurvature, layers: Sequence[LayerWeights], prior_precisions: Tensor
    ) -> RowPredictor:
        parts, solvers = curvature.solvers_of(prior_precisions)
        return RowPredictor(layers, curvature.rows, curvature.projections, parts, solvers, curvature.refitted)

    def left_out(self, curvature: RowCurvature) -> Callable[[float], list[LeftOut]]:
        if not isinstance(curvature, RefittedCurvature):
            return super().left_out(curvature)
        return LeaveOneOutPath(curvature).at

    def rebuild(
        self,
        names: list[WeightName],
        tensors: dict[str, Tensor],
        devices: Sequence[torch.device],
        likelihood: Likelihood,
    ) -> RowCurvature:
        rows = RowCurvature.from_tensors(names, tensors, devices)
        return RefittedCurvature.refitted_from(rows, tensors, likelihood) if self.refit else rows
