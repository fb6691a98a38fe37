"""Per-example Jacobians of the weights from the two streams of each layer.

For lora_A the Jacobian of one output is sum_t g_A (x) x, for lora_B it is sum_t z (x) s g, for a trained head
sum_t g (x) x: an [r, d] matrix a sequence, formed from the streams, used, and dropped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

import laplace_kernels as lk
from laplace_lora_fast.structures.base import Listener, Step
from laplace_lora_fast.structures.columns import Columns, add_halves_
from laplace_lora_fast.structures.pads import PadImage
from laplace_lora_fast.weights import (
    SIDES,
    LayerWeights,
    by_layer,
    in_order,
    long_side_is_input,
    matrices,
    positions,
)


def jacobian(small: Tensor, large: Tensor) -> Tensor:
    """Sum over tokens of small (x) large: [S, Ks, T, r], [S, Kl, T, d] -> [S, K, r, d]."""
    n, _, tokens, r = small.shape
    if not lk.sums_in_fp32(large):
        large = large.to(small.dtype)
        with lk.FULL_PRECISION:
            if small.shape[1] > 1 and large.shape[1] == 1:
                return (small.mT.reshape(n, -1, tokens) @ large[:, 0]).view(n, -1, r, large.shape[3])
            return small.mT @ large
    if large.shape[1] == 1:  # one read of it for all K
        stacked = small.mT.reshape(n, -1, tokens)
        return lk.jacobian(stacked.mT, large[:, 0]).view(n, -1, r, large.shape[3])
    k = large.shape[1]
    rows = lk.jacobian(small.expand(n, k, tokens, r).flatten(0, 1), large.flatten(0, 1))
    return rows.view(n, k, r, large.shape[3])


def bytes_of_maps(layers: Sequence[LayerWeights]) -> int:
    """What a listener for Jacobians keeps of the LoRA weights: in fp64, and as streams of 32 or 16 bits take them."""
    return sum(each.numel() * (8 if each.dtype == torch.float64 else 12) for each in matrices(layers))


class JacobianListener(Listener):
    """Listener that hands on every weight's Jacobian as its two token streams, one backward pass at a time.

    Args:
        layers: the tapped layers.
        rotations: for each weight a rotation V [r, r] of the short side, or None.
    """

    takes_jacobians = True

    def __init__(self, layers: Sequence[LayerWeights], rotations: Sequence[Tensor | None]) -> None:
        # Maps onto the short sides, each [r, d]: BLAS reads long rows twice as fast.
        self._maps = [
            tuple(small if turn is None else turn.mT @ small for small, turn in zip(maps, turns, strict=True))
            for maps, turns in zip(
                (layer.small_maps for layer in layers), by_layer(rotations, layers), strict=True
            )
        ]
        self._positions, self._sides = positions(layers), [layer.sides for layer in layers]
        # of layers with a weight whose long side is their output, which one
        self._of_outputs = {
            layer: index
            for layer, sides in enumerate(self._sides)
            for index, side in enumerate(sides)
            if not long_side_is_input(side)
        }
        self._norms = [layer.norm for layer in layers]
        normalised = in_order([layer.norm is not None] * len(layer.sides) for layer in layers)
        self._varying = {weight for weight, has_norm in enumerate(normalised) if has_norm}
        self._rotations = by_layer(rotations, layers)
        self._aligned: dict[int, Tensor] = {}
        self._wide_maps: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._columns: dict[tuple[object, ...], Columns] = {}  # of several maps, for 16-bit streams of a GPU
        self._inputs: dict[int, Tensor] = {}
        self._small_of_inputs: dict[int, Tensor] = {}
        self._shared_inputs: Sequence[int] = []

    def start(self, step: Step) -> Tensor:
        self._shared_inputs = step.shared_inputs
        return step.functions.plain(step.u)

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> PadImage | None:
        self._inputs[group] = _real_tokens(x, mask)
        return None

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> PadImage | None:
        group = self._shared_inputs[layer]
        x, g = self._inputs[group], _real_tokens(g, mask)
        if (
            layer in self._of_outputs and layer not in self._small_of_inputs
        ):  # the same in every backward pass
            layers = [layer]
            if lk.sums_in_fp32(x):  # bound by reading x: once for all
                layers = [other for other in self._of_outputs if self._shared_inputs[other] == group]
            shorts = self._short_sides(x, [(other, self._of_outputs[other]) for other in layers])
            self._small_of_inputs.update(zip(layers, shorts, strict=True))
        norm = self._norms[layer]
        if norm is not None:
            g = g * norm.gain.to(g.dtype)
            added = dict(zip(SIDES, norm.jacobians(self._aligned.pop(layer)), strict=True))
        for index, (side, weight) in enumerate(zip(self._sides[layer], self._positions[layer], strict=True)):
            if long_side_is_input(side):
                (small,), large = self._short_sides(g, [(layer, index)]), x[:, None]
            else:
                small, large = self._small_of_inputs[layer], g[:, None]
            if norm is not None:
                small, large = _with_rows(small, large, added[side], self._rotations[layer][index])
            self.observe_jacobian(weight, small, large)
        return None

    def observe_jacobians(self, layer: int, jacobians: Sequence[Tensor]) -> None:
        """As if each row of a Jacobian were a token."""
        triples = zip(self._positions[layer], jacobians, self._rotations[layer], strict=True)
        for weight, each, turn in triples:
            self._varying.add(weight)
            large = each.to(lk.accumulation_dtype(each.dtype))[:, None]
            self.observe_jacobian(weight, _units(large, turn), large)

    def varies(self, weight: int) -> bool:
        """Whether a weight's large stream differs from pass to pass, though its long side is the layer's input."""
        return weight in self._varying

    def observe_alignment(self, layer: int, aligned: Tensor) -> None:
        self._aligned[layer] = aligned

    def _short_sides(self, stream: Tensor, maps: Sequence[tuple[int, int]]) -> list[Tensor]:
        """A stream [S, T, d] times maps (of which layer and weight of it), in one product.

        Returns:
            [S, 1, T, r] each, in the accumulation dtype.
        """
        if not lk.sums_in_fp32(stream):
            wide = lk.accumulation_dtype(stream.dtype)
            with lk.FULL_PRECISION:
                return [linear(stream.to(wide), self._map(*each, wide))[:, None] for each in maps]
        key = (stream.dtype, *maps)
        if key not in self._columns:
            parts = [self._maps[layer][side].mT.to(stream.device) for layer, side in maps]
            self._columns[key] = Columns(parts, stream)
        columns = self._columns[key]
        size = (1, *stream.shape[:2], columns.matrix.shape[1])
        products = stream.new_empty(size, dtype=lk.accumulation_dtype(stream.dtype))
        lk.project_(products.flatten(0, 2), stream.flatten(0, 1), columns.matrix)
        add_halves_(products, [columns])
        return [columns.part(products[0], index)[:, None] for index in range(len(maps))]

    def _map(self, layer: int, side: int, dtype: torch.dtype) -> Tensor:
        key = (layer, side, dtype)
        if key not in self._wide_maps:  # once
            self._wide_maps[key] = self._maps[layer][side].to(dtype)
        return self._wide_maps[key]

    @abstractmethod
    def observe_jacobian(self, weight: int, small: Tensor, large: Tensor) -> None:
        """The Jacobian of every sequence in this backward pass is the sum over tokens of small (x) large.

        Args:
            weight: its position.
            small: [S, 1, T, r], rotated.
            large: [S, 1, T, d], zero at pads.
        """

    def finish(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._aligned.clear()
        self._inputs.clear()
        self._small_of_inputs.clear()


def _with_rows(small: Tensor, large: Tensor, rows: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor]:
    """The streams of a Jacobian to which `rows` [S, r, d] are added: r tokens more, in the accumulation dtype."""
    rows = rows[:, None].to(small.dtype)
    return torch.cat([small, _units(rows, turn)], 2), torch.cat([large.to(small.dtype), rows], 2)


def _units(rows: Tensor, turn: Tensor | None) -> Tensor:
    """The small stream beside rows [S, 1, r, d] that stand for tokens: unit vectors [S, 1, r, r], rotated."""
    unit = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)
    return (unit if turn is None else turn.to(unit)).expand(len(rows), 1, -1, -1)


def _real_tokens(stream: Tensor, mask: Tensor | None) -> Tensor:
    """A stream [S, T, d] with zeros at pads."""
    return stream if mask is None else stream.where(mask[..., None], 0)
