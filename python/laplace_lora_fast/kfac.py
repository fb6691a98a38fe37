"""Kronecker-factored curvature of LoRA weights from the two streams of each layer.

For the weight A of a layer (row-major vec) KFAC says H_A = G_A (x) X, for B likewise H_B = G_B (x) Z, with input
factors X, Z and gradient factors G (Martens and Grosse 2015). Tokens share the weight (Eschenhagen et al. 2023):

    expand   X = 1/M sum over tokens of x x^T              G = sum over tokens of g g^T
    reduce   X = 1/N sum over examples of xbar xbar^T      G = sum over examples of gbar gbar^T
             xbar = mean of x over real tokens             gbar = sum of g over real tokens
    paper    X = 1/N sum over all positions of x x^T       G = sum over all positions of g g^T

with M real tokens in N examples. "paper" is what the code behind the Laplace-LoRA paper computes: like expand, but the
input factor counts pads and is not divided by the sequence length, so its curvature is larger by the padded length.

z and g_A are linear images of x and g, so two of the four factors are free: Z = A X A^T and G_A = s^2 B^T G B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.blocks import BlockCurvature, KronBlock
from laplace_lora_fast.distributed import Ranks
from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.factors import DenseFactor, Factor, SketchFactor, Spectrum, flush_full, join
from laplace_lora_fast.fit import Accumulator
from laplace_lora_fast.taps import Site


class Kfac(str, Enum):
    """How tokens of one example share a weight."""

    EXPAND = "expand"
    REDUCE = "reduce"
    PAPER = "paper"


class FactorKind(str, Enum):
    """How a running factor is stored."""

    DENSE = "dense"
    SKETCH = "sketch"
    AUTO = "auto"


@dataclass(frozen=True)
class FactorPlan:
    """Which running factors are dense and which are sketched.

    Attributes:
        kind: of all factors; auto keeps the smallest ones dense as long as they fit the budget together.
        memory_budget: bytes of dense factors for auto, with the rows that may wait for them: up to half as much again.
        sketch_size: columns of a sketch, those in it that keep the LoRA side exact (the rank of each layer that shares
            the factor) as long as they are no more than half: what is kept on chip is the whole.
        seed: of the sketches.
    """

    kind: FactorKind = FactorKind.AUTO
    memory_budget: int = 4 * 2**30
    sketch_size: int = 128
    seed: int = 0

    def choose(self, dims: Sequence[int], itemsize: int) -> list[bool]:
        """For each dimension whether its factor is dense."""
        if self.kind is not FactorKind.AUTO:
            return [self.kind is FactorKind.DENSE] * len(dims)
        dense, used = [False] * len(dims), 0
        for index in sorted(range(len(dims)), key=dims.__getitem__):
            used += dims[index] ** 2 * itemsize * 3 // 2
            dense[index] = used <= self.memory_budget
        return dense


class KfacAccumulator(Accumulator):
    """Observer that sums the running factors of every site: one per distinct input, one per output gradient.

    Args:
        sites: the tapped layers.
        mode: expand or reduce.
        plan: dense or sketched.
        rank: leading eigenpairs to keep of each large factor; None for the kind's default.
        omegas: of the sketched factors, as `omegas` of another accumulator gives them; None to make them here.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        mode: Kfac,
        plan: FactorPlan,
        rank: int | None,
        omegas: dict[int, Tensor] | None = None,
    ) -> None:
        self._omegas = omegas or {}
        self._sites, self._mode, self._plan, self._rank = sites, mode, plan, rank
        self._inputs: dict[int, Factor] = {}
        self._gradients: list[Factor] = []
        self._rows: dict[int, Tensor | float] = {}
        self._first_inputs: list[tuple[int, Tensor, Tensor | None]] = []
        self._groups: list[int] = []

    def start(self, groups: list[int]) -> None:
        """Creates the factors, once the first forward pass has told which sites share their input."""
        self._groups = groups
        leaders = sorted(set(groups))
        dtype = lk.accumulation_dtype(self._first_inputs[0][1].dtype)
        dims = [self._sites[leader].d_in for leader in leaders] + [site.d_out for site in self._sites]
        dense = self._plan.choose(dims, dtype.itemsize)
        for position, leader in enumerate(leaders):
            members = [site for site, group in zip(self._sites, groups, strict=True) if group == leader]
            exact = [member.A.mT for member in members]
            self._inputs[leader] = self._factor(position, dense, exact, dtype)
        for position, site in enumerate(self._sites, len(leaders)):
            self._gradients.append(self._factor(position, dense, [site.B], dtype))
        for group, x, mask in self._first_inputs:
            self._add_input(group, x, mask)
        self._first_inputs.clear()

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        if self._groups:
            self._add_input(group, x, mask)
        else:
            self._first_inputs.append((group, x, mask))

    def observe_gradient(self, site: int, g: Tensor, mask: Tensor | None) -> None:
        add_gradient(self._gradients[site], self._mode, g, mask)

    def finish_pass(self, n: int) -> None:
        """Makes room for the next pass, in all factors together."""
        flush_full(self._all_factors())

    def omegas(self) -> dict[int, Tensor]:
        """Omega of every sketched factor: accumulators with the same ones, over other data, add up."""
        factors = enumerate(self._all_factors())
        return {index: factor.omega for index, factor in factors if isinstance(factor, SketchFactor)}

    def join(self, ranks: Ranks) -> None:
        """Adds up the factors, and the tokens behind them, over all ranks."""
        join(self._all_factors(), ranks)
        counts = ranks.gather_numbers([float(self._rows.get(leader, 0)) for leader in self._inputs]).sum(0)
        self._rows = dict(zip(self._inputs, counts.tolist(), strict=True))

    def curvature(self) -> BlockCurvature:
        """Eigendecomposes every block's curvature.

        Raises:
            NumericalError: a factor is not finite; names the layer.
        """
        spectra: dict[int, Spectrum] = {}
        blocks: list[KronBlock] = []
        for index, site in enumerate(self._sites):
            group = self._groups[index]
            x, g = self._inputs[group], self._gradients[index]
            if not (x.is_finite() and g.is_finite()):
                raise NumericalError(
                    f"the curvature of layer {site.name!r} is not finite: the model overflows or a batch holds NaN"
                )
            rows = float(self._rows[group]) or 1.0  # none where the layer never ran
            if group not in spectra:
                spectra[group] = x.spectrum(self._rank).scaled(1 / rows)
            square = site.scaling**2
            a, b = site.A.double(), site.B.double()
            blocks.append(KronBlock.kfac(spectra[group], square * g.quadratic(b), site.A))
            z = x.quadratic(a.mT) * (square / rows)
            blocks.append(KronBlock.kfac(g.spectrum(self._rank), z, site.B.mT))
        names = [(site.name, side) for site in self._sites for side in "AB"]
        return BlockCurvature("kfac", names, blocks)

    def _all_factors(self) -> list[Factor]:
        return [*self._inputs.values(), *self._gradients]

    def _factor(self, index: int, dense: Sequence[bool], exact: list[Tensor], dtype: torch.dtype) -> Factor:
        """The factor at a place of `_all_factors`."""
        if dense[index]:
            return DenseFactor(exact[0].shape[0], dtype, exact[0].device)
        seed, omega, columns = self._plan.seed + index, self._omegas.get(index), torch.cat(exact, 1)
        size = self._plan.sketch_size
        return SketchFactor(max(size - columns.shape[1], size // 2, 1), columns, dtype, seed, omega)

    def _add_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        rows = add_input(self._inputs[group], self._mode, x, mask)
        self._rows[group] = (
            self._rows.get(group, 0) + rows
        )  # on the device, if anywhere: nothing waits for it


def add_input(factor: Factor, mode: Kfac, x: Tensor, mask: Tensor | None) -> Tensor | int:
    """Adds inputs x [N, T, d] with mask [N, T] to a factor. Returns by how much its divisor grows."""
    if mode is Kfac.REDUCE:
        mean = _token_sum(x, mask)
        mean /= x.shape[1] if mask is None else mask.sum(1, keepdim=True)
        factor.add_rows(mean)
        return x.shape[0]
    if mode is Kfac.PAPER:
        factor.add_tokens(x, None)
        return x.shape[0]
    factor.add_tokens(x, mask)
    return x.shape[0] * x.shape[1] if mask is None else mask.sum()


def add_gradient(factor: Factor, mode: Kfac, g: Tensor, mask: Tensor | None) -> None:
    """Adds output gradients g [N, T, d] with mask [N, T] to a factor."""
    if mode is Kfac.REDUCE:
        factor.add_rows(_token_sum(g, mask))
    else:
        factor.add_tokens(g, None if mode is Kfac.PAPER else mask)


def _token_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over real tokens, [N, T, d] -> [N, d], in the accumulation dtype. Masked tokens are selected away."""
    if mask is not None:
        x = x.where(mask[..., None], 0)
    return x.sum(1, dtype=lk.accumulation_dtype(x.dtype))
