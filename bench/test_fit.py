"""Fit: from a model and its training batches to the curvature, against the bare passes that its Fisher takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import floors, oracle, peers
from bench.measure import Method, Work, measure
from bench.models import Setting
from laplace_lora_fast import LaplaceLoRA, Rows

Prepare = Callable[[Setting], Work]


def ours(reference: str, **options: Any) -> Prepare:
    def prepare(setting: Setting) -> Work:
        la = setting.kfac(**options)
        return compared(lambda: la.fit(setting.loader, progress=False), curvature, setting, reference)

    return prepare


def curvature(la: LaplaceLoRA) -> oracle.Curvature:
    weights = [getattr(layer, side) for layer in la.factors.values() for side in "AB"]
    return [(weight.input_factor, weight.gradient_factor) for weight in weights]


def compared(
    run: Callable[[], Any],
    read: Callable[[Any], oracle.Curvature],
    setting: Setting,
    reference: str,
    fisher: str = "exact",
) -> Work:
    """Work whose result, read as a curvature, has the oracle's `reference` as its truth."""
    return Work(
        run, lambda result: oracle.distance(read(result), oracle.curvature(setting, reference, fisher))
    )


def rows(setting: Setting) -> Work:
    """The default structure; its error is that of the GGN's eigenvalues."""
    la = setting.default()

    def error(fitted: LaplaceLoRA) -> float:
        fit, expected = fitted.snapshot()[0], oracle.ggn_eigenvalues(setting)
        assert fit.structure == Rows()
        curvature = fit.curvature
        values, _ = curvature.whitened_spectrum(torch.ones(len(curvature.names), dtype=torch.float64))
        return oracle.relative(values.sort(descending=True).values, expected[: len(values)])

    return Work(lambda: la.fit(setting.loader, progress=False), error)


def laplace_torch(backend: str) -> Prepare:
    return lambda setting: compared(
        peers.laplace_torch_fit(setting, backend), peers.laplace_torch_curvature, setting, "expand by example"
    )


def bayesian_lora(package: str, **options: Any) -> Prepare:
    return lambda setting: compared(
        peers.bayesian_lora_fit(setting, package, **options), peers.bayesian_lora_curvature, setting, "expand"
    )


def kronfluence(setting: Setting) -> Work:
    return compared(
        peers.kronfluence_fit(setting), peers.kronfluence_curvature, setting, "expand", "empirical"
    )


PAPER = "all positions count, pads too, and nothing is divided by the length"
LAST_TOKEN = (
    "last token of each layer only, factors of rank 10 without a tail, curvature too small by the batch size"
)

SKETCHED = "the GGN of all weights together, its rows sketched to 128 columns a layer"

EXACT_FISHER = [
    Method("this project, rows (default)", rows, "never", SKETCHED, headline=True),
    Method("this project, KFAC reduce", ours("reduce", tokens="reduce"), headline=True),
    Method("this project, KFAC expand", ours("expand", tokens="expand"), headline=True),
    Method("this project, paper's convention", ours("expand by example", tokens="paper"), "never", PAPER),
    Method("this project in laplace-torch", laplace_torch("FastGGN")),
    Method(
        "laplace-torch, curvlinops",
        laplace_torch("CurvlinopsGGN"),
        "unpadded",
        "counts padding as data",
        peer=True,
    ),
    Method("laplace-torch, asdl (as the paper's code)", laplace_torch("AsdlGGN"), "never", PAPER, peer=True),
]
ONE_LABEL = [
    Method(
        "this project, KFAC reduce, sampled label",
        ours("reduce", fisher="mc"),
        "never",
        "one sampled label",
        headline=True,
    ),
    Method(
        "this project, KFAC expand, sampled label",
        ours("expand", tokens="expand", fisher="mc"),
        "never",
        "one sampled label",
    ),
    Method(
        "this project in bayesian-lora, its numbers",
        bayesian_lora(peers.OURS_IN_BAYESIAN_LORA, compat=True),
        "never",
        f"one sampled label; {LAST_TOKEN}",
    ),
    Method(
        "bayesian-lora",
        bayesian_lora("bayesian_lora"),
        "never",
        f"one sampled label; {LAST_TOKEN}",
        peer=True,
    ),
    Method("kronfluence, factors", kronfluence, note="the data's label in place of a sampled one", peer=True),
]


@pytest.mark.parametrize("method", EXACT_FISHER, ids=str)
def test_exact_fisher(benchmark: BenchmarkFixture, setting: Setting, method: Method) -> None:
    measure(benchmark, "fit", method, setting, floors.fit)


@pytest.mark.parametrize("method", ONE_LABEL, ids=str)
def test_one_label(benchmark: BenchmarkFixture, setting: Setting, method: Method) -> None:
    measure(benchmark, "fit, one label", method, setting, floors.fit_one_label)
