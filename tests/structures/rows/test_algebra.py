"""Exact rows against the dense GGN over all weights."""

from __future__ import annotations

import math

import pytest
import torch

from laplace_lora_fast import Classes, Evidence, LaplaceLoRA, Rows
from tests import oracle, tiny
from tests.oracle import assert_close
from tests.structures.dense import PRIORS, TEST, TRAIN, dense_ggn, fisher_rows, fitted, model_of


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_rows_equal_the_dense_ggn(classes: int, fisher: str, prior: str) -> None:
    """Covariance, evidence, effective parameters: m = d, all layers together."""
    model = model_of(classes)
    la = fitted(model, Rows(fisher=fisher), classes, prior_precision=PRIORS[prior])
    rows = fisher_rows(model, classes, fisher)
    precision, diagonal = dense_ggn(la, rows)
    test = torch.cat(list(oracle.jacobians(model, TEST, oracle.class_logits).values()), 2)
    _, cov = la.logit_distribution(TEST)
    assert_close(cov, test @ torch.linalg.inv(precision) @ test.mT, 1e-8)
    ratio = torch.linalg.slogdet(precision).logabsdet - diagonal.log().sum()
    assert la.posterior.log_det_ratio().item() == pytest.approx(ratio.item(), rel=1e-8)
    gamma = 1 - diagonal * torch.linalg.inv(precision).diagonal()
    expected = torch.stack([part.sum() for part in gamma.split([js.shape[1] for js in rows.values()])])
    assert_close(la.posterior.effective_parameters(), expected, 1e-8)


def test_contrasts_and_several_priors_in_one_pass() -> None:
    model = model_of(3)
    la = fitted(model, "rows")
    many = [0.1, {"A": 1.0, "B": 3.0}, 30.0, {"A": 1.0, "B": 9.0}]
    probs = la.predict(TEST, prior_precision=many)
    _, covs = la.logit_distribution(TEST, prior_precision=many)
    for index, value in enumerate(many):
        la.prior_precision = value
        assert_close(covs[index], la.logit_distribution(TEST)[1], 1e-10)
        assert_close(probs[index], la.predict(TEST), 1e-10)


@pytest.mark.parametrize("per", ["all", "side", "layer"])
def test_evidence_is_stationary(per: str) -> None:
    la = fitted(model_of(3), "rows")
    best = la.optimize_prior_precision(Evidence(per=per))
    values = best if isinstance(best, dict) else {"": best}
    top, step = la.log_marginal_likelihood().item(), 1e-4
    for key in values:

        def shifted(by: float, key: str = key) -> float:
            moved = {k: v * math.exp(by) if k == key else v for k, v in values.items()}
            return la.log_marginal_likelihood(moved.get("", moved)).item()

        assert abs(shifted(step) - shifted(-step)) / (2 * step) < 1e-6
        assert max(shifted(0.3), shifted(-0.3)) < top


def test_rows_do_not_depend_on_batches_or_their_order() -> None:
    model = model_of(3)
    results = []
    for batches in (tiny.split(TRAIN, 1), tiny.split(TRAIN, 7), tiny.split(TRAIN, 2)[::-1]):
        la = LaplaceLoRA(model, Classes(), structure=Rows(columns=5))
        la.fit(batches, progress=False)
        results.append((la.log_marginal_likelihood(), la.logit_distribution(TEST)[1]))
    for evidence, cov in results[1:]:
        assert evidence.item() == pytest.approx(results[0][0].item(), rel=1e-10)
        assert_close(cov, results[0][1], 1e-9)


def test_the_sketch_is_unbiased_and_its_covariance_never_negative() -> None:
    model = model_of(2)
    exact = fitted(model, "rows", 2).logit_distribution(TEST, prior_precision=1e6)[1]  # the prior's: J* J*^T
    sketched = []
    for seed in range(40):
        la = fitted(model, Rows(columns=4), 2, seed=1000 * seed)
        sketched.append(la.logit_distribution(TEST, prior_precision=1e6)[1])
        tiny_prior = la.logit_distribution(TEST, prior_precision=1e-6)[1]
        assert torch.linalg.eigvalsh(tiny_prior).min() > -1e-6 * tiny_prior.abs().max()
    assert_close(torch.stack(sketched).mean(0), exact, 0.1)
    assert (sketched[0] - exact).abs().max() > 0.01 * exact.abs().max()  # each one is off


@pytest.mark.parametrize("prior", ["all", "side"])
def test_samples_have_the_posteriors_moments(prior: str) -> None:
    """Matheron's rule, jointly over layers: the samples' logits have the predictive covariance."""
    model = model_of(2)
    la = fitted(model, "rows", 2, prior_precision=PRIORS[prior])
    samples = la.posterior.sample(20_000, torch.Generator().manual_seed(0))
    steps = [s - mean for s, mean in zip(samples, la.posterior.curvature.means, strict=True)]
    jacobians = oracle.jacobians(model, TEST, oracle.class_logits)
    outputs = 0
    for (key, js), step in zip(jacobians.items(), steps, strict=True):
        flat = (step if key[1] == "A" else step.mT).flatten(1)
        outputs = outputs + torch.einsum("ncp,sp->snc", js, flat)
    found = torch.einsum("snc,snd->ncd", outputs, outputs) / len(outputs)
    assert_close(found, la.logit_distribution(TEST)[1], 0.05)


def test_dense_covariance_of_a_weight() -> None:
    model = model_of(3)
    la = fitted(model, "rows")
    rows = fisher_rows(model, 3, "exact")
    sigma = torch.linalg.inv(dense_ggn(la, rows)[0])
    start = 0
    for key, js in rows.items():
        own = slice(start, start + js.shape[1])
        assert_close(la.posterior.covariance(*key), sigma[own, own], 1e-8)
        start = own.stop
    with pytest.raises(ValueError, match=r"Rows\(columns=16\)"):
        fitted(model, Rows(columns=4)).posterior.covariance(*next(iter(rows)))
