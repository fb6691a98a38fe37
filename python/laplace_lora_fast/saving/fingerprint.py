"""What a posterior belongs to: an adapter's weights and scalings, and all that answers depend on around them.

The adapter's weights are compared one by one with the curvature's means, whenever the posterior is used: fused
optimisers and hot-swapped adapters write without counting a version. What is around them is too much for that: sums
stand for it, which are read again where a write has been counted, and on saving and loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import LaplaceError, NotFittedError
from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.model.proofs.additions import additions
from laplace_lora_fast.saving.surroundings import Place, Surroundings, read, settings_of
from laplace_lora_fast.saving.watch import Watch
from laplace_lora_fast.structures.base import Curvature
from laplace_lora_fast.weights import SIDES, matrices

_SINCE = "changed since fit: fit again"


class FittedOn:
    """The model that a posterior was fitted on, which it must not outlive.

    Args:
        model: the PEFT model.
        layers: its LoRA layers.
        surroundings: what is around them; None to read it.

    Attributes:
        additions: what others have hung on the model.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Treated], surroundings: Surroundings | None = None
    ) -> None:
        self._model, self._layers = model, layers
        self.surroundings = Surroundings.of(model, layers) if surroundings is None else surroundings
        self.additions = additions(model)
        self._watch = Watch(model, layers, self.surroundings)

    def fitted(self) -> None:
        """After the fit: buffers and settings that its passes have changed, counters for example, are left out.

        Raises:
            NotFittedError: a weight has changed in the meantime.
        """
        for place in self._differing():
            if not place.buffer:
                raise NotFittedError(
                    f"parameter {place.name!r} changed while the posterior was fitted: fit again"
                )
            (self.surroundings.derived if place.derived else self.surroundings.tensors)[place.name] = None
        settings = settings_of(self._model, self._layers)
        self.surroundings = self.surroundings.common(replace(self.surroundings, settings=settings))
        self._watch = Watch(self._model, self._layers, self.surroundings)

    @contextmanager
    def unchanged(self, curvature: Curvature) -> Iterator[None]:
        """Raises NotFittedError if the model has changed since: at once, or on leaving for a GPU.

        A GPU compares the weights on entering and is asked on leaving: no batch in between waits for it.
        """
        require_layers(self._model, self._layers, NotFittedError)
        self._require_surroundings()
        require_shapes(curvature, self._layers, NotFittedError)
        unchanged = unchanged_weights(curvature, self._layers)
        settings = curvature, unchanged, NotFittedError, _SINCE
        if unchanged.device.type == "cpu":
            require_weights(*settings)
        yield
        if unchanged.device.type != "cpu":
            require_weights(*settings)
        self._watch.without_counts()

    def require_all(self) -> None:
        """Raises NotFittedError unless everything around the adapter is as it was at the fit; reads it all."""
        for layer in self._layers:
            layer.check()  # a merged adapter has a message of its own
        marks = self._watch.marks()
        now = Surroundings.of(self._model, self._layers)
        different = self.surroundings.difference(now, self._watch.rounded)
        if different:
            raise NotFittedError(f"{different} {_SINCE}")
        self._watch.seen(marks)

    def _require_surroundings(self) -> None:
        """Raises NotFittedError where what is around the adapter has changed; reads what has been written to."""
        different = self._watch.other_setting()
        if different:
            for layer in self._layers:
                layer.check()  # another adapter that is active has a message of its own
            raise NotFittedError(f"{different} {_SINCE}")
        for place in self._differing():
            raise NotFittedError(f"{'buffer' if place.buffer else 'parameter'} {place.name!r} {_SINCE}")

    def _differing(self) -> list[Place]:
        """What has been written to, and is another than at the fit."""
        written = self._watch.written()
        if not written:
            return []
        for layer in self._layers:
            layer.check()
        marks = self._watch.marks()
        names = self.surroundings.differing(*read(written), self._watch.rounded)
        found = [place for place in written if place.name in names or place.tensor() is None]
        if not found:
            self._watch.seen(marks)
        return found


def require_layers(model: nn.Module, layers: Sequence[Treated], error: type[LaplaceError]) -> None:
    """Raises `error` unless the model still has these LoRA layers with these adapters and scalings; reads no weight."""
    unloaded = _submodule(model, layers[0].name) is not layers[0].module  # PEFT unloads all layers or none
    for layer in layers:
        if unloaded or not layer.is_present:
            raise error(
                f"layer {layer.name!r} with adapter {layer.adapter!r} is gone from the model (unloaded, or merged into "
                "the base model): load the adapter on the base model, and the posterior or a fit on that"
            )
        scaling = layer.current_scaling
        if scaling != layer.scaling:
            raise error(
                f"the scaling of layer {layer.name!r} changed from {layer.scaling:g} to {scaling:g} since fit: fit "
                "again"
            )


def require_shapes(curvature: Curvature, layers: Sequence[Treated], error: type[LaplaceError]) -> None:
    """Raises `error` unless the adapter's weights have the shapes of the curvature's means; names the layer."""
    for name, mean, weight in zip(curvature.names, curvature.means, _weights(layers), strict=True):
        if weight.shape != mean.shape:
            what = f"lora_{name.side}" if name.side in SIDES else "a weight"
            raise error(
                f"layer {name.layer!r} has {what} of shape {tuple(weight.shape)}, not {tuple(mean.shape)}"
            )


def unchanged_weights(curvature: Curvature, layers: Sequence[Treated]) -> Tensor:
    """For each weight whether the adapter's weight is the curvature's mean, [n_weights]; not read off the device."""
    flags = [_same(weight, mean) for weight, mean in zip(_weights(layers), curvature.means, strict=True)]
    return torch.stack([flag.to(flags[0].device, non_blocking=True) for flag in flags])


def require_weights(curvature: Curvature, unchanged: Tensor, error: type[LaplaceError], what: str) -> None:
    """Raises `error` unless all of `unchanged_weights` are; names the layer. Waits for the device."""
    for (layer, _), same in zip(curvature.names, unchanged.tolist(), strict=True):
        if not same:
            raise error(f"the adapter's weights of layer {layer!r} {what}")


def _weights(layers: Sequence[Treated]) -> list[Tensor]:
    return matrices(layer.weights for layer in layers)


def _same(current: Tensor, saved: Tensor) -> Tensor:
    """Equal, or equal up to rounding where the two are held in different dtypes."""
    saved = saved.to(current.device)
    if current.dtype == saved.dtype:
        return (current == saved).all()
    eps = max(torch.finfo(t.dtype).eps for t in (current, saved))
    return torch.isclose(current.double(), saved.double(), rtol=eps, atol=eps * 1e-3).all()


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    with suppress(AttributeError):
        return model.get_submodule(name)
    return None
