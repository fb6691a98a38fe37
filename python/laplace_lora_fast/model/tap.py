"""Forward and backward passes of a model with an observer on its layers' two streams, (input, output gradient)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import DeferredChecks, UnsupportedAdapterError
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.model.contexts import (
    autocast_of_caller,
    checkpointing_layers,
    evaluation_mode,
    frozen,
    input_embeddings,
    reentrant,
    without_fast_path,
)
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.leaks import Leaks, first_sequence
from laplace_lora_fast.model.observer import GraphStart, Observer, Tapped, tokens_and_mask
from laplace_lora_fast.model.shared_inputs import SharedInputs


class Tap:
    """Forward and backward passes of a model with an observer on its LoRA layers.

    Used as a context manager. Inside, every parameter is frozen and the model is in evaluation mode; on exit, also
    after an error, training flags, `requires_grad` flags and hooks are as before. The caller's autocast holds for the
    model's forward pass only, not for what is computed from its outputs.

    Gradient checkpointing never counts anything twice: inputs are observed in the forward phase only (the recomputed
    forward runs in the backward phase), gradients in the backward phase only.

    Gradients at pads are refused in every batch: at once on the CPU, elsewhere on exit.

    Args:
        model: the model the layers belong to.
        head: turns a batch into u.
        layers: those to tap.
        observer: receives the streams. None: forward passes only, without autograd.
        shared_inputs: for each layer the index of the one whose input tensor it shares (itself when it does not); None
            discovers them in the first forward pass. A later pass that contradicts them is refused.
        parameters: whose gradients `backward` returns; the model is not checkpointed then, which knows none.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        layers: Sequence[Tapped],
        observer: Observer | None,
        shared_inputs: list[int] | None = None,
        parameters: Sequence[nn.Parameter] = (),
    ) -> None:
        self.model, self.head, self.layers, self.observer = model, head, layers, observer
        self._parameters = list(parameters)
        self._sharing = SharedInputs([layer.name for layer in layers], shared_inputs)
        self.reached: set[int] = set()  # layers that saw a gradient
        self._checks = DeferredChecks()
        self._leaks = Leaks(self._checks)
        self._forward_phase = self._checks_rows = self._rows_checked = False
        self._inputs: Inputs | None = None
        self._stack = ExitStack()

    @property
    def shared_inputs(self) -> list[int] | None:
        """For each layer the index of the one whose input it shares; None before the first forward pass."""
        return self._sharing.groups

    def __enter__(self) -> Tap:
        with ExitStack() as stack:
            checkpointing = [] if self._parameters else checkpointing_layers(self.model)
            stack.enter_context(evaluation_mode(self.model, checkpointing))
            stack.enter_context(frozen(self.model, self._parameters))
            stack.enter_context(self.head.installed())
            stack.enter_context(without_fast_path())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self.observer is not None))
            self._autocast = autocast_of_caller(self.model)
            stack.enter_context(torch.autocast(self._autocast.device, enabled=False))
            self._anchor = torch.zeros((), requires_grad=True)
            for index, layer in enumerate(self.layers):
                layer.check()
                if self.observer is None:
                    continue
                hook = self._forward_hook(self.observer, index)
                # Before hooks of the user, which may change the output.
                handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            if self.observer is not None and reentrant(checkpointing):  # needs an input that requires grad
                embedding = input_embeddings(self.model)
                stack.callback(embedding.register_forward_hook(lambda *a: self._start_graph(a[-1])).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._stack.close()
        if kind is None:
            self._checks.settle()
            self.head.rows_checked |= self._rows_checked

    def forward(self, inputs: Inputs) -> Tensor:
        """Runs the model and shows the observer every distinct input. Returns u [S, U] with its graph."""
        with self._autocast:
            inputs = self.head.placed(self.model, inputs)
        self._inputs = inputs
        self._sharing.start()
        self._leaks.start_batch()
        self._forward_phase = True
        try:
            with self._autocast:
                u = self.head.u(self.model, inputs)
        finally:
            self._forward_phase = False
        if self.observer is None:
            return u
        self._sharing.finish()
        if not u.requires_grad:
            raise UnsupportedAdapterError(
                "the logits do not depend on any LoRA layer of the active adapter (detached outputs, or gradient "
                "checkpointing with use_reentrant=True in custom code whose inputs do not require grad)"
            )
        return u

    def prior_u(self, inputs: Inputs) -> Tensor:
        """U [S, U] with the adapter switched off in every tapped LoRA layer: no graph, nothing observed."""
        with ExitStack() as stack, torch.no_grad(), self._autocast:
            for layer in self.layers:
                handle = layer.switch_off()
                if handle is not None:
                    stack.callback(handle.remove)
            return self.head.u(self.model, self.head.placed(self.model, inputs))

    def check_rows(self, u: Tensor) -> None:
        """Between `forward` and `backward`: refuses layers whose rows are not sequences, in the model's first batch.

        One backward pass more, from the first sequence's outputs alone, which the observer does not see.
        """
        if self.head.rows_checked or self._rows_checked or len(u) == 1:
            return
        self._checks_rows = True
        try:
            self.backward(u, first_sequence(u), last=False)
        finally:
            self._checks_rows = False
        self._rows_checked = True

    def backward(self, u: Tensor, cotangent: Tensor, last: bool) -> Sequence[Tensor | None]:
        """Sends `cotangent` [S, U] back from `u` and shows the observer every gradient.

        Args:
            u: what `forward` returned.
            cotangent: dL/du; row s only reaches sequence s.
            last: frees the graph behind this pass.

        Returns:
            Gradients of the tap's `parameters`.
        """
        cotangent = cotangent.to(u.dtype)
        if self._parameters:
            return torch.autograd.grad(
                u, self._parameters, cotangent, retain_graph=not last, allow_unused=True
            )
        torch.autograd.backward(u, cotangent, retain_graph=not last)
        return ()

    def _forward_hook(self, observer: Observer, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if self._forward_phase:
                x = args[0] if args else next(iter(kwargs.values()))
                with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                    self._observe_input(observer, index, x)
            if not torch.is_grad_enabled():  # first run of a reentrant checkpoint: its rerun has the graph
                return output
            output = self._start_graph(output)
            output.register_hook(lambda g: self._observe_gradient(observer, index, g))
            return output

        return hook

    def _start_graph(self, output: Tensor) -> Tensor:
        if output.requires_grad or not torch.is_grad_enabled():
            return output
        started: Tensor = GraphStart.apply(output, self._anchor)  # type: ignore[no-untyped-call]
        return started

    def _observe_input(self, observer: Observer, index: int, x: Tensor) -> None:
        if self._sharing.leads(index, x):
            tokens, mask = self._tokens(self.layers[index], x.detach())
            self._sharing.keep(index, tokens)
            self._leaks.observe_input(index, tokens, mask)
            observer.observe_input(index, tokens, mask)

    def _observe_gradient(self, observer: Observer, index: int, g: Tensor) -> None:
        """Runs in a backward pass, which is without autograd and autocast already."""
        layer = self.layers[index]
        g, mask = self._tokens(layer, g)
        if self._checks_rows:
            self._leaks.require_own_row(g, mask, layer.name)
            return
        self._leaks.require_off_pads(self._sharing.leaders[index], g, layer.name)
        if layer.features is not None:
            g = g.index_select(-1, layer.features.to(g.device))
        self.reached.add(index)
        observer.observe_gradient(index, g, mask)

    def _tokens(self, layer: Tapped, x: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self._inputs is not None
        inputs = self.head.as_called(self._inputs)
        return tokens_and_mask(x, inputs, layer.name, layer.module is self.head.output_layer)
