"""Kronecker-factored curvature of LoRA weights from the two streams of each layer.

For the weight A of a layer (row-major vec) KFAC says H_A = G_A (x) X, for B likewise H_B = G_B (x) Z, with input
factors X, Z and gradient factors G (Martens and Grosse 2015). Tokens share the weight (Eschenhagen et al. 2023):

    expand   X = 1/M sum over tokens of x x^T              G = sum over tokens of g g^T
    reduce   X = 1/N sum over sequences of xbar xbar^T      G = sum over sequences of gbar gbar^T
             xbar = mean of x over real tokens             gbar = sum of g over real tokens
    paper    X = 1/N sum over all positions of x x^T       G = sum over all positions of g g^T

with M real tokens in N sequences. "paper" is what the code behind the Laplace-LoRA paper computes: like expand, but the
input factor counts pads and is not divided by the sequence length, so its curvature is larger by the padded length.

z and g_A are linear images of x and g, so two of the four factors are free: Z = A X A^T and G_A = s^2 B^T G B.

A trained head is read at few tokens of a sequence, one as a rule, whose gradients are the only ones that are not zero.
Whatever the convention, its factors are reduced over those: X = 1/N sum of xbar xbar^T, xbar the mean of x over them,
which for one token makes each example's Jacobian the product g x^T that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.likelihoods import Fisher
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.base import Accumulator, Step
from laplace_lora_fast.structures.blocks.algebra import KronBlock
from laplace_lora_fast.structures.blocks.curvature import BlockCurvature
from laplace_lora_fast.structures.blocks.factors import (
    DenseFactor,
    Factor,
    SketchFactor,
    flush_full,
    join,
)
from laplace_lora_fast.structures.blocks.spectrum import Spectrum
from laplace_lora_fast.structures.blocks.token_sums import PaddedTokens, TokenSums
from laplace_lora_fast.structures.blocks.waiting import zero
from laplace_lora_fast.structures.pads import PadImage
from laplace_lora_fast.structures.state import State
from laplace_lora_fast.weights import LayerWeights, in_order, is_head, long_side_is_input, weight_names


class TokenSharing(str, Enum):
    """How the tokens of a sequence share a weight."""

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

    @property
    def adapts(self) -> bool:
        """Whether the memory budget decides."""
        return self.kind is FactorKind.AUTO

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
    """Listener that sums the running factors of every layer: one per distinct input, one per output gradient.

    Args:
        layers: the tapped layers.
        fisher: whose cotangents are sent back.
        tokens: how they share a weight.
        plan: dense or sketched.
        rank: leading eigenpairs to keep of each large factor; None for the kind's default.
        omegas: of the sketched factors, as `OmegaAccumulator` gives them; None to make them here.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        fisher: Fisher,
        tokens: TokenSharing,
        plan: FactorPlan,
        rank: int | None,
        omegas: dict[int, Tensor] | None = None,
    ) -> None:
        self._layers, self._fisher, self._tokens, self._plan, self._rank = layers, fisher, tokens, plan, rank
        self._omegas = omegas or {}
        self._inputs: dict[int, Factor] = {}
        self._gradients: list[Factor] = []
        self._divisors: dict[int, Tensor | float] = {}
        self._first_inputs: list[tuple[int, Tensor, Tensor | None]] = []
        # of a batch, until the gradients of its heads
        self._inputs_of_heads: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._shared_inputs: list[int] = []  # of the factors, once they are there
        self._found: list[int] = []
        self._padded = PaddedTokens()
        self._sums: dict[str, TokenSums] = {}  # of inputs and of gradients

    def start(self, step: Step) -> Tensor:
        self._found = step.shared_inputs
        return step.functions.spread(step.fisher(self._fisher))

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> PadImage | None:
        if self._shared_inputs:
            return self._add_input(group, x, mask)
        self._first_inputs.append((group, x, mask))
        return None

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> PadImage | None:
        """Creates the factors, once the first forward pass has told which layers share their input."""
        if not self._shared_inputs:
            self._create(self._found, lk.accumulation_dtype(self._first_inputs[0][1].dtype))
            for group, x, own_mask in self._first_inputs:
                self._add_input(group, x, own_mask)
            self._first_inputs.clear()
        tokens = self._tokens
        if is_head(self._layers[layer]):
            tokens = TokenSharing.REDUCE
            if layer in self._inputs_of_heads:  # before the first pass
                x, real = self._inputs_of_heads.pop(layer)
                self._count(layer, add_input(self._inputs[layer], tokens, x, _read_tokens(g, real)))
        elif tokens is TokenSharing.REDUCE and self._padded.are_multiplied(mask, g):
            return self._sums["gradients"].take(layer, g, mask)
        add_gradient(self._gradients[layer], tokens, g, mask)
        return None

    def finish_pass(self) -> None:
        """Makes room for the next pass, in all factors together."""
        for sums in self._sums.values():
            sums.finish()
        flush_full(self._all_factors())

    def finish(self) -> None:
        self._padded.finish()

    def omegas(self) -> dict[int, Tensor]:
        """Omega of every sketched factor: accumulators with the same ones, over other data, add up."""
        factors = enumerate(self._all_factors())
        return {index: factor.omega for index, factor in factors if isinstance(factor, SketchFactor)}

    def forget(self) -> None:
        self._first_inputs.clear()
        self._inputs_of_heads.clear()
        self._padded.forget()
        for sums in self._sums.values():
            sums.forget()

    def state(self) -> State:
        if not self._shared_inputs:
            return State({"shared_inputs": []})
        factors = [factor.state() for factor in self._all_factors()]
        values = {
            "shared_inputs": self._shared_inputs,
            "dtype": str(self._dtype).removeprefix("torch."),
            "divisors": [int(self._divisors.get(leader, 0)) for leader in self._inputs],
            "factors": [factor.values for factor in factors],
        }
        tensors = {f"{i}.{name}": t for i, factor in enumerate(factors) for name, t in factor.tensors.items()}
        return State(values, tensors)

    def restore(self, state: State) -> None:
        values = state.values
        if not values["shared_inputs"]:
            return
        self._create(values["shared_inputs"], getattr(torch, values["dtype"]))
        self._divisors = dict(zip(self._inputs, values["divisors"], strict=True))
        for index, factor in enumerate(self._all_factors()):
            prefix = f"{index}."
            own = {n.removeprefix(prefix): t for n, t in state.tensors.items() if n.startswith(prefix)}
            factor.restore(State(values["factors"][index], own))

    def prepare(self, shared_inputs: list[int]) -> None:
        self._create(shared_inputs, lk.accumulation_dtype(self._layers[0].matrices[0].dtype))

    def join(self, ranks: Ranks) -> None:
        """Adds up the factors, and the tokens behind them, over all ranks."""
        join(self._all_factors(), ranks)
        counts = ranks.gather_numbers([float(self._divisors.get(leader, 0)) for leader in self._inputs]).sum(
            0
        )
        self._divisors = dict(zip(self._inputs, counts.tolist(), strict=True))

    def result(self) -> BlockCurvature:
        """Eigendecomposes every weight's curvature.

        Raises:
            NumericalError: a factor is not finite; names the layer.
        """
        spectra: dict[int, Spectrum] = {}
        parts = in_order(self._parts_of(index, spectra) for index in range(len(self._layers)))
        return BlockCurvature(weight_names(self._layers), KronBlock.kfac(parts))

    def _parts_of(self, index: int, spectra: dict[int, Spectrum]) -> list[tuple[Spectrum, Tensor, Tensor]]:
        """Both factors of a layer's weights; spectra of inputs are kept for the layers that share them."""
        layer, group = self._layers[index], self._shared_inputs[index]
        x, g = self._inputs[group], self._gradients[index]
        if not (x.is_finite() and g.is_finite()):
            raise NumericalError(
                f"the curvature of layer {layer.name!r} is not finite: the model overflows or a batch holds NaN"
            )
        divisor = float(self._divisors[group]) or 1.0  # 0 where the layer never ran
        if group not in spectra:
            spectra[group] = x.spectrum(self._rank).scaled(1 / divisor)
        parts = []
        for side, small, matrix in zip(layer.sides, layer.small_maps, layer.matrices, strict=True):
            if long_side_is_input(side):
                parts.append((spectra[group], g.quadratic(small.mT), matrix))
            else:
                z = x.quadratic(small.mT) * (1 / divisor)
                parts.append((g.spectrum(self._rank), z, matrix))
        return parts

    def _create(self, shared_inputs: list[int], dtype: torch.dtype) -> None:
        self._shared_inputs, self._dtype = shared_inputs, dtype
        leaders = sorted(set(shared_inputs))
        dims = [self._layers[leader].d_in for leader in leaders] + [layer.d_out for layer in self._layers]
        dense = self._plan.choose(dims, dtype.itemsize)
        for position, leader in enumerate(leaders):
            members = [
                layer for layer, group in zip(self._layers, shared_inputs, strict=True) if group == leader
            ]
            exact = _maps(members, of_gradients=False)
            self._inputs[leader] = self._factor(position, dense, exact.mT, dtype)
        for position, layer in enumerate(self._layers, len(leaders)):
            exact = _maps([layer], of_gradients=True)
            self._gradients.append(self._factor(position, dense, exact.mT, dtype))
        self._sums = {
            "inputs": TokenSums(self._inputs, self._padded, mean=True),
            "gradients": TokenSums(dict(enumerate(self._gradients)), self._padded, mean=False),
        }

    def _all_factors(self) -> list[Factor]:
        return [*self._inputs.values(), *self._gradients]

    def _factor(self, index: int, dense: Sequence[bool], exact: Tensor, dtype: torch.dtype) -> Factor:
        """The factor at a place of `_all_factors`."""
        if dense[index]:
            return DenseFactor(len(exact), dtype, exact.device)
        seed, omega, size = self._plan.seed + index, self._omegas.get(index), self._plan.sketch_size
        return SketchFactor(max(size - exact.shape[1], size // 2, 1), exact, dtype, seed, omega)

    def _add_input(self, group: int, x: Tensor, mask: Tensor | None) -> PadImage | None:
        if is_head(self._layers[group]):
            self._inputs_of_heads[group] = x, mask
        elif self._tokens is TokenSharing.REDUCE and self._padded.are_multiplied(mask, x):
            self._count(group, len(x))
            return self._sums["inputs"].take(group, x, mask)
        else:
            self._count(group, add_input(self._inputs[group], self._tokens, x, mask))
        return None

    def _count(self, group: int, number: Tensor | int) -> None:
        """Of what the factor of an input is the mean; on the device, if anywhere: nothing waits for it."""
        self._divisors[group] = self._divisors.get(group, 0) + number


class OmegaAccumulator(KfacAccumulator):
    """Makes the sketches that the first rank with data would make of its first batch, for all ranks to use."""

    def join(self, ranks: Ranks) -> None:
        source = ranks.first(bool(self._divisors))
        self._shared = {index: ranks.from_rank(source, omega) for index, omega in self.omegas().items()}

    def result(self) -> dict[int, Tensor]:  # type: ignore[override]
        """Omega of every sketched factor."""
        return self._shared


def _maps(layers: Sequence[LayerWeights], of_gradients: bool) -> Tensor:
    """The maps of layers' gradients, or of their common input, one below the other, [.., d]: there may be none."""
    first = layers[0]
    none = first.matrices[0].new_zeros(0, first.d_out if of_gradients else first.d_in, dtype=torch.float64)
    pairs = [pair for layer in layers for pair in zip(layer.sides, layer.small_maps, strict=True)]
    return torch.cat([none, *(small for side, small in pairs if long_side_is_input(side) is of_gradients)])


def add_input(factor: Factor, tokens: TokenSharing, x: Tensor, mask: Tensor | None) -> Tensor | int:
    """Adds inputs x [S, T, d] with mask [S, T] to a factor. Returns by how much its divisor grows."""
    if tokens is TokenSharing.REDUCE:
        _add_reduced(factor, x, mask, mean=True)
        return x.shape[0]
    if tokens is TokenSharing.PAPER:
        factor.add_tokens(x, None)
        return x.shape[0]
    factor.add_tokens(x, mask)
    return x.shape[0] * x.shape[1] if mask is None else mask.sum()


def add_gradient(factor: Factor, tokens: TokenSharing, g: Tensor, mask: Tensor | None) -> None:
    """Adds output gradients g [S, T, d] with mask [S, T] to a factor."""
    if tokens is TokenSharing.REDUCE:
        _add_reduced(factor, g, mask, mean=False)
    else:
        factor.add_tokens(g, None if tokens is TokenSharing.PAPER else mask)


def _add_reduced(factor: Factor, x: Tensor, mask: Tensor | None, mean: bool) -> None:
    """Adds the sum or mean over the real tokens of every sequence, [S, T, d] -> [S, d], in the accumulation dtype."""
    dtype = lk.accumulation_dtype(x.dtype)
    place = factor.place(len(x), dtype)
    written = place is not None and place.dtype == dtype
    rows = place if place is not None and written else x.new_empty((x.shape[0], x.shape[2]), dtype=dtype)
    if mask is not None:  # masked tokens are selected away
        x = torch.where(mask[..., None], x, zero(x))
    (torch.mean if mean and mask is None else torch.sum)(x, 1, dtype=dtype, out=rows)
    if mean and mask is not None:
        rows /= mask.sum(1, keepdim=True).clamp_min(1)  # a head may see no token
    if place is None:
        factor.add_rows(rows)
    elif not written:
        place.copy_(rows)


def _read_tokens(g: Tensor, real: Tensor | None) -> Tensor:
    """Which tokens [S, T] have a gradient g [S, T, d]; where none has, all real ones."""
    read = (g != 0).any(-1)
    others = torch.ones_like(read) if real is None else real
    return torch.where(read.any(1, keepdim=True), read & others, others)
