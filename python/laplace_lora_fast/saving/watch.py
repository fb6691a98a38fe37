"""Whether a model has been written to: asked before every use, without reading a number."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from torch import Tensor, nn

from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.saving.surroundings import (
    Place,
    Surroundings,
    config_values,
    configs,
    is_idle,
    is_without_settings,
    module_functions,
    module_values,
    modules,
    places,
)

Mark = tuple[int, int, int]


class _Value(NamedTuple):
    """A plain value: whose it is, where it stands, what it was."""

    owner: str
    holder: dict[str, Any]
    key: str
    value: Any


class Watch:
    """Looks at what a model's answers depend on: versions of tensors, which modules there are, plain settings.

    What counts no version is not noticed: writes through `.data`, and those of fused optimisers.

    Args:
        model: the model.
        layers: whose LoRA weights are compared elsewhere.
        known: what counts; other tensors and settings are not looked at.

    Attributes:
        rounded: names of the tensors that merging and unmerging an adapter rounds.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Treated], known: Surroundings) -> None:
        found = list(places(model, layers))
        self.rounded = {place.name for place in found if place.base}
        names = {name.partition("#")[0] for name in [*known.tensors, *known.derived]}
        self._places = [place for place in found if place.name in names]
        self._marks = self.marks()
        settings = known.settings
        self._children = []
        self._values = []
        for name, module in modules(model):
            if isinstance(module, nn.ModuleDict):  # adapters come and go
                continue
            self._children += [(name, module._modules, key, child) for key, child in module._modules.items()]
            if hasattr(type(module), "adapter_layer_names") and not any(
                module is layer.module for layer in layers
            ):
                self._values.append(
                    _Value(
                        f"module {name!r}", vars(module), "_active_adapter", deepcopy(module._active_adapter)
                    )
                )
            if not is_without_settings(module):
                counted = settings.get(type(module).__name__, {})
                self._values += [
                    _Value(f"module {name!r}", vars(module), key, value)
                    for key, value in [*module_values(module), *module_functions(module)]
                    if key in counted or callable(value)
                ]
        counted = settings.get("config", {})
        for prefix, holder in configs(model):
            self._values += [
                _Value("the model's configuration", holder, key, deepcopy(holder[key]))
                for name, _ in config_values(model)
                if name in counted and name.startswith(prefix) and (key := name[len(prefix) :]) in holder
            ]

    def other_setting(self) -> str | None:
        """Which setting has changed or which module has been replaced, or None."""
        for owner, holder, key, child in self._children:
            if holder.get(key) is not child and not _is_wrapped(holder.get(key), child):
                return f"module {f'{owner}.{key}'.lstrip('.')!r}"
        for owner, holder, key, value in self._values:
            now = holder.get(key, _GONE)
            if now is not value and now != value:
                return f"{key} of {owner} ({value!r} then, {now!r} now)"
        return None

    def written(self) -> list[Place]:
        """The tensors that may have changed since the beginning, or since `seen`."""
        pairs = zip(self._places, self._marks, strict=True)
        return [place for place, mark in pairs if _mark(place.tensor()) != mark]

    def marks(self) -> list[Mark]:
        """What `seen` is told; to be asked before the tensors are read."""
        return [_mark(place.tensor()) for place in self._places]

    def seen(self, marks: list[Mark]) -> None:
        """Takes the tensors as they were at these marks for unchanged."""
        self._marks = marks

    def without_counts(self) -> None:
        """Leaves out the integers that have changed: a module counts its passes there."""
        self._values = [
            each
            for each in self._values
            if type(each.value) is not int or each.holder.get(each.key) == each.value
        ]


_GONE = "nothing"


def _is_wrapped(module: nn.Module | None, former: nn.Module | None) -> bool:
    """Whether a module is PEFT's around the former one, without an adapter of its own that is active."""
    return module is not None and getattr(module, "base_layer", _GONE) is former and is_idle(module)


def _mark(tensor: Tensor | None) -> Mark:
    """Changes when a tensor is replaced, moved or written to, except by what counts no version."""
    if tensor is None:
        return 0, 0, 0
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a subclass that wraps others has none
        address = 0
    return id(tensor), address, 0 if tensor.is_inference() else tensor._version
