"""The LoRA weights of a model as the algebra sees them. The only place that knows "A", "B" and who is transposed.

Every weight is a matrix [r, d], short side first: lora_A as it is, lora_B transposed. The weights of a model stand in
one flat order, layer by layer, lora_A before lora_B.

A LoRA layer computes y = W0 x + s B A x. With g = dL/dy, everything that a curvature of A and B needs follows from the
two streams x and g at the layer itself:

    input of lora_B            z   = A x
    gradient at lora_B output  g_B = s g
    gradient at lora_A output  g_A = s B^T g

so that the Jacobian of lora_A is the sum over tokens of (s B^T g) (x) x, and lora_B's that of (s A x) (x) g. DoRA's
normalisation of W0 + s B A adds to both: see `RowNorm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

from torch import Tensor

import laplace_kernels as lk

SIDES = ("A", "B")
T = TypeVar("T")


class WeightName(NamedTuple):
    """Which weight: the layer's name in `model.named_modules()`, and "A" or "B"."""

    layer: str
    side: str

    def __str__(self) -> str:
        return f"{self.layer}.lora_{self.side}"


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
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    norm: RowNorm | None = None

    @property
    def d_in(self) -> int:
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        return self.B.shape[0]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def small_maps(self) -> tuple[Tensor, Tensor]:
        """What makes the short sides of the Jacobians, fp64: s B^T [r, d_out] of g, and s A [r, d_in] of x."""
        return self.scaling * self.B.double().mT, self.scaling * self.A.double()


def weight_names(layers: Iterable[str]) -> list[WeightName]:
    """The names of all weights, in their order."""
    return [WeightName(layer, side) for layer in layers for side in SIDES]


def matrices(layers: Iterable[LoraWeights]) -> list[Tensor]:
    """All weights [r, d], in their order."""
    return in_order((layer.A, layer.B.mT) for layer in layers)


def in_order(pairs: Iterable[tuple[T, T]]) -> list[T]:
    """What belongs to lora_A and lora_B of each layer, in the order of the weights."""
    return [value for pair in pairs for value in pair]


def by_layer(values: Sequence[T]) -> list[tuple[T, T]]:
    """The inverse of `in_order`."""
    return list(zip(values[0::2], values[1::2], strict=True))


def positions(layer: int) -> tuple[int, int]:
    """Where lora_A and lora_B of a layer stand in the order of the weights."""
    return 2 * layer, 2 * layer + 1


def layer_of(position: int) -> int:
    """The layer of the weight at a position."""
    return position // 2


def is_input_side(position: int) -> bool:
    """Whether the long side of the weight at a position is the layer's input (lora_A), not its output (lora_B)."""
    return position % 2 == 0


def stored(side: str, matrix: Tensor) -> Tensor:
    """A weight [.., r, d] as its parameter is: lora_B transposed back. Its own inverse."""
    return matrix if side == "A" else matrix.mT


def from_flat(side: str, flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Flattened parameters [.., r d] as matrices [.., r, d]."""
    r, d = shape
    return flat.reshape(*flat.shape[:-1], r, d) if side == "A" else flat.reshape(*flat.shape[:-1], d, r).mT


def to_flat(side: str, matrix: Tensor) -> Tensor:
    """The inverse of `from_flat`."""
    return stored(side, matrix).flatten(-2)


def stored_covariance(side: str, covariance: Tensor, shape: Sequence[int]) -> Tensor:
    """A covariance [r d, r d] over vec of a matrix [r, d] as one over the flattened parameter."""
    if side == "A":
        return covariance
    r, d = shape
    return covariance.view(r, d, r, d).permute(1, 0, 3, 2).reshape(r * d, r * d)
