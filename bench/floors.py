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

from bench.models import Batch, Setting
from laplace_lora_fast.likelihoods import Categorical

Cotangents = Callable[[Tensor], Tensor]  # logits [N, C] -> [N, C, K]


def fit(setting: Setting) -> None:
    """Forward and the C - 1 backward passes of the exact Fisher information over a training set."""
    _passes(setting, setting.loader, Categorical().hessian_root)


def fit_one_label(setting: Setting) -> None:
    """Forward and one backward pass, of one label for each example."""
    _passes(setting, setting.loader, lambda logits: Categorical().hessian_root(logits)[:, :, :1])


def predict(setting: Setting) -> None:
    """Forward and the backward passes of the C - 1 contrasts for one batch."""
    contrasts = Categorical().functions(len(setting.answers))
    _passes(setting, setting.loader[:1], lambda logits: contrasts.expand(len(logits), -1, -1))


def jacobian(setting: Setting) -> None:
    """Forward and the backward passes of the C logits for one batch."""
    unit = torch.eye(len(setting.answers))
    _passes(setting, setting.loader[:1], lambda logits: unit.expand(len(logits), -1, -1))


def _passes(setting: Setting, loader: Iterable[Batch], cotangents: Cotangents) -> None:
    with _frozen(setting.model), _graph_starts(setting.model) as starts:
        for batch in loader:
            starts.clear()
            logits = setting.logits(batch)
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
