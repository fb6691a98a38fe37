"""The weights under the posterior as the algebra sees them. The only place that knows "A", "B" and who is transposed.

Every weight is a matrix [r, d], short side first: lora_A as it is, lora_B transposed, the weight of a trained head
[outputs, inputs] with its bias as the last column. The weights of a model stand in one flat order, layer by layer,
lora_A before lora_B.

A LoRA layer computes y = W0 x + s B A x. With g = dL/dy, everything that a curvature of A and B needs follows from the
two streams x and g at the layer itself:

    input of lora_B            z   = A x
    gradient at lora_B output  g_B = s g
    gradient at lora_A output  g_A = s B^T g

so that the Jacobian of lora_A is the sum over tokens of (s B^T g) (x) x, and lora_B's that of (s A x) (x) g. DoRA's
normalisation of W0 + s B A adds to both: see `RowNorm`. A trained head computes y = W [x | 1], and the Jacobian of W is
the sum over tokens of g (x) [x | 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

import laplace_kernels as lk

SIDES = ("A", "B")  # of a LoRA layer
HEAD = "head"  # the one side of a trained head
T = TypeVar("T")

_FEW_OUTPUTS = 32


class WeightName(NamedTuple):
    """Which weight: the layer's name in `model.named_modules()`, and "A", "B" or "head"."""

    layer: str
    side: str

    def __str__(self) -> str:
        return self.layer if self.side == HEAD else f"{self.layer}.lora_{self.side}"


class Named(Protocol):
    """A layer with weights under the posterior."""

    @property
    def name(self) -> str:
        """In `model.named_modules()`."""

    @property
    def sides(self) -> Sequence[str]:
        """Its weights, in their order."""


class LayerWeights(Named, Protocol):
    """The weights of one layer."""

    @property
    def matrices(self) -> Sequence[Tensor]:
        """[r, d] each; their long sides are the layer's input, of lora_B its output."""

    @property
    def small_maps(self) -> Sequence[Tensor]:
        """What makes the short sides of the Jacobians, fp64: [r, d_out] of g, for lora_B [r, d_in] of x."""

    @property
    def norm(self) -> RowNorm | None:
        """DoRA's, or None."""

    @property
    def rank(self) -> int:
        """Rows r of its weights."""

    @property
    def d_in(self) -> int:
        """Width of the input stream."""

    @property
    def d_out(self) -> int:
        """Width of the gradient stream."""


@dataclass(frozen=True)
class RowNorm:
    """DoRA (Liu et al., ICML 2024, eq. 5): y = diag(m / |V|) V x + b, with |V| the norms of the rows of V = W0 + s B A.

    With a = sum_t g_t * (y_t - b), feature by feature, and g' = g * m / |V|, the gradient in V is
    sum_t g'_t x_t^T - diag(a / |V|^2) V: that of the rows' directions alone. The first term is what plain LoRA has of
    g'. PEFT's own backward pass leaves out the second, as the paper proposes for training; the function has it.

    Attributes:
        A: lora_A's weight [r, d_in].
        B: lora_B's weight [d_out, r].
        scaling: s.
        magnitude: m [d_out].
        base: gives W0 [d_out, d_in], dense; called when needed, and not kept.
    """

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor
    base: Callable[[], Tensor]

    def _directions(self) -> Tensor:
        """V [d_out, d_in] in the accumulation dtype."""
        dtype = lk.accumulation_dtype(self.base().dtype)
        return self.base().to(dtype) + self.scaling * (self.B.to(dtype) @ self.A.to(dtype))

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor, Tensor]:
        directions = self._directions()
        norms = directions.norm(dim=1)
        return self.magnitude.to(norms) / norms, norms**-2, directions @ self.A.to(directions).mT

    @property
    def gain(self) -> Tensor:
        """The factor m / |V|, [d_out]."""
        return self._constants[0]

    def growth(self, da: Tensor, db: Tensor) -> Tensor:
        """Relative growth of |V| along a step of both weights, [.., d_out]: rows of dV V^T over |V|^2.

        Args:
            da: [.., r, d_in].
            db: [.., d_out, r].
        """
        _, inverse_squares, against_a = self._constants
        of_b = (db.to(against_a) * against_a).sum(-1)
        of_a = (self.B.to(against_a) * (self._directions() @ da.to(against_a).mT)).sum(-1)
        return self.scaling * (of_a + of_b) * inverse_squares

    def moved(self, da: Tensor, db: Tensor) -> RowNorm:
        """That of other weights."""
        return replace(self, A=self.A + da, B=self.B + db)

    def jacobians(self, aligned: Tensor) -> tuple[Tensor, Tensor]:
        """What the norm adds to the Jacobians of both weights, short side first.

        Args:
            aligned: a [S, d_out].

        Returns:
            [S, r, d_in] of lora_A and [S, r, d_out] of lora_B.
        """
        _, inverse_squares, against_a = self._constants
        shares = -self.scaling * (aligned.to(inverse_squares) * inverse_squares)[:, None]
        return (self.B.to(shares).mT * shares) @ self._directions(), against_a.mT * shares


