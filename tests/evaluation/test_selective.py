"""Abstention and conformal sets against definitions by loops, and the coverage that is promised by simulation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.evaluation.selective import abstention_curve, conformal_sets, ood_score


def drawn(n: int, classes: int = 4, seed: int = 0, sharpness: float = 2.0) -> Predictions:
    """Calibrated: labels are drawn from the probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    probs = logits.softmax(1)
    return Predictions(probs, torch.multinomial(probs, 1, generator=generator)[:, 0])


def test_the_curve_is_that_of_a_loop() -> None:
    predictions = drawn(200)
    curve = abstention_curve(predictions)
    unsure = 1 - predictions.probs.amax(1)
    wrong = (predictions.probs.argmax(1) != predictions.labels).double()
    for place in (0, 20, 199):
        answered = unsure <= curve.threshold[place]
        assert float(curve.coverage[place]) == pytest.approx(float(answered.double().mean()))
        assert float(curve.risk[place]) == pytest.approx(float(wrong[answered].mean()))
    assert curve.area == pytest.approx(float(curve.risk.mean()))  # no two alike
    assert curve.risk_at(1.0) == pytest.approx(float(wrong.mean()))
    half = unsure <= unsure.sort().values[99]
    assert curve.risk_at(0.5) == pytest.approx(float(wrong[half].mean()))
    assert curve.threshold_at(0.5) == float(unsure.sort().values[99])
    assert curve.risk_at(0.2) < curve.risk_at(1.0)
    best = curve.coverage_at(0.1)
    assert best == max(float(c) for c, r in zip(curve.coverage, curve.risk, strict=True) if r <= 0.1)
    assert curve.coverage_at(-1.0) == 0


def test_examples_alike_are_answered_together() -> None:
    probs = torch.tensor([[0.9, 0.1]] * 3 + [[0.6, 0.4]])
    curve = abstention_curve(Predictions(probs, torch.tensor([0, 1, 0, 0])))
    assert curve.coverage.tolist() == [0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([1 / 3, 1 / 4])
    assert curve.area == pytest.approx(0.75 / 3 + 0.25 / 4)


def test_scores_of_ones_own_decide_the_order() -> None:
    predictions = drawn(50)
    wrong = (~predictions.correct).double()
    oracle, anti = abstention_curve(predictions, wrong), abstention_curve(predictions, -wrong)
    assert oracle.risk[0] == 0
    assert oracle.coverage_at(0) == pytest.approx(float(1 - wrong.mean()))
    assert anti.risk[0] == 1
    assert oracle.area < abstention_curve(predictions).area < anti.area


def test_ood_scores() -> None:
    predictions = Predictions(torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.05, 0.05]], dtype=torch.float64))
    assert ood_score(predictions, "confidence").tolist() == pytest.approx([0.5, 0.1])
    expected = [math.log(2), -0.9 * math.log(0.9) - 0.1 * math.log(0.05)]
    assert ood_score(predictions).tolist() == pytest.approx(expected)


def by_loop(probs: Tensor, method: str) -> list[list[float]]:
    """Scores of every class."""
    if method == "threshold":
        return [[1 - float(p) for p in row] for row in probs]
    return [[sum(float(q) for q in row if q > p) for p in row] for row in probs]


@pytest.mark.parametrize("method", ["threshold", "adaptive"])
def test_sets_are_those_of_a_loop(method: str) -> None:
    calibration, new = drawn(39, seed=1), drawn(20, seed=2)
    sets = conformal_sets(calibration, new, 0.2, method)
    assert calibration.labels is not None
    own = sorted(s[y] for s, y in zip(by_loop(calibration.probs, method), calibration.labels, strict=True))
    quantile = own[math.ceil(40 * 0.8) - 1]
    assert sets.threshold == pytest.approx(quantile)
    expected = [[s <= quantile + 1e-12 for s in row] for row in by_loop(new.probs, method)]
    assert sets.members.tolist() == expected
    assert sets.size.tolist() == [sum(row) for row in expected]
    if method == "adaptive":
        assert (sets.size >= 1).all()


@pytest.mark.parametrize("method", ["threshold", "adaptive"])
@pytest.mark.parametrize("overconfident", [1.0, 4.0])
def test_coverage_holds_whatever_the_model(method: str, overconfident: float) -> None:
    """Over 300 draws of 50 calibration examples; the mean is within 1 - alpha and what ties and rounding add."""
    covered = []
    for seed in range(300):
        truth = drawn(150, seed=seed)
        claimed = (truth.probs.log() * overconfident).softmax(1)
        calibration = Predictions(claimed[:50], truth.labels[:50])
        covered.append(
            conformal_sets(calibration, Predictions(claimed[50:], truth.labels[50:]), 0.1, method).coverage
        )
    mean = sum(covered) / len(covered)
    assert mean > 0.9 - 0.01
    if method == "threshold":
        assert mean < 0.9 + 1 / 51 + 0.01


def test_few_calibration_examples_and_options_that_are_not_there() -> None:
    ragged = Predictions(torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.3, 0.5]]))
    sets = conformal_sets(drawn(8, 3), ragged, 0.1)
    assert sets.threshold == math.inf
    assert sets.members.tolist() == [[True, True, False], [True, True, True]]
    assert conformal_sets(drawn(9, 3), ragged, 0.1).threshold < math.inf
    with pytest.raises(ValueError, match="no labels to judge by"):
        _ = sets.coverage


def test_what_is_refused() -> None:
    predictions = drawn(10)
    unlabelled = Predictions(predictions.probs)
    with pytest.raises(ValueError, match="no labels"):
        abstention_curve(unlabelled)
    with pytest.raises(ValueError, match="no labels"):
        conformal_sets(unlabelled, predictions)
    with pytest.raises(ValueError, match="alpha must lie in"):
        conformal_sets(predictions, predictions, 1.0)
    with pytest.raises(ValueError, match="method must be one of"):
        conformal_sets(predictions, predictions, 0.1, "split")
    with pytest.raises(ValueError, match="scores must be 10 finite numbers"):
        abstention_curve(predictions, torch.full((10,), math.nan))
    with pytest.raises(ValueError, match="coverage must lie in"):
        abstention_curve(predictions).risk_at(0.0)
    with pytest.raises(ValueError, match="kind must be one of"):
        ood_score(predictions, "energy")
