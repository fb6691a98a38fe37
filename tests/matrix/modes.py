"""Ways to run a model, and what a user may have done to it beforehand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast import Answers, Classes
from tests.matrix import models, oracle
from tests.matrix.cells import Cell

GROUP = "Ways of running"
TARGETS = ["q_proj", "v_proj", "down_proj"]
Change = Callable[[Any], nn.Module | None]


def decoder(**own: Any) -> Any:
    """A tiny decoder with dropout in attention and adapter."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(models.config("llama", attention_dropout=0.3, **own))
    return models.adapted(base, TARGETS, lora_dropout=0.3)


def encoder(**own: Any) -> Any:
    """A tiny classifier with dropout everywhere."""
    torch.manual_seed(0)
    config = models.config("bert", num_labels=3, is_decoder=False, **own)
    return models.adapted(
        transformers.BertForSequenceClassification(config), ["query", "dense"], lora_dropout=0.3
    )


MODELS = {"decoder": (decoder, Answers(models.ANSWERS), "left"), "encoder": (encoder, Classes(), "right")}


def error(which: str, change: Change, inside: Callable[[], Any] = nullcontext) -> float:
    """Of a posterior after `change` to the model, fitted and asked `inside` a context; the oracle ran before."""
    make, task, side = MODELS[which]
    model = make()
    tokens = models.sequences()
    outputs = models.answers_of if isinstance(task, Answers) else models.classes_of
    alone = [{"input_ids": sequence[None]} for sequence in tokens]
    expected = oracle.posterior(model, outputs, alone[: models.TRAIN], alone[models.TRAIN :])
    changed = change(model)
    train, test = (models.padded(part, side) for part in (tokens[: models.TRAIN], tokens[models.TRAIN :]))
    with inside():
        return models.compared(model if changed is None else changed, task, train, test, expected)


def accepted(change: Change) -> float:
    """Infinity for a fit that should have been refused."""
    model = decoder()
    changed = change(model)
    model = model if changed is None else changed
    batch = models.padded(models.sequences()[: models.TRAIN], "left")
    models.fitted(model, Answers(models.ANSWERS), batch, models.labels()).logit_distribution(batch)
    return float("inf")


def compiled(backend: str, model: nn.Module) -> Any:
    """torch.compile around the model, warm."""
    made = torch.compile(model, backend=backend)
    with torch.no_grad():
        made(input_ids=torch.ones(2, 5, dtype=torch.long))
    return made


def compiled_in_place(backend: str, model: nn.Module) -> None:
    """model.compile."""
    model.compile(backend=backend)


def checkpointed(reentrant: bool, training: bool, model: Any) -> None:
    """Gradient checkpointing as a trainer switches it on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train(training)


def all_frozen(model: nn.Module) -> None:
    """No parameter requires grad."""
    model.requires_grad_(False)


def all_trained(model: nn.Module) -> None:
    """Every parameter requires grad."""
    model.requires_grad_(True)


def gradients_there(model: nn.Module) -> None:
    """Gradients of a training step are still there."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


class Wrapped(nn.Module):
    """A user's own module around a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **batch: Tensor) -> Any:
        return self.inner(**batch)


def watched(model: nn.Module) -> None:
    """Hooks of the user's that only look on."""
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: None)
        module.register_forward_pre_hook(lambda module, args: None)


def accelerated(model: nn.Module) -> nn.Module:
    """As accelerate prepares it."""
    import accelerate

    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    return model


def hook_on_a(model: nn.Module) -> None:
    """A hook that changes what lora_A gives."""
    layer = next(module for name, module in model.named_modules() if name.endswith("lora_A.default"))
    layer.register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_b(model: nn.Module) -> None:
    """A hook that changes what lora_B gives."""
    layer = next(module for name, module in model.named_modules() if name.endswith("lora_B.default"))
    layer.register_forward_hook(lambda module, args, output: output.clamp(-0.01, 0.01))


def dropout_replaced(model: nn.Module) -> None:
    """A module in the place of lora_dropout."""
    layer = _layer(model)
    layer.lora_dropout["default"] = nn.Tanh()


def parametrised(model: nn.Module) -> None:
    """Spectral norm on lora_A."""
    torch.nn.utils.parametrizations.spectral_norm(_layer(model).lora_A["default"])


def fused(model: nn.Module, part: str = "q_proj") -> None:
    """An attention that computes with the weights of a layer, not with the layer, as unsloth's kernels do."""
    for name, module in list(model.named_modules()):
        if name.endswith(part):
            parent = model.get_submodule(name.rpartition(".")[0])
            delattr(parent, part)
            object.__setattr__(parent, part, partial(_by_hand, module))
            parent.add_module(f"{part}_kept", module)


def called_past_hooks(model: nn.Module) -> None:
    """layer.forward(x) in the place of layer(x)."""
    for name, module in list(model.named_modules()):
        if name.endswith("q_proj"):
            parent = model.get_submodule(name.rpartition(".")[0])
            delattr(parent, "q_proj")
            object.__setattr__(parent, "q_proj", module.forward)
            parent.add_module("q_kept", module)


