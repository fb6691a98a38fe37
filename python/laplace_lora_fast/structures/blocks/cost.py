"""What Kronecker factors take of a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import laplace_kernels as lk
from laplace_lora_fast.likelihoods import Fisher
from laplace_lora_fast.likelihoods.fisher import fisher_passes
from laplace_lora_fast.structures.base import Problem
from laplace_lora_fast.structures.blocks.kfac import FactorPlan, TokenSharing
from laplace_lora_fast.structures.cost import Cost


@dataclass(frozen=True)
class _Factor:
    """One running factor, by its dimension, the columns that keep its LoRA side exact, and the rows that come to it."""

    dim: int
    exact: int
    rows: float
    item: int

    def sketch_size(self, columns: int) -> int:
        return min(max(columns - self.exact, columns // 2, 1), self.dim)

    def running(self, dense: bool, columns: int) -> int:
        """Bytes of what accumulates, with the rows that wait."""
        capacity = self.dim // 2 if dense else self.sketch_size(columns)
        waiting = int(min(self.rows, capacity)) * self.dim * self.item
        if self.rows <= capacity:
            return waiting
        wide = self.dim if dense else 2 * (self.sketch_size(columns) + self.exact)
        return waiting + wide * self.dim * self.item

    def rank(self, dense: bool, columns: int, rank: int | None) -> int:
        """Eigenpairs kept."""
        most = self.dim if dense else self.sketch_size(columns) + self.exact
        default = self.dim if dense else max(1, self.sketch_size(columns) // 4)
        few = self.rows <= (self.dim // 2 if dense else self.sketch_size(columns))
        kept = most if rank is None and few else default if rank is None else rank
        return int(min(kept, most, self.rows))

    def passing(self, dense: bool, columns: int) -> int:
        """Bytes that come and go with its eigenproblem, in fp64, without the workspace of the solver."""
        few = self.rows <= (self.dim // 2 if dense else self.sketch_size(columns))
        if few:
            return int(3 * self.rows * self.dim * 8)
        if dense:
            return 2 * 8 * self.dim**2  # eigenvectors, beside the matrix or themselves in descending order
        return 6 * 8 * self.dim * (self.sketch_size(columns) + self.exact)

    def operations(self, dense: bool, columns: int) -> float:
        """Of its eigenproblem."""
        width = min(self.dim if dense else self.sketch_size(columns) + self.exact, self.rows)
        return 9.0 * self.dim * width**2


def kfac_cost(
    problem: Problem, plan: FactorPlan, tokens: TokenSharing, rank: int | None, fisher: Fisher
) -> Cost | None:
    """Of KFAC; None where the number of examples is not known. Factors of tokens are taken to fill up.

    Args:
        problem: which layers share an input decides how many factors there are; not known, each has its own.
        plan: dense or sketched.
        tokens: with "reduce" a sequence is one row of a factor.
        rank: eigenpairs kept of each large factor, None for the default.
        fisher: whose cotangents are sent back.
    """
    layers, examples, functions = problem.layers, problem.n_examples, problem.n_functions
    if not examples or functions is None:
        return None
    passes = functions / examples if fisher == "exact" else fisher_passes(fisher, 1)
    item = lk.accumulation_dtype(layers[0].matrices[0].dtype).itemsize
    groups = list(range(len(layers))) if problem.shared_inputs is None else list(problem.shared_inputs)
    leaders = sorted(set(groups))
    few = tokens is TokenSharing.REDUCE
    shared = {
        leader: sum(layer.rank for layer, own in zip(layers, groups, strict=True) if own == leader)
        for leader in leaders
    }
    rows = (examples, examples * passes) if few else (math.inf, math.inf)
    factors = [_Factor(layers[leader].d_in, shared[leader], rows[0], item) for leader in leaders]
    factors += [_Factor(layer.d_out, layer.rank, rows[1], item) for layer in layers]
    dense, columns = plan.choose([factor.dim for factor in factors], item), plan.sketch_size
    pairs = list(zip(factors, dense, strict=True))
    ranks = [factor.rank(is_dense, columns, rank) for factor, is_dense in pairs]
    vectors = [factor.dim * k * item for factor, k in zip(factors, ranks, strict=True)]
    kept = []
    for index, layer in enumerate(layers):
        place, own = leaders.index(groups[index]), len(leaders) + index
        bytes_of_layer = vectors[own] + (vectors[place] if groups[index] == index else 0)
        bytes_of_layer += 8 * layer.rank * (ranks[place] + ranks[own] + 2 * layer.rank)
        means = sum(each.numel() * each.dtype.itemsize for each in layer.matrices)
        kept.append(bytes_of_layer + means)
    running = sum(factor.running(is_dense, columns) for factor, is_dense in pairs)
    least = sum(min(factor.running(one, columns) for one in (True, False)) for factor in factors)
    return Cost(
        layers=kept,
        fitting=running + sum(kept) + max(factor.passing(is_dense, columns) for factor, is_dense in pairs),
        solving=2 * sum(kept),
        least=least if plan.adapts else 0,
        backward=passes,
        forward=1,
        operations=sum(factor.operations(is_dense, columns) for factor, is_dense in pairs),
    )
