"""Choosing the prior precision: stationarity, structure, prior mean, noise, held-out likelihood."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from laplace_lora_fast import LaplaceLoRA, LaplaceWarning, NumericalError, validation
from laplace_lora_fast.evidence import increasing_root
from laplace_lora_fast.likelihoods import probabilities
from tests import oracle, tiny

TRAIN, VAL = tiny.batch(9, length=6, seed=1), tiny.batch(7, length=6, seed=5)


def fitted(model: torch.nn.Module | None = None, **options: object) -> LaplaceLoRA:
    la = LaplaceLoRA(
        model or tiny.tiny_llama(), **{"answer_token_ids": tiny.ANSWERS, "structure": "kfac"} | options
    )
    return la.fit([TRAIN], progress=False)


def evidence_gradient(la: LaplaceLoRA, values: dict[str, float]) -> dict[str, float]:
    """D log p(D) / d log lambda of every group by central differences."""
    step = 1e-4

    def shifted(key: str, by: float) -> float:
        moved = {k: v * math.exp(by) if k == key else v for k, v in values.items()}
        return la.log_marginal_likelihood(moved.get("", moved)).item()

    return {key: (shifted(key, step) - shifted(key, -step)) / (2 * step) for key in values}


@pytest.mark.parametrize("structure", ["scalar", "ab", "layerwise"])
@pytest.mark.parametrize("rank", [None, 2])
def test_evidence_is_stationary_and_maximal(structure: str, rank: int | None) -> None:
    la = fitted(rank=rank)
    best = la.optimize_prior_precision(method="marglik", prior_structure=structure)
    assert la.prior_precision == best
    values = best if isinstance(best, dict) else {"": best}
    assert max(abs(g) for g in evidence_gradient(la, values).values()) < 1e-6
    top = la.log_marginal_likelihood().item()
    for factor in (0.5, 0.9, 1.1, 2.0):
        for key in values:
            moved = {k: v * factor if k == key else v for k, v in values.items()}
            assert la.log_marginal_likelihood(moved.get("", moved)).item() < top


def test_mackays_condition_holds_to_machine_precision() -> None:
    la = fitted()
    lam = la.optimize_prior_precision()
    norm = sum(block.mean.square().sum() for block in la.posterior.curvature.blocks)
    assert float(lam * norm) == pytest.approx(float(la.posterior.effective_parameters().sum()), rel=1e-12)


def test_finer_structures_have_no_less_evidence() -> None:
    la = fitted()
    evidence = []
    for structure in ("scalar", "ab"):
        la.optimize_prior_precision(prior_structure=structure)
        evidence.append(la.log_marginal_likelihood().item())
    assert evidence[0] < evidence[1]


@pytest.mark.parametrize("form", ["parameters", "peft", "folder"])
def test_prior_mean_is_the_initial_adapter(form: str, tmp_path: object) -> None:
    """The penalty is the distance moved since then; the curvature terms stay."""
    initial, trained = (
        tiny.tiny_llama(targets=("q_proj", "lm_head")),
        tiny.tiny_llama(targets=("q_proj", "lm_head")),
    )
    tiny.randomise(trained, seed=8)
    if form == "folder":
        initial.save_pretrained(str(tmp_path), save_embedding_layers=False)
        source: object = tmp_path
    else:
        state = {name: p.detach() for name, p in initial.named_parameters() if "lora_" in name}
        source = state if form == "parameters" else {k.replace(".default", ""): v for k, v in state.items()}
    zero, centred = fitted(trained), fitted(trained, prior_mean=source)
    start, end = oracle.lora_modules(initial), oracle.lora_modules(trained)
    change = 0.0
    for name in end:
        for side in "AB":
            before = getattr(start[name], f"lora_{side}")["default"].weight
            after = getattr(end[name], f"lora_{side}")["default"].weight
            if (name.rsplit(".", 1)[-1], side) == ("lm_head", "B"):
                before, after = before[list(tiny.ANSWERS)], after[list(tiny.ANSWERS)]
            change += float((after - before).square().sum() - after.square().sum())
    difference = centred.log_marginal_likelihood() - zero.log_marginal_likelihood()
    assert difference.item() == pytest.approx(-0.5 * change, rel=1e-5 if form == "folder" else 1e-9)


def test_evidence_without_a_maximum_is_refused() -> None:
    model = tiny.tiny_llama()
    mean = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    with pytest.raises(NumericalError, match="equal the prior mean"):
        fitted(model, prior_mean=mean).optimize_prior_precision()
    for layer in oracle.lora_modules(model).values():
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    with pytest.raises(NumericalError, match="curvature of group 'A' is zero"):
        fitted(model).optimize_prior_precision(prior_structure="ab")


def regression_data() -> tiny.Batch:
    return tiny.batch(12, classes=0, seed=3, padding="right")


def regression(sigma_noise: float = 1.0) -> LaplaceLoRA:
    model = tiny.tiny_llama_classifier(1)
    la = LaplaceLoRA(model, likelihood="regression", structure="kfac", sigma_noise=sigma_noise)
    return la.fit([regression_data()], progress=False)


def test_regression_evidence_and_predictive_equal_brute_force() -> None:
    la, sigma, lam = regression(0.6), 0.6, 1.3
    la.prior_precision = lam
    model, train, test = la.model, regression_data(), tiny.batch(3, classes=0, seed=4, padding="right")
    outputs = torch.stack([oracle.class_logits(model, single)[0] for single in oracle.examples(train)])
    expected = torch.distributions.Normal(outputs, sigma).log_prob(train["labels"]).sum().item()
    cov = 0
    jacobians = oracle.jacobians(model, test, oracle.class_logits)
    for (name, side), j in jacobians.items():
        factors = getattr(la.factors[name], side)
        h = torch.kron(factors.gradient_factor, factors.input_factor) / sigma**2
        precision = h + lam * torch.eye(len(h), dtype=h.dtype)
        theta = getattr(oracle.lora_modules(model)[name], f"lora_{side}")["default"].weight
        log_det = torch.linalg.slogdet(precision).logabsdet.item() - len(h) * math.log(lam)
        expected -= 0.5 * (lam * theta.square().sum().item() + log_det)
        cov = cov + j @ torch.linalg.inv(precision) @ j.mT
    assert la.log_marginal_likelihood().item() == pytest.approx(expected, rel=1e-8)
    mean, variance = la.predict(test)
    oracle.assert_close(variance, cov[:, 0] + sigma**2, 1e-8)
    outputs = torch.stack([oracle.class_logits(model, single)[0] for single in oracle.examples(test)])
    oracle.assert_close(mean[:, 0], outputs, 1e-10)


def test_noise_and_prior_maximise_the_evidence_together() -> None:
    la = regression()
    la.optimize_prior_precision(tune_sigma_noise=True)
    assert abs(evidence_gradient(la, {"": la.prior_precision})[""]) < 1e-6
    best, sigma = la.log_marginal_likelihood().item(), la.sigma_noise

    def evidence(log_change: float) -> float:
        la.sigma_noise = sigma * math.exp(log_change)
        return la.log_marginal_likelihood().item()

    assert abs(evidence(1e-4) - evidence(-1e-4)) / 2e-4 < 1e-6
    assert evidence(0.2) < best
    assert evidence(-0.2) < best


@pytest.mark.parametrize("link", ["probit", "mc", "bridge"])
@pytest.mark.parametrize("structure", ["scalar", "ab"])
def test_validation_finds_the_best_grid_point(link: str, structure: str) -> None:
    la, grid = fitted(), [0.01, 0.3, 4.0, 50.0, 1e4]
    choices = grid if structure == "scalar" else [{"A": a, "B": b} for a in grid for b in grid]
    nll = []
    for choice in choices:
        probs = la.predict(VAL, link_approx=link, prior_precision=choice)
        nll.append(-probs[torch.arange(len(probs)), VAL["labels"]].log().mean().item())
    expected = choices[min(range(len(nll)), key=nll.__getitem__)]
    ends = expected.values() if isinstance(expected, dict) else [expected]
    options = {
        "val_loader": tiny.split(VAL, 3),
        "grid": grid,
        "prior_structure": structure,
        "link_approx": link,
    }
    if grid[0] in ends or grid[-1] in ends:
        with pytest.warns(LaplaceWarning, match="edge of the grid"):
            found = la.optimize_prior_precision("val_nll", progress=False, **options)
    else:
        found = la.optimize_prior_precision("val_nll", progress=False, **options)
    assert found == expected


def test_validation_of_a_regression() -> None:
    la, grid, val = regression(), [0.01, 0.1, 1.0, 10.0, 100.0], tiny.batch(6, classes=0, seed=9)
    nll = []
    for value in grid:
        mean, variance = la.predict(val, prior_precision=value)
        nll.append(
            -torch.distributions.Normal(mean[:, 0], variance[:, 0].sqrt())
            .log_prob(val["labels"])
            .mean()
            .item()
        )
    expected = grid[min(range(5), key=nll.__getitem__)]
    options = {"val_loader": [val], "grid": grid, "progress": False}
    if expected in (grid[0], grid[-1]):
        with pytest.warns(LaplaceWarning, match="edge"):
            assert la.optimize_prior_precision("val_nll", **options) == expected
    else:
        assert la.optimize_prior_precision("val_nll", **options) == expected


@pytest.mark.parametrize("root", [-80.0, 0.0, 3.3, 90.0])
def test_increasing_root(root: float) -> None:
    """Newton from far away on a function that is flat on one side and steep on the other."""
    found = increasing_root(lambda x: (math.expm1(min(x - root, 700)), math.exp(min(x - root, 700))), 0.0)
    assert found == pytest.approx(root, abs=1e-9)


def test_a_function_without_a_root_is_refused() -> None:
    with pytest.raises(NumericalError, match="no maximum"):
        increasing_root(lambda x: (-1.0, 0.0), 0.0)


@pytest.mark.parametrize("link", ["probit", "mc", "bridge"])
def test_validation_of_confident_single_precision_logits(link: str) -> None:
    la = LaplaceLoRA(
        tiny.tiny_llama(torch.float32),
        output_fn=lambda out, _: 200 * out.logits[:, -1, :3],
        structure="kfac",
        prior_precision=10.0,
    )
    la.fit([TRAIN], progress=False)
    grid = [1e2, 1e4, 1e6, 1e8]
    val = VAL | {"labels": la.predict(VAL, link_approx="map").argmax(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LaplaceWarning)  # of the edge of the grid
        best = la.optimize_prior_precision(
            "val_nll", val_loader=[val], link_approx=link, grid=grid, progress=False
        )
    nll = {}
    for value in grid:
        probs = la.predict(val, link_approx=link, prior_precision=value).double()
        nll[value] = float(-probs.gather(1, val["labels"][:, None]).log().mean())
    assert best == min(nll, key=nll.__getitem__)


def test_a_likelihood_that_is_not_a_number_is_no_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    la = fitted()

    def broken(*args: object) -> torch.Tensor:
        probs = probabilities(*args)
        probs[1] = torch.nan
        return probs

    monkeypatch.setattr(validation, "probabilities", broken)
    with pytest.raises(NumericalError, match=r"at prior precision \[1.0\] is not a number"):
        la.optimize_prior_precision("val_nll", val_loader=[VAL], grid=[0.1, 1.0, 10.0], progress=False)
    monkeypatch.setattr(validation, "probabilities", lambda *args: 0 * probabilities(*args))
    with pytest.raises(NumericalError, match="infinite at every value"):
        la.optimize_prior_precision("val_nll", val_loader=[VAL], grid=[0.1, 1.0, 10.0], progress=False)
    assert la.prior_precision == 1.0


@pytest.mark.parametrize("make", [torch.tensor, iter, tuple])
def test_a_grid_of_any_kind(make: Callable[[list[float]], Any]) -> None:
    la, values = fitted(), [1e-3, 1.0, 1e3]
    best = la.optimize_prior_precision("val_nll", val_loader=[VAL], grid=values, progress=False)
    found = la.optimize_prior_precision("val_nll", val_loader=[VAL], grid=make(values), progress=False)
    assert found == pytest.approx(best)


@pytest.mark.filterwarnings("ignore:the best prior precision lies on the edge")
def test_the_method_follows_from_what_is_given() -> None:
    """Held-out data are looked at, or refused where the method does not."""
    held_out = {"val_loader": [VAL], "progress": False}
    la = fitted(tiny.tiny_llama())
    assert la.optimize_prior_precision(**held_out) == la.optimize_prior_precision("val_nll", **held_out)
    assert la.optimize_prior_precision() == la.optimize_prior_precision("marglik")
    with pytest.raises(ValueError, match="val_loader"):
        la.optimize_prior_precision("marglik", **held_out)
    refit = fitted(tiny.tiny_llama(), structure="dual", mean="refit")
    assert refit.optimize_prior_precision() == refit.optimize_prior_precision("loo", progress=False)
