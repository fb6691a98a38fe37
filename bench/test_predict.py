"""Predict a batch of 8: against the bare forward pass and the C - 1 backward passes of the contrasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import floors, oracle, peers
from bench.measure import Method, Work, measure
from bench.models import Setting

Prepare = Callable[[Setting], Work]


def contrast_variance(cov: Tensor) -> Tensor:
    """Variances [N, C - 1] of f_c - f_0: what softmax sees of a covariance [N, C, C]."""
    diagonal = cov.diagonal(dim1=1, dim2=2)
    return diagonal[:, 1:] + diagonal[:, :1] - 2 * cov[:, 0, 1:]


def compared(
    run: Callable[[], Any], setting: Setting, kfac: str | None, cov: Callable[[Any], Tensor]
) -> Work:
    """Work with the oracle's variances as its truth; `cov` gives its covariance from what it returned."""
    return Work(
        run,
        lambda result: oracle.relative(contrast_variance(cov(result)), oracle.variance(setting, kfac)),
    )


def ours(kfac: str | None, **options: Any) -> Prepare:
    """With kfac = None the default structure, exact rows."""

    def prepare(setting: Setting) -> Work:
        la = setting.kfac(tokens=kfac, **options) if kfac else setting.default()
        batch = setting.loader[0]
        la.fit(setting.loader, progress=False)
        return compared(
            lambda: la.predict(batch, link_approx="probit"),
            setting,
            kfac,
            lambda _: la.logit_distribution(batch)[1],
        )

    return prepare


def laplace_torch(posterior_of: Callable[[Setting], Any], kfac: str = "expand by example") -> Prepare:
    def prepare(setting: Setting) -> Work:
        posterior, batch = posterior_of(setting), setting.loader[0]
        return compared(
            lambda: posterior(batch, pred_type="glm", link_approx="probit"),
            setting,
            kfac,
            lambda _: posterior._glm_predictive_distribution(batch)[1],
        )

    return prepare


def paper(setting: Setting) -> Work:
    """Jacobians by asdl, as laplace-torch 0.1 and with it the paper's code took them; 0.3 takes jacrev instead."""
    posterior, batch = peers.laplace_torch(setting, "AsdlGGN"), setting.loader[0]

    def run() -> Tensor:
        jacobian, _ = posterior.backend.jacobians(batch)
        return posterior.functional_variance(jacobian.detach())

    return compared(run, setting, "expand by example", lambda cov: cov)


def bayesian_lora(package: str, kfac: str) -> Prepare:
    return lambda setting: compared(
        peers.bayesian_lora_predict(setting, package), setting, kfac, lambda cov: cov
    )


METHODS = [
    Method(
        "this project, rows (default)",
        ours(None),
        "never",
        "the GGN of all weights together, its rows sketched to 128 columns a layer",
        headline=True,
    ),
    Method("this project, KFAC from rows", ours("reduce"), headline=True),
    Method("this project, KFAC from dense factors", ours("expand"), headline=True),
    Method(
        "this project, KFAC of rank 10 and tail",
        ours("expand", rank=10),
        "never",
        "factors of rank 10, their trace kept",
    ),
    Method("this project in laplace-torch, lowrank_kron", laplace_torch(peers.lowrank_kron, "reduce")),
    Method(
        "this project in laplace-torch",
        laplace_torch(lambda setting: peers.laplace_torch(setting, "FastGGN")),
    ),
    Method(
        "this project in bayesian-lora",
        bayesian_lora(peers.OURS_IN_BAYESIAN_LORA, "reduce"),
        "never",
        "factors of rank 10 without a tail",
    ),
    Method(
        "laplace-torch, curvlinops",
        laplace_torch(lambda setting: peers.laplace_torch(setting, "CurvlinopsGGN")),
        "unpadded",
        "its fit counts padding as data",
        peer=True,
    ),
    Method(
        "laplace-torch, asdl (as the paper's code)",
        paper,
        "never",
        "curvature too large by the length (see fit)",
        peer=True,
    ),
    Method(
        "bayesian-lora",
        bayesian_lora("bayesian_lora", "expand"),
        "never",
        "from its own factors (see fit)",
        peer=True,
    ),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_predict(benchmark: BenchmarkFixture, setting: Setting, method: Method) -> None:
    measure(benchmark, "predict", method, setting, floors.predict)
