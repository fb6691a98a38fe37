"""What a model's answers depend on beside the LoRA weights under the posterior: the other tensors, and settings.

Left out is what an answer does not depend on: inactive adapters, what `modules_to_save` stand in for, dropout, names
and paths. Tensors that are no parameters or buffers, and settings that are no plain values, are not seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.saving.sums import Sums, plain_parts, sums

_PLAIN = (bool, int, float, str, type(None))
_WITHOUT_EFFECT = {
    *("training", "gradient_checkpointing", "use_cache", "forward", "max_seq_len_cached", "inplace"),
    *(
        "name_or_path",
        "loss_type",
        "problem_type",
        "active_adapter",
        "peft_type",
        "vocab_size",
        "architectures",
    ),
    *(
        "dtype",
        "torch_dtype",
        "transformers_version",
        "quantization_config",
        "id2label",
        "label2id",
        "auto_map",
    ),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("router_aux_loss_coef", "router_z_loss_coef"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_return_dict"),
    *("initializer_range", "task_specific_params", "finetuning_task", "torchscript", "tokenizer_class"),
    *("ephemeral_gpu_offload", "compute_type_is_set", "peft_config", "merged_adapters"),
    *("in_features", "out_features"),
}
# Which tokens begin, end and fill up texts, where no logit depends on them: see `_ignored`.
_ENDS, _PADS = {"bos_token_id", "eos_token_id"}, {"pad_token_id", "padding_idx"}
_LANGUAGE_HEADS = ("CausalLM", "LMHead", "ForConditionalGeneration")
_CONTAINERS = {"ModuleDict", "ModuleList", "ParameterDict", "BufferDict", "Sequential", "Identity"}

Settings = dict[str, Any]
Prints = dict[str, Sums | None]


class Place(NamedTuple):
    """Where a tensor stands.

    Attributes:
        name: of the parameter or buffer.
        holder: the module's dict that has it.
        key: its name there.
        buffer: whether it is a buffer.
        derived: whether the model makes it of its configuration: a buffer that PyTorch does not save.
        base: whether it is of a layer below an adapter, which merging changes.
    """

    name: str
    holder: Mapping[str, Tensor | None]
    key: str
    buffer: bool
    derived: bool
    base: bool

    def tensor(self) -> Tensor | None:
        """What stands there now."""
        return self.holder.get(self.key)


@dataclass(frozen=True)
class Surroundings:
    """What a model's answers depend on beside the LoRA weights under the posterior.

    Attributes:
        tensors: sums over every parameter and buffer, by name; None for one that cannot be read.
        derived: likewise over what the model makes again when it is loaded: buffers that PyTorch does not save, and
            scales beside quantised weights. Compared where both models have them, up to rounding.
        settings: plain values of the configuration, and of all modules of a kind together.
        version: of transformers: another one may name its modules otherwise.
    """

    tensors: Prints
    derived: Prints
    settings: dict[str, Settings]
    version: str | None

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[Treated]) -> Surroundings:
        """Reads everything: some 20 s a core for 7 billion parameters of 16 bits, and no time on a GPU."""
        tensors, derived = read(list(places(model, layers)))
        return cls(tensors, derived, settings_of(model, layers), _transformers_version(model))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self)

    @classmethod
    def from_json(cls, data: Any) -> Surroundings:
        """Raises ValueError, TypeError, KeyError or AttributeError where this is not what `to_json` gives."""
        tensors, derived = (
            {name: None if each is None else Sums.from_json(each) for name, each in data[key].items()}
            for key in ("tensors", "derived")
        )
        settings = {str(kind): dict(values) for kind, values in data["settings"].items()}
        return cls(tensors, derived, settings, data["version"])

    def difference(self, now: Surroundings, rounded: Collection[str] = ()) -> str | None:
        """What is not as it was, or None.

        Args:
            now: of the model in question.
            rounded: names of tensors that merging and unmerging an adapter may have rounded.
        """
        for name in self.tensors.keys() ^ now.tensors.keys():
            if "#" not in name:
                return f"parameter {name!r}, which one of the models does not have,"
        different = self.differing(now.tensors, now.derived, rounded)
        return f"parameter {different[0]!r}" if different else self._other_setting(now)

    def differing(self, tensors: Prints, derived: Prints, rounded: Collection[str]) -> list[str]:
        """The names, of those that both have, under which there is another tensor than here."""
        pairs = [(name, self.tensors.get(name), each, name in rounded) for name, each in tensors.items()]
        pairs += [(name, self.derived.get(name), each, True) for name, each in derived.items()]
        return [
            name.partition("#")[0]
            for name, own, other, rounding in pairs
            if own is not None and other is not None and not own.agrees(other, rounding)
        ]

    def _other_setting(self, now: Surroundings) -> str | None:
        strict = self.version == now.version
        for kind, values in self.settings.items():
            others = now.settings.get(kind)
            if others is None:
                if strict:
                    return f"{kind}, which the model no longer has,"
                continue
            for key, value in values.items():
                if key in others and others[key] != value and (strict or key != "number"):
                    return f"{kind}.{key} ({_short(value)} then, {_short(others[key])} now)"
        return None

    def common(self, other: Surroundings) -> Surroundings:
        """Without the settings that are not the other's and the tensors that it could not read.

        What a forward pass counts is no setting.
        """
        tensors, derived = (
            {name: None if own.get(name, each) is None else each for name, each in mine.items()}
            for mine, own in ((self.tensors, other.tensors), (self.derived, other.derived))
        )
        settings = {
            kind: {
                key: value for key, value in values.items() if other.settings.get(kind, {}).get(key) == value
            }
            for kind, values in self.settings.items()
        }
        return Surroundings(tensors, derived, settings, self.version)


def read(found: Sequence[Place]) -> tuple[Prints, Prints]:
    """Sums over the tensors at these places, and over those that are derived."""
    plain: dict[str, Tensor] = {}
    derived: dict[str, Tensor] = {}
    unread: Prints = {}
    for place in found:
        tensor = place.tensor()
        parts = {} if tensor is None else dict(plain_parts(place.name, tensor))
        if not parts:
            unread[place.name] = None
        for name, part in parts.items():
            (derived if place.derived or "#" in name else plain)[name] = part
    values = sums(plain | derived)
    return unread | {name: values[name] for name in plain}, {name: values[name] for name in derived}


def places(model: nn.Module, layers: Sequence[Treated]) -> Iterator[Place]:
    """Every parameter and buffer that answers may depend on, but the weights under the posterior."""
    treated = {name for layer in layers for name in layer.parameter_names.values()}
    bases = tuple(f"{name}.base_layer." for name, module in modules(model) if hasattr(module, "base_layer"))
    for name, module in modules(model):
        prefix = f"{name}." if name else ""
        holders: list[dict[str, Any]] = [module._parameters, module._buffers]
        for buffer, holder in enumerate(holders):
            for key, tensor in holder.items():
                full = prefix + key
                if tensor is None or full in treated or _is_recomputed(module, key):
                    continue
                derived = key in module._non_persistent_buffers_set
                yield Place(full, holder, key, bool(buffer), derived, full.startswith(bases))


def settings_of(model: nn.Module, layers: Sequence[Treated]) -> dict[str, Settings]:
    """Plain values: "config" of the model's configuration, and for every class of modules what they hold, as lists."""
    ignored = _ignored(model)
    found: dict[str, Settings] = {"config": dict(config_values(model))}
    lists: dict[str, dict[str, list[Any]]] = {}
    for _, module in modules(model):
        kind = type(module).__name__
        if is_without_settings(module):
            continue
        own = lists.setdefault(kind, {})
        own.setdefault("number", []).append(1)
        for key, value in module_values(module):
            if key not in ignored:
                own.setdefault(key, []).append(value)
        for key, value in _scalings(module, layers):
            own.setdefault(key, []).append(value)
    for kind, values in lists.items():
        found[kind] = {key: _summary(key, each) for key, each in values.items()}
    return found


