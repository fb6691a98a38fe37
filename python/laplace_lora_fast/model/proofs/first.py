"""What a tap has to see before its numbers may be believed.

In every forward pass all tapped LoRA layers run, with their lora_A and lora_B, and in every batch a gradient arrives at
each. In a model's first batch more is proved, by doing:

- every linear layer of the model lets gradients through;
- each layer computes W0 x + s B A x, with these A and B: no hook, parametrisation or replacement in between;
- two forward passes agree bit for bit: nothing random is left on. Where one has drawn random numbers this is proved in
  every batch: it may have been without effect by chance;
- gradients are those of what the model computes: see `slopes`;
- row n of what a layer sees is sequence n, and depends on no other, nor do the outputs in ways that have no gradient.

What is proved holds as long as nothing is hung on the model's modules, replaced or removed: see `behaviour`. In every
batch the gradients at pads are zero, or their inputs are: see `leaks`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laplace_lora_fast.errors import (
    DeferredChecks,
    InvalidBatchError,
    LaplaceError,
    LaplaceWarning,
    UnsupportedAdapterError,
)
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.observer import Tapped
from laplace_lora_fast.model.proofs.behaviour import Sample, random_states, require_alone

_UNPROVED = (
    "it could not be proved that the gradients are those of what the model computes, for which it has to run once in "
    "fp64 or fp32 ({reason}). They are if nothing in its code detaches a part of a tensor or has a backward pass of "
    "its own. To have it proved, fit on one batch with the model in fp32 and plain (eager or sdpa) attention"
)
_LEAVE_OUT = "or leave them out: LaplaceLoRA(.., layers=lambda name: ..)"


def require_all_ran(layers: Sequence[Tapped], uses: Mapping[int, int], parts_ran: set[int]) -> None:
    """Raises UnsupportedAdapterError if the forward pass went around a LoRA layer; names it."""
    idle = [index for index, layer in enumerate(layers) if layer.adapted and index not in uses]
    if not idle:
        return
    names = [layers[index].name for index in idle]
    if parts_ran & set(idle):
        raise UnsupportedAdapterError(
            f"{_listed(names)}: the model calls layer.forward(x), past all hooks: let it call layer(x), {_LEAVE_OUT}"
        )
    raise UnsupportedAdapterError(
        f"{_listed(names)}: the forward pass went around the layer, though its adapter is active. Fused LoRA kernels "
        "(unsloth, axolotl's lora_*_kernel, liger) compute it elsewhere: load model and adapter with transformers and "
        f"peft alone. If these layers have no part in the answers, {_LEAVE_OUT[3:]}"
    )


def require_gradients(layers: Sequence[Tapped], reached: set[int]) -> None:
    """Raises UnsupportedAdapterError if no gradient arrived at a LoRA layer that ran; names it."""
    idle = [layer.name for index, layer in enumerate(layers) if layer.adapted and index not in reached]
    if idle:
        raise UnsupportedAdapterError(
            f"{_listed(idle)}: no gradient arrived, though the layer ran: something behind it lets none pass (a "
            "quantised kernel for inference, .detach(), torch.no_grad), or the answers do not depend on it. Load the "
            f"base model unquantised, {_LEAVE_OUT}"
        )


class FirstBatch:
    """The proofs of a model's first batch. What is proved is kept by the head.

    Args:
        head: of the model.
        layers: the tapped ones.
        checks: takes what cannot be read without waiting.
    """

    def __init__(self, head: Head, layers: Sequence[Tapped], checks: DeferredChecks) -> None:
        self._head, self._layers, self._checks = head, layers, checks
        self._bases: dict[int, Tensor] = {}
        self._hooks: dict[int, list[RemovableHandle]] = {}
        self._is_plain: set[int] = set()
        self._settled: set[int] = set()  # these, and those of which nothing is to be proved
        self._is_same = self._slopes_are_same = False
        self._hooked: set[int] = (
            set()
        )  # on whose parts others have hooks, which may do something else each time
        self.rows_are_sequences = False
        self.casts = False  # whether the model runs under autocast
        self.parts_ran: set[int] = set()  # layers whose lora_A or lora_B has run in this pass

    @property
    def may_be_random(self) -> bool:
        """Whether two forward passes have to be compared yet."""
        return not (self._head.is_deterministic or self._is_same)

    def may_mix_rows(self, n_sequences: int) -> bool:
        """Whether rows have to be compared with sequences yet: one sequence says nothing about them."""
        return n_sequences > 1 and not (self._head.rows_checked or self.rows_are_sequences)

    def start_pass(self) -> None:
        """Before a forward pass."""
        self._bases.clear()
        self.parts_ran.clear()

    def watch(self, index: int, is_own: Callable[[], bool], stack: ExitStack) -> None:
        """Hooks on the parts of a LoRA layer, until the stack is closed."""
        layer = self._layers[index]

        def keep_base(module: nn.Module, args: Any, output: Any) -> None:
            if is_own() and isinstance(output, Tensor):
                self._bases[index] = output.detach()

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if is_own():
                self.parts_ran.add(index)

        if any(part._forward_hooks or part._forward_pre_hooks for part in layer.adapter_parts):
            self._hooked.add(index)
        elif layer.name in self._head.plain_layers:
            return
        hooks = [part.register_forward_hook(note) for part in layer.adapter_parts]
        if layer.base is not None:
            hooks.append(layer.base.register_forward_hook(keep_base))
        self._hooks[index] = hooks
        for hook in hooks:
            stack.callback(hook.remove)

    def watch_kernels(self, model: nn.Module, is_own: Callable[[], bool], stack: ExitStack) -> None:
        """Hooks on all that has weights, in a first batch: each has to let gradients through.

        What does not (a quantised linear layer for inference, a fused MLP) need not show otherwise: gradients arrive
        everywhere by the residual stream, but without its part.
        """
        if not self.may_be_random:
            return

        hooks: dict[str, RemovableHandle] = {}  # each until its module has shown it

        def require_passage(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if not (is_own() and torch.is_grad_enabled() and isinstance(output, Tensor)):
                return
            depends = any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))
            if depends and output.is_floating_point() and not output.requires_grad:
                raise UnsupportedAdapterError(
                    f"layer {name!r} ({type(module).__name__}) lets no gradient through: its kernel is for inference "
                    "(activations quantised too, say), or a hook or its own code detaches what it gives. Load the base "
                    "model unquantised, or with quantised weights that can be trained through (bitsandbytes, torchao's "
                    "weight-only kinds), without what detaches"
                )
            if depends:
                hooks[name].remove()

        for name, module in model.named_modules():
            if module._forward_hooks:
                self._watch_hooks(name, module, is_own, stack)
            has_weights = hasattr(module, "in_features") or next(module.parameters(), None) is not None
            if has_weights and not hasattr(module, "base_layer"):
                hook = partial(require_passage, name)
                hooks[name] = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(hooks[name].remove)

    def _watch_hooks(
        self, name: str, module: nn.Module, is_own: Callable[[], bool], stack: ExitStack
    ) -> None:
        """Others' hooks on a module have to let gradients through as well, whatever the module has."""
        before: list[bool] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if is_own():
                before[:] = [each.requires_grad for each in _tensors(output)]

        def require_passage(module: nn.Module, args: Any, output: Any) -> None:
            after = [each.requires_grad for each in _tensors(output)]
            if is_own() and any(was and not now for was, now in zip(before, after, strict=False)):
                raise UnsupportedAdapterError(
                    f"layer {name!r} ({type(module).__name__}) lets no gradient through: a hook on it detaches what it "
                    "gives. Remove it while the posterior is used"
                )

        stack.callback(module.register_forward_hook(note, prepend=True).remove)
        stack.callback(module.register_forward_hook(require_passage).remove)

    def is_settled(self, index: int) -> bool:
        """Whether `require_plain` has nothing left to prove of a layer."""
        return index in self._settled

    def require_plain(self, index: int, x: Tensor, output: Tensor) -> None:
        """Raises UnsupportedAdapterError unless the layer's output is W0 x + s B A x, in a first batch."""
        if index in self._settled:
            return
        layer = self._layers[index]
        if not layer.adapted or (layer.name in self._head.plain_layers and index not in self._hooked):
            self._settled.add(index)
            return
        if layer.adapter_parts and index not in self.parts_ran:
            raise UnsupportedAdapterError(
                f"layer {layer.name!r} ran without its lora_A and lora_B: its forward has been replaced (fused kernels "
                f"do that): load model and adapter with transformers and peft alone, {_LEAVE_OUT}"
            )
        layer.require_plain(x, self._bases.pop(index, None), output)
        self._is_plain.add(index)
        if index in self._hooked:
            return
        self._settled.add(index)
        for hook in self._hooks.pop(index, ()):  # every call of a module with hooks takes longer
            hook.remove()

    def prove(
        self,
        u: Tensor,
        inputs: Inputs,
        run: Callable[[Inputs], Tensor],
        send_back_first: Callable[[], object],
        compare_slopes: Callable[[Inputs], UnsupportedAdapterError | str | None],
    ) -> None:
        """Between the forward and the backward passes of a batch.

        Args:
            u: of the batch.
            inputs: the batch.
            run: gives u of a batch, unobserved.
            send_back_first: sends back from the first sequence's outputs, and compares rows with sequences.
            compare_slopes: compares gradients with difference quotients, in passes of its own: see `widened`.
        """
        if self.may_be_random:
            before = random_states(u.device)
            _require_same(u, run(inputs))
            self._is_same = random_states(u.device) == before
        several = self.may_mix_rows(len(u))
        if several:
            send_back_first()
        if several or (self._head.keeps_sample and self._head.sample is None):
            self._run_alone(u, inputs, run, several)
        wrong: UnsupportedAdapterError | str | None = None
        if not (self._head.slopes_checked or self._slopes_are_same):
            wrong = compare_slopes((None if self._head.of_batches else inputs.first()) or inputs)
        if isinstance(wrong, UnsupportedAdapterError):
            raise wrong
        if wrong is not None:
            warnings.warn(_UNPROVED.format(reason=wrong), LaplaceWarning, stacklevel=2)
        self.rows_are_sequences |= several
        self._slopes_are_same = True

    def _run_alone(self, u: Tensor, inputs: Inputs, run: Callable[[Inputs], Tensor], several: bool) -> None:
        """The first sequence without the others, if it can be told what is its own."""
        first, head = inputs.first(), self._head
        if first is None:
            return
        self._checks.settle()  # what is known of its rows by now says more
        try:
            with torch.no_grad():
                alone = run(first) if len(u) > 1 else u
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            if head.of_batches:
                return
            if isinstance(error, LaplaceError):
                raise
            raise InvalidBatchError(
                f"the first sequence of the batch fails alone ({type(error).__name__}: {error}), which is how it is "
                "proved that sequences do not depend on each other: pass batches of one sequence"
            ) from error
        if head.of_batches and alone.shape != u[:1].shape:
            return
        if several and head.same_alone:
            require_alone(u, alone, self._checks)
        if head.keeps_sample and head.sample is None:
            head.sample = Sample(first, alone.detach(), self.casts)

    def finish(self) -> None:
        """All is proved: later taps need not repeat it."""
        self._head.rows_checked |= self.rows_are_sequences
        self._head.is_deterministic |= self._is_same
        self._head.slopes_checked |= self._slopes_are_same
        self._head.plain_layers |= {self._layers[index].name for index in self._is_plain}


def _require_same(u: Tensor, again: Tensor) -> None:
    """Raises UnsupportedAdapterError unless both forward passes gave the same, NaN where NaN is."""
    if not bool(((u == again) | (u.isnan() & again.isnan())).all()):
        raise UnsupportedAdapterError(
            "two forward passes in evaluation mode differ: something random is left on (dropout by hand, layer "
            "drop, sampled routing), or a kernel adds up in another order each time. Switch it off in the model's "
            "configuration, or call torch.use_deterministic_algorithms(True)"
        )


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those of a module's output."""
    parts = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    )
    return (part for part in parts if isinstance(part, Tensor))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3]) + (", .." if len(names) > 3 else "")
    return f"layer {shown}" if len(names) == 1 else f"layers {shown} ({len(names)} of them)"
