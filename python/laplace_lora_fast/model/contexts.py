"""The state a model is put in while it is tapped, and what gradient checkpointing means for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import UnsupportedAdapterError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the data-parallel wrappers, which prefix the names of its layers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def checkpointing_layers(model: nn.Module) -> list[nn.Module]:
    """Modules that transformers' gradient checkpointing is switched on for."""
    return [module for module in model.modules() if vars(module).get("gradient_checkpointing", False)]


def input_embeddings(model: nn.Module) -> nn.Module:
    """Of the outermost module that knows them: `model` may be a plain wrapper."""
    owner = next(module for module in model.modules() if hasattr(module, "get_input_embeddings"))
    embedding: nn.Module = owner.get_input_embeddings()  # type: ignore[operator]
    return embedding


def reentrant(checkpointing: list[nn.Module]) -> bool:
    """Whether any of them checkpoints reentrantly: its segments then need an input that requires grad."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in checkpointing)
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


def autocast_of_caller(model: nn.Module) -> torch.autocast:
    """The autocast in force now, on the model's device, to be entered again later."""
    kind = device_of(model).type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a parameter elsewhere, and fetches it for the forward pass only."""
    hooked = any(hasattr(part, "_hf_hook") for part in module.modules())
    return hooked and any(parameter.is_meta for parameter in module.parameters())


def refuse_inference_tensors(model: nn.Module) -> None:
    """Raises UnsupportedAdapterError for parameters that autograd cannot use."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UnsupportedAdapterError(
                f"parameter {name!r} was made in torch.inference_mode: load the model outside of it"
            )


def _has_own_dropout(module: nn.Module) -> bool:
    return any(
        "drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items()
    )


@contextmanager
def evaluation_mode(model: nn.Module, checkpointing: list[nn.Module]) -> Iterator[None]:
    """Evaluation mode, except that transformers' checkpointed layers keep the flag that makes them checkpoint."""
    were_training = [module for module in model.modules() if module.training]
    were_not = [layer for layer in checkpointing if not layer.training]
    try:
        for module in were_training:
            module.training = False
        for layer in checkpointing:
            layer.training = not _has_own_dropout(layer)
        yield
    finally:
        for module in were_training:
            module.training = True
        for layer in were_not:
            layer.training = False


@contextmanager
def frozen(model: nn.Module, but: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """No parameter requires grad, `but` for some: the backward pass computes no other weight gradient."""
    kept = {id(parameter) for parameter in but}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """No fused nn.TransformerEncoderLayer: in evaluation mode it computes with the base weights, past their LoRA."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
