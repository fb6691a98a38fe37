"""Layers whose Jacobians come from autograd in their weights, one sequence at a time.

The fast way reads a Jacobian off two streams with a row a sequence. Some layers have none: LoRA on parameters (PEFT's
`target_parameters`: expert weights of a mixture), whose tokens a router mixes; DeBERTa's keys, which see relative
positions too, once for all sequences of a batch; vision towers, windows of attention. There the gradient of each
sequence's outputs in lora_A and lora_B is the row by definition, at the cost of a backward pass a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import InvalidBatchError, UnsupportedAdapterError
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.model.contexts import input_embeddings
from laplace_lora_fast.model.observer import Observer, Stream, Tapped, tokens_and_mask

Gradients = Sequence[Tensor | None]


class Alone:
    """Which layers of a tap these are.

    Args:
        layers: all of the tap.
        known: names of those that earlier taps have found.

    Attributes:
        indices: theirs.
        starts: where the pass starts: what embeddings gave for the batch's tokens, and its floating-point inputs.
            Gradients there tell what streams would, that sequences do not depend on each other, nor on pads.
        refused: why the streams of layers that are not among them, yet, could not be read in this pass.
    """

    def __init__(self, layers: Sequence[Tapped], known: Iterable[str]) -> None:
        self._layers, names = layers, set(known)
        self.indices = {
            index for index, layer in enumerate(layers) if layer.without_streams or layer.name in names
        }
        self.starts: list[Tensor] = []
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
        return [*self.weights, *self.starts]

    def started(self, inputs: Inputs) -> Inputs:
        """The inputs of a pass, which starts anew; those in floating point require gradients."""
        self.starts = []
        if not self.indices:
            return inputs
        model = dict(inputs.model)
        for key, value in model.items():
            if isinstance(value, Tensor) and value.is_floating_point() and len(value) == inputs.n_sequences:
                model[key] = value.detach().clone().requires_grad_()
                self.starts.append(model[key])
        return replace(inputs, model=model)

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

    def require_provable(self, inputs: Inputs) -> None:
        """Raises InvalidBatchError where nothing could show that sequences depend on each other, or on pads.

        Streams would, and gradients where the pass starts do, if that was found.
        """
        if not self.indices or self.starts:
            return
        if inputs.n_sequences > 1 or (inputs.mask is not None and not bool(inputs.mask.all())):
            raise InvalidBatchError(
                f"layer {self._layers[min(self.indices)].name!r} has no stream of tokens with a row a sequence, and no "
                "embeddings of the batch's tokens were seen, so that it cannot be told whether sequences depend on "
                "each other or on pads: pass batches of one sequence without pads, or leave it out with "
                "layers=lambda name: .."
            )

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
            require_own: is given the gradient where the pass starts, and of which sequence.

        Returns:
            The layers that some gradient reached.
        """
        n_weights = len(self.weights)
        for sequence, each in enumerate(gradients):
            for gradient in each[n_weights:]:
                if gradient is not None:
                    require_own(gradient, sequence)
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
    """A stream where a pass starts as [S, T, d] with its mask. Tokens may come first there, or pads be added.

    No mask is known of what has other axes, pictures and sound.
    """
    if g.dim() == 3 and g.shape[0] != inputs.n_sequences == g.shape[1]:
        g = g.transpose(0, 1)
    if g.dim() == 3 and g.shape[0] == inputs.n_sequences and g.shape[1] > (inputs.length or g.shape[1]):
        if inputs.mask is None:
            return g, None
        return g, nn.functional.pad(inputs.mask, (0, g.shape[1] - inputs.mask.shape[1])).to(g.device)
    if g.shape[0] == inputs.n_sequences and (g.dim() != 3 or g.shape[1] != inputs.length):
        return g.reshape(len(g), 1, -1), None
    return tokens_and_mask(g, inputs, "embeddings")


def embeddings(model: nn.Module) -> list[nn.Module]:
    """All modules that may embed a batch's tokens: the one that the model names, and any other."""
    named = _named(model)
    found = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return [*([] if named is None else [named]), *(module for module in found if module is not named)]


def embeds(model: nn.Module, module: nn.Module, args: Any, output: Any, inputs: Inputs | None) -> bool:
    """Whether it embeds the batch's tokens: some models do so by other modules than they name."""
    given, ids = (args[0] if args else None), (inputs.model.get("input_ids") if inputs else None)
    of_batch = isinstance(ids, Tensor) and isinstance(given, Tensor) and given.data_ptr() == ids.data_ptr()
    return isinstance(output, Tensor) and (of_batch or module is _named(model))


def _named(model: nn.Module) -> nn.Module | None:
    with suppress(StopIteration, NotImplementedError):  # a model without
        return input_embeddings(model)
    return None


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