def forward_replaced(model: nn.Module) -> None:
    """A forward of the user's own in the place of the layer's."""
    layer = _layer(model)
    layer.forward = lambda x, *args, **kwargs: (
        layer.base_layer(x) + 0.5 * layer.lora_B["default"](layer.lora_A["default"](x))
    )


def detached(model: nn.Module) -> None:
    """A hook that detaches what a block gives."""
    block = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    block.register_forward_hook(lambda module, args, output: output.detach())


def random_by_hand(model: nn.Module) -> None:
    """Noise in evaluation mode."""
    block = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    block.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))


def rows_mixed(model: nn.Module) -> None:
    """A statistic of the whole batch in a block."""
    block = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    block.register_forward_hook(lambda module, args, output: output - output.mean(0, keepdim=True))


def tied(model: nn.Module) -> None:
    """One lora_A for two layers, by hand."""
    layers = [module for name, module in model.named_modules() if name.endswith("q_proj")]
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight


def on_meta(model: nn.Module) -> nn.Module:
    """Without weights."""
    return model.to("meta")


def in_inference_mode(model: nn.Module) -> nn.Module:
    """Made in inference mode."""
    with torch.inference_mode():
        return decoder()


def offloaded(model: nn.Module) -> nn.Module:
    """Weights that accelerate fetches for the forward pass only."""
    import accelerate

    return accelerate.cpu_offload(model)


def _layer(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer))


def _by_hand(layer: Any, x: Tensor) -> Tensor:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer(x) + layer.scaling["default"] * x @ a.T @ b.T


def unchanged(model: nn.Module) -> None:
    """As it is."""


@contextmanager
def fp64_default() -> Iterator[None]:
    """Tensors are fp64 unless told otherwise."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def plain_passes_beside() -> Iterator[None]:
    """Forward passes of another model in another thread."""
    other, stop = decoder(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            other(input_ids=torch.ones(2, 5, dtype=torch.long))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


CHANGES: dict[str, Change] = {
    "training mode with dropout": nn.Module.train,
    "checkpointing, reentrant": partial(checkpointed, True, False),
    "checkpointing, reentrant, training mode": partial(checkpointed, True, True),
    "checkpointing, not reentrant": partial(checkpointed, False, False),
    "checkpointing, not reentrant, training mode": partial(checkpointed, False, True),
    "torch.compile by aot_eager": partial(compiled, "aot_eager"),
    "model.compile by aot_eager": partial(compiled_in_place, "aot_eager"),
    "torch.compile by inductor": partial(compiled, "inductor"),
    "model.compile by inductor": partial(compiled_in_place, "inductor"),
    "DataParallel": nn.DataParallel,
    "all parameters frozen": all_frozen,
    "all parameters trained": all_trained,
    "gradients of a training step": gradients_there,
    "hooks that look on": watched,
    "hooks of accelerate": accelerated,
}
CONTEXTS: dict[str, Callable[[], Any]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "fp64 as the default": fp64_default,
    "another model in another thread": plain_passes_beside,
    "autograd's anomaly mode": torch.autograd.detect_anomaly,
    "device context": partial(torch.device, "cpu"),
}
REFUSED: dict[str, tuple[Change, str]] = {
    "hook changes lora_A": (hook_on_a, "lora_A"),
    "hook changes lora_B": (hook_on_b, "lora_B"),
    "lora_dropout replaced": (dropout_replaced, "lora_dropout"),
    "spectral norm on lora_A": (parametrised, "lora_A"),
    "fused kernel for q": (fused, "went around the layer"),
    "fused kernel for down_proj": (partial(fused, part="down_proj"), "went around the layer"),
    "layer.forward called": (called_past_hooks, "past all hooks"),
    "forward replaced": (forward_replaced, "does not compute W0 x + s B A x"),
    "a block detached": (detached, "lets no gradient through"),
    "noise in evaluation mode": (random_by_hand, "two forward passes"),
    "statistics of the batch": (rows_mixed, "depends on other examples"),
    "lora_A shared by hand": (tied, "share"),
    "meta device": (on_meta, "meta"),
    "made in inference mode": (in_inference_mode, "inference_mode"),
    "offloaded by accelerate": (offloaded, "offload"),
}
SLOW = {"torch.compile by inductor", "model.compile by inductor"}


def cells() -> list[Cell]:
    """All of them."""
    found = [
        Cell(GROUP, name, which, partial(error, which, change), quick=which == "decoder" and name not in SLOW)
        for name, change in CHANGES.items()
        for which in MODELS
    ]
    found += [
        Cell(GROUP, name, which, partial(error, which, unchanged, context), quick=which == "decoder")
        for name, context in CONTEXTS.items()
        for which in MODELS
    ]
    found.append(Cell(GROUP, "module of the user's around it", "decoder", partial(error, "decoder", Wrapped)))
    return found + [
        Cell(GROUP, name, "decoder", partial(accepted, change), refused=words, quick=True)
        for name, (change, words) in REFUSED.items()
    ]
