"""KFAC, EKFAC and the diagonal as plugs: their options, passes and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.likelihoods import Fisher, Likelihood
from laplace_lora_fast.likelihoods.fisher import checked_fisher, fisher_passes
from laplace_lora_fast.options import check_choice, positive_integer, register
from laplace_lora_fast.structures.base import Ability, Problem, Stage, Structure, Verdict
from laplace_lora_fast.structures.blocks.cost import kfac_cost
from laplace_lora_fast.structures.blocks.curvature import BlockCurvature
from laplace_lora_fast.structures.blocks.kfac import (
    FactorKind,
    FactorPlan,
    KfacAccumulator,
    OmegaAccumulator,
    TokenSharing,
)
from laplace_lora_fast.structures.blocks.moments import DiagonalAccumulator, EkfacAccumulator
from laplace_lora_fast.structures.blocks.predict import BlockPredictor
from laplace_lora_fast.structures.cost import Cost
from laplace_lora_fast.structures.jacobians import bytes_of_maps
from laplace_lora_fast.weights import LayerWeights, WeightName

_SKETCH_COLUMNS = 128


class BlockStructure(Structure):
    """What structures of independent blocks share."""

    def predictor(
        self, curvature: BlockCurvature, layers: Sequence[LayerWeights], prior_precisions: Tensor
    ) -> BlockPredictor:
        return BlockPredictor(layers, curvature.sound_under(prior_precisions), prior_precisions)

    def rebuild(
        self,
        names: list[WeightName],
        tensors: dict[str, Tensor],
        devices: Sequence[torch.device],
        likelihood: Likelihood,
    ) -> BlockCurvature:
        return BlockCurvature.from_tensors(names, tensors, devices)


@register
@dataclass(frozen=True)
class KFAC(BlockStructure):
    """Kronecker-factored curvature (Martens and Grosse 2015): cheap at any number of examples, and coarse.

    Args:
        tokens: "reduce" or "expand", how the tokens of a sequence share a weight (Eschenhagen et al. 2023). "paper" is
            the convention of the code behind the Laplace-LoRA paper, to compare with published results: pads count,
            and the curvature is too large by the padded length of a batch. With LoRA on the output head, pass `Outputs`
            there: with `Answers` the head sees the last position only.
        rank: leading eigenpairs kept of each large factor, besides its tail. None: all of a dense factor, a quarter of
            a sketched one's columns.
        factors: "dense", "sketch", or "auto": dense, smallest first, within the memory budget.
        columns: of a sketched factor; None for 128.
        fisher: "exact" (GGN, rank-of-Hessian backward passes a batch), "empirical", or "mc" or `MonteCarlo(samples)`.

    Raises:
        ValueError: a value is not one of its choices, or would not be looked at.
    """

    tokens: str = "reduce"
    rank: int | None = None
    factors: str = "auto"
    columns: int | None = None
    fisher: Fisher = "exact"

    preference: ClassVar[int | None] = 100  # it serves any problem: after all others

    def __post_init__(self) -> None:
        check_choice("tokens", self.tokens, [choice.value for choice in TokenSharing])
        check_choice("factors", self.factors, [choice.value for choice in FactorKind])
        for name in ("rank", "columns"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive_integer(name, getattr(self, name)))
        if self.columns is not None and self.factors == "dense":
            raise ValueError("columns are those of a sketch: leave them out with factors='dense'")
        object.__setattr__(self, "fisher", checked_fisher(self.fisher))

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.SAMPLES, Ability.FACTORS})

    @property
    def uses_budget(self) -> bool:
        return self.factors == "auto"

    def suits(self, problem: Problem) -> Verdict:
        return Verdict(True, "KFAC serves any number of examples")

    def adapted_to(self, problem: Problem) -> KFAC:
        """Where every token has a label of its own, tokens are not added up first."""
        return replace(self, tokens=TokenSharing.EXPAND.value) if problem.likelihood.sampled else self

    def stages(self, problem: Problem) -> list[Stage]:
        def accumulator(omegas: dict[int, Tensor] | None) -> KfacAccumulator:
            return KfacAccumulator(*self._arguments(problem), omegas=omegas)

        stages = [Stage("fit", accumulator)]
        if self._sketches_over_ranks(problem):
            probe = Stage("sketches", lambda _: OmegaAccumulator(*self._arguments(problem)), True)
            stages.insert(0, probe)
        return stages

    def cost(self, problem: Problem) -> Cost | None:
        return kfac_cost(problem, self.plan(problem), TokenSharing(self.tokens), self.rank, self.fisher)

    def plan(self, problem: Problem) -> FactorPlan:
        """Dense or sketched factors."""
        columns = _SKETCH_COLUMNS if self.columns is None else self.columns
        return FactorPlan(FactorKind(self.factors), problem.budget, columns, problem.seed)

    def _arguments(
        self, problem: Problem
    ) -> tuple[Sequence[LayerWeights], Fisher, TokenSharing, FactorPlan, int | None]:
        return problem.layers, self.fisher, TokenSharing(self.tokens), self.plan(problem), self.rank

    def _sketches_over_ranks(self, problem: Problem) -> bool:
        """Whether several ranks need one Omega, for their sketches to add up."""
        widths = [width for layer in problem.layers for width in (layer.d_in, layer.d_out)]
        itemsize = lk.accumulation_dtype(problem.layers[0].matrices[0].dtype).itemsize
        return problem.ranks.size > 1 and not all(self.plan(problem).choose(widths, itemsize))


@register
@dataclass(frozen=True)
class EKFAC(KFAC):
    """KFAC whose eigenvalues are measured again in a second pass (George et al. 2018). Takes what `KFAC` takes."""

    preference = None

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.SAMPLES})

    def suits(self, problem: Problem) -> Verdict:
        return Verdict(False, "it takes a second pass over the data")

    def cost(self, problem: Problem) -> Cost | None:
        kfac = super().cost(problem)
        # the second pass begins when the factors are gone; its sums are as large as the eigenvalues they replace
        return None if kfac is None else replace(kfac, backward=2 * kfac.backward, forward=2)

    def stages(self, problem: Problem) -> list[Stage]:
        second = Stage("ekfac", lambda kfac: EkfacAccumulator(problem.layers, self.fisher, kfac))
        return [*super().stages(problem), second]


@register
@dataclass(frozen=True)
class Diagonal(BlockStructure):
    """The diagonal of the Fisher information in the weights: a baseline.

    Args:
        fisher: "exact", "empirical", "mc" or `MonteCarlo(samples)`.
    """

    fisher: Fisher = "exact"

    def __post_init__(self) -> None:
        object.__setattr__(self, "fisher", checked_fisher(self.fisher))

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({Ability.SAMPLES})

    def suits(self, problem: Problem) -> Verdict:
        return Verdict(False, "it is a baseline")

    def cost(self, problem: Problem) -> Cost | None:
        if problem.n_functions is None or not problem.n_examples:
            return None
        item = lk.accumulation_dtype(problem.layers[0].matrices[0].dtype).itemsize
        sums = [sum(each.numel() for each in layer.matrices) * item for layer in problem.layers]
        kept = [2 * each for each in sums]  # with the means
        passes = fisher_passes(self.fisher, 1) * problem.n_examples
        rows = problem.n_functions if self.fisher == "exact" else passes
        fitting = sum(kept) + bytes_of_maps(problem.layers)
        return Cost(kept, fitting, 2 * sum(kept), 0, rows / problem.n_examples, 1, 0.0)

    def stages(self, problem: Problem) -> list[Stage]:
        return [Stage("fit", lambda _: DiagonalAccumulator(problem.layers, self.fisher))]
