"""The methods of the table on one trained adapter. Ensembles share one base model: adapters are put in one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.protocols.config import Methods
from bench.protocols.train import restore
from laplace_lora_fast import KFAC, Answers, Evidence, HeldOut, LaplaceLoRA, Rows
from laplace_lora_fast.baselines import MAP, Baseline, Case, MCDropout, Temperature
from laplace_lora_fast.baselines.base import averaged, logits
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.evaluation.predictions import Predictions

Loader = Sequence[dict[str, Tensor]]
# The evidence of a refit takes dozens of factorisations of a matrix with that many rows.
MOST_REFIT_ROWS = 2000


class NotHereError(Exception):
    """A protocol has not what a method needs; says what."""


@dataclass(frozen=True)
class Trained:
    """What methods are given.

    Attributes:
        model: with the adapter in question in it.
        task: of the answers.
        train: batches that were trained on.
        held_out: batches to tune by, or None.
        tests: batches by the name of their set.
        checkpoints: of the training, the last one last.
        members: the ends of other trainings.
        methods: of the configuration.
        seed: of the training.
    """

    model: nn.Module
    task: Answers
    train: Loader
    held_out: Loader | None
    tests: Mapping[str, Loader]
    checkpoints: Sequence[Path]
    members: Sequence[Path]
    methods: Methods
    seed: int

    @property
    def case(self) -> Case:
        """For the baselines of the package."""
        return Case(self.model, self.task, self.train, self.held_out, self.seed)


@dataclass(frozen=True)
class Answer:
    """What a method says of each test set, and what it cost.

    Attributes:
        predictions: by the name of the set.
        facts: seconds, memory, the prior precision.
    """

    predictions: dict[str, Predictions]
    facts: dict[str, Any]


def _metered(model: nn.Module, work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """A result, its seconds, and on a GPU the peak of allocated and reserved bytes."""
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    facts: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.synchronize()
        facts = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return result, {"seconds": round(time.perf_counter() - start, 2)} | facts


def _baseline(made: Callable[[Trained], Baseline]) -> Callable[[Trained], Answer]:
    def run(trained: Trained) -> Answer:
        if made(trained).needs_held_out and trained.held_out is None:
            raise NotHereError("no rows are held out: --held-out")
        predict, fit = _metered(trained.model, lambda: made(trained).fit(trained.case))
        found, cost = _metered(trained.model, lambda: {n: predict(each) for n, each in trained.tests.items()})
        return Answer(found, {"fit": fit, "predict": cost})

    return run


def _members(files: Callable[[Trained], Sequence[Path]]) -> Callable[[Trained], Answer]:
    """The mean of the probabilities of several adapters."""

    def run(trained: Trained) -> Answer:
        chosen = files(trained)
        if len(chosen) < 2:
            raise NotHereError(f"an ensemble needs two adapters or more, there is {len(chosen)}")

        def each(loader: Loader) -> Iterator[tuple[Tensor, Tensor | None]]:
            for file in chosen:
                yield logits(restore(trained.model, file), trained.task, loader)

        try:
            found, cost = _metered(
                trained.model,
                lambda: {name: averaged(each(loader)) for name, loader in trained.tests.items()},
            )
        finally:
            restore(trained.model, trained.checkpoints[-1])
        return Answer(found, {"predict": cost, "members": len(chosen)})

    return run


def _posterior(published: bool, refit: bool = False, **options: Any) -> Callable[[Trained], Answer]:
    """A Laplace posterior: tuned by held-out rows where there are any, else by the evidence."""

    def run(trained: Trained) -> Answer:
        n_rows = sum(len(batch["labels"]) for batch in trained.train) * (len(trained.task.token_ids) - 1)
        if refit and n_rows > MOST_REFIT_ROWS:
            raise NotHereError(f"refitting {n_rows:,} rows takes too long")
        la = LaplaceLoRA(trained.model, trained.task, seed=trained.seed, **options)

        def fit() -> None:
            la.fit(trained.train, progress=False)
            tuning = Evidence() if trained.held_out is None else HeldOut(trained.held_out)
            la.optimize_prior_precision(tuning, progress=False)

        link: dict[str, Any] = {"link_approx": "probit"}
        if published:
            link = {"link_approx": "mc", "n_samples": trained.methods.link_samples}

        def predict(loader: Loader) -> Predictions:
            probs = [la.predict(batch, **link).cpu() for batch in loader]
            return Predictions(torch.cat(probs), torch.cat([batch["labels"] for batch in loader]))

        _, fitted = _metered(trained.model, fit)
        found, cost = _metered(trained.model, lambda: {n: predict(each) for n, each in trained.tests.items()})
        structure = repr(la.snapshot()[0].structure)
        facts = {
            "fit": fitted,
            "predict": cost,
            "structure": structure,
            "prior_precision": la.prior_precision,
        }
        return Answer(found, facts)

    return run


# As the paper's tables have them, and behind them ours. Its Laplace rows: KFAC as its code sums over tokens, the prior
# precision by the evidence of all rows or by held-out ones, and a softmax averaged over samples.
METHODS: dict[str, Callable[[Trained], Answer]] = {
    "MAP": _baseline(lambda trained: MAP()),
    "MC Drop": _baseline(lambda trained: MCDropout(trained.methods.dropout_samples)),
    "Ckpt Ens": _members(lambda trained: trained.checkpoints),
    "Ensemble": _members(lambda trained: [trained.checkpoints[-1], *trained.members]),
    "Temp": _baseline(lambda trained: Temperature()),
    "LLLA": _posterior(True, structure=KFAC(tokens="paper"), layers="last"),
    "LA": _posterior(True, structure=KFAC(tokens="paper")),
    "ours": _posterior(False),
    "ours, refit": _posterior(False, refit=True, structure=Rows(refit=True)),
}
