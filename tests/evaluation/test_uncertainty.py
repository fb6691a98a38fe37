"""Total, aleatoric and epistemic uncertainty of every task against brute force over the Gaussian of its functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import (
    Answers,
    Classes,
    InvalidBatchError,
    LaplaceLoRA,
    Regression,
    Rows,
    Tokens,
)
from laplace_lora_fast.likelihoods import Bernoulli, Categorical, Gaussian
from laplace_lora_fast.likelihoods.draws import gaussian_points
from tests import tiny
from tests.contracts.test_tasks import GROUPED, TASKS, data
from tests.oracle import assert_close

SEEDED = torch.Generator().manual_seed(7)


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def drawn(mean: Tensor, cov: Tensor, n: int = 200_000) -> Tensor:
    """Plain samples [n, K]."""
    return torch.distributions.MultivariateNormal(mean, cov).sample((n,))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_entropies_against_plain_sampling(size: int) -> None:
    torch.manual_seed(0)
    root = torch.randn(size, size, dtype=torch.float64)
    mean, cov = torch.randn(size, dtype=torch.float64), root @ root.mT + 0.1 * torch.eye(size)
    total, aleatoric = Categorical().uncertainty(mean[None], cov[None], None, SEEDED, 1.0)
    p = torch.nn.functional.pad(drawn(mean, cov), (1, 0)).softmax(-1)
    assert abs(float(total) - float(entropy(p.mean(0)))) < 3e-3
    assert abs(float(aleatoric) - float(entropy(p).mean())) < 5e-3


def test_two_classes_against_quadrature() -> None:
    """One contrast: an integral over the real line, by a fine grid. The points are better than as many samples."""
    mean, sd = 0.7, 2.5
    z = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    weight = (-0.5 * z.square()).exp()
    weight /= weight.sum()
    p = (mean + sd * z).sigmoid()
    both = torch.stack([p, 1 - p], -1).clamp_min(1e-300)
    expected = entropy((weight[:, None] * both).sum(0)), (weight * entropy(both)).sum()
    args = torch.tensor([[mean]]), torch.tensor([[[sd**2]]])
    found = Categorical().uncertainty(*args, None, SEEDED, 1.0)
    labels = Bernoulli().uncertainty(*args, None, SEEDED, 1.0)
    for each, label, wanted in zip(found, labels, expected, strict=True):
        assert abs(float(each) - float(wanted)) < 1e-3
        assert abs(float(label) - float(wanted)) < 1e-3


def test_without_uncertainty_all_is_aleatoric_and_far_from_any_limit() -> None:
    mean = torch.tensor([[0.3, -1.0], [500.0, 0.0]])
    total, aleatoric = Categorical().uncertainty(mean, torch.zeros(2, 2, 2), None, SEEDED, 1.0)
    expected = entropy(torch.tensor([0.0, 0.3, -1.0], dtype=torch.float64).softmax(0))
    assert_close(total[:1], expected[None], 1e-6)
    assert_close(aleatoric[:1], expected[None], 1e-6)
    assert abs(float(total[1])) < 1e-100
    huge = Categorical().uncertainty(torch.zeros(1, 1), torch.full((1, 1, 1), 1e8), None, SEEDED, 1.0)
    assert abs(float(huge[0]) - math.log(2)) < 1e-3  # every model is sure, and they disagree
    assert float(huge[1]) < 1e-2


def test_points_are_seeded_and_of_a_gaussian() -> None:
    one, same, other = (gaussian_points(1024, 3, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.mean(0).abs().max() < 1e-2
    assert (one.mT @ one / 1024 - torch.eye(3)).abs().max() < 2e-2
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        gaussian_points(0, 3, SEEDED)


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"Tokens"}))
@pytest.mark.parametrize("structure", [Rows(columns=64), Rows(columns=64, refit=True), "kfac"], ids=str)
def test_every_task(name: str, structure: Rows | str) -> None:
    """Of the Gaussian that the facade gives, example by example, in the batch's order."""
    make, task = TASKS[name]
    la = LaplaceLoRA(make(), task, structure=structure, prior_precision=0.3).fit([data(task)], progress=False)
    batch = data(task, 1)
    found = la.uncertainty(batch)
    assert torch.equal(la.uncertainty(batch).total, found.total)
    assert (found.epistemic >= 0).all()
    assert_close(found.total, found.aleatoric + found.epistemic, 1e-12)
    if la.likelihood.has_noise:
        _, cov = la.logit_distribution(batch)
        assert_close(found.epistemic, cov.diagonal(dim1=1, dim2=2), 1e-9)
        assert_close(found.total, la.predictive_variance(batch), 1e-9)
        assert_close(found.aleatoric, torch.full((7, 2), la.sigma_noise**2, dtype=torch.float64), 1e-9)
        return
    if isinstance(la.likelihood, Bernoulli):
        mean, cov = la.logit_distribution(batch)
        assert found.total.shape == (7, 3)
        p = drawn(mean[2], cov[2], 50_000).sigmoid()
        means = torch.stack([p.mean(0), 1 - p.mean(0)], -1)
        assert (found.total[2] - entropy(means)).abs().max() < 1e-2
        assert (found.aleatoric[2] - entropy(torch.stack([p, 1 - p], -1)).mean(0)).abs().max() < 1e-2
        return
    grouped = isinstance(task, GROUPED)
    if grouped:
        rewards = la.reward(batch)
        gaussians = list(zip(rewards.mean, rewards.covariance, strict=True))
    else:
        gaussians = list(zip(*la.logit_distribution(batch), strict=True))
    assert found.total.shape == (len(gaussians),)
    for place in (0, 1):
        mean, cov = gaussians[place]
        p = drawn(mean, cov + 1e-12 * torch.eye(len(mean)), 50_000).softmax(-1)
        assert abs(float(found.total[place]) - float(entropy(p.mean(0)))) < 1e-2
        assert abs(float(found.aleatoric[place]) - float(entropy(p).mean())) < 2e-2


def test_more_prior_precision_leaves_less_to_know() -> None:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS)).fit([tiny.batch(6)], progress=False)
    batch = tiny.batch(5, seed=1)
    values = [la.uncertainty(batch, prior_precision=prior).epistemic for prior in (0.1, 10.0, 1e6)]
    assert (values[0] > values[1]).all()
    assert values[2].max() < 1e-3
    with pytest.raises(InvalidBatchError):
        la.uncertainty({})


def test_what_is_refused() -> None:
    model, batch = tiny.tiny_llama_classifier(2), tiny.batch(4, classes=0)
    la = LaplaceLoRA(model, Regression(noise=0.5)).fit(
        [batch | {"labels": torch.randn(4, 2, dtype=torch.float64)}], progress=False
    )
    with pytest.raises(ValueError, match="closed form: leave n_samples out"):
        la.uncertainty(batch, n_samples=10)
    la = LaplaceLoRA(TASKS["Tokens"][0](), Tokens()).fit([data(Tokens())], progress=False)
    with pytest.raises(ValueError, match="see token_uncertainty"):
        la.uncertainty(data(Tokens()))
    with pytest.raises(ValueError, match="give it a method 'uncertainty'"):
        super(Gaussian, Gaussian()).uncertainty(torch.zeros(1, 1), torch.zeros(1, 1, 1), None, SEEDED, 1.0)
    la = LaplaceLoRA(tiny.tiny_llama_classifier(3), Classes()).fit([tiny.batch(4)], progress=False)
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        la.uncertainty(tiny.batch(4), n_samples=0)
