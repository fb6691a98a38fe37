"""Predictive links against direct computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.likelihoods.links import LINKS, probabilities


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    probs = probabilities(link, mean, cov, 500, generator())
    assert probs.shape == (4, classes)
    assert (probs > 0).all()
    torch.testing.assert_close(probs.sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("link", ["probit", "mc"])
@pytest.mark.parametrize("classes", [2, 3])
def test_links_approach_the_plain_softmax_without_uncertainty(link: str, classes: int) -> None:
    mean, cov = gaussian(classes, 1.0)
    expected = torch.nn.functional.pad(mean, (1, 0)).softmax(1)
    torch.testing.assert_close(Categorical().plain_answer(Categorical().from_functions(mean)), expected)
    torch.testing.assert_close(probabilities(link, mean, 0 * cov, 100, generator()), expected)


@pytest.mark.parametrize(("link", "tolerance"), [("mc", 0.01), ("probit", 0.06)])
@pytest.mark.parametrize("classes", [2, 4])
def test_links_approximate_the_integral(link: str, tolerance: float, classes: int) -> None:
    mean, cov = gaussian(classes, 0.6, seed=3)
    probs = probabilities(link, mean, cov, 50_000, generator())
    assert (probs - exact(mean, cov)).abs().max() < tolerance


def test_binary_probit_is_mackays_formula() -> None:
    mean, cov = gaussian(2, 2.0)
    expected = torch.sigmoid(mean[:, 0] / (1 + math.pi / 8 * cov[:, 0, 0]).sqrt())
    torch.testing.assert_close(probabilities("probit", mean, cov, 1, generator())[:, 1], expected)


def test_bridge_is_the_mean_of_hobbhahns_dirichlet() -> None:
    """Directly from equation 12 on the logits projected to sum to zero."""
    mean, cov = gaussian(4, 1.0)
    centre = torch.eye(4, dtype=torch.float64) - 0.25
    for m, s, probs in zip(mean, cov, probabilities("bridge", mean, cov, 1, generator()), strict=True):
        mu = centre @ torch.nn.functional.pad(m, (1, 0))
        variance = (centre @ torch.nn.functional.pad(s, (1, 0, 1, 0)) @ centre).diagonal()
        alpha = (1 - 2 / 4 + mu.exp() / 16 * (-mu).exp().sum()) / variance
        torch.testing.assert_close(probs, alpha / alpha.sum())


@pytest.mark.parametrize("link", ["probit", "bridge"])
def test_links_do_not_depend_on_which_class_is_the_reference(link: str) -> None:
    """Contrasts to another class, with the classes permuted alike, give permuted probabilities."""
    mean, cov = gaussian(3, 1.2)
    full_mean, full_cov = torch.nn.functional.pad(mean, (1, 0)), torch.nn.functional.pad(cov, (1, 0, 1, 0))
    order = [2, 0, 1]
    contrast = torch.tensor([[-1.0, -1.0], [1, 0], [0, 1]], dtype=torch.float64)
    other_mean = full_mean[:, order] @ contrast
    other_cov = contrast.mT @ full_cov[:, order][:, :, order] @ contrast
    probs = probabilities(link, mean, cov, 1, generator())
    torch.testing.assert_close(probabilities(link, other_mean, other_cov, 1, generator()), probs[:, order])


def test_singular_covariance_is_no_trouble_for_monte_carlo() -> None:
    mean = torch.zeros(1, 3, dtype=torch.float64)
    cov = torch.ones(1, 3, 3, dtype=torch.float64)  # rank one
    probs = probabilities("mc", mean, cov, 2000, generator())
    torch.testing.assert_close(probs[0, 1:], probs[0, 1].expand(3))


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_logits_stay_probabilities(link: str, classes: int, dtype: torch.dtype) -> None:
    """The bridge's concentrations overflow from a margin of 88 on, in single precision."""
    mean, cov = gaussian(classes, 0.5)
    for scale in (1e2, 1e3, 1e4):
        probs = probabilities(link, (scale * mean).to(dtype), cov.to(dtype), 100, generator())
        assert probs.isfinite().all()
        torch.testing.assert_close(probs.sum(1), torch.ones(4, dtype=dtype))
        best = torch.nn.functional.pad(mean, (1, 0)).argmax(1)
        if link != "bridge":  # which divides by the variance of each class
            assert torch.equal(probs.argmax(1), best)


def test_another_link_is_refused() -> None:
    mean, cov = gaussian(3, 1.0)
    with pytest.raises(ValueError, match=r"link_approx must be one of .*probit.*bridge"):
        probabilities("median", mean, cov, 1, generator())
