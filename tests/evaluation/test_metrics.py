from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.evaluation.metrics import score_regression, temperature_scale
from laplace_lora_fast.evaluation.predictions import Predictions, RegressionPredictions


def ece_by_hand(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Loops over bins (i / bins, (i + 1) / bins], in exact fractions (Guo et al. 2017)."""
    total = Fraction(0)
    correct = probs.argmax(1) == labels
    for i in range(bins):
        inside = [n for n, p in enumerate(probs) if float(i / bins) < p.max() <= float((i + 1) / bins)]
        if inside:
            confidence = sum(Fraction(probs[n].max()) for n in inside)
            total += abs(confidence - int(correct[inside].sum()))
    return float(total / len(labels))


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
    assert got.ece == pytest.approx(ece_by_hand(p, y), abs=1e-12)
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


def two_classes(
    confidence: list[float], correct: list[int], dtype: torch.dtype = torch.float64
) -> Predictions:
    """The first class has that confidence; the label is it where correct."""
    of_first = torch.tensor(confidence, dtype=dtype)
    return Predictions(torch.stack([of_first, 1 - of_first], 1), 1 - torch.tensor(correct))


@pytest.mark.parametrize("place", range(8, 16))
def test_an_edge_belongs_to_the_bin_below_it(place):
    """Place / 15, right, with one just below it, wrong; one just above it stands alone."""
    edge = place / 15
    together = two_classes([edge, edge - 1e-9], [1, 0])
    assert together.metrics().ece == pytest.approx(abs(edge - 0.5), abs=1e-8)
    if place < 15:
        apart = two_classes([edge, edge + 1e-9], [1, 0])
        assert apart.metrics().ece == pytest.approx((1 - edge + edge) / 2, abs=1e-8)


@pytest.mark.parametrize("classes", [3, 5, 15])
def test_a_uniform_confidence_lies_on_an_edge(classes):
    probs = torch.full((40, classes), 1 / classes, dtype=torch.float64)
    labels = torch.arange(40) % classes
    above = torch.tensor([1 / classes + 1e-9, *[(1 - 1 / classes - 1e-9) / (classes - 1)] * (classes - 1)])
    predictions = Predictions(
        torch.cat([probs, above[None].double()]), torch.cat([labels, torch.tensor([0])])
    )
    p, y = predictions.probs.numpy(), predictions.labels.numpy()
    wrong = abs((y[:40] == 0).mean() - 1 / classes) * 40
    assert predictions.metrics().ece == pytest.approx((wrong + 1 - 1 / classes) / 41, abs=1e-6)
    assert predictions.metrics().ece == pytest.approx(ece_by_hand(p, y), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [10, 15, 30])
def test_confidences_of_few_digits(dtype, steps):
    generator = torch.Generator().manual_seed(steps)
    numerators = torch.randint((steps + 1) // 2, steps + 1, (300,), generator=generator)
    correct = torch.randint(0, 2, (300,), generator=generator).tolist()
    got = two_classes([n / steps for n in numerators.tolist()], correct, dtype)
    assert got.metrics().ece == pytest.approx(ece_by_hand(got.probs.numpy(), got.labels.numpy()), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_probabilities_are_scored(dtype):
    logits = 8 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(1))
    got = Predictions(logits.to(dtype).softmax(1), labels)
    assert got.metrics().ece == pytest.approx(ece_by_hand(got.probs.numpy(), labels.numpy()), abs=1e-12)


def test_certainty_is_right_or_wrong():
    labels = torch.arange(9) % 3
    assert Predictions(torch.eye(3)[labels], labels).metrics().ece == 0
    assert Predictions(torch.eye(3)[(labels + 1) % 3], labels).metrics().ece == 1


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_off_the_edges_it_is_torchmetrics(classes):
    probs, labels = draw(500, classes, 2.0, classes)
    expected = multiclass_calibration_error(probs, labels, num_classes=classes, n_bins=15, norm="l1")
    assert Predictions(probs, labels).metrics().ece == pytest.approx(expected.item(), abs=1e-6)


def test_scores_need_labels():
    with pytest.raises(ValueError, match="no labels"):
        Predictions(torch.tensor([[0.5, 0.5]])).metrics()
    with pytest.raises(ValueError, match="no labels"):
        RegressionPredictions(torch.zeros(2, 1), torch.ones(2, 1)).metrics()


def test_regression_scores_equal_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, labels = torch.randn(2, 400, 2, generator=generator, dtype=torch.float64)
    variance = torch.rand(400, 2, generator=generator, dtype=torch.float64) + 0.1
    got = score_regression(RegressionPredictions(mean, variance, labels))
    normal = torch.distributions.Normal(mean, variance.sqrt())
    assert got.nll == pytest.approx(-normal.log_prob(labels).sum(1).mean().item())
    assert got.rmse == pytest.approx(((labels - mean) ** 2).mean().sqrt().item())
    share = normal.cdf(labels)
    for inside, coverage in ((got.coverage_68, 0.6826894921), (got.coverage_95, 0.95)):
        tail = (1 - coverage) / 2
        assert inside == ((share >= tail) & (share <= 1 - tail)).double().mean().item()
    assert got.count == 400
    with pytest.raises(ValueError, match=r"\[N, C\]"):
        RegressionPredictions(mean, variance[:, 0], labels)


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
