"""Whether a model's forward-mode derivatives are those of its backward pass: some kernels drop them without a word."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks, UnsupportedAdapterError
from laplace_lora_fast.fitting.passes import run
from laplace_lora_fast.likelihoods import SampledTokens
from laplace_lora_fast.model.batches import Batch
from laplace_lora_fast.model.contexts import unwrapped
from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.model.storage import quantised_linears
from laplace_lora_fast.model.tokens.heads import LabelScoreHead
from laplace_lora_fast.prediction import LinearisedModel
from laplace_lora_fast.sampling.tangents import StepHooks
from laplace_lora_fast.structures.base import Step
from laplace_lora_fast.structures.jacobians import JacobianListener
from laplace_lora_fast.weights import LayerWeights

_SEQUENCES = 2  # that are compared
# Relative errors that are no rounding: in fp32, with layers that may round their inputs to 8 bits, and in 16 bits
_EXACT, _QUANTISED, _NARROW = 1e-3, 0.02, 0.25


class _Along(JacobianListener):
    """J delta [S] of one output a sequence, by a backward pass."""

    def __init__(self, layers: Sequence[LayerWeights], delta: Sequence[Tensor]) -> None:
        super().__init__(layers, [None] * len(delta))
        self._delta = delta
        self.total: Tensor | float = 0.0

    def start(self, step: Step) -> Tensor:
        return super().start(step)[:, :, :1]

    def observe_jacobian(self, weight: int, small: Tensor, large: Tensor) -> None:
        step = self._delta[weight].to(small)
        self.total = self.total + ((small @ step) * large.to(small)).sum((1, 2, 3)).double().cpu()


def require_forward_mode(linearised: LinearisedModel, deltas: Sequence[Tensor], batch: Batch) -> None:
    """Compares the log probability's derivative along one sample, of a few sequences; once a model.

    Args:
        linearised: the model.
        deltas: steps of every weight, [n, r, d].
        batch: with labels.

    Raises:
        UnsupportedAdapterError: forward and backward mode disagree.
    """
    proved = linearised.subject.head
    if proved.forward_mode_is_exact:
        return
    few = {
        key: value[:_SEQUENCES] if isinstance(value, Tensor) and value.dim() else value
        for key, value in batch.items()
    }
    head = LabelScoreHead(unwrapped(linearised.subject.model), mean=False)
    layers = [layer for layer in linearised.subject.layers if isinstance(layer, Treated)]
    one = [delta[:1] for delta in deltas]
    along = _Along([layer.weights for layer in layers], [delta[0] for delta in one])
    subject = replace(linearised.subject, head=head, likelihood=SampledTokens())
    run(
        subject,
        [few],
        along,
        lambda _: None,
        generator=torch.Generator(),
        shared_inputs=list(linearised.shared_inputs),
    )
    backward = torch.as_tensor(along.total)
    if not backward.any():  # no labelled token, or a step that changes nothing: nothing to compare
        return
    checks = DeferredChecks()
    inputs = head.inputs(few, device_of(subject.model), checks)
    checks.settle()
    with StepHooks(subject.model, layers, head).installed() as hooks:
        inputs = head.placed(subject.model, inputs)
        _, change = hooks.linearised(one, lambda: head.u(subject.model, inputs))
    error = float((change[0, :, 0].double().cpu() - backward).norm() / backward.norm())
    _require_small(error, subject.model)
    proved.forward_mode_is_exact = True


def require_same_backward(
    hooks: StepHooks, deltas: Sequence[Tensor], function: Callable[[], Any], change: Any
) -> bool:
    """Compares derivatives of any function of the model, along the first sample, with those of a backward pass.

    Args:
        hooks: of the model, installed.
        deltas: steps of every weight, [n, r, d].
        function: of nothing, by way of the model.
        change: its derivatives, by forward mode, with a leading axis n.

    Returns:
        Whether there was something to compare: outputs have a graph, and the step changes them.

    Raises:
        UnsupportedAdapterError: forward and backward mode disagree.
    """
    generator = torch.Generator().manual_seed(0)
    found, signs = [each[0].double() for each in tree_leaves(change)], []
    for each in found:  # signs of their own, so that nothing cancels; any where they are zero, or dropped
        drawn = 2.0 * torch.randint(0, 2, each.shape, generator=generator).to(each) - 1
        signs.append(torch.where(each != 0, each.sign(), drawn))
    backward = float(hooks.by_backward(deltas, function, signs))
    forward = sum(float((each * sign).sum()) for each, sign in zip(found, signs, strict=True))
    largest = max(abs(forward), abs(backward))
    if math.isnan(backward) or not largest:
        return False
    _require_small(abs(forward - backward) / largest, hooks.model)
    return True


def _require_small(error: float, model: nn.Module) -> None:
    if not error <= _least(model):
        raise UnsupportedAdapterError(
            f"the model's forward-mode derivatives differ from those of its backward pass by {error:.1%}: something "
            "in it (a custom kernel) drops them, and linearised samples would be wrong. Load it with "
            "attn_implementation='sdpa' or 'eager' and without custom kernels"
        )


def _least(model: nn.Module) -> float:
    """The relative error from which on something is wrong with a model's derivatives."""
    stored = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())
    if stored or torch.is_autocast_enabled(device_of(model).type):
        return _NARROW
    return _QUANTISED if quantised_linears(model) else _EXACT
