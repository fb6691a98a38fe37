"""A fit: the passes that a structure asks for, over this rank's share of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.fitting.choose import first_batch
from laplace_lora_fast.fitting.passes import BatchStep, Loader, Subject, run
from laplace_lora_fast.progress import track
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.base import Accumulator, Curvature, Problem, Stage, Structure


@dataclass(frozen=True)
class Fit:
    """What a fit leaves.

    Attributes:
        structure: its options.
        curvature: of the LoRA weights, at unit noise.
        shared_inputs: for each layer the layer whose input it shares.
        n_examples: N.
        n_outputs: U, numbers that the model gives for a sequence.
        log_likelihood: sum of log p(y | f) at unit noise; None if some batch had no labels.
        reason: why its structure was chosen, where the caller left that open.
    """

    structure: Structure
    curvature: Curvature
    shared_inputs: list[int]
    n_examples: int
    n_outputs: int
    log_likelihood: float | None
    reason: str = ""


@dataclass
class Tally:
    """What a pass over one rank's data counted.

    Attributes:
        shared_inputs: for each layer the layer whose input it shares.
        n_examples: N.
        n_outputs: U.
        log_likelihood: None if some batch had no labels.
    """

    shared_inputs: list[int]
    n_examples: int = 0
    n_outputs: int = 0
    log_likelihood: Tensor | float | None = 0.0

    def count(self, step: BatchStep) -> None:
        """Takes in a batch."""
        self.n_examples += step.functions.n_examples
        self.n_outputs = step.u.shape[1]
        if step.targets is None or self.log_likelihood is None:
            self.log_likelihood = None
            return
        for outputs, targets in zip(step.outputs, step.targets, strict=True):
            self.log_likelihood = self.log_likelihood + step.likelihood.log_likelihood(outputs, targets)


def fit(
    subject: Subject, structure: Structure, problem: Problem, loader: Loader, reason: str, progress: bool
) -> Fit:
    """Fits the curvature.

    Args:
        subject: what is differentiated; its layers are LoRA layers.
        structure: in which form.
        problem: what the structure's passes are made for.
        loader: batches; with several ranks, this one's.
        reason: why this structure was chosen, where it was.
        progress: show a bar.

    Raises:
        InvalidBatchError: the loader is empty, a batch is unusable, or two passes need a loader that allows them.
        NumericalError: a layer's curvature is not finite.
        RankError: another rank failed, or holds another model.
    """
    ranks, stages = problem.ranks, structure.stages(problem)
    with ranks.together():
        if sum(not stage.first_batch_only for stage in stages) > 1 and iter(loader) is loader:
            raise InvalidBatchError(
                f"{type(structure).__name__}() passes over train_loader twice: pass a DataLoader or a list"
            )
    result, last = None, None
    for stage in stages:
        data = loader
        if stage.first_batch_only:
            with ranks.together():
                first, loader = first_batch(loader)
            data = [first]
        result, tally = _run_stage(subject, stage, stage.accumulator(result), data, problem, progress)
        if last is not None and tally.n_examples != last:
            raise InvalidBatchError(
                f"train_loader gave {last} examples in a first pass and {tally.n_examples} in a second: "
                f"{type(structure).__name__}() needs the same data twice"
            )
        last = None if stage.first_batch_only else tally.n_examples
    assert isinstance(result, Curvature)
    assert not isinstance(tally.log_likelihood, Tensor)
    return Fit(
        structure=structure,
        curvature=result,
        shared_inputs=tally.shared_inputs,
        n_examples=tally.n_examples,
        n_outputs=tally.n_outputs,
        log_likelihood=tally.log_likelihood,
        reason=reason,
    )


def _run_stage(
    subject: Subject,
    stage: Stage,
    accumulator: Accumulator,
    loader: Loader,
    problem: Problem,
    progress: bool,
) -> tuple[Any, Tally]:
    """One pass, and what the ranks make of it together."""
    ranks = problem.ranks
    # The generator takes the lowest 32 bits of a seed: ranks have to differ there.
    generator = torch.Generator().manual_seed(problem.seed + 0x9E3779B9 * ranks.rank)
    tally = Tally([])
    with ranks.together():
        batches = track(loader, stage.name, progress and ranks.rank == 0)
        tap = run(subject, batches, accumulator, tally.count, generator=generator)
    assert tap.shared_inputs is not None
    tally.shared_inputs = tap.shared_inputs
    _require_same_model(problem, tally)
    accumulator.join(ranks)
    with torch.autocast(device_of(subject.model).type, enabled=False):
        result = accumulator.result()
    _add_up(tally, ranks)
    return result, tally


def _add_up(tally: Tally, ranks: Ranks) -> None:
    """Makes the counts those of all ranks."""
    log_likelihood = math.nan if tally.log_likelihood is None else float(tally.log_likelihood)
    totals = ranks.gather_numbers([tally.n_examples, log_likelihood]).sum(0).tolist()
    tally.n_examples = int(totals[0])
    tally.log_likelihood = None if math.isnan(totals[1]) else totals[1]


def _require_same_model(problem: Problem, tally: Tally) -> None:
    """Of what only a pass shows; the weights and options were compared before."""
    shapes = [tally.n_outputs, *tally.shared_inputs]
    problem.ranks.require_same(shapes, "the number of outputs or which layers share an input")
