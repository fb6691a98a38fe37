"""Slow, independent definitions of what the package computes: one unpadded example at a time, plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from tests import tiny

Logits = Callable[[nn.Module, tiny.Batch], Tensor]


def examples(batch: tiny.Batch) -> list[tiny.Batch]:
    """Each example alone, without its pads."""
    singles = []
    for row in range(len(batch["input_ids"])):
        keep = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
        single = {"input_ids": batch["input_ids"][row][keep][None]}
        if "labels" in batch:
            single["labels"] = batch["labels"][row : row + 1]
        singles.append(single)
    return singles


def answer_logits(model: nn.Module, single: tiny.Batch) -> Tensor:
    """[C] logits of the answer tokens behind the last token."""
    return model(input_ids=single["input_ids"]).logits[0, -1, list(tiny.ANSWERS)]


def class_logits(model: nn.Module, single: tiny.Batch) -> Tensor:
    """[C] logits of a sequence classifier."""
    return model(input_ids=single["input_ids"]).logits[0]


def softmax_hessian(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return torch.diag(p) - torch.outer(p, p)


def lora_modules(model: nn.Module) -> dict[str, nn.Module]:
    """LoRA layers that hold the default adapter, by name."""
    return {name: m for name, m in model.named_modules() if "default" in getattr(m, "lora_A", {})}


@dataclass
class Stream:
    """Inputs and output gradients of lora_A and lora_B, one entry an example: [T, .] and [K, T, .]."""

    x: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    g_a: list[Tensor] = field(default_factory=list)
    g_b: list[Tensor] = field(default_factory=list)


def streams(
    model: nn.Module, batch: tiny.Batch, logits_of: Logits, cotangents: Callable[[Tensor, tiny.Batch], Tensor]
) -> dict[str, Stream]:
    """Taps lora_A and lora_B separately. `cotangents`: (logits [C], example) -> [C, K]."""
    model.eval()
    layers = lora_modules(model)
    result = {name: Stream() for name in layers}
    for single in examples(batch):
        taken: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        handles = []
        for name, layer in layers.items():
            for side in ("lora_A", "lora_B"):
                keep = partial(_keep, taken, (name, side))
                handles.append(getattr(layer, side)["default"].register_forward_hook(keep))
        logits = logits_of(model, single)
        for handle in handles:
            handle.remove()
        directions = cotangents(logits.detach(), single)
        outputs = [out for _, out in taken.values()]
        per_cotangent = [
            torch.autograd.grad(logits @ direction, outputs, retain_graph=True, allow_unused=True)
            for direction in directions.mT
        ]
        for place, ((name, side), (inputs, out)) in enumerate(taken.items()):
            g = torch.stack(
                [torch.zeros_like(out) if gs[place] is None else gs[place] for gs in per_cotangent]
            )
            flat_x, flat_g = inputs.reshape(-1, inputs.shape[-1]), g.reshape(len(g), -1, out.shape[-1])
            stream = result[name]
            (stream.x if side == "lora_A" else stream.z).append(flat_x)
            (stream.g_a if side == "lora_A" else stream.g_b).append(flat_g)
    return result


def _keep(taken: dict, key: tuple[str, str], module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
    taken[key] = args[0].detach(), out


def exact_cotangents(logits: Tensor, single: tiny.Batch) -> Tensor:
    """A square root of the softmax Hessian by eigendecomposition, all C columns."""
    values, vectors = torch.linalg.eigh(softmax_hessian(logits))
    return vectors * values.clamp_min(0).sqrt()


def empirical_cotangents(logits: Tensor, single: tiny.Batch) -> Tensor:
    target = torch.zeros_like(logits)
    target[single["labels"][0]] = 1
    return (logits.softmax(-1) - target)[:, None]


def kfac(inputs: list[Tensor], gradients: list[Tensor], mode: str) -> tuple[Tensor, Tensor]:
    """(input factor, gradient factor) from per-example [T, in] and [K, T, out]."""
    if mode == "expand":
        rows = torch.cat(inputs)
        x = rows.mT @ rows / len(rows)
        g = sum(torch.einsum("ktd,kte->de", g, g) for g in gradients)
    else:
        means = torch.stack([x.mean(0) for x in inputs])
        x = means.mT @ means / len(means)
        g = sum(torch.einsum("kd,ke->de", g.sum(1), g.sum(1)) for g in gradients)
    return x, g


def jacobians(model: nn.Module, batch: tiny.Batch, logits_of: Logits) -> dict[tuple[str, str], Tensor]:
    """D logits / d vec(weight) [N, C, P] of every LoRA weight, row-major, by autograd."""
    model.eval()
    weights = {
        (name, side): getattr(layer, f"lora_{side}")["default"].weight
        for name, layer in lora_modules(model).items()
        for side in "AB"
    }
    rows: dict[tuple[str, str], list[Tensor]] = {key: [] for key in weights}
    for single in examples(batch):
        logits = logits_of(model, single)
        per_class = [
            torch.autograd.grad(logit, list(weights.values()), retain_graph=True, allow_unused=True)
            for logit in logits
        ]
        for place, (key, weight) in enumerate(weights.items()):
            grads = [torch.zeros_like(weight) if g[place] is None else g[place] for g in per_class]
            rows[key].append(torch.stack([g.flatten() for g in grads]))
    return {key: torch.stack(value) for key, value in rows.items()}


def assert_close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Largest deviation relative to the largest entry."""
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0, "the oracle is zero: the test proves nothing"
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= relative, f"relative error {error:.2e} > {relative:.0e}"
