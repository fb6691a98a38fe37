"""What a tap shows of a model, next to what autograd says of the same function."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast import Answers, Outputs
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.lora import LoraLayer, lora_layers
from laplace_lora_fast.model.tap import Tap
from laplace_lora_fast.tasks import Task
from tests import tiny

CPU = torch.device("cpu")
ANSWERS = Answers(tiny.ANSWERS)
LLAMA_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Recorder:
    """Observer that keeps what it is shown."""

    def __init__(self) -> None:
        self.inputs: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.gradients: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.calls: Counter[tuple[str, int]] = Counter()

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        self.calls["input", group] += 1
        self.inputs[group] = x, mask

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> None:
        self.calls["gradient", layer] += 1
        self.gradients[layer] = g, mask


def tapped(model: nn.Module, task: Task, observer: Any) -> tuple[Tap, Head]:
    """A tap on all LoRA layers, not entered yet."""
    head = task.head(model)
    return Tap(model, head, lora_layers(model, head), observer), head


def read(head: Head, batch: tiny.Batch) -> Any:
    """The batch as a head reads it on the CPU."""
    return head.inputs(batch, CPU, DeferredChecks())


def real(x: Tensor, mask: Tensor | None) -> Tensor:
    """In fp64, zero at pads."""
    return x.double() if mask is None else x.double().where(mask[..., None], 0)


def cotangent_for(u: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u)


def tapped_gradients(
    model: nn.Module, batch: tiny.Batch, task: Task
) -> tuple[dict[tuple[str, str], Tensor], Tensor, list[LoraLayer]]:
    """Gradients of lora_A and lora_B for every sequence, from the two streams; the tap's u; the layers."""
    recorder = Recorder()
    tap, head = tapped(model, task, recorder)
    with tap:
        u = tap.forward(read(head, batch))
        tap.backward(u, cotangent_for(u.detach()), last=True)
    groups, layers, gradients = tap.shared_inputs, list(tap.layers), {}
    assert groups is not None
    for index, layer in enumerate(layers):
        x, g = real(*recorder.inputs[groups[index]]), real(*recorder.gradients[index])
        a, b = layer.weights.A.double(), layer.weights.B.double()
        gradients[layer.name, "A"] = torch.einsum("ntr,nti->nri", layer.scaling * g @ b, x)
        gradients[layer.name, "B"] = torch.einsum("nto,ntr->nor", layer.scaling * g, x @ a.mT)
    leaders = {("input", group): 1 for group in groups}
    assert recorder.calls == leaders | {("gradient", index): 1 for index in range(len(layers))}
    return gradients, u.detach(), layers


def plain_outputs(model: nn.Module, batch: tiny.Batch, task: Task) -> Tensor:
    """What a user's own forward pass gives."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if isinstance(task, Outputs):
        return task.fn(model(**inputs), inputs)
    if not isinstance(task, Answers):
        return model(**inputs).logits
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    logits = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    last = [int(row.nonzero().max()) for row in mask]
    return torch.stack([logits[n, t, list(task.token_ids)] for n, t in enumerate(last)])


def autograd_gradients(
    model: nn.Module, batch: tiny.Batch, layers: list[LoraLayer], task: Task
) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """Gradients of the same function by autograd, one sequence at a time, and its outputs."""
    was_training = model.training
    model.eval()
    keys = [(layer.name, side) for layer in layers for side in "AB"]
    weights = [model.get_parameter(layer.parameter_names[side]) for layer in layers for side in "AB"]
    flags = [weight.requires_grad for weight in weights]
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        u = plain_outputs(model, batch, task)
        objective = (u * cotangent_for(u.detach())).sum(1)
        rows = [torch.autograd.grad(o, weights, retain_graph=True) for o in objective]
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    model.train(was_training)
    return {key: torch.stack(parts) for key, parts in zip(keys, zip(*rows, strict=True), strict=True)}, u


def assert_same_gradients(
    model: nn.Module, batch: tiny.Batch, task: Task, rtol: float = 1e-12
) -> list[LoraLayer]:
    """The two streams give autograd's gradients, and the tap's u is the model's. Returns the layers."""
    got, u, layers = tapped_gradients(model, batch, task)
    expected, plain = autograd_gradients(model, batch, layers, task)
    torch.testing.assert_close(u, plain.detach(), rtol=rtol, atol=rtol)
    features = {(layer.name, "B"): layer.features for layer in layers if layer.features is not None}
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        if key in features:
            others = torch.ones(gradient.shape[1], dtype=torch.bool).index_fill(0, features[key], False)
            assert not gradient[:, others].any()
            gradient = gradient[:, features[key]]
        atol = rtol * float(gradient.abs().max())
        torch.testing.assert_close(
            got[key].to(gradient), gradient, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
        )
    return layers
