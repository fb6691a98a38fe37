"""What may not flow: gradients at pads, gradients of one sequence in the rows of another."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from laplace_lora_fast.errors import DeferredChecks, UnsupportedAdapterError
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.structures.pads import PadImage

_WAITING_BYTES, _WAITING_BYTES_ON_CPU = 2**26, 2**22  # of tokens at pads


class PadTokens:
    """At which pads streams are not zero. Only the tokens there are read, and reduced many streams at a time.

    Args:
        pads: [P] their places in a stream [S T, d].
    """

    def __init__(self, pads: Tensor) -> None:
        self._pads = pads
        self._waiting: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, list[Hashable]]] = {}
        self._nonzero: dict[Hashable, Tensor] = {}

    def add(self, key: Hashable, stream: Tensor) -> None:
        """A stream [S, T, d]; it is read now and not kept."""
        width, device = stream.shape[-1], stream.device
        kind = width, stream.dtype, device
        if kind not in self._waiting:
            most = _WAITING_BYTES_ON_CPU if device.type == "cpu" else _WAITING_BYTES
            room = most // (len(self._pads) * width * stream.itemsize)
            self._waiting[kind] = stream.new_empty(min(max(room, 1), 64), len(self._pads), width), []
        tokens, keys = self._waiting[kind]
        pads = self._pads if device == self._pads.device else self._pads.to(device, non_blocking=True)
        torch.index_select(stream.reshape(-1, width), 0, pads, out=tokens[len(keys)])
        keys.append(key)
        if len(keys) == len(tokens):
            self._reduce(tokens, keys)

    def nonzero(self, keys: Sequence[Hashable]) -> Tensor:
        """[streams, P], on one device."""
        for tokens, waiting in self._waiting.values():
            self._reduce(tokens, waiting)
        flags = [self._nonzero[key] for key in keys]
        return torch.stack([each.to(flags[0].device, non_blocking=True) for each in flags])

    def _reduce(self, tokens: Tensor, keys: list[Hashable]) -> None:
        if keys:
            self._nonzero.update(zip(keys, _nonzero(tokens[: len(keys)]).unbind(), strict=True))
            keys.clear()


class Leaks:
    """Conditions on the streams of a tap; nothing here waits for the device.

    No weight gradient comes from pads, where the input or the output gradient has to be zero. BERT, say, pools the
    first position, a pad if padding is on the left. Mamba's gradients do reach left pads, but their inputs are zero
    there.

    Args:
        checks: takes the conditions.
    """

    def __init__(self, checks: DeferredChecks) -> None:
        self._checks = checks
        self._mask: Tensor | None = None
        self._pads: PadTokens | None = None
        self._padded: set[int] = set()  # groups with the batch's own mask
        self._nonzero: dict[int, Tensor] = {}  # of other groups: at which pads their input is not zero
        self._reached: list[tuple[int, str]] = []  # by this pass: group and layer
        self._images: dict[int, PadImage] = {}  # of inputs whose pads the observer knows
        self._norms: dict[int, Tensor] = {}  # [n, S] of those, by their id
        self._pairs: list[
            tuple[PadImage, PadImage, str]
        ] = []  # by this pass: images of g and x, and the layer

    def start_batch(self, inputs: Inputs) -> None:
        """Forgets the last batch."""
        self._mask = inputs.mask
        self._pads = None if inputs.pads is None else PadTokens(inputs.pads)
        for held in (self._padded, self._nonzero, self._reached, self._images, self._norms, self._pairs):
            held.clear()

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None, image: PadImage | None) -> None:
        """Input x [S, T, d] of the layers in `group`, and what the observer knows of its pads."""
        if image is not None and mask is not None and mask is self._mask:
            self._images[group] = image
        elif mask is not None and mask is self._mask and self._pads is not None:
            self._pads.add(("x", group), x)
            self._padded.add(group)
        elif (
            mask is not None
        ):  # on the device, or of a layer that runs several times: the host does not know the pads
            self._nonzero[group] = ~mask & _nonzero(x)

    def observe_gradient(self, group: int, g: Tensor, layer: str, image: PadImage | None) -> None:
        """Gradient g [S, T, d] of a layer in `group`, and what the observer knows of its pads."""
        if group in self._images:
            if image is None:
                assert self._mask is not None
                whole = self._images[group].images.dim() == 4
                image = PadImage(_norms_of_pads(g, self._mask, whole), 0)
            self._pairs.append((image, self._images[group], layer))
        elif group in self._padded:
            assert self._pads is not None
            self._pads.add(("g", layer), g)
            self._reached.append((group, layer))
        elif group in self._nonzero:
            self._checks.require(~(_nonzero(g) & self._nonzero[group]).any(), _pads_are_read(layer))

    def finish_pass(self) -> None:
        """After a backward pass: one condition for all of its layers."""
        if self._reached:
            assert self._pads is not None
            gradients = self._pads.nonzero([("g", layer) for _, layer in self._reached])
            inputs = self._pads.nonzero([("x", group) for group, _ in self._reached])
            messages = [_pads_are_read(layer) for _, layer in self._reached]
            self._checks.require_each(~(gradients & inputs).any(1), messages)
            self._reached.clear()
        kinds: dict[tuple[int, int], list[tuple[PadImage, PadImage, str]]] = {}
        for pair in self._pairs:
            kinds.setdefault((id(pair[0].images), id(pair[1].images)), []).append(pair)
        for pairs in kinds.values():
            self._require_silent(sorted(pairs, key=lambda pair: pair[0].place))
        self._pairs.clear()

    def _require_silent(self, pairs: Sequence[tuple[PadImage, PadImage, str]]) -> None:
        """Of layers alike: no sequence has both a gradient and an input at its pads."""
        (of_g, of_x, _), places = pairs[0], [g.place for g, _, _ in pairs]
        if id(of_x.images) not in self._norms:
            self._norms[id(of_x.images)] = self._norms_at_pads(of_x.images)
        inputs = self._norms[id(of_x.images)]
        gradients = self._norms_at_pads(of_g.images)
        if places != list(range(len(gradients))):
            gradients = torch.stack([gradients[place] for place in places])
        inputs = torch.stack([inputs[x.place] for _, x, _ in pairs])
        # NaN is neither above 0 nor passed over by the minimum
        silent = ~(torch.minimum(gradients, inputs) > 0).any(1)
        self._checks.require_each(silent, [_pads_are_read(layer) for _, _, layer in pairs])

    def _norms_at_pads(self, images: Tensor) -> Tensor:
        """Of images of n streams: [n, S], or [n, S T]."""
        norms = _norms(images)
        if norms.dim() == 2:
            return norms
        assert self._mask is not None
        return norms.where(~self._mask, 0).flatten(1)

    def require_own_row(self, g: Tensor, mask: Tensor | None, layer: str) -> None:
        """The gradient g [S, T, d] of the first sequence's outputs is zero in all rows but the first.

        It is not where the first axis is something else (tokens, classes, what a router has selected) that is as long
        as the batch, nor where examples are coupled (statistics of the batch).
        """
        leak = _nonzero(g[1:]) if mask is None else _nonzero(g[1:]) & mask[1:]
        self._checks.require(
            ~leak.any(),
            f"row n of what layer {layer!r} sees is not example n, or depends on other examples too: leave the "
            "layer out with layers=lambda name: .., or pass batches of one sequence",
            UnsupportedAdapterError,
        )

    def require_own_tokens(self, g: Tensor, mask: Tensor | None, sequence: int) -> None:
        """The gradient g [S, T, d] of one sequence's outputs in the embeddings is zero but at its own real tokens."""
        leak = _nonzero(g)
        if mask is not None:
            self._checks.require(~(leak[sequence] & ~mask[sequence]).any(), _pads_are_read("embeddings"))
        others = torch.arange(len(g), device=g.device) != sequence
        self._checks.require(
            ~leak[others].any(),
            "the outputs of a sequence depend on other sequences of its batch: pass batches of one sequence",
            UnsupportedAdapterError,
        )


def first_sequence(u: Tensor) -> Tensor:
    """A cotangent of u [S, U] that is zero but for the first sequence."""
    outputs, cotangent = u.shape[1], torch.zeros_like(u)
    # Not a constant, along which probabilities have no gradient.
    cotangent[0] = torch.linspace(1 / outputs, 1, outputs, device=u.device)
    return cotangent


def _pads_are_read(layer: str) -> str:
    return (
        f"the logits depend on padded positions of layer {layer!r}: pad on the other side, or use batches "
        "without padding"
    )


def _nonzero(x: Tensor) -> Tensor:
    """Which tokens of x [..., d] are not zero, [...]; NaN counts as zero. The 2-norm is one fast pass over x."""
    return _norms(x) > 0


def _norms_of_pads(g: Tensor, mask: Tensor, whole: bool) -> Tensor:
    """An image of a stream's own: [1, S, T, 1], or [1, S, T] of which only pads are not zero."""
    norms = _norms(g)
    return norms[None, ..., None] if whole else norms.where(~mask, 0)[None]


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norms
