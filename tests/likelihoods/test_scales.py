"""Outputs with a noise each, against what scaling targets and outputs by hand gives, and the dense posterior."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from laplace_lora_fast import (
    Evidence,
    HeldOut,
    InvalidBatchError,
    LaplaceLoRA,
    LaplaceWarning,
    Regression,
    Rows,
)
from laplace_lora_fast.likelihoods import Gaussian
from tests import oracle, tiny
from tests.oracle import assert_close

SCALES = (0.5, 3.0)
NOISE = Gaussian(scales=SCALES)


def batch(seed: int = 0) -> tiny.Batch:
    generator = torch.Generator().manual_seed(seed)
    return tiny.batch(6, seed=seed) | {"labels": torch.randn(6, 2, generator=generator, dtype=torch.float64)}


def test_derivatives_and_samples() -> None:
    f = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y, s = torch.randn(3, 2, dtype=torch.float64), torch.tensor(SCALES, dtype=torch.float64)
    (expected,) = torch.autograd.grad(-NOISE.log_likelihood(f, y), f)
    assert_close(NOISE.residual(f.detach(), y), expected, 1e-12)
    root = NOISE.hessian_root(f.detach())
    assert_close(root @ root.mT, torch.diag(s**-2).expand(3, 2, 2), 1e-12)
    density = torch.distributions.Normal(f.detach(), 0.7 * s).log_prob(y).sum()
    whole = NOISE.log_likelihood(f.detach(), y) / 0.7**2 - NOISE.log_normaliser(6, 0.7)
    assert_close(whole, density, 1e-12)
    drawn = NOISE.sample(torch.zeros(40_000, 2, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert_close(drawn.std(0), s, 0.02)


def test_scores_are_densities_of_the_targets() -> None:
    mean, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    cov = torch.diag_embed(torch.rand(4, 2, dtype=torch.float64))
    s = torch.tensor(SCALES, dtype=torch.float64)

    def nll(noise: float, scale: float) -> torch.Tensor:
        variance = scale * cov.diagonal(dim1=1, dim2=2) + (noise * s) ** 2
        return -torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).sum(1).mean()

    found, _ = NOISE.score(mean, cov[None], y, None, 1, torch.Generator(), 0.7)
    assert_close(found[0], nll(0.7, 1.0), 1e-12)
    tuned, best = NOISE.score(mean, cov[None], y, None, 1, torch.Generator(), None)
    assert_close(tuned[0], nll(float(best), float(best) ** 2), 1e-12)
    assert all(nll(f * float(best), (f * float(best)) ** 2) > tuned[0] for f in (0.98, 1.02))


@pytest.mark.parametrize("refit", [False, True])
def test_against_the_dense_posterior(refit: bool) -> None:
    model = tiny.tiny_llama_classifier(2).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train, test, noise = batch(), batch(1), 0.7
    la = LaplaceLoRA(model, Regression(noise=noise, scales=SCALES), structure=Rows(columns=64, refit=refit))
    la.fit([train], progress=False)
    J, Jt = (
        torch.cat(list(oracle.jacobians(model, b, oracle.class_logits).values()), 2) for b in (train, test)
    )
    s = noise * torch.tensor(SCALES, dtype=torch.float64)
    precision = torch.diag((s**-2).repeat(6))
    rows = J.flatten(0, 1)
    covariance = torch.linalg.inv(torch.eye(rows.shape[1], dtype=torch.float64) + rows.mT @ precision @ rows)
    _, cov = la.logit_distribution(test)
    assert_close(cov, Jt @ covariance @ Jt.mT, 1e-6)
    assert_close(la.predictive_variance(test), cov.diagonal(dim1=1, dim2=2) + s**2, 1e-9)
    assert_close(la.uncertainty(test).aleatoric, (s**2).expand(6, 2), 1e-9)
    if refit:  # evidence of a Gaussian process around the model without its adapter
        with model.disable_adapter():
            prior = torch.stack(
                [oracle.class_logits(model, single) for single in oracle.examples(train)]
            ).detach()
        kernel = rows @ rows.mT + torch.linalg.inv(precision)
        target = (train["labels"] - prior).flatten()
        expected = torch.distributions.MultivariateNormal(torch.zeros(12).double(), kernel).log_prob(target)
    else:
        f = torch.stack([oracle.class_logits(model, single) for single in oracle.examples(train)]).detach()
        fit = torch.distributions.Normal(f, s).log_prob(train["labels"]).sum()
        norm = sum(p.detach().square().sum() for n, p in model.named_parameters() if "lora_" in n)
        expected = fit - 0.5 * (norm - covariance.logdet())
    assert_close(la.log_marginal_likelihood(), expected, 1e-7)


def test_scaling_the_targets_by_hand_is_the_same_and_the_common_noise_is_tuned() -> None:
    """One output in other units, its scale in the same: the answer in the old units does not change."""
    model, factor = tiny.tiny_llama_classifier(2), 10.0
    la = LaplaceLoRA(model, Regression(scales=(1.0, 1.0))).fit([batch()], progress=False)
    plain = LaplaceLoRA(model, Regression()).fit([batch()], progress=False)
    for each in (la, plain):
        each.optimize_prior_precision(Evidence(), progress=False)
    assert la.sigma_noise == pytest.approx(plain.sigma_noise)
    assert_close(la.predictive_variance(batch(1)), plain.predictive_variance(batch(1)), 1e-9)
    wide = LaplaceLoRA(model, Regression(scales=(1.0, factor))).fit([batch()], progress=False)
    assert wide.sigma_noise != pytest.approx(plain.sigma_noise, rel=1e-3)
    ratio = wide.uncertainty(batch(1)).aleatoric
    assert_close(ratio[:, 1], factor**2 * ratio[:, 0], 1e-9)
    nll = wide.predictions([batch(1)], progress=False).metrics().nll
    warnings.simplefilter("ignore", LaplaceWarning)  # of the grid's edge
    wide.optimize_prior_precision(HeldOut([batch(1)], grid=(0.01, 1.0, 100.0)), progress=False)
    assert wide.predictions([batch(1)], progress=False).metrics().nll <= nll
    assert math.isfinite(nll)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="scales must be positive"):
        Regression(scales=(1.0, 0.0))
    with pytest.raises(InvalidBatchError, match="scales are those of 3 outputs, this model gives 2"):
        LaplaceLoRA(tiny.tiny_llama_classifier(2), Regression(scales=(1.0, 2.0, 3.0))).fit(
            [batch()], progress=False
        )
