"""What a posterior belongs to: an adapter's weights and scalings, and the frozen weights around them.

The adapter's weights are compared one by one with the curvature's means, whenever the posterior is used: fused
optimisers and hot-swapped adapters write without counting a version. The frozen weights (the base weights of the LoRA
layers, and trained parameters left alone) are too many for that: two sums over each stand for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import LaplaceError, NotFittedError
from laplace_lora_fast.model.lora import LoraLayer, parameters_left_alone
from laplace_lora_fast.structures.base import Curvature
from laplace_lora_fast.weights import matrices

Fingerprint = tuple[str, float, float]  # dtype, norm, alternating sum


class FittedOn:
    """The model that a posterior was fitted on, which it must not outlive.

    Args:
        model: the PEFT model.
        layers: its LoRA layers.
        frozen: the weights around them; None for those of now.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[LoraLayer], frozen: FrozenWeights | None = None
    ) -> None:
        self._model, self._layers = model, layers
        self.frozen = FrozenWeights.of(model, layers) if frozen is None else frozen

    @contextmanager
    def unchanged(self, curvature: Curvature) -> Iterator[None]:
        """Raises NotFittedError if the model has changed since: at once, or on leaving for a GPU.

        A GPU compares the weights on entering and is asked on leaving: no batch in between waits for it.
        """
        require_layers(self._model, self._layers, NotFittedError)
        if self.frozen.written_to():
            self.require_frozen()
        require_shapes(curvature, self._layers, NotFittedError)
        unchanged = unchanged_weights(curvature, self._layers)
        settings = curvature, unchanged, NotFittedError, "changed since fit: fit again"
        if unchanged.device.type == "cpu":
            require_weights(*settings)
        yield
        if unchanged.device.type != "cpu":
            require_weights(*settings)

    def require_frozen(self) -> None:
        """Raises NotFittedError unless the weights around the adapter are those of the fit; reads them all."""
        for layer in self._layers:
            layer.check()  # a merged adapter has a message of its own
        now = self.frozen.now(self._model)
        self.frozen.require_same(now, NotFittedError, "changed since fit: fit again", rounding=True)
        self.frozen = replace(now, fingerprints=self.frozen.fingerprints)


def require_layers(model: nn.Module, layers: Sequence[LoraLayer], error: type[LaplaceError]) -> None:
    """Raises `error` unless the model still has these LoRA layers with these adapters and scalings; reads no weight."""
    unloaded = _submodule(model, layers[0].name) is not layers[0].module  # PEFT unloads all layers or none
    for layer in layers:
        if unloaded or layer.adapter not in layer.module.scaling:  # type: ignore[operator]
            raise error(
                f"layer {layer.name!r} with adapter {layer.adapter!r} is gone from the model: fit again"
            )
        scaling = float(layer.module.scaling[layer.adapter])  # type: ignore[index, operator]
        if scaling != layer.scaling:
            raise error(
                f"the scaling of layer {layer.name!r} changed from {layer.scaling:g} to {scaling:g} since fit: fit "
                "again"
            )


def require_shapes(curvature: Curvature, layers: Sequence[LoraLayer], error: type[LaplaceError]) -> None:
    """Raises `error` unless the adapter's weights have the shapes of the curvature's means; names the layer."""
    for (layer, side), mean, weight in zip(curvature.names, curvature.means, _weights(layers), strict=True):
        if weight.shape != mean.shape:
            raise error(
                f"layer {layer!r} has lora_{side} of shape {tuple(weight.shape)}, not {tuple(mean.shape)}"
            )


def unchanged_weights(curvature: Curvature, layers: Sequence[LoraLayer]) -> Tensor:
    """For each weight whether the adapter's weight is the curvature's mean, [n_weights]; not read off the device."""
    flags = [_same(weight, mean) for weight, mean in zip(_weights(layers), curvature.means, strict=True)]
    return torch.stack([flag.to(flags[0].device, non_blocking=True) for flag in flags])


def require_weights(curvature: Curvature, unchanged: Tensor, error: type[LaplaceError], what: str) -> None:
    """Raises `error` unless all of `unchanged_weights` are; names the layer. Waits for the device."""
    for (layer, _), same in zip(curvature.names, unchanged.tolist(), strict=True):
        if not same:
            raise error(f"the adapter's weights of layer {layer!r} {what}")


def _weights(layers: Sequence[LoraLayer]) -> list[Tensor]:
    return matrices(layer.weights for layer in layers)


