"""Every method on one cell, a model after one training: what it says of each test set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench.table.subjects import KEPT, Batch, Data, Subject
from bench.table.train import FOLDS, MEMBERS, rows_of_seed, runs, snapshot
from laplace_lora_fast import KFAC, CrossFit, Diagonal, Evidence, HeldOut, LaplaceLoRA, LeaveOneOut, Rows
from laplace_lora_fast.baselines import (
    MAP,
    Baseline,
    BLoB,
    Case,
    CrossFittedTemperature,
    Ensemble,
    MCDropout,
    Temperature,
    TrainingFree,
)
from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.evaluation.predictions import Predictions

BATCH = 16
Found = dict[str, dict[str, Any]]  # method -> what is kept of it


@dataclass(frozen=True)
class Cell:
    """A model, a seed, and an epoch of its training.

    Attributes:
        subject: the model.
        seed: of the rows, the initialisation and the order.
        epoch: of the snapshot.
    """

    subject: Subject
    seed: int
    epoch: int

    @cached_property
    def data(self) -> Data:
        """The rows."""
        return rows_of_seed(self.seed)

    @cached_property
    def _adapted(self) -> tuple[nn.Module, Callable[[Sequence[Any], int], list[Batch]], Any]:
        return self.subject.adapted(self.seed)

    def batches(self, rows: Sequence[Any], size: int = BATCH) -> list[Batch]:
        """Batches of rows."""
        return self._adapted[1](rows, size)

    def model(self, run: str = "main", back: int = 0) -> nn.Module:
        """A run's snapshot, so many epochs before this one."""
        return snapshot(self.subject, self.seed, run, self.epoch - back)

    @cached_property
    def case(self) -> Case:
        """What baselines are given."""
        train, held_out = self.batches(self.data.train), self.batches(self.data.held_out)
        return Case(self.model(), self._adapted[2], train, held_out, self.seed)

    @cached_property
    def tests(self) -> dict[str, list[Batch]]:
        """Test batches by name."""
        return {name: self.batches(rows) for name, rows in self.data.tests.items()}

    def fold_model(self, rows: Sequence[Any]) -> nn.Module:
        """The model that was trained on these rows."""
        kept = runs(self.seed)
        return self.model(next(f"fold{k}" for k in range(FOLDS) if kept[f"fold{k}"][0] == list(rows)))

    def cross_fit(self) -> CrossFit:
        """By the folds that were trained for it."""
        return CrossFit(self.fold_model, self.data.train, folds=FOLDS, batches=self.batches, seed=self.seed)


def kept(predictions: Mapping[str, Predictions], **facts: Any) -> dict[str, Any]:
    """What of a method's answers goes to the file: log odds of the second class, to four digits."""
    margins = {
        name: [round(x, 4) for x in (p.probs[:, 1].log() - p.probs[:, 0].log()).tolist()]
        for name, p in predictions.items()
    }
    return {**facts, "log_odds": margins}


def baseline(
    method: str,
    make: Callable[[Cell], Baseline],
    case: Callable[[Cell], Case] = lambda cell: cell.case,
) -> Callable[[Cell], Found]:
    """A group of one method."""

    def run(cell: Cell) -> Found:
        start = time.process_time()
        predict = make(cell).fit(case(cell))
        found = {name: predict(loader) for name, loader in cell.tests.items()}
        return {method: kept(found, cpu_seconds=round(time.process_time() - start, 1))}

    return run


def temperature(method: str, make: Callable[[Cell], Baseline]) -> Callable[[Cell], Found]:
    """The same for a temperature. Where the labels do not follow the logits at all, none is best: infinity is."""
    scaled = baseline(method, make)

    def run(cell: Cell) -> Found:
        try:
            return scaled(cell)
        except NumericalError:
            even = {name: torch.full((len(rows), 2), 0.5) for name, rows in cell.data.tests.items()}
            return {method: kept({name: Predictions(p) for name, p in even.items()}, temperature="infinite")}

    return run


