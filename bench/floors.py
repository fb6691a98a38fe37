"""The floors: what any method pays that needs the gradients at every LoRA layer, and nothing else.

Every parameter is frozen, so that no weight gradient is computed; the graph starts at the first LoRA layers; the
language-model head sees the last position only. What a method adds to that is its own cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from bench import models
from laplace_lora_fast.likelihoods import Categorical, contrast_cotangents

Cotangents = Callable[[Tensor], Tensor]  # logits [N, C] -> [N, C, K]


def fit(model: nn.Module, loader: Iterable[models.Batch]) -> None:
    """Forward and the C - 1 backward passes of the exact Fisher information over a training set."""
    _passes(model, loader, Categorical().hessian_root)


def predict(model: nn.Module, batch: models.Batch) -> None:
    """Forward and the backward passes of the C - 1 contrasts for one batch."""
    contrasts = contrast_cotangents(len(models.ANSWERS))
    _passes(model, [batch], lambda logits: contrasts.expand(len(logits), -1, -1))


def _passes(model: nn.Module, loader: Iterable[models.Batch], cotangents: Cotangents) -> None:
    with _frozen(model), _graph_starts(model) as starts:
        for batch in loader:
            starts.clear()
            logits = models.logits(model, batch)
            columns = cotangents(logits.detach()).unbind(2)
            for column in columns:
                torch.autograd.grad(logits, starts, column, retain_graph=column is not columns[-1])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    yield
    for parameter in trainable:
        parameter.requires_grad_(True)


@contextmanager
def _graph_starts(model: nn.Module) -> Iterator[list[Tensor]]:
    """Makes the outputs of the first LoRA layers the leaves of the graph; yields the list they are put in."""
    starts: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            starts.append(output.requires_grad_())

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, LoraLayer)]
    yield starts
    for handle in handles:
        handle.remove()
