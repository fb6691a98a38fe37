"""The layers of a PEFT model that it trains: which are treated, their weights. The only file that imports peft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from peft.tuners.lora import dora
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import UnsupportedAdapterError
from laplace_lora_fast.model.adapters.layer import AdapterLayer, ParametersAdapted
from laplace_lora_fast.model.adapters.trained import ALL, Trained, refuse_tied, restricted
from laplace_lora_fast.model.contexts import is_offloaded
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.linear import TrainedHead, trained_linears
from laplace_lora_fast.model.observer import Layers, selected
from laplace_lora_fast.model.storage import refuse_storage
from laplace_lora_fast.weights import HEAD, SIDES, LayerWeights, WeightName

# Variants that compute W0 x + s B A x in evaluation mode, which the first batch proves.
_PLAIN_IN_EVALUATION = ("Montecl", "Velora", "DoraLinear")  # DoRA's norm is known: see weights.RowNorm
_LEAVE_OUT = (
    "leave it out with layers=lambda name: .., train it as plain LoRA, or merge it into the base model"
)


@dataclass(frozen=True)
class LoraLayer(AdapterLayer):
    """A linear layer with LoRA."""

    def check(self) -> None:
        """Raises UnsupportedAdapterError if the adapter has been switched, merged or disabled since."""
        active = _active_adapter(self.name, self.module)  # type: ignore[arg-type]
        if active != self.adapter:
            raise UnsupportedAdapterError(
                f"layer {self.name!r} has adapter {active!r} active, expected {self.adapter!r}: call model.set_adapter"
            )
        _refuse_unsupported(self.name, self.module, self.adapter)  # type: ignore[arg-type]

    def _dense_base(self) -> Tensor:
        weight: Tensor = dequantize_module_weight(self.base).detach()
        return weight.mT if getattr(self.module, "fan_in_fan_out", False) else weight


@dataclass(frozen=True)
class ParameterLayer(ParametersAdapted, LoraLayer):
    """LoRA on a parameter."""


Treated = LoraLayer | TrainedHead


def trained_layers(
    model: nn.Module, head: Head, layers: Layers = None, trained: Trained = ALL
) -> list[Treated]:
    """Lists what has an active adapter and linear weights, in the order of `model.named_modules()`.

    Args:
        model: a PEFT model.
        head: says whether the language-model head is restricted to answer tokens.
        layers: see `selected`.
        trained: see `restricted`.

    Returns:
        LoRA layers, and the linear layers of `modules_to_save`, but those that are too large or share a weight.

    Raises:
        UnsupportedAdapterError: there is no LoRA layer, or one whose adapter is not plain LoRA on a linear layer
            (variants but DoRA, Conv, Embedding, fused attention), is merged, disabled, or mixed with another.
    """
    refuse_storage(model)
    active = _active(model)
    heads = {each.name: each for each in _trained_heads(model, head)}
    names = [name for name, _ in model.named_modules() if name in active or name in heads]
    chosen = selected(model, names, layers)  # what is left out is not looked at
    found = [heads[name] if name in heads else _lora_layer(name, active[name], head) for name in chosen]
    for each in found:
        each.check()
    refuse_tied(found)
    return restricted(found, trained, _flags(active, heads.values()))


def lora_layers(model: nn.Module, head: Head) -> list[LoraLayer]:
    """The LoRA layers alone: see `trained_layers`."""
    refuse_storage(model)
    found = [_lora_layer(name, module, head) for name, module in _active(model).items()]
    refuse_tied(found)
    return found


def _active(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers with an active adapter. Raises UnsupportedAdapterError if there is none."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, lora.LoraLayer) and _has_active(module)
    }
    if not found:
        raise UnsupportedAdapterError(_why_none(model))
    return found


def _flags(active: Mapping[str, Any], heads: Iterable[TrainedHead]) -> dict[WeightName, bool]:
    """For every weight of the active adapter whether it requires gradients."""
    flags = {
        WeightName(layer, side): parameter.requires_grad
        for layer, module in active.items()
        for side in SIDES
        for adapter in module.active_adapters
        for name, parameter in module.named_parameters()
        if name == f"lora_{side}.{adapter}.weight"
    }
    return flags | {
        WeightName(head.name, HEAD): any(p.requires_grad for p in head.module.parameters(recurse=False))
        for head in heads
    }


def any_requires_grad(model: nn.Module) -> bool:
    """Whether any LoRA weight of the active adapter requires gradients, so that these tell what was trained."""
    return any(_flags(_active(model), ()).values())


def _lora_layer(name: str, module: Any, head: Head) -> LoraLayer:
    adapter = _active_adapter(name, module)
    _refuse_unsupported(name, module, adapter)
    features = head.features if module is head.output_layer else None
    features = None if features is None else features.to(device_of(module))
    if features is not None and module.use_dora.get(adapter, False):
        raise UnsupportedAdapterError(f"layer {name!r} is an output head with DoRA: {_LEAVE_OUT}")
    kind = ParameterLayer if isinstance(module, lora.ParamWrapper) else LoraLayer
    return kind(name, module, adapter, float(module.scaling[adapter]), features)


def _trained_heads(model: nn.Module, head: Head) -> Iterator[TrainedHead]:
    owners = [parameter for m in model.modules() for parameter in m.parameters(recurse=False)]
    uses = Counter(id(parameter) for parameter in owners)
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for adapter in module.active_adapters:
                if adapter in module.modules_to_save:
                    yield from trained_linears(name, module, adapter, head, uses)


def _why_none(model: nn.Module) -> str:
    """Why there is nothing to treat: another method of PEFT, or none."""
    others = {
        _method(module)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, lora.LoraLayer)
    }
    configs = getattr(model, "peft_config", {})
    others |= {config.peft_type.value.lower() for config in configs.values()} - {
        "lora"
    }  # prompts have no layers
    if others:
        return (
            f"the active adapter is {', '.join(sorted(others))}, not LoRA: its weights have another Jacobian. Train a "
            "LoRA adapter (peft.LoraConfig)"
        )
    if any(isinstance(module, lora.LoraLayer) for module in model.modules()):
        return "model has LoRA layers, but no adapter is active: call model.set_adapter(name)"
    return "model has no LoRA layer with an active adapter: pass a peft.PeftModel with a LoRA adapter"


def _has_active(module: lora.LoraLayer) -> bool:
    return any(adapter in {*module.lora_A, *module.lora_embedding_A} for adapter in module.active_adapters)


def _active_adapter(name: str, module: lora.LoraLayer) -> str:
    here = {*module.lora_A, *module.lora_embedding_A}
    active = [adapter for adapter in module.active_adapters if adapter in here]
    if len(active) > 1:
        raise UnsupportedAdapterError(
            f"layer {name!r} mixes the adapters {active}: activate one with model.set_adapter(...)"
        )
    return active[0] if active else ""


def _refuse_unsupported(name: str, module: lora.LoraLayer, adapter: str) -> None:
    kind = type(module).__name__
    if is_offloaded(module):
        raise UnsupportedAdapterError(
            f"layer {name!r} is offloaded: load the model without offloading, which leaves its weights on no device"
        )
    if module.merged:
        raise UnsupportedAdapterError(
            f"layer {name!r} has its adapter merged: call model.unmerge_adapter() first"
        )
    if module.disable_adapters:
        raise UnsupportedAdapterError(f"layer {name!r} has its adapters disabled: enable them first")
    if module.use_dora.get(adapter, False) and dora.ENABLE_DORA_CACHING:
        raise UnsupportedAdapterError(
            f"layer {name!r} uses DoRA and keeps its norms: leave peft's DoraCaching context first"
        )
    variant = type(module.lora_variant.get(adapter)).__name__
    if adapter in module.lora_variant and not variant.startswith(_PLAIN_IN_EVALUATION):
        raise UnsupportedAdapterError(
            f"layer {name!r} uses a LoRA variant ({variant.removesuffix('Variant')}): only plain LoRA is supported; "
            f"{_LEAVE_OUT}"
        )
    linear = adapter in module.lora_A and all(
        isinstance(weights[adapter], nn.Linear) for weights in (module.lora_A, module.lora_B)
    )
    if not linear or isinstance(module, lora.MultiheadAttention):
        raise UnsupportedAdapterError(
            f"layer {name!r} is {_method(module)} on a {kind} layer: only linear layers are supported; {_LEAVE_OUT}"
        )
    for side, weights in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
        if not isinstance(weights[adapter].weight, nn.Parameter):
            raise UnsupportedAdapterError(
                f"layer {name!r} has a parametrisation on its {side} (a spectral or a weight norm): its weight is no "
                "parameter. Remove it with torch.nn.utils.parametrize.remove_parametrizations, or leave the layer out "
                "with layers=lambda name: .."
            )


def _method(module: nn.Module) -> str:
    """What PEFT calls the method that a layer is of."""
    method = type(module).__module__.split(".")[-2]
    return "LoRA" if method == "lora" else method


def parameters_left_alone(model: nn.Module, layers: Sequence[Treated]) -> list[str]:
    """Names of trained parameters without a posterior (biases, norms, embeddings): they stay at their MAP."""
    treated = {name for layer in layers for name in layer.parameter_names.values()}
    saved = tuple(
        f"{name}.modules_to_save.{layers[0].adapter}."
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    )
    return [
        name
        for name, parameter in model.named_parameters()
        if name not in treated and (parameter.requires_grad or name.startswith(saved))
    ]


def read_adapter(
    source: str | PathLike[str] | Mapping[str, Tensor], layers: Sequence[Treated]
) -> list[LayerWeights]:
    """Reads the weights of every layer from a PEFT adapter folder or a state dict.

    Args:
        source: an adapter folder as `save_pretrained` writes it, or a state dict whose keys are parameter names with
            or without the adapter's name in them.
        layers: the layers to look up.

    Raises:
        UnsupportedAdapterError: a weight is missing or has another shape; names the layer.
    """
    state = source if isinstance(source, Mapping) else load_peft_weights(str(source), device="cpu")
    return [layer.read(state) for layer in layers]
