"""Hessian roots, cotangents and predictive links against direct computation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.likelihoods import (
    Categorical,
    Fisher,
    Gaussian,
    Link,
    fisher_cotangents,
    probabilities,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=50, deadline=None)
@given(classes=st.integers(2, 7), scale=st.floats(0, 30), seed=st.integers(0, 1000))
def test_hessian_root_has_rank_c_minus_1_and_the_right_square(classes: int, scale: float, seed: int) -> None:
    logits = scale * torch.randn(3, classes, generator=generator(seed), dtype=torch.float64)
    p = logits.softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    root = Categorical().hessian_root(logits)
    assert root.shape == (3, classes, classes - 1)
    torch.testing.assert_close(root @ root.mT, expected, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("favourite", [0, 1])
def test_hessian_root_keeps_its_digits_for_confident_predictions(classes: int, favourite: int) -> None:
    """fp32, p within 1e-13 of one: diag(p) - p p^T would be all rounding."""
    logits = torch.zeros(1, classes)
    logits[0, favourite] = 30.0
    q = (-30.0 + math.log(classes - 1)) if classes > 2 else -30.0
    root = Categorical().hessian_root(logits).double()
    variance = (root @ root.mT)[0, favourite, favourite].item()
    assert variance == pytest.approx(math.exp(q), rel=1e-4)  # p (1 - p)


def test_gaussian_hessian_is_the_identity() -> None:
    root = Gaussian().hessian_root(torch.randn(2, 3))
    torch.testing.assert_close(root @ root.mT, torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()])
def test_sampled_cotangents_have_the_hessian_as_second_moment(likelihood: Categorical | Gaussian) -> None:
    logits = torch.randn(2, 3, generator=generator(), dtype=torch.float64)
    root = likelihood.hessian_root(logits)
    drawn = fisher_cotangents(likelihood, Fisher.MC, logits, None, generator(), mc_samples=20_000)
    torch.testing.assert_close(drawn @ drawn.mT, root @ root.mT, atol=0.03, rtol=0.05)


def test_residual_is_the_gradient_of_the_negative_log_likelihood() -> None:
    for likelihood, targets in (
        (Categorical(), torch.tensor([2, 0])),
        (Gaussian(), torch.randn(2, 3).double()),
    ):
        logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(-likelihood.log_likelihood(logits, targets), logits)
        torch.testing.assert_close(likelihood.residual(logits.detach(), targets), expected)


def gaussian(classes: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean [4, C - 1] and covariance of contrasts."""
    g = generator(seed)
    mean = 2 * torch.randn(4, classes - 1, generator=g, dtype=torch.float64)
    root = scale * torch.randn(4, classes - 1, classes - 1, generator=g, dtype=torch.float64)
    return mean, root @ root.mT


def exact(mean: Tensor, cov: Tensor, n: int = 400_000) -> Tensor:
    noise = torch.randn(n, mean.shape[1], generator=generator(77), dtype=torch.float64)
    root = torch.linalg.cholesky(cov + 1e-12 * torch.eye(cov.shape[-1], dtype=cov.dtype))
    rows = [(m + noise @ r.mT) for m, r in zip(mean, root, strict=True)]
    return torch.stack([torch.nn.functional.pad(r, (1, 0)).softmax(1).mean(0) for r in rows])