def posterior(
    name: str, tunings: Mapping[str, Callable[[Cell], Any]], **options: Any
) -> Callable[[Cell], Found]:
    """A group of methods: one posterior, its prior precision chosen in several ways, predicted in one pass."""

    def run(cell: Cell) -> Found:
        start = time.process_time()
        la = LaplaceLoRA(cell.case.model, cell.case.task, seed=cell.seed, **options)
        la.fit(cell.case.train, progress=False)
        chosen = {
            how: la.optimize_prior_precision(make(cell), progress=False) for how, make in tunings.items()
        }
        tried = list(chosen.values())
        answers: dict[str, list[Tensor]] = {
            name: [la.predict(batch, prior_precision=tried) for batch in loader]
            for name, loader in cell.tests.items()
        }
        seconds = round(time.process_time() - start, 1)
        found = {}
        for place, (how, value) in enumerate(chosen.items()):
            predictions = {
                test: Predictions(torch.cat([each[place] for each in parts]))
                for test, parts in answers.items()
            }
            found[f"{name}, {how}"] = kept(predictions, prior_precision=value, cpu_seconds=seconds)
        return found

    return run


def _held_out(cell: Cell) -> HeldOut:
    return HeldOut(cell.case.known_held_out)


def _without_heads(name: str) -> bool:
    return "modules_to_save" not in name


@dataclass(frozen=True)
class Reshuffled:
    """A cell's training batches in another order each time, as its own training saw them."""

    cell: Cell

    def __iter__(self) -> Iterator[Batch]:
        rows = list(self.cell.data.train)
        order = torch.randperm(len(rows)).tolist()
        yield from self.cell.batches([rows[i] for i in order], self.cell.subject.batch_size)


def blob(cell: Cell) -> Baseline:
    """Trained as long as the subject and at its rate; the rest as in the paper."""
    subject = cell.subject
    return BLoB(lambda seed: subject.adapted(seed)[0], epochs=cell.epoch, learning_rate=subject.learning_rate)


GROUPS: dict[str, Callable[[Cell], Found]] = {
    "MAP": baseline("MAP", lambda cell: MAP()),
    "temperature": temperature("temperature, held-out", lambda cell: Temperature()),
    "cross-fitted temperature": temperature(
        "temperature, cross-fitted",
        lambda cell: CrossFittedTemperature(
            cell.fold_model, cell.data.train, cell.batches, folds=FOLDS, seed=cell.seed
        ),
    ),
    "rows": posterior(
        "exact rows",
        {"held-out": _held_out, "cross-fitted": Cell.cross_fit, "evidence": lambda cell: Evidence()},
        structure=Rows(),
    ),
    "refit": posterior(
        "refit",
        {
            "leave-one-out": lambda cell: LeaveOneOut(),
            "cross-fitted": Cell.cross_fit,
            "held-out": _held_out,
        },
        structure=Rows(refit=True),
    ),
    "refit, evidence": posterior("refit", {"evidence": lambda cell: Evidence()}, structure=Rows(refit=True)),
    "rows without heads": posterior(
        "exact rows without heads", {"held-out": _held_out}, structure=Rows(), layers=_without_heads
    ),
    "last layer": posterior("last layer", {"held-out": _held_out}, structure=Rows(), layers="last"),
    "kfac": posterior("KFAC", {"held-out": _held_out}, structure=KFAC()),
    "kfac, paper": posterior(
        "KFAC, the paper's",
        {"held-out": _held_out, "evidence": lambda cell: Evidence()},
        structure=KFAC(tokens="paper"),
    ),
    "diagonal": posterior("diagonal", {"held-out": _held_out}, structure=Diagonal()),
    "checkpoints": baseline(
        "checkpoint ensemble",
        lambda cell: Ensemble([cell.model(back=back) for back in range(1, min(KEPT, cell.epoch))]),
    ),
    "ensemble": baseline(
        "deep ensemble", lambda cell: Ensemble([cell.model(f"member{k + 1}") for k in range(MEMBERS)])
    ),
    "dropout": baseline("MC dropout", lambda cell: MCDropout()),
    "blob": baseline("BLoB", blob, lambda cell: replace(cell.case, train=Reshuffled(cell))),
    "training-free": baseline("training-free", lambda cell: TrainingFree()),
}

# Those of them that need models without a fold.
FOLDED = {"cross-fitted temperature", "rows", "refit"}
