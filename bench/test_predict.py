"""Predict a batch of 8: ours and the peers', each against the bare forward and C - 1 backward passes (goal: 1.15)."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import floors, peers
from bench.measure import Setting, against_floor

# Exact factors of few rows, complete dense ones, and leading eigenpairs with a tail.
FACTORS = {
    "rows": {"kfac": "reduce"},
    "dense": {"kfac": "expand"},
    "rank 10 and tail": {"kfac": "expand", "rank": 10},
}


def run(benchmark: BenchmarkFixture, setting: Setting, factors: str) -> None:
    benchmark.group = f"predict {setting.name}{' padded' if setting.padded else ''}"
    la = setting.laplace(**FACTORS[factors]).fit(setting.loader, progress=False)
    batch = setting.loader[0]
    against_floor(
        benchmark,
        lambda: la.predict(batch, link_approx="probit"),
        lambda: floors.predict(setting.model, batch),
        setting.rounds,
        method=f"this project, {factors}",
    )


@pytest.mark.parametrize("factors", FACTORS)
def test_ours(benchmark: BenchmarkFixture, setting: Setting, factors: str) -> None:
    run(benchmark, setting, factors)


@pytest.mark.parametrize("factors", FACTORS)
def test_ours_padded(benchmark: BenchmarkFixture, padded: Setting, factors: str) -> None:
    run(benchmark, padded, factors)


def contrast_variance(cov: Tensor) -> Tensor:
    """Variances [N, C - 1] of f_c - f_0: what softmax sees of a covariance [N, C, C]."""
    diagonal = cov.diagonal(dim1=1, dim2=2)
    return (diagonal[:, 1:] + diagonal[:, :1] - 2 * cov[:, 0, 1:]).double()


def our_variance(setting: Setting) -> Tensor:
    la = setting.laplace("expand").fit(setting.loader, progress=False)
    return contrast_variance(la.logit_distribution(setting.loader[0])[1])


def test_laplace_torch(benchmark: BenchmarkFixture, setting: Setting) -> None:
    benchmark.group = f"predict {setting.name}"
    posterior = peers.laplace_torch(setting.model, setting.loader)()
    batch = setting.loader[0]
    _, cov = posterior._glm_predictive_distribution(batch)
    ratio = contrast_variance(cov.detach()) / our_variance(setting)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-2, atol=0)
    against_floor(
        benchmark,
        lambda: posterior(batch, pred_type="glm", link_approx="probit"),
        lambda: floors.predict(setting.model, batch),
        setting.peer_rounds,
        method="laplace-torch",
        note=peers.NOTES["laplace-torch predict"],
        check="variance of the contrasts over ours (expand), median",
        check_value=float(ratio.median()),
    )


def test_bayesian_lora(benchmark: BenchmarkFixture, setting: Setting) -> None:
    benchmark.group = f"predict {setting.name}"
    batch = setting.loader[0]
    predict = peers.bayesian_lora_predict(setting.model, setting.loader, batch)
    ratio = contrast_variance(predict()) / our_variance(setting)
    assert ratio.isfinite().all()
    against_floor(
        benchmark,
        predict,
        lambda: floors.predict(setting.model, batch),
        setting.peer_rounds,
        method="bayesian-lora",
        note=peers.NOTES["bayesian-lora predict"],
        check="variance of the contrasts over ours (expand), median",
        check_value=float(ratio.median()),
    )
