from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.evaluate import Predictions, temperature_scale


def ece_by_hand(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Loops over bins [i / bins, (i + 1) / bins), the last one closed."""
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    total = 0.0
    for i in range(bins):
        inside = (confidence >= i / bins) & ((confidence < (i + 1) / bins) | (i == bins - 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return total


def draw(n: int, classes: int, scale: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(1), torch.randint(0, classes, (n,), generator=generator)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(2, 6), st.sampled_from([0.1, 1.0, 8.0]), st.integers(0, 1000))
def test_metrics_equal_numpy(n, classes, scale, seed):
    probs, labels = draw(n, classes, scale, seed)
    got = Predictions(probs, labels).metrics()
    p, y = probs.numpy(), labels.numpy()
    assert got.accuracy == pytest.approx((p.argmax(1) == y).mean())
    assert got.nll == pytest.approx(-np.log(p[np.arange(n), y]).mean())
    assert got.brier == pytest.approx(((p - np.eye(classes)[y]) ** 2).sum(1).mean())
    assert got.ece == pytest.approx(ece_by_hand(p, y), abs=1e-6)
    assert got.count == n


def test_metrics_of_a_worked_example():
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    got = Predictions(probs, torch.tensor([0, 1, 1, 1])).metrics()
    assert got.accuracy == 0.75
    assert got.nll == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.7) + math.log(0.55)) / 4)
    assert got.brier == pytest.approx(2 * (0.1**2 + 0.8**2 + 0.3**2 + 0.45**2) / 4)
    assert got.ece == pytest.approx((0.1 + 0.8 + 0.3 + 0.45) / 4)  # each in a bin of its own


def test_full_confidence_shares_the_last_bin():
    """0.95 wrong and 1.0 right lie in one bin: |mean confidence - accuracy| = 0.975 - 0.5, not 0.95 / 2 + 0."""
    got = Predictions(torch.tensor([[1.0, 0.0], [0.95, 0.05]]), torch.tensor([0, 1])).metrics()
    assert got.ece == pytest.approx(0.475, abs=1e-6)


def test_a_wrong_certainty_costs_infinitely():
    assert Predictions(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).metrics().nll == math.inf


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([[0.5, 0.5], [math.nan, 0.5]], [0, 1], "not finite: row 1"),
        ([[0.5, 0.5], [math.inf, 0.5]], [0, 1], "not finite: row 1"),
        ([[1.2, -0.2]], [0], "negative value: row 0"),
        ([[0.5, 0.5], [0.5, 0.5], [0.5, 0.4]], [0, 1, 0], "sum to one: row 2"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], r"\[0, 2\): row 1"),
        ([[0.5, 0.5]], [-1], r"\[0, 2\): row 0"),
        ([[0.5, 0.5]], [0, 1], "1 class indices"),
        ([[0.5, 0.5]], [0.0], "class indices"),
        ([[1.0]], [0], "C >= 2"),
        ([0.5, 0.5], [0], r"\[N, C\]"),
    ],
)
def test_bad_predictions_are_refused(probs, labels, message):
    with pytest.raises(ValueError, match=message):
        Predictions(torch.tensor(probs), torch.tensor(labels))


def test_no_predictions_are_refused():
    with pytest.raises(ValueError, match="N >= 1"):
        Predictions(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


def test_low_precision_rows_are_accepted():
    probs, labels = draw(50, 5, 2.0, 0)
    low = Predictions(probs.to(torch.float16), labels).metrics()
    assert low.nll == pytest.approx(Predictions(probs, labels).metrics().nll, rel=1e-2)


@settings(deadline=None, max_examples=40)
@given(st.integers(20, 200), st.integers(2, 5), st.floats(-6, 6), st.integers(0, 1000))
def test_temperature_has_zero_gradient_and_scales_with_the_logits(n, classes, log_scale, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    labels[0] = 0
    unit = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    unit = unit + 1.5 * torch.nn.functional.one_hot(labels, classes)
    unit[0, 1] = unit[0, 0] + 1  # one mistake at least: an optimum exists
    logits = math.exp(log_scale) * unit
    t = temperature_scale(logits, labels)
    p = (logits / t).softmax(1).numpy()
    # d NLL / d (1 / T) = E_p[f] - f_y, on the scale of f
    slope = ((p * unit.numpy()).sum(1) - unit.numpy()[np.arange(n), labels.numpy()]).mean()
    assert abs(slope) < 1e-7
    assert temperature_scale(unit, labels) * math.exp(log_scale) == pytest.approx(t, rel=1e-6)


def test_temperature_of_two_margins():
    """Right by m three times in four: the best probability is 3 / 4, so T = m / log 3."""
    logits = torch.tensor([[7.0, 0.0]] * 4)
    assert temperature_scale(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(7 / math.log(3), rel=1e-9)


def test_log_probabilities_do_as_logits():
    logits = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = (logits + 1.5 * torch.randn(60, 3, generator=torch.Generator().manual_seed(1))).argmax(1)
    expected = temperature_scale(logits, labels)
    assert temperature_scale(logits.log_softmax(1), labels) == pytest.approx(expected, rel=1e-9)


def test_a_temperature_without_optimum_is_refused():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    with pytest.raises(NumericalError, match="largest logit"):
        temperature_scale(logits, torch.tensor([0, 1]))
    with pytest.raises(NumericalError, match="do not favour"):
        temperature_scale(logits, torch.tensor([1, 0]))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0.0, math.nan]], [0], "not finite: row 0"),
        ([[0.0, 1.0]], [2], r"\[0, 2\)"),
        ([0.0, 1.0], [0], r"\[N, C\]"),
        ([[0.0, 1.0]], [0, 1], "class indices"),
    ],
)
def test_bad_logits_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        temperature_scale(torch.tensor(logits), torch.tensor(labels))
