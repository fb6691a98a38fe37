"""Probabilities of the plain adapter and of what is made of it, by test set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.answers.models import Batches
from laplace_lora_fast import Evidence, HeldOut, LaplaceLoRA, LeaveOneOut, Rows
from laplace_lora_fast.evaluation.metrics import temperature_scale
from laplace_lora_fast.evaluation.predictions import Predictions

COLUMNS = 64
MAP, TEMPERATURE = "MAP", "temperature (held-out)"
LEFT_OUT = "refit, leave-one-out (no held-out data)"
VALIDATED = "refit, validated (held-out)"
CENTRED = "centred, validated (held-out)"
EVIDENCE = "refit, evidence (no held-out data)"


def compared(
    model: nn.Module, task: Any, train: Batches, held_out: Batches, tests: Mapping[str, Batches]
) -> tuple[dict[str, Any], LaplaceLoRA]:
    """What each method answers and chose, and the posterior, tuned without held-out data."""
    start = time.process_time()
    la = LaplaceLoRA(model, task, structure=Rows(columns=COLUMNS, refit=True)).fit(train, progress=False)
    seconds = {"fit": time.process_time() - start}
    start = time.process_time()
    chosen = {
        EVIDENCE: la.optimize_prior_precision(Evidence(), progress=False),
        VALIDATED: la.optimize_prior_precision(HeldOut(held_out), progress=False),
        LEFT_OUT: la.optimize_prior_precision(LeaveOneOut(), progress=False),
    }
    seconds["tune"] = time.process_time() - start
    start = time.process_time()
    of_held_out = _plain(la, held_out)
    temperature = temperature_scale(of_held_out.probs.clamp_min(1e-30).log(), of_held_out.known_labels)
    found: dict[str, Any] = {"labels": {}, "probs": {}}
    for name, batches in tests.items():
        plain = _plain(la, batches)
        parts = [la.predict(batch, prior_precision=list(chosen.values())) for batch in batches]
        width = plain.probs.shape[1]
        posterior = torch.cat([nn.functional.pad(part, (0, width - part.shape[2])) for part in parts], 1)
        probs = {MAP: plain.probs, TEMPERATURE: (plain.probs.log() / temperature).softmax(1)}
        probs |= dict(zip(chosen, posterior, strict=True))
        found["labels"][name] = plain.known_labels.tolist()
        found["probs"][name] = {method: _rounded(each) for method, each in probs.items()}
    seconds["predict"] = time.process_time() - start
    found["chosen"] = {TEMPERATURE: float(temperature)} | {name: float(p) for name, p in chosen.items()}
    found["cpu_seconds"] = seconds
    return found, la


def compared_centred(
    model: nn.Module, task: Any, train: Batches, held_out: Batches, tests: Mapping[str, Batches]
) -> tuple[dict[str, Any], LaplaceLoRA]:
    """The same of the posterior around the trained adapter, its precision by held-out data."""
    la = LaplaceLoRA(model, task, structure=Rows(columns=COLUMNS)).fit(train, progress=False)
    chosen = {CENTRED: float(la.optimize_prior_precision(HeldOut(held_out), progress=False))}
    probs = {}
    for name, batches in tests.items():
        found = la.predictions(batches, progress=False)
        assert isinstance(found, Predictions)
        probs[name] = {CENTRED: _rounded(found.probs)}
    return {"chosen": chosen, "probs": probs}, la


def _plain(la: LaplaceLoRA, batches: Batches) -> Predictions:
    found = la.predictions(batches, link_approx="map", progress=False)
    assert isinstance(found, Predictions)
    return found


def _rounded(probs: Tensor) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in row] for row in probs.tolist()]
