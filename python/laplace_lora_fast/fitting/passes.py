"""The one loop over data: for each batch a forward pass, and the backward passes that a listener asks for.

batch -> sequences (+ group) -> forward (activations x) -> u -> functions of the examples
-> backward passes (output gradients g)            -> listener: accumulator or predictor
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.devices import device_of, to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.fitting.finite import Screen
from laplace_lora_fast.likelihoods import Fisher, Likelihood
from laplace_lora_fast.likelihoods.fisher import fisher_cotangents
from laplace_lora_fast.likelihoods.functions import Functions, Group, OneSequence
from laplace_lora_fast.model.batches import Batch, Inputs
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.observer import Tapped
from laplace_lora_fast.model.tap import Tap
from laplace_lora_fast.structures.base import Listener

Loader = Iterable[Batch]


@dataclass(frozen=True)
class Subject:
    """What is differentiated: a model's answers, in the weights of its layers.

    Attributes:
        model: the model.
        head: reads u off its output.
        layers: those that are tapped.
        likelihood: of the outputs.
    """

    model: nn.Module
    head: Head
    layers: Sequence[Tapped]
    likelihood: Likelihood


@dataclass
class BatchStep:
    """One batch between its forward and its backward passes: see `structures.base.Step`.

    Attributes:
        index: of the batch.
        inputs: the batch.
        u: [S, U], detached, in the accumulation dtype.
        functions: of the examples.
        shared_inputs: see `Tap`; empty where nothing listens.
        outputs: of every block.
        targets: of every block, or None without labels.
    """

    index: int
    inputs: Inputs
    u: Tensor
    functions: Functions
    shared_inputs: list[int]
    likelihood: Likelihood
    generator: torch.Generator
    tap: Tap
    checks: DeferredChecks
    outputs: list[Tensor] = field(init=False)
    targets: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self.outputs = self.functions.outputs(self.u)

    def fisher(self, fisher: Fisher) -> list[Tensor]:
        """Fisher cotangents [N_b, C_b, K_b] of every block's outputs."""
        targets: Sequence[Tensor | None] = self.targets or [None] * len(self.outputs)
        return [
            fisher_cotangents(self.likelihood, fisher, outputs, target, self.generator)
            for outputs, target in zip(self.outputs, targets, strict=True)
        ]

    def prior_u(self) -> Tensor:
        """`u` with the adapter switched off."""
        u = self.tap.prior_u(self.inputs)
        return u.to(lk.accumulation_dtype(u.dtype))

    def read_targets(self, checks: DeferredChecks) -> None:
        """Takes the labels of the batch apart. Raises InvalidBatchError where they do not fit."""
        blocks = []
        labels = self.inputs.labels
        if (
            labels is not None
            and not self.functions.one_sequence
            and len(labels) != self.functions.n_examples
        ):
            raise InvalidBatchError(
                f"'labels' must hold one label an example, {self.functions.n_examples}, got {len(labels)}"
            )
        for outputs, examples in zip(self.outputs, self.functions.examples, strict=True):
            own = labels if labels is None or self.functions.one_sequence else labels[examples]
            blocks.append(self.likelihood.targets(own, outputs, checks))
        given = [block for block in blocks if block is not None]
        self.targets = given if len(given) == len(blocks) else None


def run(
    subject: Subject,
    loader: Loader,
    listener: Listener | None,
    each: Callable[[BatchStep], None],
    *,
    generator: torch.Generator,
    shared_inputs: list[int] | None = None,
    n_outputs: int | None = None,
    plain_outputs: bool = False,
    parameters: Sequence[nn.Parameter] = (),
    first_index: int = 0,
) -> Tap:
    """Forward and backward passes over a loader.

    Args:
        subject: what is differentiated.
        loader: batches.
        listener: what the streams are shown to; None: forward passes only.
        each: called when all is done with a batch.
        generator: of sampled labels.
        shared_inputs: of an earlier run, which this one must not contradict.
        n_outputs: U of an earlier run; None for that of the first batch.
        plain_outputs: whether the functions are the outputs themselves, not what the likelihood sees of them.
        parameters: whose gradients the listener is shown too.
        first_index: of the loader's first batch, for errors.

    Returns:
        The tap, left: which layers share inputs, and which saw a gradient.

    Raises:
        InvalidBatchError: the loader is empty, or a batch is unusable.
        UnsupportedAdapterError: the layers cannot be tapped.
    """
    checks, device, index = DeferredChecks(), device_of(subject.model), None
    screen = listener if isinstance(listener, Screen) else None
    layers = list(subject.layers)
    with Tap(subject.model, subject.head, layers, listener, shared_inputs, parameters) as tap:
        for index, batch in enumerate(loader, first_index):
            inputs = subject.head.inputs(batch, device, checks)
            graph = tap.forward(inputs)
            u = graph.detach().to(lk.accumulation_dtype(graph.dtype))
            n_outputs = _checked_outputs(u, n_outputs)
            if screen is not None and screen.rejects(u):
                screen.forget()
                continue
            functions = _functions(subject, inputs, u, plain_outputs)
            step = BatchStep(
                index,
                inputs,
                u,
                functions,
                tap.shared_inputs or [],
                subject.likelihood,
                generator,
                tap,
                checks,
            )
            for outputs in step.outputs:
                subject.likelihood.check(outputs)
            checks.require_at(u.isfinite().all(), index, _not_finite(screen))
            step.read_targets(checks)
            if listener is not None:
                _send_back(tap, graph, step, listener)
            if screen is None or not screen.dropped:
                each(step)
        checks.settle()
    if index is None:
        raise InvalidBatchError("the loader yielded no batch")
    return tap


def _send_back(tap: Tap, graph: Tensor, step: BatchStep, listener: Listener) -> None:
    tap.prove(graph)
    try:
        cotangents = listener.start(step)
        passes = cotangents.shape[2]
        for k in range(passes):
            gradients = tap.backward(graph, cotangents[:, :, k], last=k == passes - 1)
            if gradients:
                listener.observe_parameters(gradients)
            listener.finish_pass()
        listener.finish()
    finally:
        listener.forget()


def _not_finite(screen: Screen | None) -> str:
    first = "" if screen is None else screen.wrong_input()
    return (
        "batch {index} gives logits that are not finite"
        + (f" (what is not, first: {first})" if first else "")
        + ": load the model in bfloat16 or float32, or pad on the other side"
    )


def _functions(subject: Subject, inputs: Inputs, u: Tensor, plain_outputs: bool) -> Functions:
    """Which functions the examples of a batch have."""

    def directions(outputs: int) -> Tensor:
        matrix = torch.eye(outputs) if plain_outputs else subject.likelihood.functions(outputs)
        return to_device(matrix.to(u.dtype), u.device)

    if inputs.group is None:
        return OneSequence(len(u), directions(u.shape[1]))
    if u.shape[1] != 1:
        raise InvalidBatchError(f"a sequence of a group has one score, this model gives {u.shape[1]}")
    sizes = torch.bincount(inputs.group).unique().tolist()
    return Group(inputs.group, {size: directions(size) for size in sizes}, u.device)


def _checked_outputs(u: Tensor, n_outputs: int | None) -> int:
    if n_outputs is not None and u.shape[1] != n_outputs:
        raise InvalidBatchError(
            f"a batch gives {u.shape[1]} logits per example, earlier ones gave {n_outputs}"
        )
    return u.shape[1]
