"""Sketched Jacobians without a second look at a stream: both its products are taken while it passes by.

    lora_A    J Omega = sum over tokens of (s B^T g) (x) (Omega^T x)
    lora_B    J Omega = sum over tokens of (s A x) (x) (Omega^T g)

So one product with the columns [A^T of every layer fed by x | Omega of each lora_A] is all that is needed of x, one
with [B | Omega of lora_B] all of g: both are read once, in the dtype they have, and neither is kept. What is left are
products of thin fp32 matrices, [T, r] and [T, m], of all layers of one shape together.

That is how 16-bit streams go on a GPU, where it costs about a read of x and g. It takes T d m multiplications, where
the Jacobian first takes T d r: more than a CPU, or a GPU in fp32, has to spare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.structures.columns import Columns, add_halves_
from laplace_lora_fast.structures.pads import PadImage
from laplace_lora_fast.weights import LayerWeights, by_layer, positions

PROJECT = lk.OPS["project_"]


def are_taken_of(stream: Tensor) -> bool:
    """Whether a stream goes this way."""
    return lk.sums_in_fp32(stream)


@dataclass(eq=False)
class Kind:
    """Groups of layers that are alike in all shapes: each group is an input x and the layers fed by it.

    Attributes:
        positions: for each layer of the model where its weights stand.
        layers: of each group.
        members: of each layer its place in its group.
        inputs: columns for x of each group: A^T of every layer, then Omega_A of each.
        gradients: columns for g of each layer: B, then Omega_B.
    """

    positions: Sequence[Sequence[int]]
    layers: dict[int, list[int]] = field(default_factory=dict)
    members: dict[int, int] = field(default_factory=dict)
    inputs: dict[int, Columns] = field(default_factory=dict)
    gradients: dict[int, Columns] = field(default_factory=dict)


@dataclass(eq=False)
class Products:
    """Of one batch's streams of one kind, all of one shape.

    Attributes:
        kind: what they are products with.
        groups: those that have a place here, in this order.
        mask: [S, T] or None.
        x: [groups, S, T, n].
        g: for each layer's place in its group [groups, S, T, n].
        places: where each group is.
        flat: where the products with each group's input go, [S T, n].
        reached: layers that saw a gradient in this pass: their place in the group, and the group's here.
        ready: whether the halves in `x` are added up and its pads are zero.
    """

    kind: Kind
    groups: list[int]
    mask: Tensor | None
    x: Tensor
    g: dict[int, Tensor] = field(default_factory=dict)
    places: dict[int, int] = field(init=False)
    flat: tuple[Tensor, ...] = field(init=False)
    reached: dict[int, dict[int, int]] = field(default_factory=dict)
    ready: bool = False

    def __post_init__(self) -> None:
        self.places = {group: place for place, group in enumerate(self.groups)}
        self._shape = self.x.shape[1:3]
        self.flat = self.x.flatten(1, 2).unbind()
        self._flat_g: dict[int, tuple[Tensor, ...]] = {}

    def fit(self, group: int, x: Tensor, mask: Tensor | None) -> bool:
        """Whether a stream has a place here."""
        return self.mask is mask and group in self.places and self._shape == x.shape[:2]

    def of_gradient(self, place: int, member: int, layer: int, columns: int) -> Tensor:
        """Where the products with the gradient at the output of a layer go, in this pass, [S T, columns]."""
        if member not in self.g:
            self.g[member] = self.x.new_empty(*self.x.shape[:3], columns)
            self._flat_g[member] = self.g[member].flatten(1, 2).unbind()
            self.reached[member] = {}
        self.reached[member][layer] = place
        return self._flat_g[member][place]

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """Of the weights that were reached in this pass; the next one may begin."""
        of_x = [self.kind.inputs[group] for group in self.groups]
        if not self.ready:
            _finish_(self.x, of_x, self.mask)
            self.ready = True
        for member, reached in self.reached.items():
            if not reached:
                continue
            layers = [self.kind.layers[group][member] for group in self.groups]
            of_g = [self.kind.gradients.get(layer) for layer in layers]
            g, columns = self.g[member], next(each for each in of_g if each is not None)
            _finish_(g, of_g, self.mask)
            z, x = (
                of_x[0].part(self.x, index)
                for index in (member, len(self.kind.layers[self.groups[0]]) + member)
            )
            rows_a, rows_b = _rows(columns.part(g, 0), x), _rows(z, columns.part(g, 1))
            for layer, place in reached.items():
                weight_a, weight_b = self.kind.positions[layer]
                yield weight_a, rows_a[place]
                yield weight_b, rows_b[place]
            reached.clear()


class ProjectedStreams:
    """Takes the streams of a model's layers and gives the rows of their sketched Jacobians.

    Args:
        layers: the tapped layers.
        projections: Omega of every weight.
    """

    def __init__(self, layers: Sequence[LayerWeights], projections: Sequence[Tensor]) -> None:
        self._layers, self._projections = layers, by_layer(projections, layers)
        self._positions = positions(layers)
        self._kinds: dict[object, Kind] = {}
        self._kind_of: dict[int, Kind] = {}
        self._open: dict[int, Products] = {}  # of this batch, by group
        self._common: dict[Kind, Products] = {}  # those that have room for all groups of a kind

    def enter(self, group: int, members: Sequence[int], x: Tensor) -> None:
        """Before any stream is taken: the layers `members` are fed by inputs like x."""
        layers = [self._layers[index] for index in members]
        omegas = [self._projections[index] for index in members]
        shapes = [
            (len(layer.matrices[0]), layer.d_out, *((omega.shape[1], omega.dtype) for omega in pair))
            for layer, pair in zip(layers, omegas, strict=True)
        ]
        kind = self._kinds.setdefault((x.shape[-1], x.dtype, x.device, *shapes), Kind(self._positions))
        self._kind_of[group], kind.layers[group] = kind, list(members)
        kind.members.update((layer, place) for place, layer in enumerate(members))
        parts = [layer.small_maps[1].mT for layer in layers] + [omega for omega, _ in omegas]
        kind.inputs[group] = Columns([part.to(x.device) for part in parts], x)

    def take_input(self, group: int, x: Tensor, mask: Tensor | None) -> PadImage | None:
        """Input x [S, T, d] of a group; it is read now and not kept."""
        kind = self._kind_of[group]
        products = self._common.get(kind)
        if products is None or not products.fit(group, x, mask):
            # The first of its kind makes room for all. One that differs, in its length say, has its own.
            groups = list(kind.layers) if products is None else [group]
            size = (len(groups), *x.shape[:2], kind.inputs[group].matrix.shape[1])
            products = Products(kind, groups, mask, x.new_empty(size, dtype=lk.accumulation_dtype(x.dtype)))
            self._common.setdefault(kind, products)
        self._open[group] = products
        place = products.places[group]
        _project_(products.flat[place], x, kind.inputs[group].matrix)
        return None if mask is None else PadImage(products.x, place)

    def take_gradient(self, group: int, layer: int, g: Tensor) -> PadImage | None:
        """Gradient g [S, T, d] at the output of a layer whose group's input was taken."""
        products = self._open[group]
        kind = products.kind
        if layer not in kind.gradients:
            parts = self._layers[layer].small_maps[0].mT, self._projections[layer][1]
            kind.gradients[layer] = Columns([part.to(g.device) for part in parts], g)
        columns, member, place = kind.gradients[layer].matrix, kind.members[layer], products.places[group]
        _project_(products.of_gradient(place, member, layer, columns.shape[1]), g, columns)
        return None if products.mask is None else PadImage(products.g[member], place)

    def knows(self, group: int) -> bool:
        """Whether a group has entered."""
        return group in self._kind_of

    def takes(self, group: int) -> bool:
        """Whether the input of a group was taken in this batch."""
        return group in self._open

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """After a backward pass: each weight that was reached, with its rows [S, r m]."""
        for products in dict.fromkeys(self._open.values()):
            yield from products.rows()

    def forget(self) -> None:
        """All of this batch."""
        self._open.clear()
        self._common.clear()


def _finish_(products: Tensor, columns: Sequence[Columns | None], mask: Tensor | None) -> None:
    """Adds up halves, and puts zeros at pads, whatever stood there. Products [groups, S, T, n] are changed."""
    add_halves_(products, columns)
    if mask is not None:
        products.masked_fill_(~mask[None, ..., None], 0)


def _project_(products: Tensor, stream: Tensor, columns: Tensor) -> None:
    """A stream [S, T, d] times columns [d, n], written to [S T, n]."""
    lk.unchecked(PROJECT, products, stream.flatten(0, 1), columns)


def _rows(small: Tensor, large: Tensor) -> tuple[Tensor, ...]:
    """[groups, S, T, r] and [groups, S, T, m] -> [S, r m] of each group."""
    rows = lk.jacobian(small.flatten(0, 1), large.flatten(0, 1))
    return rows.view(*small.shape[:2], -1).unbind()
