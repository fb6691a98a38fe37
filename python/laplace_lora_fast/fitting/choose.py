"""Which structure serves a fit where the caller left that open: decided before the first pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.fitting.passes import BatchStep, Loader, Subject, run
from laplace_lora_fast.fitting.planner import price, require_budget
from laplace_lora_fast.model.batches import Batch
from laplace_lora_fast.options import kinds
from laplace_lora_fast.progress import length, say
from laplace_lora_fast.structures.base import Problem, Structure


class Resumed:
    """A loader whose first batch has been looked at: its next pass starts there, later ones start anew.

    A loader that hands out one stream again and again would lose that batch, and a shuffled one would draw another.
    """

    def __init__(self, loader: Loader, batches: Iterator[Batch]) -> None:
        self._loader = loader
        self._batches: Iterator[Batch] | None = batches

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        batches, self._batches = self._batches, None
        return iter(self._loader) if batches is None else batches


def first_batch(loader: Loader) -> tuple[Batch | None, Loader]:
    """The first batch, None if there is none, and a loader that still has it."""
    batches = iter(loader)
    first = next(batches, None)
    return first, Resumed(loader, batches if first is None else chain([first], batches))


def choose(
    subject: Subject, structure: Structure | None, problem: Problem, loader: Loader, progress: bool
) -> tuple[Structure, str, Problem, Loader]:
    """The structure of a fit, priced: one line to whoever waits says what it takes.

    Args:
        subject: what is differentiated.
        structure: the caller's, or None for the first of all, in the order of their preference, that suits the problem.
        problem: without its size.
        loader: batches.
        progress: say what it takes.

    Returns:
        It, why, the problem with its size where that is known, and the loader, of which a first batch may have been
        looked at.

    Raises:
        ValueError: the budget is too small for it in its smallest form.
    """
    reason = ""
    if structure is None:
        problem, loader = _sized(subject, problem, loader)
        structure, reason = _first_that_suits(problem)
    else:
        problem = _declared(subject, problem, loader)
        if structure.needs_size and problem.n_functions is None:
            problem, loader = _sized(subject, problem, loader)
    plan = price(structure, problem)
    require_budget(plan)
    say(plan.line(), progress and problem.ranks.rank == 0)
    return structure, reason, problem, loader


def _first_that_suits(problem: Problem) -> tuple[Structure, str]:
    ranked = [(kind.preference, kind) for kind in kinds(Structure) if kind.preference is not None]
    reasons = []
    for _, kind in sorted(ranked, key=lambda pair: pair[0]):
        structure = kind()
        verdict = structure.suits(problem)
        reasons.append(verdict.reason)
        if verdict.suits:
            break
    structure = structure.adapted_to(problem)
    # The last one suits everything: what speaks is why those before it do not.
    return structure, reasons[-1] if len(reasons) == 1 else "; ".join(reasons[:-1])


def _declared(subject: Subject, problem: Problem, loader: Loader) -> Problem:
    """The problem with its size, where the loader tells without giving a batch, and the head without a pass."""
    head, data = subject.head, getattr(loader, "dataset", None)
    if data is not None:
        examples = length(data)
    else:
        examples = sum(map(_sequences, loader)) if type(loader) in (list, tuple) else None
    known = head.n_outputs is not None and not head.grouped and examples is not None
    total = float(problem.ranks.gather_numbers([float(examples or 0) if known else math.nan]).sum())
    if math.isnan(total) or not total or head.n_outputs is None:
        return problem
    functions = subject.likelihood.functions(head.n_outputs).shape[1]
    return replace(problem, n_examples=int(total), n_functions=int(total) * functions)


def _sequences(batch: Any) -> int:
    """Of a batch that may be anything yet."""
    values = batch.values() if isinstance(batch, Mapping) else ()
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 0)


def _sized(subject: Subject, problem: Problem, loader: Loader) -> tuple[Problem, Loader]:
    """The problem with its size, if the loader tells: its first batch counts for all."""
    with problem.ranks.together():
        first, loader = first_batch(loader)
        counts = (0, 0) if first is None else _count(subject, first)
    batches = 0 if first is None else length(loader)
    mine = [math.nan if batches is None else float(batches * count) for count in counts]
    examples, functions = problem.ranks.gather_numbers(mine).sum(0).tolist()
    if math.isnan(examples):
        return problem, loader
    return replace(problem, n_examples=int(examples), n_functions=int(functions)), loader


def _count(subject: Subject, batch: Batch) -> tuple[int, int]:
    """Examples of a batch, and their functions: by a forward pass where the head does not know its outputs."""
    head = subject.head
    if head.n_outputs is not None and not head.grouped:
        inputs = head.inputs(batch, device_of(subject.model), DeferredChecks())
        return inputs.n_examples, inputs.n_examples * subject.likelihood.functions(head.n_outputs).shape[1]
    seen: list[BatchStep] = []
    run(subject, [batch], None, seen.append, generator=torch.Generator())
    functions = seen[0].functions
    blocks = zip(functions.examples, functions.sizes, strict=True)
    return functions.n_examples, sum(len(examples) * size for examples, size in blocks)
