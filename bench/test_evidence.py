"""The evidence of a fit, and the prior precision that maximises it: no method passes the model, there is no floor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import oracle, peers
from bench.measure import Method, Work, measure
from bench.models import Setting
from laplace_lora_fast import Evidence

Prepare = Callable[[Setting], Work]


def evaluated(run: Callable[[], float], setting: Setting, kfac: str) -> Work:
    return Work(run, lambda found: oracle.relative(found, oracle.evidence(setting, kfac)))


def maximised(run: Callable[[], float], setting: Setting, kfac: str) -> Work:
    """Work that returns a prior precision; its error is what evidence that leaves on the table."""

    def error(prior_precision: float) -> float:
        return oracle.relative(
            oracle.evidence(setting, kfac, prior_precision), oracle.best_evidence(setting, kfac)
        )

    return Work(run, error)


def ours(setting: Setting) -> Work:
    la = setting.kfac().fit(setting.loader, progress=False)
    return evaluated(lambda: float(la.log_marginal_likelihood()), setting, "reduce")


def ours_maximised(setting: Setting) -> Work:
    la = setting.kfac().fit(setting.loader, progress=False)
    return maximised(lambda: la.optimize_prior_precision(Evidence()), setting, "reduce")


def laplace_torch(setting: Setting) -> Work:
    posterior = peers.laplace_torch(setting, "CurvlinopsGGN")
    prior_precision = torch.tensor(oracle.PRIOR_PRECISION)
    return evaluated(
        lambda: float(posterior.log_marginal_likelihood(prior_precision)), setting, "expand by example"
    )


def laplace_torch_maximised(setting: Setting) -> Work:
    posterior = peers.laplace_torch(setting, "CurvlinopsGGN")

    def run() -> float:
        posterior.optimize_prior_precision("glm", "marglik", prior_structure="scalar")
        found = float(posterior.prior_precision)
        posterior.prior_precision = oracle.PRIOR_PRECISION
        return found

    return maximised(run, setting, "expand by example")


def bayesian_lora(package: str, kfac: str) -> Prepare:
    return lambda setting: evaluated(peers.bayesian_lora_evidence(setting, package), setting, kfac)


EVALUATED = [
    Method("this project", ours, headline=True),
    Method(
        "this project in bayesian-lora",
        bayesian_lora(peers.OURS_IN_BAYESIAN_LORA, "reduce"),
        "never",
        "factors of rank 10 without a tail",
    ),
    Method("laplace-torch", laplace_torch, "unpadded", "its fit counts padding as data", peer=True),
    Method(
        "bayesian-lora",
        bayesian_lora("bayesian_lora", "expand"),
        "never",
        "signs of the norm and of the log determinants, the norm not squared, one log prior term for all layers",
        peer=True,
    ),
]
MAXIMISED = [
    Method("this project", ours_maximised, headline=True),
    Method(
        "laplace-torch",
        laplace_torch_maximised,
        "never",
        "100 steps of Adam, its default; the error is what evidence is left",
        peer=True,
    ),
]


@pytest.mark.parametrize("method", EVALUATED, ids=str)
def test_evidence(benchmark: BenchmarkFixture, setting: Setting, method: Method) -> None:
    measure(benchmark, "evidence", method, setting, rounds=20)


@pytest.mark.parametrize("method", MAXIMISED, ids=str)
def test_prior_precision(benchmark: BenchmarkFixture, setting: Setting, method: Method) -> None:
    measure(benchmark, "prior precision", method, setting, rounds=5)
