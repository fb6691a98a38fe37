"""A fit: the passes that a structure asks for, over this rank's share of the data."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import InvalidBatchError, LaplaceWarning, RankError
from laplace_lora_fast.fitting.checkpoint import Course, Recorder
from laplace_lora_fast.fitting.choose import first_batch
from laplace_lora_fast.fitting.finite import Screen
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
        n_skipped: batches that were left out as not finite.
    """

    structure: Structure
    curvature: Curvature
    shared_inputs: list[int]
    n_examples: int
    n_outputs: int
    log_likelihood: float | None
    reason: str = ""
    n_skipped: int = 0


@dataclass
class Tally:
    """What a pass over one rank's data counted.

    Attributes:
        shared_inputs: for each layer the layer whose input it shares; empty before the first batch.
        n_examples: N.
        n_outputs: U; 0 before the first batch.
        log_likelihood: None if some batch had no labels.
        n_skipped: batches that were left out.
        first_skipped: which was the first of them, and why.
    """

    shared_inputs: list[int]
    n_examples: int = 0
    n_outputs: int = 0
    log_likelihood: Tensor | float | None = 0.0
    n_skipped: int = 0
    first_skipped: str = ""

    def count(self, step: BatchStep) -> None:
        """Takes in a batch."""
        self.shared_inputs = step.shared_inputs
        self.n_examples += step.functions.n_examples
        self.n_outputs = step.u.shape[1]
        if step.targets is None:
            step.tap.head.refuse_other_labels(step.inputs)
        if step.targets is None or self.log_likelihood is None:
            self.log_likelihood = None
            return
        for outputs, targets in zip(step.outputs, step.targets, strict=True):
            self.log_likelihood = self.log_likelihood + step.likelihood.log_likelihood(outputs, targets)

    def to_json(self) -> dict[str, Any]:
        """Plain values; waits for the device."""
        found = self.log_likelihood
        return vars(self) | {"log_likelihood": None if found is None else float(found)}


def fit(
    subject: Subject,
    structure: Structure,
    problem: Problem,
    loader: Loader,
    reason: str,
    progress: bool,
    *,
    recorder: Recorder | None = None,
    non_finite: str = "raise",
) -> Fit:
    """Fits the curvature.

    Args:
        subject: what is differentiated; its layers are LoRA layers.
        structure: in which form.
        problem: what the structure's passes are made for.
        loader: batches; with several ranks, this one's.
        reason: why this structure was chosen, where it was.
        progress: show a bar.
        recorder: of how far the fit has come, and where one before it had; None to write nothing.
        non_finite: what becomes of batches whose numbers are not finite: "raise" or "skip".

    Raises:
        InvalidBatchError: the loaders of all ranks are empty, a batch is unusable, or two passes need a loader that
            allows them.
        NumericalError: numbers are not finite; names the layer and the batch.
        RankError: another rank failed, or holds another model.
        StateError: what was recorded is damaged, or of a fit on other data.

    Warns:
        LaplaceWarning: batches were skipped.
    """
    ranks, stages = problem.ranks, structure.stages(problem)
    with ranks.together():
        if sum(not stage.first_batch_only for stage in stages) > 1 and iter(loader) is loader:
            raise InvalidBatchError(
                f"{type(structure).__name__}() passes over train_loader twice: pass a DataLoader or a list"
            )
    result, last = None, None
    for index, stage in enumerate(stages):
        data = loader
        if stage.first_batch_only:
            with ranks.together():
                first, loader = first_batch(loader)
            data = [] if first is None else [first]
        run_stage = _Stage(subject, stage, index, problem, recorder, non_finite == "skip", progress)
        result, tally = run_stage(stage.accumulator(result), data)
        if last is not None and tally.n_examples != last:
            raise InvalidBatchError(
                f"train_loader gave {last} examples in a first pass and {tally.n_examples} in a second: "
                f"{type(structure).__name__}() needs the same data twice"
            )
        last = None if stage.first_batch_only else tally.n_examples
    assert isinstance(result, Curvature)
    assert not isinstance(tally.log_likelihood, Tensor)
    if tally.n_skipped:
        where = f", on this rank the first is {tally.first_skipped}" if tally.first_skipped else ""
        warnings.warn(
            f"{tally.n_skipped} batches were skipped as not finite{where}", LaplaceWarning, stacklevel=4
        )
    return Fit(
        structure=structure,
        curvature=result,
        shared_inputs=tally.shared_inputs,
        n_examples=tally.n_examples,
        n_outputs=tally.n_outputs,
        log_likelihood=tally.log_likelihood,
        reason=reason,
        n_skipped=tally.n_skipped,
    )


