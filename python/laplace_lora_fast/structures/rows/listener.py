"""Streams to sketched Jacobian rows, the way that suits the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_lora_fast.structures.base import Step
from laplace_lora_fast.structures.jacobians import JacobianListener
from laplace_lora_fast.structures.pads import PadImage
from laplace_lora_fast.structures.rows import products
from laplace_lora_fast.structures.rows.sketches.sketch import sketched
from laplace_lora_fast.weights import LayerWeights, is_whole


class RowListener(JacobianListener):
    """Listener that hands on the sketched Jacobian of every weight, one backward pass at a time.

    16-bit streams of a GPU are projected as they pass by, those of like layers together at the end of a pass (see
    `products`); of all others the Jacobian comes first, as soon as its gradient is there.

    Args:
        layers: the tapped layers.
        projections: Omega of every weight.
    """

    def __init__(self, layers: Sequence[LayerWeights], projections: Sequence[Tensor]) -> None:
        super().__init__(layers, [None] * len(projections))
        self._projections = list(projections)
        # DoRA adds what no such product gives, which are of both weights; a head is read at few tokens
        self._is_plain = [layer.norm is None and is_whole(layer) for layer in layers]
        self._streams = products.ProjectedStreams(layers, self._projections)
        self._wide: dict[tuple[int, torch.dtype], Tensor] = {}  # Omega as it is multiplied with fp32 or fp64
        self._kept: set[int] = set()  # groups of the other way
        self._first_inputs: list[tuple[int, Tensor, Tensor | None]] = []

    def start(self, step: Step) -> Tensor:
        cotangents = super().start(step)
        if self._first_inputs:  # only now it is known which layers share them
            for group, x, _ in self._first_inputs:
                members = [layer for layer, leader in enumerate(step.shared_inputs) if leader == group]
                if all(self._is_plain[layer] for layer in members):
                    self._streams.enter(group, members, x)
                else:
                    self._kept.add(group)
            first_inputs, self._first_inputs = self._first_inputs, []
            for first in first_inputs:
                self.observe_input(*first)
        return cotangents

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> PadImage | None:
        if group in self._kept or not products.are_taken_of(x):
            return super().observe_input(group, x, mask)
        if self._streams.knows(group):
            return self._streams.take_input(group, x, mask)
        self._first_inputs.append((group, x, mask))
        return None

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> PadImage | None:
        group = self._shared_inputs[layer]
        if self._streams.takes(group):
            return self._streams.take_gradient(group, layer, g)
        return super().observe_gradient(layer, g, mask)

    def observe_jacobian(self, weight: int, small: Tensor, large: Tensor) -> None:
        key = weight, small.dtype
        if key not in self._wide:
            self._wide[key] = self._projections[weight].to(small.device, small.dtype)
        self.observe_rows(weight, sketched(small, large, self._wide[key]))

    @abstractmethod
    def observe_rows(self, weight: int, rows: Tensor) -> None:
        """J Omega [S, r m] of every sequence in this backward pass."""

    def finish_pass(self) -> None:
        for weight, rows in self._streams.rows():
            self.observe_rows(weight, rows)

    def forget(self) -> None:
        super().forget()
        self._first_inputs.clear()
        self._streams.forget()
