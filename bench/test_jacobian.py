"""Jacobians of all logits of a batch of 8 in all LoRA weights: against the bare forward and C backward passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import floors, oracle, peers
from bench.measure import Method, Work, measure
from bench.models import Setting
from bench.test_predict import compared

Prepare = Callable[[Setting], Work]


def projected(setting: Setting) -> Work:
    la, batch = setting.kfac(tokens="expand").fit(setting.loader, progress=False), setting.loader[0]
    return compared(lambda: la.logit_distribution(batch), setting, "expand", lambda result: result[1])


def laplace_torch(backend: str) -> Prepare:
    def prepare(setting: Setting) -> Work:
        model = peers.Logits(peers.own_copy(setting) if backend == "AsdlGGN" else setting)
        interface = peers.laplace_backend(backend)(model, "classification")
        batch = setting.loader[0]
        return Work(
            lambda: interface.jacobians(batch),
            lambda result: oracle.relative(result[0], oracle.jacobian(setting)),
        )

    return prepare


def bayesian_lora(package: str) -> Prepare:
    return lambda setting: Work(
        peers.bayesian_lora_jacobian(setting, package),
        lambda found: oracle.relative(
            torch.cat([value.flatten(2) for value in found.values()], 2), oracle.jacobian(setting)
        ),
    )


METHODS = [
    Method(
        "this project, projected layer by layer",
        projected,
        note="holds no Jacobian: the statistics of its projections, and the logits' covariance from them",
    ),
    Method("this project in laplace-torch", laplace_torch("FastGGN"), headline=True),
    Method("this project in bayesian-lora", bayesian_lora(peers.OURS_IN_BAYESIAN_LORA)),
    Method("laplace-torch, jacrev (curvlinops)", laplace_torch("CurvlinopsGGN"), peer=True),
    Method("laplace-torch, asdl (as the paper's code)", laplace_torch("AsdlGGN"), peer=True),
    Method("bayesian-lora", bayesian_lora("bayesian_lora"), peer=True),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_jacobian(benchmark: BenchmarkFixture, setting: Setting, method: Method) -> None:
    measure(benchmark, "Jacobian", method, setting, floors.jacobian)