def _same(current: Tensor, saved: Tensor) -> Tensor:
    """Equal, or equal up to rounding where the two are held in different dtypes."""
    saved = saved.to(current.device)
    if current.dtype == saved.dtype:
        return (current == saved).all()
    eps = max(torch.finfo(t.dtype).eps for t in (current, saved))
    return torch.isclose(current.double(), saved.double(), rtol=eps, atol=eps * 1e-3).all()


@dataclass(frozen=True)
class FrozenWeights:
    """The frozen weights that a curvature depends on, by two sums over each.

    Attributes:
        fingerprints: by the parameter's name; None for a weight that is quantised or offloaded.
        places: the weights' modules, and their names there.
        versions: change when a weight is written to or moved, except by what counts no version.
    """

    fingerprints: Mapping[str, Fingerprint | None]
    places: Sequence[tuple[nn.Module, str]] = ()
    versions: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[LoraLayer]) -> FrozenWeights:
        """Reads all of them: about as much as a forward pass of one token."""
        names = [f"{layer.name}.base_layer.weight" for layer in layers]
        return cls._read(model, [*names, *parameters_left_alone(model, layers)])

    def now(self, model: nn.Module) -> FrozenWeights:
        """The same weights as they are now."""
        return self._read(model, list(self.fingerprints))

    def written_to(self) -> bool:
        """Whether a weight may have changed; reads none."""
        return self.versions != _versions(self.places)

    @classmethod
    def _read(cls, model: nn.Module, names: Sequence[str]) -> FrozenWeights:
        places = {name: place for name in names if (place := _place(model, name)) is not None}
        found = {name: getattr(*place).detach() for name, place in places.items()}
        readable = {name: weight for name, weight in found.items() if _is_readable(weight)}
        sums = [_sums(weight) for weight in readable.values()]
        values = torch.stack([each.to(sums[0].device) for each in sums]).tolist() if sums else []
        fingerprints: dict[str, Fingerprint | None] = dict.fromkeys(found)
        for (name, weight), (norm, alternating) in zip(readable.items(), values, strict=True):
            fingerprints[name] = str(weight.dtype).removeprefix("torch."), norm, alternating
        return cls(fingerprints, list(places.values()), _versions(places.values()))

    def require_same(
        self, now: FrozenWeights, error: type[LaplaceError], what: str, rounding: bool = False
    ) -> None:
        """Raises `error` at the first weight that is gone or differs; names it.

        Args:
            now: the weights in question.
            error: to raise.
            what: goes behind the name.
            rounding: allow what merging and unmerging an adapter leaves.
        """
        for name, print_ in self.fingerprints.items():
            if name not in now.fingerprints or not _agree(print_, now.fingerprints[name], rounding):
                raise error(f"parameter {name!r} {what}")


def _agree(one: Fingerprint | None, other: Fingerprint | None, rounding: bool) -> bool:
    if one is None or other is None:
        return True
    tolerance = 1e-9  # of another order of summation
    if rounding or one[0] != other[0]:
        tolerance = 2 * max(torch.finfo(getattr(torch, dtype)).eps for dtype in (one[0], other[0]))
    return all(abs(a - b) <= tolerance * one[1] for a, b in zip(one[1:], other[1:], strict=True))


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    with suppress(AttributeError):
        return model.get_submodule(name)
    return None


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module that holds a parameter, and its name there."""
    owner, _, own_name = name.rpartition(".")
    module = _submodule(model, owner)
    return (module, own_name) if isinstance(getattr(module, own_name, None), Tensor) else None  # type: ignore[return-value]


def _versions(places: Iterable[tuple[nn.Module, str]]) -> list[tuple[int, int]]:
    weights = [getattr(*place) for place in places]
    return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]


def _is_readable(weight: Tensor) -> bool:
    """Whether it holds real numbers where it is: neither quantised nor offloaded nor empty."""
    plain = type(weight) is Tensor and weight.is_floating_point() and weight.itemsize > 1
    return plain and weight.numel() > 0 and not weight.is_meta


def _sums(weight: Tensor) -> Tensor:
    """Norm and alternating sum [2], fp64. Weights drawn alike nearly share the norm, but not the second sum."""
    flat, fp64 = weight.reshape(-1), torch.float64
    alternating = flat[0::2].sum(dtype=fp64) - flat[1::2].sum(dtype=fp64)
    return torch.stack([torch.linalg.vector_norm(flat, dtype=fp64), alternating])
