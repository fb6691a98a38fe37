"""Forward and backward passes of a model with an observer on its layers' two streams, (input, output gradient)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError, UnsupportedAdapterError
from laplace_lora_fast.model.alone import Alone, embedded_tokens, embeddings, embeds, thawed
from laplace_lora_fast.model.backward_hooks import register_hook, without_backward_hooks
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.model.contexts import (
    Caller,
    checkpointed,
    checkpointing_layers,
    eager,
    evaluation_mode,
    exclusive,
    frozen,
    is_offloaded,
    reentrant,
    without_autocast,
    without_fast_path,
)
from laplace_lora_fast.model.gradients import Leaves, by_sequence, send_back
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.observer import (
    GraphStart,
    Observer,
    Stream,
    Tapped,
    aligned,
    switched_off,
    tokens_and_mask,
)
from laplace_lora_fast.model.proofs import widened
from laplace_lora_fast.model.proofs.behaviour import code_of
from laplace_lora_fast.model.proofs.first import FirstBatch, require_all_ran, require_gradients
from laplace_lora_fast.model.proofs.leaks import Leaks, first_sequence
from laplace_lora_fast.model.proofs.slopes import Slopes
from laplace_lora_fast.model.shared_inputs import SharedInputs
from laplace_lora_fast.model.storage import differentiable_kernels
from laplace_lora_fast.model.uses import Uses


class Tap:
    """Forward and backward passes of a model with an observer on some layers.

    Used as a context manager. Inside, every parameter is frozen and the model is in evaluation mode; on exit, also
    after an error, training flags, `requires_grad` flags and hooks are as before. One tap at a time is on a model:
    others wait. A plain forward pass in another thread sees nothing of it. The caller's autocast holds for the model's
    forward pass only, not for what is computed from its outputs.

    Gradient checkpointing never counts anything twice: inputs are observed in the forward phase only (the recomputed
    forward runs in the backward phase), gradients in the backward phase only. The streams of a layer that runs several
    times are those of all its uses, one behind the other.

    Gradients at pads are refused in every batch: at once on the CPU, elsewhere on exit. More is proved in a model's
    first batch: see `proofs`.

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
        varying = [index for index, layer in enumerate(layers) if layer.module is head.output_layer]
        self._of_output = {index for index, layer in enumerate(layers) if layer.outer is head.output_layer}
        self._sharing = SharedInputs([layer.name for layer in layers], shared_inputs, varying)
        self._alone = Alone(layers, head.layers_alone)
        self._checks = DeferredChecks()
        self._leaks = Leaks(self._checks)
        self._first = FirstBatch(head, layers, self._checks)
        self._slopes = Slopes([layer.name for layer in layers])
        self._forward_phase = self._backward_phase = self._proves = False
        self._inputs: Any = None  # Inputs, of the batch that runs
        self._uses = Uses()
        self._reached: set[int] = set()  # layers that saw a gradient of this batch
        self._stack = ExitStack()

    @property
    def shared_inputs(self) -> list[int] | None:
        """For each layer the index of the one whose input it shares; None before the first forward pass."""
        return self._sharing.groups

    def __enter__(self) -> Tap:
        with ExitStack() as stack:
            stack.enter_context(exclusive(self.model))
            self._thread, code = threading.get_ident(), code_of(self.model)
            none = self._parameters or self._alone.indices
            checkpointing = [] if none else checkpointing_layers(self.model)
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(without_backward_hooks(self.model, partial(self._is_own, but_proofs=True)))
            stack.enter_context(frozen(self.model, self._parameters))
            stack.enter_context(thawed(self._alone.weights))
            stack.enter_context(
                checkpointed(checkpointing, lambda: self._is_own() and not self._alone.indices)
            )
            stack.enter_context(self.head.installed())
            stack.enter_context(differentiable_kernels(self.model))
            stack.enter_context(without_fast_path())
            stack.enter_context(eager())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self.observer is not None))
            self._caller = Caller(self.model)
            self._first.casts = self._caller.casts
            stack.enter_context(torch.autocast(self._caller.device, enabled=False))
            self._starts_early = reentrant(checkpointing)  # such segments need an input that requires grad
            self._leaves = Leaves(self._parameters, self._starts_early)
            for layer in self.layers:
                layer.check()
            self.head.recall(code, partial(self._again, self._caller), self._caller.casts)
            self._normalised = {index for index, layer in enumerate(self.layers) if layer.normalised}
            if self.observer is not None:
                self._alone.require_taken(self.observer)
                self._listen(self.observer, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._stack.close()
        if self.head.code is None:  # also what the passes have changed
            self.head.code = code_of(self.model)
        if kind is None:
            self._checks.settle()
            self._first.finish()
            self.head.layers_alone |= self._alone.names

    def forward(self, inputs: Inputs) -> Tensor:
        """Runs the model and shows the observer every distinct input. Returns u [S, U] with its graph.

        Raises:
            UnsupportedAdapterError: a layer did not run, or did what it should not; names it.
        """
        if self.model.training:  # put there by the loader
            self._stack.enter_context(evaluation_mode(self.model))
        with self._caller:
            inputs = self.head.placed(self.model, inputs)
        self._inputs = inputs
        u = self._run(inputs)
        if self.observer is None:
            return u
        if self._alone.refused:
            self._stack.enter_context(thawed(self._alone.take_refused(self.observer)))
            u = self._run(inputs)
        self._alone.require_provable(inputs)
        self._alone.read(inputs.n_sequences)
        require_all_ran(self.layers, self._sharing.uses, self._first.parts_ran)
        self._finish_inputs(self.observer)
        if not u.requires_grad:
            raise UnsupportedAdapterError(
                "the logits do not depend on any LoRA layer of the active adapter (detached outputs, or gradient "
                "checkpointing with use_reentrant=True in custom code whose inputs do not require grad: call "
                "model.enable_input_require_grads())"
            )
        self._leaves.find(u, self._alone.targets)
        return u

    def _run(self, inputs: Inputs) -> Tensor:
        """A forward pass under observation."""
        self._sharing.start()
        inputs = self._alone.started(inputs) if self.observer is not None else inputs
        self._leaks.start_batch(inputs)
        self._uses.start()
        self._reached.clear()
        self._first.start_pass()
        self._forward_phase = True
        try:
            with self._caller:
                return self.head.u(self.model, inputs)
        finally:
            self._forward_phase = False

    def prior_u(self, inputs: Inputs) -> Tensor:
        """U [S, U] with every tapped layer as it was before training: no graph, nothing observed."""
        with switched_off(self.layers, self._is_own), torch.no_grad(), self._caller:
            return self.head.u(self.model, self.head.placed(self.model, inputs))

    def prove(self, u: Tensor) -> None:
        """Between `forward` and `backward`, in the model's first batch: see `proofs`. Passes of its own, unobserved."""
        send_back_first = partial(self.backward, u, first_sequence(u), last=False)
        run, self._proves = partial(self._again, self._caller), True
        try:
            self._first.prove(u, self._inputs, run, send_back_first, partial(self._compare_slopes, u))
        finally:
            self._proves = False

    def _compare_slopes(self, u: Tensor, inputs: Inputs) -> UnsupportedAdapterError | str | None:
        if is_offloaded(self.model):  # what fetches its weights would keep them widened
            return "part of its weights is offloaded"
        run = partial(self._again, self._caller.without_casts())
        with frozen(self.model), torch.enable_grad():
            return widened.compare(self._slopes, u, run, self._starts_early, inputs)

    def _again(self, caller: AbstractContextManager[Any], inputs: Inputs) -> Tensor:
        """U [S, U] of a batch, unobserved."""
        with caller:
            return self.head.u(self.model, inputs)

    def backward(self, u: Tensor, cotangent: Tensor, last: bool) -> Sequence[Tensor | None]:
        """Sends `cotangent` [S, U] back from `u` and shows the observer every gradient.

        Args:
            u: what `forward` returned.
            cotangent: dL/du; row s only reaches sequence s.
            last: frees the graph behind this pass.

        Returns:
            Gradients of the tap's `parameters`.

        Raises:
            UnsupportedAdapterError: no gradient arrived at a layer in any pass of the batch; names it.
        """
        self._uses.start_backward()
        cotangent = cotangent.to(u.dtype)
        alone = self._alone.targets  # leaves as well: layers behind them may be on the way to nothing else
        leaves, alone = [*self._leaves.all, *alone], [] if self._proves else alone
        with_others = len(u) == 1  # of one sequence: gradients of all kinds come in one pass
        retain = not last or (bool(alone) and not with_others)
        self._backward_phase = True
        try:
            found = send_back(u, cotangent, leaves, retain, self._leaves.reentrant)
        finally:
            self._backward_phase = False
        with torch.no_grad():
            for index, stream in self._uses.other_gradients(self._sharing.uses):
                self._deliver_gradient(index, *stream)
        self._leaks.finish_pass()
        if alone:
            assert self.observer is not None
            rest = [found[-len(alone) :]] if with_others else list(by_sequence(u, cotangent, alone, last))
            with torch.no_grad():
                self._reached |= self._alone.show(self.observer, rest, self._require_own_tokens)
        if last:
            require_gradients(self.layers, self._reached)
        return found[: len(self._parameters)]

    def _listen(self, observer: Observer, stack: ExitStack) -> None:
        """Hooks on all layers, until the stack is closed."""
        for index, layer in enumerate(self.layers):
            hook = self._forward_hook(observer, index)  # before the user's, which may change the output
            handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
            self._first.watch(index, self._is_own, stack)
        self._first.watch_kernels(self.model, self._is_own, stack)
        for module in embeddings(self.model):
            stack.callback(module.register_forward_hook(self._embedding_hook).remove)

    def _embedding_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        early = self._starts_early or self._alone.indices or self._slopes.listens
        if not (early and self._is_own() and embeds(self.model, module, args, output, self._inputs)):
            return output
        started = self._start_graph(output)
        if self._forward_phase and self._alone.indices:
            self._alone.starts.append(started)
        return started

    def _require_own_tokens(self, g: Tensor, sequence: int) -> None:
        stream = embedded_tokens(g, self.head.as_called(self._inputs))
        self._leaks.require_own_tokens(*stream, sequence)

    def _is_own(self, but_proofs: bool = False) -> bool:
        """Whether this code runs in one of the tap's passes, not in a plain forward pass of another thread.

        A backward pass on a GPU, and what it recomputes, runs in a thread of autograd's.
        """
        if but_proofs and self._slopes.listens:
            return False
        if threading.get_ident() == self._thread:
            return True
        return (self._backward_phase or self._proves) and torch._C._current_graph_task_id() != -1

    def _forward_hook(self, observer: Observer, index: int) -> Any:
        """What it does at every layer of every pass takes Python time: see bench/results/host_time.md."""
        of_first_use = partial(self._observe_gradient, index, 0)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not self._is_own():
                return output
            if index in self._alone.indices:
                self._sharing.count(index)
                return output
            if self._slopes.listens:
                return self._slopes.passed(index, output)
            use = 0
            if self._forward_phase:
                x = args[0] if args else next(iter(kwargs.values()))
                use = self._observe_use(observer, index, x, output)
            if not torch.is_grad_enabled():  # first run of a reentrant checkpoint: its rerun has the graph
                return output
            if not output.requires_grad:
                output = self._start_graph(output)
            register_hook(output, partial(self._observe_gradient, index, use) if use else of_first_use)
            return output

        return hook

    def _observe_use(self, observer: Observer, index: int, x: Tensor, output: Tensor) -> int:
        """Input and output of a layer in a forward pass. Returns how often it has run before in this one."""
        groups = self.shared_inputs
        shares = groups is not None and groups[index] != index  # in a first pass it is not known yet who does
        if shares and index not in self._normalised and self._first.is_settled(index):
            return self._sharing.enter(index, x)  # nothing else is new
        with torch.no_grad(), without_autocast(x.device.type):
            self._first.require_plain(index, x, output)
            x = self.layers[index].seen(x)
            use = self._sharing.enter(index, x)
            if not shares:
                self._observe_input(observer, index, use, x)
            if index in self._normalised:
                self._keep_output(index, use, output)
        return use

    def _start_graph(self, output: Tensor) -> Tensor:
        if output.requires_grad or not torch.is_grad_enabled():
            return output
        return GraphStart.apply(output, self._leaves.anchor)  # type: ignore[no-untyped-call, no-any-return]

    def _observe_input(self, observer: Observer, index: int, use: int, x: Tensor) -> None:
        try:
            stream = self._tokens(index, use, x.detach())
        except InvalidBatchError as error:
            self._alone.refused |= dict.fromkeys(self._sharing.fed_by(index), error)
            return
        self._sharing.keep(index, stream[0])
        whole = self._uses.add_input(index, stream, self._sharing.expected(index))
        if whole is not None:
            self._deliver_input(observer, index, *whole)

    def _keep_output(self, index: int, use: int, output: Tensor) -> None:
        y = self.layers[index].without_bias(output.detach())
        self._uses.add_output(index, self._tokens(index, use, y))

    @torch.no_grad()
    def _finish_inputs(self, observer: Observer) -> None:
        """After a forward pass: in a first one it is only known now how often each layer runs, and who shares."""
        self._sharing.finish()
        assert self.shared_inputs is not None
        for index, stream in self._uses.other_inputs():
            if self.shared_inputs[index] == index:
                self._deliver_input(observer, index, *stream)

    def _deliver_input(self, observer: Observer, index: int, tokens: Tensor, mask: Tensor | None) -> None:
        image = observer.observe_input(index, tokens, mask)
        self._leaks.observe_input(index, tokens, mask, image)

    def _observe_gradient(self, index: int, use: int, g: Tensor) -> None:
        """Runs in a backward pass, which is without autograd and autocast already."""
        if not self._backward_phase:  # for weights of one sequence
            return
        stream = self._tokens(index, use, g)
        if self._proves:
            if self._first.may_mix_rows(self._inputs.n_sequences):
                self._leaks.require_own_row(*stream, self.layers[index].name)
            return
        self._reached.add(index)
        whole = self._uses.add_gradient(index, use, stream, self._sharing.uses[index])
        if whole is not None:
            self._deliver_gradient(index, *whole)

    def _deliver_gradient(self, index: int, g: Tensor, mask: Tensor | None) -> None:
        layer, groups, observer = self.layers[index], self.shared_inputs, self.observer
        assert groups is not None
        assert observer is not None
        shown = g
        if index in self._normalised:
            observer.observe_alignment(index, aligned(g, self._uses.output(index), mask))
        if layer.features is not None:
            shown = g.index_select(-1, layer.features.to(g.device))
        image = observer.observe_gradient(index, shown, mask)
        self._leaks.observe_gradient(groups[index], g, layer.name, image)

    def _tokens(self, index: int, use: int, x: Tensor) -> Stream:
        inputs = self.head.as_called(self._inputs)
        if index in self._of_output:
            stream = self.head.output_stream(x, inputs, use)
            if stream is not None:
                return stream
        return tokens_and_mask(x, inputs, self.layers[index].name)