@dataclass(frozen=True)
class _Stage:
    """One pass, and what the ranks make of it together."""

    subject: Subject
    stage: Stage
    index: int
    problem: Problem
    recorder: Recorder | None
    skip: bool
    progress: bool

    def __call__(self, accumulator: Accumulator, loader: Loader) -> tuple[Any, Tally]:
        ranks = self.problem.ranks
        with ranks.together():
            tally = self._pass(accumulator, loader)
        _share_shapes(tally, ranks)
        if not tally.n_examples:
            accumulator.prepare(tally.shared_inputs)
        accumulator.join(ranks)
        with torch.autocast(device_of(self.subject.model).type, enabled=False):
            result = accumulator.result()
        _add_up(tally, ranks)
        return result, tally

    def _pass(self, accumulator: Accumulator, loader: Loader) -> Tally:
        """Over this rank's share of the data, or what is left of it."""
        ranks = self.problem.ranks
        # The generator takes the lowest 32 bits of a seed: ranks have to differ there.
        generator = torch.Generator().manual_seed(self.problem.seed + 0x9E3779B9 * ranks.rank)
        course = Course(self.recorder, self.index, accumulator, generator)
        tally = Tally([]) if course.tally is None else Tally(**course.tally)
        names = [layer.name for layer in self.subject.layers]
        screen = Screen(accumulator, names, self.skip, course.batches)
        skipped_before = tally.n_skipped

        def counted() -> dict[str, Any]:
            tally.n_skipped = skipped_before + screen.skipped
            tally.first_skipped = tally.first_skipped or screen.first_skipped
            return tally.to_json()

        def take(step: BatchStep) -> None:
            tally.count(step)

            def settle() -> None:
                step.checks.settle()
                screen.settle()

            course.write_if_due(counted, settle)

        batches = course.remaining(track(loader, self.stage.name, self.progress and ranks.rank == 0))
        first = next(batches, None)
        if first is not None:
            run(
                self.subject,
                chain([first], batches),
                screen,
                take,
                generator=generator,
                shared_inputs=tally.shared_inputs or None,
                n_outputs=tally.n_outputs or None,
                first_index=course.batches - 1,
            )
            screen.settle()
        counted()
        course.write_if_due(counted, screen.settle)
        return tally


def _share_shapes(tally: Tally, ranks: Ranks) -> None:
    """What only a pass shows has to be the same on all ranks; those without data are told.

    The weights and options were compared before.

    Raises:
        InvalidBatchError: no rank has data.
        RankError: ranks differ.
    """
    mine = torch.tensor([[tally.n_outputs, *tally.shared_inputs]]) if tally.n_examples else None
    if not ranks.gather_numbers([tally.n_examples]).any():
        if tally.n_skipped:
            raise InvalidBatchError(
                f"all {tally.n_skipped} batches were skipped as not finite; the first is {tally.first_skipped}"
            )
        raise InvalidBatchError("the loader yielded no batch")
    everywhere = ranks.gather(mine)
    if not torch.equal(everywhere, everywhere[:1].expand_as(everywhere)):
        raise RankError("the ranks differ in the number of outputs or which layers share an input")
    tally.n_outputs, *tally.shared_inputs = everywhere[0].tolist()


def _add_up(tally: Tally, ranks: Ranks) -> None:
    """Makes the counts those of all ranks."""
    log_likelihood = math.nan if tally.log_likelihood is None else float(tally.log_likelihood)
    totals = ranks.gather_numbers([tally.n_examples, log_likelihood, tally.n_skipped]).sum(0).tolist()
    tally.n_examples, tally.n_skipped = int(totals[0]), int(totals[2])
    tally.log_likelihood = None if math.isnan(totals[1]) else totals[1]
