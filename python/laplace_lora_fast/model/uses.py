"""Streams of layers that run several times in a forward pass (shared layers, as ALBERT's): one behind the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from laplace_lora_fast.model.observer import Stream


class Uses:
    """Keeps the streams of a batch's layers until those of all uses are there."""

    def __init__(self) -> None:
        self._inputs: dict[int, list[Stream]] = {}
        self._gradients: dict[int, dict[int, Stream]] = {}  # of a backward pass, by layer and use
        self._outputs: dict[int, list[Stream]] = {}

    def start(self) -> None:
        """Before a forward pass."""
        self._inputs.clear()
        self._outputs.clear()

    def start_backward(self) -> None:
        """Before a backward pass."""
        self._gradients.clear()

    def add_input(self, index: int, stream: Stream, expected: int | None) -> Stream | None:
        """An input of a layer that runs so often, None where that is not known. Returns all of them, once they came."""
        if expected == 1:
            return stream
        streams = self._inputs.setdefault(index, [])
        streams.append(stream)
        return _joined(self._inputs.pop(index)) if len(streams) == expected else None

    def other_inputs(self) -> Iterator[tuple[int, Stream]]:
        """After a forward pass: layers whose inputs are still here, and these."""
        while self._inputs:
            index = next(iter(self._inputs))
            yield index, _joined(self._inputs.pop(index))

    def add_output(self, index: int, stream: Stream) -> None:
        """An output of a layer."""
        self._outputs.setdefault(index, []).append(stream)

    def output(self, index: int) -> Tensor:
        """All outputs of a layer."""
        return _joined(self._outputs[index])[0]

    def add_gradient(self, index: int, use: int, stream: Stream, n_uses: int) -> Stream | None:
        """A gradient of a layer that has run so often. Returns all of them, once they came."""
        if n_uses == 1:
            return stream
        streams = self._gradients.setdefault(index, {})
        streams[use] = stream
        return self._gradient(index, n_uses) if len(streams) == n_uses else None

    def other_gradients(self, n_uses: Mapping[int, int]) -> Iterator[tuple[int, Stream]]:
        """After a backward pass: layers whose gradients are still here; of uses that nothing depends on they are 0."""
        for index in sorted(self._gradients):
            yield index, self._gradient(index, n_uses[index])

    def _gradient(self, index: int, n_uses: int) -> Stream:
        streams = self._gradients.pop(index)
        g, mask = next(iter(streams.values()))
        return _joined(
            [streams[use] if use in streams else (torch.zeros_like(g), mask) for use in range(n_uses)]
        )


def _joined(streams: Sequence[Stream]) -> Stream:
    """The streams of all uses of a layer, one behind the other."""
    if len(streams) == 1:
        return streams[0]
    tokens = torch.cat([x for x, _ in streams], 1)
    if all(mask is None for _, mask in streams):
        return tokens, None
    masks = [x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask for x, mask in streams]
    return tokens, torch.cat(masks, 1)