def is_without_settings(module: nn.Module) -> bool:
    """Whether nothing that a module holds has an effect in evaluation mode: containers, dropout, PEFT's outer ones."""
    kind = type(module).__name__
    return kind in _CONTAINERS or "Dropout" in kind or hasattr(module, "peft_config")


def module_values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The plain values that a module holds."""
    for key, value in vars(module).items():
        if _has_effect(key) and _is_plain(value):
            yield key, value


def module_functions(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The functions that a module holds, activations for example: told apart in one process, not in a file."""
    for key, value in vars(module).items():
        if _has_effect(key) and isinstance(value, FunctionType | BuiltinFunctionType):
            yield key, value


def config_values(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The plain values of a model's configuration, those of nested ones with their names in front."""
    ignored = _ignored(model)
    for prefix, config in configs(model):
        for key, value in config.items():
            if _has_effect(key) and key not in ignored and (_is_plain(value) or isinstance(value, dict)):
                yield prefix + key, _as_json(value)


def _ignored(model: nn.Module) -> set[str]:
    """Tokens that trainers set as texts are to be generated (TRL's, eos), and no logit depends on.

    Classifiers with an encoder and a decoder read the last eos, those of decoders the last token that is no pad; models
    that number positions from the pad on have a table of positions beside `padding_idx`.
    """
    inner = _inner(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return set()
    generates = any(head in type(inner).__name__ for head in _LANGUAGE_HEADS)
    numbers = any(hasattr(module, "position_embeddings") for module in inner.modules())
    return _ENDS | _PADS if generates and not numbers else _ENDS


def configs(model: nn.Module, depth: int = 3) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the configuration and those nested in it hold."""
    config = getattr(_inner(model), "config", None)
    waiting = [("", config, depth)]
    while waiting:
        prefix, each, left = waiting.pop(0)
        if not hasattr(each, "to_dict") or not left:
            continue
        values = vars(each)
        yield prefix, values
        waiting += [
            (f"{prefix}{key}.", value, left - 1)
            for key, value in values.items()
            if hasattr(value, "to_dict") and _has_effect(key)
        ]


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that answers may depend on, by the name it has without inactive adapters around it."""
    yield from _modules("", model, set())


def _modules(name: str, module: nn.Module, left_out: set[str]) -> Iterator[tuple[str, nn.Module]]:
    if is_idle(module):
        yield from _modules(name, module.base_layer, set())  # type: ignore[arg-type]
        return
    yield name, module
    of_adapters = getattr(type(module), "adapter_layer_names", ())
    active = set(module.active_adapters) if of_adapters else set()  # type: ignore[arg-type]
    for key, child in module._modules.items():
        stood_in_for = key == "original_module" and bool(active & set(getattr(module, "modules_to_save", ())))
        if child is None or key in left_out or stood_in_for:
            continue
        inactive = {each for each in child if each not in active} if key in of_adapters else set()  # type: ignore[attr-defined]
        if not isinstance(child, nn.ParameterDict) or len(inactive) < len(child):
            yield from _modules(f"{name}.{key}".lstrip("."), child, inactive)


def is_idle(module: nn.Module) -> bool:
    """Whether a module is PEFT's around another one, without an adapter that is active."""
    names = getattr(type(module), "adapter_layer_names", ())
    if not names or not hasattr(module, "base_layer"):
        return False
    active = set(module.active_adapters)  # type: ignore[arg-type]
    return not any(active & set(getattr(module, name, None) or ()) for name in names)


def _is_recomputed(module: nn.Module, key: str) -> bool:
    """Whether a forward pass makes a buffer anew: frequencies of rotary embeddings that depend on the length."""
    kind = str(getattr(module, "rope_type", ""))
    return "original" not in key and ("dynamic" in kind or "longrope" in kind) and key.endswith("inv_freq")


def _scalings(module: nn.Module, layers: Sequence[Treated]) -> Iterator[tuple[str, list[float]]]:
    """The scaling of an active adapter that has no posterior; those that have are compared by name."""
    scaling = getattr(module, "scaling", None)
    if isinstance(scaling, dict) and not any(layer.module is module for layer in layers):
        active = getattr(module, "active_adapters", ())
        yield "scaling", [scaling[adapter] for adapter in active if adapter in scaling]


def _has_effect(key: str) -> bool:
    return not key.startswith("_") and key not in _WITHOUT_EFFECT and "drop" not in key


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return len(value) <= 64 and all(type(each) in _PLAIN for each in value)
    return type(value) in _PLAIN


def _summary(key: str, values: list[Any]) -> Any:
    """One value where all modules of a class have the same, else the list; of what is counted the number."""
    if key == "number":
        return len(values)
    first = _as_json(values[0])
    return (
        first if all(_as_json(value) == first for value in values) else [_as_json(value) for value in values]
    )


def _as_json(value: Any) -> Any:
    """As JSON gives it back; NaN, which equals nothing, as text."""
    if isinstance(value, tuple | list):
        return [_as_json(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _as_json(each) for key, each in value.items()}
    return value if type(value) in _PLAIN and value == value else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _inner(model: nn.Module) -> nn.Module:
    """The model inside PEFT's."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _transformers_version(model: nn.Module) -> str | None:
    """Of the library that its configuration is from: the classes of its modules may be named otherwise in another."""
    config = getattr(_inner(model), "config", None)
    if not type(config).__module__.startswith("transformers"):
        return None
    import transformers

    return str(transformers.__version__)
