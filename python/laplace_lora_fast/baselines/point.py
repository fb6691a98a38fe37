"""The trained model itself, and with one temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from laplace_lora_fast.baselines.base import Baseline, Case, Predict, logits
from laplace_lora_fast.evaluation.metrics import cross_fitted_temperature, temperature_scale
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.prior.cross_fit import Train


def _scaled(case: Case, temperature: float) -> Predict:
    def predict(loader: Loader) -> Predictions:
        found, labels = logits(case.model, case.task, loader)
        return Predictions((found / temperature).softmax(1), labels)

    return predict


@dataclass(frozen=True)
class MAP(Baseline):
    """The trained model's own probabilities."""

    def fit(self, case: Case) -> Predict:
        return _scaled(case, 1.0)


@dataclass(frozen=True)
class Temperature(Baseline):
    """One temperature by held-out NLL (Guo et al. 2017)."""

    needs_held_out = True

    def fit(self, case: Case) -> Predict:
        found, labels = logits(case.model, case.task, case.known_held_out)
        if labels is None:
            raise ValueError("a temperature needs 'labels' in every held-out batch")
        return _scaled(case, temperature_scale(found, labels))


@dataclass(frozen=True)
class CrossFittedTemperature(Baseline):
    """One temperature by the NLL of folds that were trained without: no held-out data.

    Args:
        train: as for `CrossFit`.
        data: likewise.
        batches: likewise.
        folds: likewise.
        seed: likewise.
    """

    train: Train = field(repr=False)
    data: Sequence[Any] = field(repr=False)
    batches: Callable[[list[Any]], Loader] | None = field(default=None, repr=False)
    folds: int = 4
    seed: int = 0

    def fit(self, case: Case) -> Predict:
        def predict(model: Any, rows: list[Any]) -> Any:
            loader = rows if self.batches is None else self.batches(rows)
            found, labels = logits(model, case.task, loader)
            if labels is None:
                raise ValueError("a temperature needs 'labels' in every batch")
            return found, labels

        temperature = cross_fitted_temperature(self.train, self.data, predict, self.folds, self.seed)
        return _scaled(case, temperature)
