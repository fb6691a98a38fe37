"""Which of a model's LoRA layers are treated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from laplace_lora_fast.errors import UnsupportedAdapterError

Layers = str | Sequence[str] | Callable[[str], bool] | None


def selected(model: nn.Module, names: Sequence[str], layers: Layers) -> list[str]:
    """The names of the LoRA layers that `layers` selects, in their order.

    Args:
        model: the model.
        names: of all its LoRA layers, in the order of `model.named_modules()`.
        layers: None for all; "last" for the adapted output head, or else the last numbered layer; names; a predicate.

    Raises:
        UnsupportedAdapterError: nothing is selected, or a layer without LoRA.
        ValueError: another string than "last".
    """
    if layers is None:
        return list(names)
    if layers == "last":
        stem = _numbered_layer(model, names[-1])
        return [name for name in names if name.startswith(stem)] if stem else [names[-1]]
    if isinstance(layers, str):
        raise ValueError(f"layers must be None, 'last', a list of names or a predicate, got {layers!r}")
    wanted = layers if callable(layers) else set(layers).__contains__
    chosen = [name for name in names if wanted(name)]
    unknown = [] if callable(layers) else sorted(set(layers) - set(names))
    if unknown or not chosen:
        raise UnsupportedAdapterError(
            f"layers selects {unknown or 'nothing'}, which is no LoRA layer; {names[0]!r} is one, for example"
        )
    return chosen


def _numbered_layer(model: nn.Module, name: str) -> str:
    """The prefix of the numbered layer that `name` is in, "" if in none: "model.layers.3." of a decoder.

    A layer's own parts may be numbered too (attention and MLP in T5, experts): the outermost list of layers counts.
    In a model without a list, `nn.Sequential` may hold anything: there the innermost number counts.
    """
    parts = name.split(".")
    stems = [parts[:i] for i in range(1, len(parts)) if parts[i - 1].isdigit()]
    lists = [stem for stem in stems if isinstance(model.get_submodule(".".join(stem[:-1])), nn.ModuleList)]
    stem = lists[0] if lists else stems[-1] if stems else []
    return ".".join([*stem, ""]) if stem else ""
