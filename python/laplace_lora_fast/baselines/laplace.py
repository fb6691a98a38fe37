"""Laplace posteriors as baselines: any structure, layers and way of tuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from laplace_lora_fast.baselines.base import Baseline, Case, Predict
from laplace_lora_fast.laplace import LaplaceLoRA
from laplace_lora_fast.model.observer import Layers
from laplace_lora_fast.prior.held_out import HeldOut
from laplace_lora_fast.prior.tuning import Tuning
from laplace_lora_fast.structures import Structure


@dataclass(frozen=True)
class Laplace(Baseline):
    """A Laplace posterior: `Laplace(KFAC())`, `Laplace(Diagonal())`, `Laplace(layers="last")` and so on.

    Args:
        structure: as for `LaplaceLoRA`; the paper's (Yang et al. 2024) is `KFAC(tokens="paper")`.
        layers: as for `LaplaceLoRA`: "last" for the last layer alone (Kristiadi, Hein and Hennig 2020).
        tuning: of the prior precision; None for `HeldOut` on the case's held-out batches.
    """

    structure: Structure | str = "rows"
    layers: Layers = None
    tuning: Tuning | None = None

    @property
    def needs_held_out(self) -> bool:  # type: ignore[override]
        return self.tuning is None

    def fit(self, case: Case) -> Predict:
        la = LaplaceLoRA(case.model, case.task, structure=self.structure, layers=self.layers, seed=case.seed)
        la.fit(case.train, progress=False)
        tuning = HeldOut(case.known_held_out) if self.tuning is None else self.tuning
        la.optimize_prior_precision(tuning, progress=False)
        return partial(la.predictions, progress=False)  # type: ignore[return-value]
