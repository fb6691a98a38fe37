"""Fit: ours and the peers', each against the bare forward and C - 1 backward passes (goal: at most 1.15 times)."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import floors, peers
from bench.measure import Setting, against_floor

METHODS = {
    "reduce": {"kfac": "reduce"},
    "expand": {"kfac": "expand"},
    "reduce, 1 sampled label": {"kfac": "reduce", "fisher": "mc"},
}


def run(benchmark: BenchmarkFixture, setting: Setting, method: str) -> None:
    benchmark.group = f"fit {setting.name}{' padded' if setting.padded else ''}"
    la = setting.laplace(**METHODS[method])
    against_floor(
        benchmark,
        lambda: la.fit(setting.loader, progress=False),
        lambda: floors.fit(setting.model, setting.loader),
        setting.rounds,
        method=f"this project, {method}",
    )


@pytest.mark.parametrize("method", METHODS)
def test_ours(benchmark: BenchmarkFixture, setting: Setting, method: str) -> None:
    run(benchmark, setting, method)


@pytest.mark.parametrize("method", ["reduce", "expand"])
def test_ours_padded(benchmark: BenchmarkFixture, padded: Setting, method: str) -> None:
    run(benchmark, padded, method)


def test_laplace_torch(benchmark: BenchmarkFixture, setting: Setting) -> None:
    benchmark.group = f"fit {setting.name}"
    fit = peers.laplace_torch(setting.model, setting.loader)
    theirs = float(fit().posterior_precision.logdet())  # at prior precision 1
    ours = float(setting.laplace("expand").fit(setting.loader, progress=False).posterior.log_det_ratio())
    assert theirs == pytest.approx(ours, rel=1e-2)
    against_floor(
        benchmark,
        fit,
        lambda: floors.fit(setting.model, setting.loader),
        setting.peer_rounds,
        method="laplace-torch",
        note=peers.NOTES["laplace-torch fit"],
        check="logdet over ours (expand)",
        check_value=theirs / ours,
    )


def test_bayesian_lora(benchmark: BenchmarkFixture, setting: Setting) -> None:
    benchmark.group = f"fit {setting.name}"
    fit = peers.bayesian_lora_fit(setting.model, setting.loader)
    layer, (low_rank, _) = next(iter(fit().items()))
    captured = float(low_rank.square().sum())
    best = peers.best_last_token_trace(setting.model, setting.loader, layer)
    assert captured == pytest.approx(best, rel=0.3)
    against_floor(
        benchmark,
        fit,
        lambda: floors.fit(setting.model, setting.loader),
        setting.peer_rounds,
        method="bayesian-lora",
        note=peers.NOTES["bayesian-lora fit"],
        check=f"trace over the best rank {peers.N_KFAC} of the last tokens' inputs",
        check_value=captured / best,
    )
