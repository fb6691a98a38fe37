"""Bootstrap intervals: against the normal approximation, and by how often they cover."""

from __future__ import annotations

import pytest
import torch

from laplace_lora_fast.evaluation.intervals import difference, interval, of_means
from laplace_lora_fast.evaluation.predictions import Predictions
from tests.evaluation.test_metrics import draw


def accuracy(predictions: Predictions) -> float:
    return predictions.metrics().accuracy


def nll(predictions: Predictions) -> float:
    return predictions.metrics().nll


def test_a_mean_has_the_interval_of_its_standard_error():
    probs, labels = draw(400, 3, 1.0, 0)
    predictions = Predictions(probs, labels)
    losses = -probs.gather(1, labels[:, None]).log()[:, 0]
    found = interval(predictions, nll)
    half = 1.96 * float(losses.std()) / 20
    assert found.value == pytest.approx(float(losses.mean()))
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)
    assert found == interval(predictions, nll)  # seeded


def test_a_paired_difference_is_narrower_and_needs_the_same_examples():
    probs, labels = draw(300, 2, 1.0, 1)
    first, second = Predictions(probs, labels), Predictions(0.9 * probs + 0.05, labels)
    paired = difference(first, second, nll)
    apart = interval(first, nll)
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)
    assert paired.value == pytest.approx(nll(first) - nll(second))
    assert difference(first, first, nll, resamples=20).excludes_zero is False
    with pytest.raises(ValueError, match="same examples"):
        difference(first, Predictions(probs, 1 - labels), accuracy)


def test_intervals_cover_as_often_as_they_say():
    truth, covered = 0.7, 0
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        labels = (torch.rand(100, generator=generator) < truth).long()
        found = of_means([labels.double()], resamples=400, seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seeds_are_drawn_too():
    """Groups that differ make the interval as wide as their means are spread."""
    apart = [torch.full((500,), float(k)) for k in range(5)]
    found = of_means(apart)
    assert found.value == 2.0
    assert found.high - found.low > 1.5
    alike = of_means([torch.randn(500, generator=torch.Generator().manual_seed(k)) for k in range(5)])
    assert alike.high - alike.low < 0.3
    with pytest.raises(ValueError, match="group"):
        of_means([])