@pytest.mark.parametrize("link", ["probit", "mc", "bridge"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_links_are_distributions(link: str, classes: int) -> None:
    mean, cov = gaussian(classes, 1.5)
    probs = probabilities(Link(link), mean, cov, 500, generator())
    assert probs.shape == (4, classes)
    assert (probs > 0).all()
    torch.testing.assert_close(probs.sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("link", ["probit", "mc"])
@pytest.mark.parametrize("classes", [2, 3])
def test_links_approach_the_plain_softmax_without_uncertainty(link: str, classes: int) -> None:
    mean, cov = gaussian(classes, 1.0)
    expected = probabilities(Link.MAP, mean, cov, 1, generator())
    torch.testing.assert_close(expected, torch.nn.functional.pad(mean, (1, 0)).softmax(1))
    torch.testing.assert_close(probabilities(Link(link), mean, 0 * cov, 100, generator()), expected)


@pytest.mark.parametrize(("link", "tolerance"), [("mc", 0.01), ("probit", 0.06)])
@pytest.mark.parametrize("classes", [2, 4])
def test_links_approximate_the_integral(link: str, tolerance: float, classes: int) -> None:
    mean, cov = gaussian(classes, 0.6, seed=3)
    probs = probabilities(Link(link), mean, cov, 50_000, generator())
    assert (probs - exact(mean, cov)).abs().max() < tolerance


def test_binary_probit_is_mackays_formula() -> None:
    mean, cov = gaussian(2, 2.0)
    expected = torch.sigmoid(mean[:, 0] / (1 + math.pi / 8 * cov[:, 0, 0]).sqrt())
    torch.testing.assert_close(probabilities(Link.PROBIT, mean, cov, 1, generator())[:, 1], expected)


def test_bridge_is_the_mean_of_hobbhahns_dirichlet() -> None:
    """Directly from equation 12 on the logits projected to sum to zero."""
    mean, cov = gaussian(4, 1.0)
    centre = torch.eye(4, dtype=torch.float64) - 0.25
    for m, s, probs in zip(mean, cov, probabilities(Link.BRIDGE, mean, cov, 1, generator()), strict=True):
        mu = centre @ torch.nn.functional.pad(m, (1, 0))
        variance = (centre @ torch.nn.functional.pad(s, (1, 0, 1, 0)) @ centre).diagonal()
        alpha = (1 - 2 / 4 + mu.exp() / 16 * (-mu).exp().sum()) / variance
        torch.testing.assert_close(probs, alpha / alpha.sum())


@pytest.mark.parametrize("link", ["probit", "bridge", "map"])
def test_links_do_not_depend_on_which_class_is_the_reference(link: str) -> None:
    """Contrasts to another class, with the classes permuted alike, give permuted probabilities."""
    mean, cov = gaussian(3, 1.2)
    full_mean, full_cov = torch.nn.functional.pad(mean, (1, 0)), torch.nn.functional.pad(cov, (1, 0, 1, 0))
    order = [2, 0, 1]
    contrast = torch.tensor([[-1.0, -1.0], [1, 0], [0, 1]], dtype=torch.float64)
    other_mean = full_mean[:, order] @ contrast
    other_cov = contrast.mT @ full_cov[:, order][:, :, order] @ contrast
    probs = probabilities(Link(link), mean, cov, 1, generator())
    torch.testing.assert_close(
        probabilities(Link(link), other_mean, other_cov, 1, generator()), probs[:, order]
    )


def test_singular_covariance_is_no_trouble_for_monte_carlo() -> None:
    mean = torch.zeros(1, 3, dtype=torch.float64)
    cov = torch.ones(1, 3, 3, dtype=torch.float64)  # rank one
    probs = probabilities(Link.MC, mean, cov, 2000, generator())
    torch.testing.assert_close(probs[0, 1:], probs[0, 1].expand(3))


@pytest.mark.parametrize("link", list(Link))
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_logits_stay_probabilities(link: Link, classes: int, dtype: torch.dtype) -> None:
    """The bridge's concentrations overflow from a margin of 88 on, in single precision."""
    mean, cov = gaussian(classes, 0.5)
    for scale in (1e2, 1e3, 1e4):
        probs = probabilities(link, (scale * mean).to(dtype), cov.to(dtype), 100, generator())
        assert probs.isfinite().all()
        torch.testing.assert_close(probs.sum(1), torch.ones(4, dtype=dtype))
        best = torch.nn.functional.pad(mean, (1, 0)).argmax(1)
        if link is not Link.BRIDGE:  # which divides by the variance of each class
            assert torch.equal(probs.argmax(1), best)


def test_targets_are_copies() -> None:
    """A loader may fill the same memory with the next batch."""
    logits = torch.zeros(3, 1, dtype=torch.float64)
    labels = torch.randn(3, dtype=torch.float64)
    targets, expected = Gaussian().targets(labels, logits, DeferredChecks()), labels.clone()
    classes = torch.tensor([0, 1, 1])
    indices = Categorical().targets(classes, torch.zeros(3, 2), DeferredChecks())
    labels.zero_()
    classes.zero_()
    assert torch.equal(targets[:, 0], expected)
    assert indices.tolist() == [0, 1, 1]
