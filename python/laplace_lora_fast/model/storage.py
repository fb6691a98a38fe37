"""Weights that are not where or what they seem, and kernels that let no gradient through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from laplace_lora_fast.errors import UnsupportedAdapterError


def refuse_storage(model: nn.Module) -> None:
    """Raises UnsupportedAdapterError for parameters that a forward pass or autograd cannot use here; names one."""
    for module in model.modules():
        kind = type(module).__name__
        if kind == "FullyShardedDataParallel" or kind.startswith("FSDP"):
            raise UnsupportedAdapterError(
                "the model is sharded by FSDP: no rank holds whole weights. Load the adapter on an unsharded copy of "
                "the base model (one process, or one copy a rank with fit(group=..))"
            )
        if (getattr(module, "_tp_size", None) or 1) > 1:
            raise UnsupportedAdapterError(
                f"the model is tensor parallel over {module._tp_size} processes (tp_plan): no rank holds whole "
                "weights, and LoRA layers see parts of their inputs or outputs. Load it without tp_plan, with "
                "device_map where one device is too small"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UnsupportedAdapterError(
                f"parameter {name!r} was made in torch.inference_mode: load the model outside of it"
            )
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise UnsupportedAdapterError(
                f"parameter {name!r} is a DTensor, spread over processes (FSDP2, tensor parallelism): load the model "
                "unsharded, one copy a rank with fit(group=..), or with device_map where one device is too small"
            )
        if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_shape"):
            raise UnsupportedAdapterError(
                f"parameter {name!r} is partitioned by DeepSpeed ZeRO-3: save the adapter and load it on an unsharded "
                "copy of the base model"
            )


def refuse_meta(model: nn.Module) -> None:
    """Raises UnsupportedAdapterError for weights on the meta device, unless accelerate fetches them for their use."""
    for module_name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise UnsupportedAdapterError(
                    f"parameter {f'{module_name}.{name}'!r} is on the meta device: load its values first"
                )


def quantised_linears(model: nn.Module) -> list[nn.Module]:
    """Linear layers whose weights are packed, or of a kind of tensor of their own."""

    def packed(weight: torch.Tensor) -> bool:
        own = type(weight.data) is not torch.Tensor or getattr(weight, "quant_state", None) is not None
        return own or not (weight.is_floating_point() or weight.is_complex())

    def is_linear(module: nn.Module) -> bool:
        sizes = all(isinstance(getattr(module, f"{side}_features", None), int) for side in ("in", "out"))
        return sizes and not hasattr(module, "base_layer")  # which is one of PEFT's around it

    return [
        module
        for module in model.modules()
        if is_linear(module)
        and any(map(packed, (*module.parameters(recurse=False), *module.buffers(recurse=False))))
    ]


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Bitsandbytes' 4-bit layers without their packed form for CPUs, which lets no gradient through.

    They take it on at any evaluation pass on a CPU with AVX512-BF16, and stay in it. Inside they are unpacked; outside
    they pack themselves again when they like.
    """
    layers: list[Any] = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    try:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                _unpack(layer, state)
            elif state is not None:
                _UNPACKED[layer] = copy(state)
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True


@torch.no_grad()
def _unpack(layer: Any, state: Any) -> None:
    """Packing rounds the blocks' scales to bf16. They are what they were, where the layer was seen before that.

    The library's own inverse leaves the scales in the packed order, or rounds them once more.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_blockwise

    packed = state.absmax.T.reshape(-1)
    state.original_nested = False
    layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax = packed.float()
    before = _UNPACKED.get(layer)
    if before is not None:
        scales = before.absmax
        if before.nested:
            scales = dequantize_blockwise(scales, before.state2) + before.offset
        if torch.equal(scales.float().to(packed.dtype), packed):
            state = copy(before)
    layer.weight.quant_state = layer.quant_state = state


_UNPACKED: WeakKeyDictionary[nn.Module, Any] = (
    WeakKeyDictionary()
)  # the state of layers before they were packed
