"""The prior precision by leaving out one training example at a time."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from laplace_lora_fast import Classes, Evidence, LaplaceLoRA, LaplaceWarning, LeaveOneOut, Regression, Rows
from laplace_lora_fast.prediction import Block
from laplace_lora_fast.prior.grid import DEFAULT_GRID, scores
from laplace_lora_fast.prior.leave_one_out import SUSPICIOUS
from laplace_lora_fast.structures.search import lowest
from tests import tiny
from tests.oracle import assert_close


def loo_nll(la: LaplaceLoRA, labels: Tensor) -> float:
    ((_, mean, cov, _),) = la.posterior.curvature.leave_one_out(la.posterior.prior_precision)
    mean, cov = mean[:, 0], cov[:, 0, 0]
    signs = 2.0 * labels - 1
    return float(-nn.functional.logsigmoid(signs * mean / (1 + math.pi / 8 * cov).sqrt()).mean())


def test_loo_takes_the_best_of_the_grid() -> None:
    data, grid = (
        tiny.batch(7, length=6, seed=1, padding="right", classes=2),
        [1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2],
    )
    model = tiny.tiny_llama_classifier(2)
    la = LaplaceLoRA(model, Classes(), structure=Rows(refit=True)).fit([data], progress=False)
    found = {}
    for la.prior_precision in grid:
        found[la.prior_precision] = loo_nll(la, data["labels"])
    expected = min(found, key=found.__getitem__)
    if expected in (grid[0], grid[-1]):
        with pytest.warns(LaplaceWarning, match="edge"):
            assert la.optimize_prior_precision(LeaveOneOut(grid=grid), progress=False) == expected
    else:
        assert la.optimize_prior_precision(LeaveOneOut(grid=grid), progress=False) == expected
    assert la.prior_precision == expected


def test_coarse_to_fine_finds_the_least_of_what_is_smooth_and_of_any_few() -> None:
    for least in (0, 3, 37, 60, 99, 100):
        seen: list[int] = []

        def value(place: int, least: int = least, seen: list[int] = seen) -> float:
            seen.append(place)
            return abs(place - least) ** 1.5

        assert lowest(value, 101) == least
        assert len(seen) == len(set(seen)) <= 22
    assert lowest([3.0, 1.0, 2.0].__getitem__, 3) == 1
    assert lowest([1.0, 2.0].__getitem__, 2) == 0
    assert lowest([2.0, 1.0, math.nan].__getitem__, 3) == 2  # to be refused


@pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")
@pytest.mark.parametrize("columns", [128, 6])
@pytest.mark.parametrize("classes", [0, 2, 3])
def test_the_default_grid_has_the_same_optimum_as_all_of_its_values(classes: int, columns: int) -> None:
    """Refits from scratch at each of 101 values; with warm starts about a fifth of them is looked at."""
    data = tiny.batch(20, length=6, seed=1, padding="right", classes=classes or 2)
    if not classes:
        data["labels"] = torch.randn(20, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    task = Classes() if classes else Regression(noise=0.7)
    model = tiny.tiny_llama_classifier(classes or 1)
    la = LaplaceLoRA(model, task, structure=Rows(columns=columns, refit=True)).fit([data], progress=False)
    curvature, ones = la.posterior.curvature, torch.ones(8, dtype=torch.float64)
    found = []
    for value in DEFAULT_GRID:
        (block,) = curvature.leave_one_out(value * ones)
        examples, mean, cov, targets = block
        blocks = [Block(examples, mean, cov[None], targets)]
        nll, _ = scores(la.likelihood, blocks, "probit" if classes else None, 1, 0, None if classes else 0.7)
        found.append(float(nll))
    best = la.optimize_prior_precision(LeaveOneOut(), progress=False)
    assert DEFAULT_GRID.index(best) == min(range(101), key=found.__getitem__)


@pytest.mark.parametrize("columns", [128, 6])
@pytest.mark.parametrize("noise", [None, 0.7])
def test_along_a_path_they_are_those_of_each_precision_alone(noise: float | None, columns: int) -> None:
    data = tiny.batch(9, length=6, seed=1, padding="right", classes=3)
    if noise is not None:
        data["labels"] = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    task = Classes() if noise is None else Regression(noise=noise)
    model = tiny.tiny_llama_classifier(3)
    la = LaplaceLoRA(model, task, structure=Rows(columns=columns, refit=True)).fit([data], progress=False)
    curvature, ones = la.posterior.curvature, torch.ones(8, dtype=torch.float64)
    along = la.structure.left_out(curvature)
    for value in (30.0, 10.0, 0.1, 3.0):
        ((_, mean, cov, _),) = curvature.leave_one_out(value * ones)
        ((_, path_mean, path_cov, _),) = along(value)
        assert_close(path_mean, mean, 1e-5)
        assert_close(path_cov, cov, 1e-5)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_far_above_the_evidence_it_warns(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of labels that the kernel may have learnt."""
    data = tiny.batch(7, length=6, seed=1, padding="right", classes=2)
    model = tiny.tiny_llama_classifier(2)
    la = LaplaceLoRA(model, Classes(), structure=Rows(refit=True)).fit([data], progress=False)
    evidence = la.optimize_prior_precision(Evidence(), progress=False)
    chosen = factor * SUSPICIOUS * evidence
    grid = [chosen, chosen * (1 + 1e-9)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LaplaceWarning)
        la.optimize_prior_precision(LeaveOneOut(grid=grid), progress=False)
    said = [str(each.message) for each in caught if "times the evidence's" in str(each.message)]
    assert len(said) == (factor > 1)
    if said:
        assert f"{chosen:.3g}, 22 times the evidence's {evidence:.3g}" in said[0]