@dataclass(frozen=True)
class LoraWeights:
    """Both weights of one LoRA layer.

    Attributes:
        name: the layer's.
        A: lora_A's weight [r, d_in], detached.
        B: lora_B's weight [d_out, r], detached; of an adapted language-model head the answers' rows only.
        scaling: s.
        norm: DoRA's, or None.
        sides: those under the posterior.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    norm: RowNorm | None = None
    sides: Sequence[str] = SIDES

    @property
    def matrices(self) -> list[Tensor]:
        return self._of_sides(self.A, self.B.mT)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        return self.B.shape[0]

    @property
    def small_maps(self) -> list[Tensor]:
        """Of g s B^T [r, d_out], of x s A [r, d_in], fp64."""
        return self._of_sides(self.scaling * self.B.double().mT, self.scaling * self.A.double())

    def _of_sides(self, of_a: Tensor, of_b: Tensor) -> list[Tensor]:
        return [dict(zip(SIDES, (of_a, of_b), strict=True))[side] for side in self.sides]


@dataclass(frozen=True)
class HeadWeights:
    """The weight of a linear layer that is trained itself.

    Attributes:
        name: the layer's.
        W: [d_out, d_in], or [d_out, d_in + 1] with the bias as its last column, detached; of a language-model head the
            answers' rows only.
    """

    name: str
    W: Tensor

    sides: ClassVar[Sequence[str]] = (HEAD,)
    norm: ClassVar[None] = None

    @property
    def matrices(self) -> tuple[Tensor]:
        return (self.W,)

    @property
    def rank(self) -> int:
        return self.W.shape[0]

    @property
    def d_in(self) -> int:
        return self.W.shape[1]

    @property
    def d_out(self) -> int:
        return self.W.shape[0]

    @property
    def small_maps(self) -> tuple[Tensor]:
        """The gradient itself."""
        return (torch.eye(self.d_out, dtype=torch.float64, device=self.W.device),)


def weight_names(layers: Iterable[Named]) -> list[WeightName]:
    """The names of all weights, in their order."""
    return [WeightName(layer.name, side) for layer in layers for side in layer.sides]


def matrices(layers: Iterable[LayerWeights]) -> list[Tensor]:
    """All weights [r, d], in their order."""
    return in_order(layer.matrices for layer in layers)


def in_order(groups: Iterable[Sequence[T]]) -> list[T]:
    """What belongs to the weights of each layer, in the order of the weights."""
    return list(chain.from_iterable(groups))


def by_layer(values: Sequence[T], layers: Sequence[Named]) -> list[Sequence[T]]:
    """The inverse of `in_order`."""
    assert len(values) == sum(len(layer.sides) for layer in layers)
    rest = iter(values)
    return [tuple(next(rest) for _ in layer.sides) for layer in layers]


def positions(layers: Sequence[Named]) -> list[Sequence[int]]:
    """For each layer where its weights stand in their order."""
    return by_layer(range(sum(len(layer.sides) for layer in layers)), layers)


def long_side_is_input(side: str) -> bool:
    """Whether the long side of a weight is the layer's input, not its output (lora_B)."""
    return side != SIDES[1]


def is_whole(layer: Named) -> bool:
    """Whether both weights of a LoRA layer are under the posterior."""
    return len(layer.sides) == len(SIDES)


def is_head(layer: Named) -> bool:
    """Whether a layer is a trained head: one of few, with few outputs, read at few tokens."""
    return HEAD in layer.sides


def kept_columns(side: str, shape: Sequence[int], columns: int) -> int:
    """How many columns of a Jacobian [r, d] are kept where a sketch has so many: of a head with few outputs all."""
    r, d = shape
    return d if side == HEAD and r <= _FEW_OUTPUTS else min(d, columns)


def kept_widths(layer: LayerWeights, columns: int) -> list[tuple[int, int]]:
    """For each weight [r, d] of a layer d, and how many columns of its Jacobians are kept."""
    pairs = zip(layer.sides, layer.matrices, strict=True)
    return [(each.shape[1], kept_columns(side, each.shape, columns)) for side, each in pairs]


def kept_features(layers: Sequence[LayerWeights], columns: int) -> int:
    """Numbers that are kept of one row over all weights."""
    return sum(layer.rank * kept for layer in layers for _, kept in kept_widths(layer, columns))


def stored(side: str, matrix: Tensor) -> Tensor:
    """A weight [.., r, d] as its parameter is: lora_B transposed back. Its own inverse."""
    return matrix.mT if side == SIDES[1] else matrix


def from_flat(side: str, flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Flattened parameters [.., r d] as matrices [.., r, d]."""
    r, d = shape
    leading = flat.shape[:-1]
    return flat.reshape(*leading, d, r).mT if side == SIDES[1] else flat.reshape(*leading, r, d)


def to_flat(side: str, matrix: Tensor) -> Tensor:
    """The inverse of `from_flat`."""
    return stored(side, matrix).flatten(-2)


def stored_covariance(side: str, covariance: Tensor, shape: Sequence[int]) -> Tensor:
    """A covariance [r d, r d] over vec of a matrix [r, d] as one over the flattened parameter."""
    if side != SIDES[1]:
        return covariance
    r, d = shape
    return covariance.view(r, d, r, d).permute(1, 0, 3, 2).reshape(r * d, r * d)
