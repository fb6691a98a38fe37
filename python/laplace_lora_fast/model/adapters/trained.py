"""Which of an adapter's weights the posterior is over: those that were trained, each once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from laplace_lora_fast.errors import UnsupportedAdapterError
from laplace_lora_fast.weights import Named, WeightName, weight_names

ALL = "all"
Trained = str | Sequence[str] | Callable[[str], bool] | None
Layer = TypeVar("Layer", bound=Named)


class Adapted(Protocol):
    """A layer with parts of an adapter."""

    @property
    def name(self) -> str: ...
    @property
    def adapter_parts(self) -> Sequence[nn.Module]: ...


def restricted(layers: Sequence[Layer], trained: Trained, flags: Mapping[WeightName, bool]) -> list[Layer]:
    """The layers with the weights that were trained, without those that have none.

    Args:
        layers: LoRA layers and trained heads.
        trained: names of weights, a predicate on them, or "all"; None to go by the flags, where they tell anything.
        flags: for every weight of the active adapter whether it requires gradients. Where none does they tell nothing:
            an adapter that is loaded for inference is frozen, whatever of it was trained.

    Raises:
        UnsupportedAdapterError: none is left, or a name is no weight of these layers.
        ValueError: another string than "all".
    """
    if trained == ALL:
        return list(layers)
    if isinstance(trained, str):
        raise ValueError(f"trained must be None, 'all', a list of names or a predicate, got {trained!r}")
    wanted: Callable[[str], Any]
    if trained is None:
        if not any(flags.values()):
            return list(layers)
        wanted = {str(name): flag for name, flag in flags.items()}.__getitem__
    elif callable(trained):
        wanted = trained
    else:
        wanted = set(trained).__contains__
        names = list(map(str, weight_names(layers)))
        unknown = sorted(set(trained) - set(names))
        if unknown:
            raise UnsupportedAdapterError(
                f"trained names {unknown[0]!r}, which is no weight of the LoRA layers and trained heads; {names[0]!r} "
                "is one, for example"
            )
    found = []
    for layer in layers:
        sides = tuple(side for side in layer.sides if wanted(str(WeightName(layer.name, side))))
        if sides == tuple(layer.sides):
            found.append(layer)
        elif sides:
            found.append(replace(layer, sides=sides))  # type: ignore[type-var]
    if not found:
        why = "of the selected layers requires gradients" if trained is None else "is named by `trained`"
        raise UnsupportedAdapterError(
            f"no weight {why}: pass trained='all', or the names of those that were trained, to LaplaceLoRA"
        )
    return found


def refuse_tied(layers: Sequence[Adapted]) -> None:
    """A weight of two layers would be two weights here."""
    owners: dict[int, str] = {}
    for layer in layers:
        for part in layer.adapter_parts:
            weight: Tensor = part.weight  # type: ignore[assignment]
            key = weight.data_ptr()
            if key and owners.setdefault(key, layer.name) != layer.name:
                raise UnsupportedAdapterError(
                    f"layers {owners[key]!r} and {layer.name!r} share a LoRA weight: leave one of them out with "
                    "`layers`"
                )
