"""What every registered structure must do, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import Answers, LaplaceLoRA, Regression
from laplace_lora_fast.options import from_json, kinds, to_json
from laplace_lora_fast.structures.base import Ability, Curvature, Structure
from tests import tiny
from tests.contracts import toys
from tests.oracle import assert_close

STRUCTURES = [kind() for kind in [*kinds(Structure), toys.Isotropic]]
TRAIN, TEST = tiny.split(tiny.batch(9, seed=1), 3), tiny.batch(4, seed=2)


def fitted(structure: Structure, **options: object) -> LaplaceLoRA:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS), structure=structure, **options)
    return la.fit(TRAIN, progress=False)


@pytest.fixture(params=STRUCTURES, ids=lambda structure: type(structure).__name__, scope="module")
def structure(request: pytest.FixtureRequest) -> Structure:
    return request.param


def test_repr_and_json_are_the_constructor_call(structure: Structure) -> None:
    assert from_json(to_json(structure)) == structure
    assert repr(structure).startswith(type(structure).__name__ + "(")


def test_it_predicts_and_the_variance_is_between_zero_and_the_priors(structure: Structure) -> None:
    la = fitted(structure, prior_precision=2.0)
    probs = la.predict(TEST)
    assert_close(probs.sum(1), torch.ones(4, dtype=torch.float64), 1e-12)
    _, cov = la.logit_distribution(TEST)
    assert (torch.linalg.eigvalsh(cov) > -1e-10).all()
    _, prior = la.logit_distribution(TEST, prior_precision=2e12)
    assert (prior.diagonal(dim1=1, dim2=2) < 1e-6 * cov.diagonal(dim1=1, dim2=2)).all()


def test_batch_size_and_order_do_not_matter(structure: Structure) -> None:
    whole = fitted(structure).logit_distribution(TEST)
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS), structure=structure)
    data = {key: torch.cat([batch[key] for batch in TRAIN]).flip(0) for key in TRAIN[0]}
    again = la.fit(tiny.split(data, 4), progress=False).logit_distribution(TEST)
    for one, other in zip(whole, again, strict=True):
        assert_close(one, other, 1e-9)


def test_saved_and_loaded_it_is_bitwise_the_same(structure: Structure, tmp_path: Path) -> None:
    la = fitted(structure, prior_precision=0.7)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, la.model)
    assert again.structure == structure
    assert torch.equal(again.predict(TEST), la.predict(TEST))
    assert str(again.summary()) == str(la.summary())


def test_several_priors_in_one_pass_are_those_priors_one_by_one(structure: Structure) -> None:
    la = fitted(structure)
    priors = [0.3, {"A": 2.0, "B": 0.5}]
    together = la.predict(TEST, prior_precision=priors)
    for prior, found in zip(priors, together, strict=True):
        assert_close(found, la.predict(TEST, prior_precision=prior), 1e-9)


def test_evidence_and_effective_parameters_agree(structure: Structure) -> None:
    """Gamma = d logdet(H + Lambda) / d log Lambda - P, and never more than there are parameters or rows."""
    posterior = fitted(structure).posterior
    gamma, precision = posterior.effective_parameters(), posterior.prior_precision
    sizes = torch.tensor([float(mean.numel()) for mean in posterior.curvature.means])
    assert ((gamma >= 0) & (gamma <= sizes)).all()
    if Ability.LEAVE_ONE_OUT in fitted(structure).snapshot()[0].structure.abilities:
        return  # its curvature moves with the prior

    def ratio(scale: float) -> Tensor:
        return posterior.curvature.log_det_ratio(precision * scale)

    step = 1e-4
    slope = (ratio(1 + step) - ratio(1 - step)) / (2 * step)
    assert_close(-slope, gamma.sum(), 1e-5)


def test_samples_come_from_the_posterior_or_are_refused(structure: Structure) -> None:
    la = fitted(structure)
    curvature: Curvature = la.posterior.curvature
    if Ability.SAMPLES not in structure.abilities:
        with pytest.raises(ValueError, match=type(structure).__name__):
            la.posterior.sample(2, torch.Generator())
        return
    samples = la.posterior.sample(3000, torch.Generator().manual_seed(0))
    for index, (drawn, mean) in enumerate(zip(samples, curvature.means, strict=True)):
        assert drawn.shape[1:] == mean.shape
        name = curvature.names[index]
        expected = la.posterior.covariance(*name).diagonal()
        if name.side == "B":
            drawn, mean = drawn.mT, mean.mT
        variance = (drawn - mean).flatten(1).square().mean(0)
        assert ((variance / expected - 1).abs() < 0.2).all()


def test_a_regression_is_served_too(structure: Structure) -> None:
    model = tiny.tiny_llama_classifier(2)
    data = tiny.batch(8, seed=3, padding="right")
    data["labels"] = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    la = LaplaceLoRA(model, Regression(noise=0.5), structure=structure).fit([data], progress=False)
    assert la.predict(data).shape == (8, 2)
    assert (la.predictive_variance(data) > 0.25).all()
