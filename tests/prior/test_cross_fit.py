"""The prior precision by cross-fitting, against out-of-fold likelihoods by autograd and dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import Answers, CrossFit, LaplaceLoRA, Regression, Rows
from laplace_lora_fast.evaluation.metrics import cross_fitted_temperature
from laplace_lora_fast.prior.cross_fit import split
from tests import tiny
from tests.oracle import Logits, examples, jacobians, softmax_hessian

# Of a small grid's edges.
pytestmark = pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")

TOKENS = tiny.ANSWERS[:2]
GRID = (0.03, 0.3, 3.0, 30.0)
EXACT = Rows(columns=64)


def data(n: int = 9) -> list[tiny.Batch]:
    """Batches of one example."""
    return tiny.split(tiny.batch(n, classes=2, seed=4), 1)


def train(rows: list[tiny.Batch]) -> nn.Module:
    """An adapter that depends on the rows."""
    return tiny.tiny_llama(seed=int(sum(int(row["input_ids"].sum()) for row in rows)))


def logits_of(model: nn.Module, single: tiny.Batch) -> Tensor:
    return model(input_ids=single["input_ids"]).logits[0, -1, list(TOKENS)]


def stacked(rows: list[tiny.Batch]) -> tiny.Batch:
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def dense(model: nn.Module, rows: list[tiny.Batch], logits: Logits) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        means = torch.stack([logits(model, single) for single in examples(stacked(rows))])
    return means, torch.cat(list(jacobians(model, stacked(rows), logits).values()), -1)


def out_of_fold(rows: list[tiny.Batch], folds: int) -> tuple[Tensor, Tensor, Tensor]:
    """NLL of every prior, and the plain logits and labels, fold by fold."""
    losses, plain, labels = [], [], []
    for fold in split(len(rows), folds, 0):
        inside = [rows[i] for i in fold.tolist()]
        model = train([row for i, row in enumerate(rows) if i not in fold.tolist()])
        f, j = dense(model, [row for i, row in enumerate(rows) if i not in fold.tolist()], logits_of)
        hessian = sum(each.mT @ softmax_hessian(logit) @ each for logit, each in zip(f, j, strict=True))
        mean, j_out = dense(model, inside, logits_of)
        own = stacked(inside)["labels"]
        plain.append(mean)
        labels.append(own)
        for_fold = []
        for lam in GRID:
            cov = j_out @ torch.linalg.inv(hessian + lam * torch.eye(len(hessian)).double()) @ j_out.mT
            margin = mean[:, 1] - mean[:, 0]
            variance = cov[:, 1, 1] + cov[:, 0, 0] - 2 * cov[:, 0, 1]
            scaled = margin / (1 + math.pi / 8 * variance).sqrt()
            signs = 2.0 * own - 1
            for_fold.append(-nn.functional.logsigmoid(signs * scaled))
        losses.append(torch.stack(for_fold))
    return torch.cat(losses, 1).mean(1), torch.cat(plain), torch.cat(labels)


@pytest.mark.parametrize("folds", [2, 3, 9])
def test_the_choice_is_the_least_out_of_fold_nll(folds, monkeypatch):
    rows = data()
    la = LaplaceLoRA(train(rows), Answers(TOKENS), structure=EXACT).fit(rows, progress=False)
    seen = {}
    from laplace_lora_fast.prior import cross_fit

    monkeypatch.setattr(cross_fit, "least", lambda nll, tried: seen.update(nll=nll) or int(nll.argmin()))
    chosen = la.optimize_prior_precision(CrossFit(train, rows, folds=folds, grid=GRID), progress=False)
    expected, _, _ = out_of_fold(rows, folds)
    torch.testing.assert_close(seen["nll"].double(), expected, rtol=1e-8, atol=1e-10)
    assert chosen == la.prior_precision == GRID[int(expected.argmin())]
    la.predict(rows[0])  # the model in question is as it was


def test_rows_may_be_anything_and_two_groups_are_tried_together():
    rows = data(6)
    la = LaplaceLoRA(train(rows), Answers(TOKENS), structure=EXACT).fit(rows, progress=False)
    numbers = list(range(6))
    tuning = CrossFit(
        lambda picked: train([rows[i] for i in picked]),
        numbers,
        folds=2,
        batches=lambda picked: [stacked([rows[i] for i in picked])],
        per="side",
        grid=GRID[:3],
    )
    by_side = la.optimize_prior_precision(tuning, progress=False)
    assert set(by_side) == {"A", "B"}
    assert set(by_side.values()) <= set(GRID)
    one = la.optimize_prior_precision(CrossFit(train, rows, folds=2, grid=GRID[:3]), progress=False)
    again = CrossFit(tuning.train, numbers, folds=2, batches=tuning.batches, grid=GRID[:3])
    assert la.optimize_prior_precision(again, progress=False) == one


def test_the_noise_of_a_regression_is_tuned_with_it():
    def regressor(rows: list[tiny.Batch]) -> nn.Module:
        return tiny.tiny_llama_classifier(1, seed=len(rows))

    rows = tiny.split(tiny.batch(8, classes=0, padding="right", seed=3), 2)
    la = LaplaceLoRA(regressor(rows), Regression(), structure=EXACT).fit(rows, progress=False)
    la.optimize_prior_precision(CrossFit(regressor, rows, folds=2), progress=False)
    products = torch.logspace(-4, 6, 101, dtype=torch.float64)
    product = la.prior_precision * la.sigma_noise**2
    assert (products / product - 1).abs().min() < 1e-9


def test_a_cross_fitted_temperature_is_that_of_the_out_of_fold_logits():
    rows = data(30)

    def predict(model: nn.Module, left_out: list[tiny.Batch]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = torch.stack([logits_of(model, each) for each in examples(stacked(left_out))])
        labels = stacked(left_out)["labels"]
        return logits + 2 * nn.functional.one_hot(
            labels
        ), labels  # so that they say something about the labels

    found = cross_fitted_temperature(train, rows, predict, folds=3)
    _, logits, labels = out_of_fold(rows, 3)
    logits = logits + 2 * nn.functional.one_hot(labels)
    inverse = torch.logspace(-3, 2, 20001, dtype=torch.float64)
    losses = torch.stack([nn.functional.cross_entropy(logits * each, labels) for each in inverse])
    assert abs(found * float(inverse[losses.argmin()]) - 1) < 1e-3


def test_what_does_not_go_is_refused():
    rows = data(4)
    la = LaplaceLoRA(train(rows), Answers(TOKENS), structure=EXACT).fit(rows, progress=False)
    for folds in (1, 5):
        with pytest.raises(ValueError, match="folds"):
            CrossFit(train, rows, folds=folds)
    other = CrossFit(lambda _: tiny.tiny_llama(targets=("k_proj",)), rows, folds=2)
    with pytest.raises(ValueError, match="same adapter"):
        la.optimize_prior_precision(other, progress=False)


def test_folds_partition_the_rows():
    folds = split(11, 4, 3)
    assert torch.cat(folds).sort().values.tolist() == list(range(11))
    assert {len(fold) for fold in folds} == {2, 3}
    assert not all(torch.equal(a, b) for a, b in zip(folds, split(11, 4, 4), strict=True))
