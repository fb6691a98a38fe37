"""Gaussian noise: Hessian, targets, and the score with its best noise."""

from __future__ import annotations

import torch

from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.likelihoods import Gaussian


def test_gaussian_hessian_is_the_identity() -> None:
    root = Gaussian().hessian_root(torch.randn(2, 3))
    torch.testing.assert_close(root @ root.mT, torch.eye(3).expand(2, 3, 3))


def test_targets_are_copies() -> None:
    """A loader may fill the same memory with the next batch."""
    labels = torch.randn(3, dtype=torch.float64)
    targets, expected = (
        Gaussian().targets(labels, torch.zeros(3, 1).double(), DeferredChecks()),
        labels.clone(),
    )
    labels.zero_()
    assert torch.equal(targets[:, 0], expected)


def test_score_is_the_marginal_density() -> None:
    mean, targets = torch.randn(2, 5, 3).double().unbind()
    root = torch.randn(2, 5, 3, 3).double()
    cov = root @ root.mT
    seeded = torch.Generator()
    scores, best = Gaussian().score(mean, cov, targets, None, 1, seeded, 0.7)
    scale = (cov.diagonal(dim1=-2, dim2=-1) + 0.49).sqrt()
    expected = -torch.distributions.Normal(mean, scale).log_prob(targets).sum(-1).mean(-1)
    torch.testing.assert_close(scores, expected)
    assert best is None


def test_score_with_open_noise_takes_the_best() -> None:
    """The covariance at unit noise scales with the noise: no noise gives a better score than the one that is told."""
    mean, targets = torch.randn(2, 5, 3).double().unbind()
    root = torch.randn(2, 5, 3, 3).double()
    cov = root @ root.mT
    scores, best = Gaussian().score(mean, cov, targets, None, 1, torch.Generator(), None)
    tried = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    variance = cov.diagonal(dim1=-2, dim2=-1) + 1
    scale = tried[:, None, None, None] * variance.sqrt()
    nll = -torch.distributions.Normal(mean, scale).log_prob(targets).sum(-1).mean(-1)
    torch.testing.assert_close(scores, nll.amin(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(best, tried[nll.argmin(0)], rtol=2e-3, atol=0)
    assert (scores <= nll.amin(0)).all()
