"""Layers whose Jacobians come from autograd in their weights, one sequence at a time.

The fast way reads a Jacobian off two streams with a row a sequence. Some layers have none: LoRA on parameters (PEFT's
`target_parameters`: expert weights of a mixture), whose tokens a router mixes; DeBERTa's keys, which see relative
positions too, once for all sequences of a batch; vision towers, windows of attention. There the gradient of each
sequence's outputs in lora_A and lora_B is the row by definition, at the cost of a backward pass a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import InvalidBatchError, UnsupportedAdapterError
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.model.observer import Observer, Stream, Tapped, tokens_and_mask

Gradients = Sequence[Tensor | None]


class Alone:
    """Which layers of a tap these are.

    Args:
        layers: all of the tap.
        known: names of those that earlier taps have found.

    Attributes:
        indices: theirs.
        embedded: what the input embeddings gave in this pass: gradients there tell what streams would, that sequences
            do not depend on each other, nor on pads.
        refused: why the streams of layers that are not among them, yet, could not be read in this pass.
    """

    def __init__(self, layers: Sequence[Tapped], known: Iterable[str]) -> None:
        self._layers, names = layers, set(known)
        self.indices = {
            index for index, layer in enumerate(layers) if layer.without_streams or layer.name in names
        }
        self.embedded: Tensor | None = None
        self._read = False
        self.refused: dict[int, InvalidBatchError] = {}

    def __contains__(self, index: int) -> bool:
        return index in self.indices

    @property
    def names(self) -> set[str]:
        """Of the layers."""
        return {self._layers[index].name for index in self.indices}

    @property
    def weights(self) -> list[nn.Parameter]:
        """Theirs."""
        return [weight for index in sorted(self.indices) for weight in self._layers[index].own_parameters]

    @property
    def targets(self) -> list[Tensor]:
        """All whose gradients `show` takes."""
        return [*self.weights, *([] if self.embedded is None else [self.embedded])]

    def may_embed(self, output: Any) -> bool:
        """Whether this is to be what the embeddings gave: the first time that they run."""
        return bool(self.indices) and self.embedded is None and isinstance(output, Tensor)

    def take_refused(self, observer: Observer) -> list[nn.Parameter]:
        """Takes in the layers whose streams could not be read, and returns their weights; raises if there is no way.

        Nor is there where those of several sequences have been read before: what was read then is in doubt.
        """
        for index, error in self.refused.items():
            layer = self._layers[index]
            possible = bool(layer.own_parameters) and not layer.normalised and takes_jacobians(observer)
            if self._read or not possible:
                raise error
        new, self.refused = sorted(self.refused), {}
        self.indices |= set(new)
        return [weight for index in new for weight in self._layers[index].own_parameters]

    def read(self, n_sequences: int) -> None:
        """Takes note that the streams of all other layers have been read."""
        self._read |= n_sequences > 1

    def require_taken(self, observer: Observer) -> None:
        """Raises UnsupportedAdapterError if the observer has to have streams; names a layer."""
        if self.indices and not takes_jacobians(observer):
            raise UnsupportedAdapterError(
                f"layer {self._layers[min(self.indices)].name!r} has no streams of tokens with a row a sequence, which "
                "Kronecker factors are made of: take structure=Rows(), LowRank() or Diagonal(), which take its "
                "Jacobian by autograd, or leave it out with layers=lambda name: .."
            )

    def show(
        self,
        observer: Observer,
        gradients: Sequence[Gradients],
        require_own: Callable[[Tensor, int], None],
    ) -> set[int]:
        """Shows the Jacobians of all layers.

        Args:
            observer: shown them.
            gradients: of each sequence's outputs in all `targets`; None where they do not depend on one.
            require_own: is given the gradient in the embeddings, and of which sequence.

        Returns:
            The layers that some gradient reached.
        """
        for sequence, each in enumerate(gradients):
            if self.embedded is not None and each[-1] is not None:
                require_own(each[-1], sequence)
        reached, start = set(), 0
        for index in sorted(self.indices):
            layer = self._layers[index]
            count = len(layer.own_parameters)
            own = [each[start : start + count] for each in gradients]
            start += count
            if any(gradient is not None for each in own for gradient in each):
                reached.add(index)
                stacked = [layer.matrices_of(_filled(each, layer.own_parameters)) for each in own]
                observer.observe_jacobians(index, [torch.stack(each) for each in zip(*stacked, strict=True)])
        return reached


def takes_jacobians(observer: Any) -> bool:
    """Whether an observer can do with whole Jacobians of a layer."""
    return bool(getattr(observer, "takes_jacobians", False))


def embedded_tokens(g: Tensor, inputs: Inputs) -> Stream:
    """A stream at the input embeddings as [S, T, d] with its mask. Tokens may come first there, or pads be added."""
    if g.dim() == 3 and g.shape[0] != inputs.n_sequences == g.shape[1]:
        g = g.transpose(0, 1)
    if g.dim() == 3 and g.shape[0] == inputs.n_sequences and g.shape[1] > (inputs.length or g.shape[1]):
        if inputs.mask is None:
            return g, None
        return g, nn.functional.pad(inputs.mask, (0, g.shape[1] - inputs.mask.shape[1])).to(g.device)
    return tokens_and_mask(g, inputs, "embeddings")


@contextmanager
def thawed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These require gradients inside."""
    were_frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in were_frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in were_frozen:
            parameter.requires_grad_(False)


def _filled(gradients: Gradients, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pairs = zip(gradients, parameters, strict=True)
    return [torch.zeros_like(weight) if each is None else each for each, weight in pairs]
