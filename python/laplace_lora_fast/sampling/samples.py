"""Samples of a posterior's weights, and what a model says under them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.fitting.passes import Subject
from laplace_lora_fast.model.batches import Batch
from laplace_lora_fast.model.contexts import undisturbed_methods
from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.sampling.proof import require_same_backward
from laplace_lora_fast.sampling.tangents import StepHooks


@undisturbed_methods
class PosteriorSamples:
    """n samples of the LoRA weights: a function f of the model becomes f + J delta, or f at the weights themselves.

    Linearised is what the posterior is made for. At a prior precision that predicts well the weights themselves are far
    from where the model is linear, and its text turns to garbage: `linearised=False` is for large precisions.

    Args:
        subject: model, head and layers.
        deltas: steps from the trained weights, [n, r, d] each.
        unchanged: a context in which the model is the one that was fitted; raises if it is not.
        described: what they were drawn with, for the repr.
    """

    def __init__(
        self,
        subject: Subject,
        deltas: Sequence[Tensor],
        unchanged: Callable[[], AbstractContextManager[Any]],
        described: str,
    ) -> None:
        self._subject, self.deltas, self._unchanged = subject, list(deltas), unchanged
        self._described = described

    @classmethod
    def still(cls, other: PosteriorSamples) -> PosteriorSamples:
        """One sample that is the trained model."""
        zeros = [torch.zeros_like(delta[:1]) for delta in other.deltas]
        return cls(other._subject, zeros, other._unchanged, "still")

    def __len__(self) -> int:
        return len(self.deltas[0])

    def __repr__(self) -> str:
        return f"PosteriorSamples(n={len(self)}, {self._described})"

    @property
    def norms(self) -> Tensor:
        """|delta| of every sample over all weights, fp64 [n]."""
        squares = sum(delta.double().flatten(1).square().sum(1).cpu() for delta in self.deltas)
        assert isinstance(squares, Tensor)
        return squares.sqrt()

    def apply(self, function: Callable[[], Any], *, linearised: bool = True, at_a_time: int = 8) -> Any:
        """What a function of the model gives under every sample.

        Args:
            function: of nothing; runs the model, without random numbers, and returns a tensor, or a tuple or dict of
                tensors: `lambda: model(**batch).logits`. It is called several times.
            linearised: f + J delta, by forward-mode derivatives; False: the model with each sample's weights.
            at_a_time: samples whose derivatives are computed together, in so many times the memory of a forward pass.

        Returns:
            The same with a leading axis n.

        Raises:
            UnsupportedAdapterError: something in the model has no forward-mode derivative, or not that of its backward
                pass, which is compared until `outputs` or a text has shown it.
        """
        with self._unchanged(), self._hooks().installed() as hooks:
            if not linearised:
                return hooks.as_weights(self.deltas, function)
            value, change = hooks.linearised(self.deltas, function, at_a_time=at_a_time)
            if (
                not self._subject.head.forward_mode_is_exact
            ):  # and stays so: a function may see a part of the model
                require_same_backward(hooks, self.deltas, function, change)
            return tree_map(lambda f, step: f + step, value, change)

    def outputs(self, batch: Batch, *, linearised: bool = True, at_a_time: int = 8) -> Tensor:
        """What the task reads off the model for every sequence, [n, S, U]: logits of answers, scores of options.

        Args:
            batch: as for `predict`.
            linearised: as for `apply`.
            at_a_time: as for `apply`.
        """
        head, model, checks = self._subject.head, self._subject.model, DeferredChecks()
        inputs = head.inputs(batch, device_of(model), checks)
        checks.settle()
        with self._unchanged(), self._hooks(own_head=True).installed() as hooks:
            inputs = head.placed(model, inputs)
            if not linearised:
                stacked: Tensor = hooks.as_weights(self.deltas, lambda: head.u(model, inputs))
                return stacked
            read = partial(head.u, model, inputs)
            value, change = hooks.linearised(self.deltas, read, at_a_time=at_a_time)
            if not head.forward_mode_is_exact:
                head.forward_mode_is_exact = require_same_backward(hooks, self.deltas, read, change)
            linear: Tensor = value + change
            return linear

    def _hooks(self, own_head: bool = False) -> StepHooks:
        layers = [layer for layer in self._subject.layers if isinstance(layer, Treated)]
        return StepHooks(self._subject.model, layers, self._subject.head if own_head else None)
