"""The prior precision by the likelihood of held-out data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from laplace_lora_fast import (
    KFAC,
    Answers,
    HeldOut,
    LaplaceLoRA,
    LaplaceWarning,
    NumericalError,
    Outputs,
    Regression,
)
from laplace_lora_fast.likelihoods import categorical
from laplace_lora_fast.likelihoods.links import probabilities
from tests import tiny

TRAIN, VAL = tiny.batch(9, length=6, seed=1), tiny.batch(7, length=6, seed=5)


def fitted(
    model: torch.nn.Module | None = None, structure: KFAC | str = "kfac", **options: object
) -> LaplaceLoRA:
    la = LaplaceLoRA(model or tiny.tiny_llama(), Answers(tiny.ANSWERS), structure=structure, **options)
    return la.fit([TRAIN], progress=False)


@pytest.mark.parametrize("link", ["probit", "mc", "bridge"])
@pytest.mark.parametrize("per", ["all", "side"])
def test_held_out_tuning_finds_the_best_grid_point(link: str, per: str) -> None:
    la, grid = fitted(), [0.01, 0.3, 4.0, 50.0, 1e4]
    choices = grid if per == "all" else [{"A": a, "B": b} for a in grid for b in grid]
    nll = []
    for choice in choices:
        probs = la.predict(VAL, link_approx=link, prior_precision=choice)
        nll.append(-probs[torch.arange(len(probs)), VAL["labels"]].log().mean().item())
    expected = choices[min(range(len(nll)), key=nll.__getitem__)]
    ends = expected.values() if isinstance(expected, dict) else [expected]
    tuning = HeldOut(tiny.split(VAL, 3), per=per, grid=grid, link_approx=link)
    if grid[0] in ends or grid[-1] in ends:
        with pytest.warns(LaplaceWarning, match="edge of the grid"):
            found = la.optimize_prior_precision(tuning, progress=False)
    else:
        found = la.optimize_prior_precision(tuning, progress=False)
    assert found == expected


def test_held_out_tuning_of_a_regression() -> None:
    la = LaplaceLoRA(tiny.tiny_llama_classifier(1), Regression(noise=1.0), structure="kfac")
    la.fit([tiny.batch(12, classes=0, seed=3, padding="right")], progress=False)
    grid, val = [0.01, 0.1, 1.0, 10.0, 100.0], tiny.batch(6, classes=0, seed=9)
    nll = []
    for value in grid:
        mean, variance = (of(val, prior_precision=value) for of in (la.predict, la.predictive_variance))
        nll.append(
            -torch.distributions.Normal(mean[:, 0], variance[:, 0].sqrt())
            .log_prob(val["labels"])
            .mean()
            .item()
        )
    expected = grid[min(range(5), key=nll.__getitem__)]
    tuning = HeldOut([val], grid=grid)
    if expected in (grid[0], grid[-1]):
        with pytest.warns(LaplaceWarning, match="edge"):
            assert la.optimize_prior_precision(tuning, progress=False) == expected
    else:
        assert la.optimize_prior_precision(tuning, progress=False) == expected


@pytest.mark.parametrize("link", ["probit", "mc", "bridge"])
def test_held_out_tuning_of_confident_single_precision_logits(link: str) -> None:
    la = LaplaceLoRA(
        tiny.tiny_llama(torch.float32),
        Outputs(lambda out, _: 200 * out.logits[:, -1, :3]),
        structure="kfac",
        prior_precision=10.0,
    )
    la.fit([TRAIN], progress=False)
    grid = [1e2, 1e4, 1e6, 1e8]
    val = VAL | {"labels": la.predict(VAL, link_approx="map").argmax(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LaplaceWarning)  # of the edge of the grid
        best = la.optimize_prior_precision(HeldOut([val], link_approx=link, grid=grid), progress=False)
    nll = {}
    for value in grid:
        probs = la.predict(val, link_approx=link, prior_precision=value).double()
        nll[value] = float(-probs.gather(1, val["labels"][:, None]).log().mean())
    assert nll[best] == min(nll.values())  # predictions in fp32 tie where the score in fp64 does not


def test_a_likelihood_that_is_not_a_number_is_no_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    la = fitted()

    def broken(*args: object) -> torch.Tensor:
        probs = probabilities(*args)  # type: ignore[arg-type]
        probs[1] = torch.nan
        return probs

    monkeypatch.setattr(categorical, "probabilities", broken)
    with pytest.raises(NumericalError, match=r"at prior precision \[1.0\] is not a number"):
        la.optimize_prior_precision(HeldOut([VAL], grid=[0.1, 1.0, 10.0]), progress=False)
    monkeypatch.setattr(categorical, "probabilities", lambda *args: 0 * probabilities(*args))
    with pytest.raises(NumericalError, match="infinite at every value"):
        la.optimize_prior_precision(HeldOut([VAL], grid=[0.1, 1.0, 10.0]), progress=False)
    assert la.prior_precision == 1.0


@pytest.mark.parametrize("make", [torch.tensor, iter, tuple])
def test_a_grid_of_any_kind(make: Callable[[list[float]], Any]) -> None:
    la, values = fitted(), [1e-3, 1.0, 1e3]
    best = la.optimize_prior_precision(HeldOut([VAL], grid=values), progress=False)
    found = la.optimize_prior_precision(HeldOut([VAL], grid=make(values)), progress=False)
    assert found == pytest.approx(best)
