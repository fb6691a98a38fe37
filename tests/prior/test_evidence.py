"""The prior precision by the evidence: stationarity, groups, prior mean, noise."""

from __future__ import annotations

import math

import pytest
import torch

from laplace_lora_fast import KFAC, Answers, Evidence, LaplaceLoRA, NumericalError, Regression
from tests import oracle, tiny

TRAIN = tiny.batch(9, length=6, seed=1)


def fitted(
    model: torch.nn.Module | None = None, structure: KFAC | str = "kfac", **options: object
) -> LaplaceLoRA:
    la = LaplaceLoRA(model or tiny.tiny_llama(), Answers(tiny.ANSWERS), structure=structure, **options)
    return la.fit([TRAIN], progress=False)


def evidence_gradient(la: LaplaceLoRA, values: dict[str, float]) -> dict[str, float]:
    """D log p(D) / d log lambda of every group by central differences."""
    step = 1e-4

    def shifted(key: str, by: float) -> float:
        moved = {k: v * math.exp(by) if k == key else v for k, v in values.items()}
        return la.log_marginal_likelihood(moved.get("", moved)).item()

    return {key: (shifted(key, step) - shifted(key, -step)) / (2 * step) for key in values}


@pytest.mark.parametrize("per", ["all", "side", "layer"])
@pytest.mark.parametrize("rank", [None, 2])
def test_evidence_is_stationary_and_maximal(per: str, rank: int | None) -> None:
    la = fitted(structure=KFAC(rank=rank))
    best = la.optimize_prior_precision(Evidence(per=per))
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


def test_finer_groups_have_no_less_evidence() -> None:
    la = fitted()
    evidence = []
    for per in ("all", "side"):
        la.optimize_prior_precision(Evidence(per=per))
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
        fitted(model).optimize_prior_precision(Evidence(per="side"))


def regression_data() -> tiny.Batch:
    return tiny.batch(12, classes=0, seed=3, padding="right")


def regression(noise: float | None) -> LaplaceLoRA:
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), Regression(noise), structure="kfac")
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
    oracle.assert_close(la.predictive_variance(test), cov[:, 0] + sigma**2, 1e-8)
    outputs = torch.stack([oracle.class_logits(model, single)[0] for single in oracle.examples(test)])
    oracle.assert_close(la.predict(test)[:, 0], outputs, 1e-10)


def test_noise_and_prior_maximise_the_evidence_together() -> None:
    la = regression(noise=None)
    la.optimize_prior_precision()
    assert abs(evidence_gradient(la, {"": la.prior_precision})[""]) < 1e-6
    best, sigma = la.log_marginal_likelihood().item(), la.sigma_noise

    def evidence(log_change: float) -> float:
        la.sigma_noise = sigma * math.exp(log_change)
        return la.log_marginal_likelihood().item()

    assert abs(evidence(1e-4) - evidence(-1e-4)) / 2e-4 < 1e-6
    assert evidence(0.2) < best
    assert evidence(-0.2) < best
