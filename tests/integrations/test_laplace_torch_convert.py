"""A posterior goes to laplace-torch and back without changing."""

from __future__ import annotations

import pytest
import torch

from laplace_lora_fast import KFAC, Answers, Evidence, LaplaceLoRA
from laplace_lora_fast.errors import NotFittedError, StateError
from tests import tiny
from tests.integrations import batched
from tests.oracle import assert_close

pytest.importorskip("laplace", reason="needs laplace-torch")
pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch")

from laplace import Laplace
from laplace.curvature import CurvlinopsGGN

from laplace_lora_fast.integrations.laplace_torch import (
    FastGGN,
    from_state_dict,
    to_kron,
    to_state_dict,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DATA = tiny.batch(6, length=5, padding=None, seed=4)


def fitted(**options: object) -> LaplaceLoRA:
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS), **{"structure": "kfac"} | options)
    return la.fit(tiny.split(DATA, 4), progress=False)


def theirs(la: LaplaceLoRA, backend: type = FastGGN):
    return Laplace(batched.Batched(la.model, answers=True), "classification", "all", "kron", backend=backend)


@pytest.mark.parametrize("mode", ["expand", "reduce"])
def test_kron_is_curvlinops(mode: str) -> None:
    la = fitted(structure=KFAC(mode))
    other = theirs(la, CurvlinopsGGN)
    other._asdl_fisher_kwargs = {"kfac_approx": mode}
    other.fit(batched.loader(DATA, 6))
    for ours, expected in zip(to_kron(la).kfacs, other.H_facs.kfacs, strict=True):
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b, 1e-6)


@pytest.mark.parametrize("prior", ["scalar", "ab", "layerwise", "centred"])
def test_there_and_back(prior: str) -> None:
    start = {name: 0.9 * value for name, value in tiny.tiny_llama().state_dict().items() if "lora_" in name}
    la = fitted(prior_mean=start if prior == "centred" else None)
    layers = [layer.name for layer in la.layers]
    la.prior_precision = {
        "scalar": 0.7,
        "centred": 0.7,
        "ab": {"A": 0.5, "B": 2.0},
        "layerwise": {name: 0.5 + i for i, name in enumerate(layers)},
    }[prior]
    there = theirs(la)
    there.load_state_dict(to_state_dict(la))
    assert_close(there.log_marginal_likelihood(), la.log_marginal_likelihood(), 1e-9)
    mean, cov = la.logit_distribution(DATA)
    for found, expected in zip(there._glm_predictive_distribution(DATA), (mean, cov), strict=True):
        assert_close(found, expected, 1e-9)

    back = from_state_dict(LaplaceLoRA(la.model, Answers(tiny.ANSWERS)), there.state_dict())
    assert back.prior_precision == la.prior_precision
    assert_close(back.log_marginal_likelihood(), la.log_marginal_likelihood(), 1e-9)
    assert_close(back.logit_distribution(DATA)[1], cov, 1e-9)
    assert_close(back.predict(DATA), la.predict(DATA), 1e-9)


def test_a_posterior_that_laplace_torch_fitted() -> None:
    model = tiny.tiny_llama()
    la = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure="kfac")
    other = theirs(la, CurvlinopsGGN)
    other.fit(batched.loader(DATA, 3))
    from_state_dict(la, other.state_dict())
    assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood(), 1e-6)
    la.optimize_prior_precision(Evidence(per="side"))
    assert set(la.prior_precision) == {"A", "B"}


def test_low_rank_factors_become_dense_with_their_tail() -> None:
    la = fitted(structure=KFAC(rank=2))
    there = theirs(la)
    there.load_state_dict(to_state_dict(la))
    assert_close(there.log_marginal_likelihood(), la.log_marginal_likelihood(), 1e-9)


def test_what_cannot_be_converted_says_why() -> None:
    la = fitted()
    state = to_state_dict(la)
    for key, value in (("cls_name", "DiagLaplace"), ("likelihood", "regression"), ("temperature", 0.5)):
        with pytest.raises(StateError, match="KronLaplace"):
            from_state_dict(la, state | {key: value})
    with pytest.raises(StateError, match="one a layer"):
        from_state_dict(la, state | {"prior_precision": torch.linspace(1, 2, 8)})
    with pytest.raises(StateError, match="factor pairs"):
        from_state_dict(la, state | {"H": state["H"][:-2]})
    with pytest.raises(StateError, match="weights"):
        from_state_dict(la, state | {"mean": state["mean"] + 1})
    ekfac = LaplaceLoRA(la.model, Answers(tiny.ANSWERS), structure="ekfac")
    with pytest.raises(ValueError, match=r"KFAC\(\)"):
        from_state_dict(ekfac, state)
    with pytest.raises(ValueError, match="no Kronecker product"):
        to_kron(ekfac.fit([DATA], progress=False))
    unlabelled = [{k: v for k, v in DATA.items() if k != "labels"}]
    with pytest.raises(NotFittedError, match="labels"):
        to_state_dict(la.fit(unlabelled, progress=False))
    model = tiny.tiny_llama(targets=("lm_head",))
    head = LaplaceLoRA(model, Answers(tiny.ANSWERS), structure="kfac")
    with pytest.raises(ValueError, match="answer rows"):
        to_kron(head.fit([DATA], progress=False))
