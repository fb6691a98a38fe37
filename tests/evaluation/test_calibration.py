"""Calibration errors and separation, against torchmetrics and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_calibration_error,
    binary_specificity_at_sensitivity,
)

from laplace_lora_fast.evaluation.calibration import (
    adaptive_ece,
    auroc,
    calibration,
    class_wise_ece,
    fpr_at_tpr,
    smooth_ece,
)
from laplace_lora_fast.evaluation.predictions import Predictions
from tests.evaluation.test_metrics import draw


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 200), st.integers(2, 5), st.sampled_from([0.3, 3.0]), st.integers(0, 1000))
def test_the_parts_of_the_brier_score_add_up_to_it(n, classes, scale, seed):
    predictions = Predictions(*draw(n, classes, scale, seed))
    found = calibration(predictions)
    assert found.brier == pytest.approx(predictions.metrics().brier, abs=1e-12)
    assert min(found.reliability, found.resolution, found.uncertainty) >= 0


def test_the_parts_of_a_worked_example():
    """Two bins: 0.2 stated and a half true, 0.8 stated and three quarters true."""
    p = torch.tensor([0.2, 0.2, 0.8, 0.8, 0.8, 0.8], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 1, 1, 0])
    found = calibration(Predictions(torch.stack([1 - p, p], 1), labels))
    rate = 4 / 6
    assert found.reliability == pytest.approx(2 * (2 * 0.3**2 + 4 * 0.05**2) / 6)
    assert found.resolution == pytest.approx(2 * (2 * (0.5 - rate) ** 2 + 4 * (0.75 - rate) ** 2) / 6)
    assert found.uncertainty == pytest.approx(2 * rate * (1 - rate))
    assert found.within == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(5, 200), st.integers(2, 5), st.integers(0, 1000))
def test_class_wise_is_torchmetrics_class_by_class(n, classes, seed):
    probs, labels = draw(n, classes, 1.0, seed)
    expected = [
        float(binary_calibration_error(probs[:, c], (labels == c).long(), n_bins=15)) for c in range(classes)
    ]
    assert class_wise_ece(Predictions(probs, labels)) == pytest.approx(np.mean(expected), abs=1e-6)


def test_adaptive_bins_hold_equally_many():
    probs, labels = draw(31, 3, 2.0, 4)
    predictions = Predictions(probs, labels)
    order = np.argsort(predictions.confidence.numpy(), kind="stable")
    total = 0.0
    for group in np.array_split(order, 15):
        gap = predictions.confidence.numpy()[group] - predictions.correct.numpy()[group]
        total += abs(gap.mean()) * len(group) / 31
    assert adaptive_ece(predictions) == pytest.approx(total, abs=1e-12)
    few = Predictions(probs[:4], labels[:4])
    assert adaptive_ece(few) == pytest.approx(float((few.confidence - few.correct.double()).abs().mean()))


def integral(confidence: np.ndarray, outcome: np.ndarray, width: float) -> float:
    """Of |r| by a fine sum, the reflected kernel written out as a folded density."""
    t = (np.arange(20000) + 0.5) / 20000
    r = np.zeros_like(t)
    for f, y in zip(confidence, outcome, strict=True):
        density = sum(
            np.exp(-0.5 * ((t - sign * f - 2 * k) / width) ** 2) for k in range(-6, 7) for sign in (1, -1)
        )
        r += (y - f) * density / (width * np.sqrt(2 * np.pi)) / len(confidence)
    return float(np.abs(r).mean())


@pytest.mark.parametrize("seed", range(4))
def test_smooth_ece_is_the_fixed_point(seed):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(40, generator=generator, dtype=torch.float64)
    outcome = (torch.rand(40, generator=generator) < confidence**2).double()
    found = smooth_ece(confidence, outcome)
    assert integral(confidence.numpy(), outcome.numpy(), found) == pytest.approx(found, abs=3e-4)


def test_smooth_ece_at_its_ends():
    half = torch.full((1000,), 0.5, dtype=torch.float64)
    assert smooth_ece(half, torch.arange(1000).double() % 2) < 1e-3
    always = torch.ones(50, dtype=torch.float64)
    assert smooth_ece(always, torch.zeros(50, dtype=torch.float64)) > 0.8


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([3, 1000]), st.integers(0, 1000))
def test_separation_is_torchmetrics(negatives, positives, levels, seed):
    """With many ties, and with hardly any."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(levels, (negatives,), generator=generator) / levels
    high = torch.randint(levels, (positives,), generator=generator) / levels
    scores, kinds = torch.cat([low, high]), torch.cat([torch.zeros(negatives), torch.ones(positives)]).long()
    assert auroc(low, high) == pytest.approx(float(binary_auroc(scores, kinds)), abs=1e-6)
    specificity, _ = binary_specificity_at_sensitivity(scores, kinds, min_sensitivity=0.95)
    assert fpr_at_tpr(low, high) == pytest.approx(1 - float(specificity), abs=1e-6)


def test_separation_needs_both_kinds():
    with pytest.raises(ValueError, match="both kinds"):
        auroc(torch.zeros(0), torch.ones(2))
    with pytest.raises(ValueError, match="tpr"):
        fpr_at_tpr(torch.ones(2), torch.ones(2), tpr=0.0)
