"""Rewards of groups against brute force: autograd one sequence at a time, the explicit GGN, and integrals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import Answers, LaplaceLoRA, Options, Preference, Rows
from laplace_lora_fast.data import option_batches_from_ids
from laplace_lora_fast.evaluation.rewards import Rewards
from tests import tiny
from tests.oracle import assert_close

GROUP = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 3, 3])  # four examples, of 2, 3, 3 and 2 sequences
MEMBERS = [[0, 1], [2, 3, 4], [5, 6, 7], [8, 9]]
PRIOR = 0.8


def batch(seed: int) -> tiny.Batch:
    data = tiny.batch(10, seed=seed, labels=False, padding="right")
    return data | {"group": GROUP, "labels": torch.tensor([1, 2, 0, 0])}


def rewards(model: nn.Module, data: tiny.Batch) -> tuple[Tensor, Tensor]:
    """Reward of each sequence alone, and its gradient in all LoRA weights."""
    weights = [p for name, p in model.named_parameters() if "lora_" in name]
    values, rows = [], []
    for ids, mask in zip(data["input_ids"], data["attention_mask"].bool(), strict=True):
        value = model(input_ids=ids[mask][None]).logits[0, 0]
        values.append(value.detach())
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)]))
    return torch.stack(values), torch.stack(rows)


@pytest.fixture(scope="module")
def fitted() -> tuple[LaplaceLoRA, Tensor]:
    """A posterior, and its covariance by hand."""
    model = tiny.tiny_llama_classifier(1).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    la = LaplaceLoRA(model, Preference(), structure=Rows(columns=1 << 20), prior_precision=PRIOR)
    la.fit([batch(1)], progress=False)
    values, rows = rewards(model, batch(1))
    hessian = PRIOR * torch.eye(rows.shape[1], dtype=torch.float64)
    for example in range(4):
        p, J = values[MEMBERS[example]].softmax(0), rows[MEMBERS[example]]
        hessian += J.mT @ (torch.diag(p) - torch.outer(p, p)) @ J
    return la, torch.linalg.inv(hessian)


def test_against_the_dense_posterior(fitted: tuple[LaplaceLoRA, Tensor]) -> None:
    la, covariance = fitted
    found, (values, rows) = la.reward(batch(2)), rewards(la.model, batch(2))
    assert [len(mean) for mean in found.mean] == [2, 3, 3, 2]
    for example in range(4):
        mean, J = values[MEMBERS[example]], rows[MEMBERS[example]]
        expected = J @ covariance @ J.mT
        assert_close(found.mean[example], mean, 1e-9)
        assert_close(found.covariance[example], expected, 1e-10)
        assert_close(found.sd[example], expected.diagonal().sqrt(), 1e-9)
        bound = mean - 1.5 * expected.diagonal().sqrt()
        assert_close(found.lower_bound(1.5)[example], bound, 1e-9)
        assert found.best(1.5)[example] == bound.argmax()
        assert found.best()[example] == mean.argmax()


def test_another_prior_precision_and_a_refit(fitted: tuple[LaplaceLoRA, Tensor]) -> None:
    la, _ = fitted
    sds = [la.reward(batch(2), prior_precision=prior).sd[1] for prior in (0.1, 10.0)]
    assert (sds[0] > sds[1]).all()
    refitted = LaplaceLoRA(la.model, Preference(), structure=Rows(refit=True)).fit([batch(1)], progress=False)
    found, probs = refitted.reward(batch(2)), refitted.predict(batch(2), link_approx="mc", n_samples=20_000)
    contrast, cov = found.mean[0].diff(), found.covariance[0]
    variance = cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert abs((contrast + variance.sqrt() * noise).sigmoid().mean() - probs[0, 1]) < 0.01


def test_options_have_scores_too() -> None:
    examples = [([3, 4], [[5, 6], [7]], 0), ([8], [[9], [10, 11], [12]], 2)]
    (data,) = option_batches_from_ids(examples, 2)
    la = LaplaceLoRA(tiny.tiny_llama(), Options()).fit([data], progress=False)
    found, plain = la.reward(data), la.predict(data, link_approx="map")
    for row, mean in zip(plain, found.mean, strict=True):
        assert_close(mean.softmax(0), row[: len(mean)], 1e-9)


def test_tasks_without_groups_have_no_rewards() -> None:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS)).fit([tiny.batch(4)], progress=False)
    with pytest.raises(ValueError, match="no groups of sequences"):
        la.reward(tiny.batch(4))


def test_the_probability_of_being_best() -> None:
    """Two: the normal distribution function of the difference. Three alike: a third each. A common shift is nothing."""
    mean, cov = torch.tensor([0.3, 0.9]), torch.tensor([[1.0, 0.4], [0.4, 0.5]])
    difference = 0.6 / math.sqrt(2 * (1.0 + 0.5 - 2 * 0.4))
    expected = 0.5 * (1 + math.erf(difference))
    three = torch.zeros(3), torch.eye(3) + 100.0
    found = Rewards([mean, mean, three[0]], [cov, cov + 1e4, three[1]]).best_probability(n_samples=100_000)
    assert abs(float(found[0][1]) - expected) < 0.005
    assert abs(float(found[1][1]) - expected) < 0.005
    assert (found[2] - 1 / 3).abs().max() < 0.005
    assert all(abs(float(each.sum()) - 1) < 1e-6 for each in found)


def test_sure_groups_and_seeds() -> None:
    sure = Rewards([torch.tensor([1.0, 2.0, 0.0])], [torch.zeros(3, 3)])
    assert sure.best_probability()[0].tolist() == [0.0, 1.0, 0.0]
    open_ = Rewards([torch.zeros(2, dtype=torch.float64)], [torch.eye(2, dtype=torch.float64)])
    twice = Rewards(open_.mean * 2, open_.covariance * 2)
    first = open_.best_probability(n_samples=50, seed=3)[0]
    assert all(torch.equal(first, each) for each in twice.best_probability(n_samples=50, seed=3))
    assert not torch.equal(first, open_.best_probability(n_samples=51, seed=4)[0])
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        open_.best_probability(n_samples=0)


def test_caution_prefers_what_is_known() -> None:
    rewards = Rewards([torch.tensor([1.0, 1.1])], [torch.diag(torch.tensor([0.01, 4.0]))])
    assert rewards.best().tolist() == [1]
    assert rewards.best(k=1.0).tolist() == [0]
    assert_close(rewards.lower_bound(2.0)[0], torch.tensor([0.8, -2.9]), 1e-6)
