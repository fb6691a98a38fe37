"""Whole rows beside sketched ones, as a trained head's are: what is whole keeps the prior's precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from laplace_lora_fast.likelihoods import Categorical, Gaussian, Likelihood
from laplace_lora_fast.prior.precision import group_keys
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.refit import RefittedCurvature
from laplace_lora_fast.structures.rows.refits.mode import Observations
from laplace_lora_fast.structures.rows.refits.path import LeaveOneOutPath
from laplace_lora_fast.structures.rows.sketches.sketch import random_projection
from laplace_lora_fast.weights import SIDES, WeightName
from tests.oracle import assert_close

LAYERS, RANK, WIDTH, ROWS, UNSEEN, COLUMNS = 5, 4, 64, 60, 40, 20
WEIGHTS = 2 * LAYERS + 1  # the last one is the head, with most of the energy
SEEDS = 8
ONES = torch.ones(WEIGHTS, dtype=torch.float64)
TWO = torch.tensor([1.0, 5.0] * LAYERS + [0.3], dtype=torch.float64)


def jacobians(n: int, seed: int) -> list[Tensor]:
    """[n, r, d] of every weight, with shared latent causes."""
    causes = torch.randn(150, WEIGHTS * RANK * WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, 150, generator=generator) * torch.logspace(0, -1, 150)
    whole = (mixed @ causes).double().view(n, WEIGHTS, RANK, WIDTH) / 10
    return [whole[:, index] * (2 if index == WEIGHTS - 1 else 1) for index in range(WEIGHTS)]


TRAINED, TESTED = jacobians(ROWS, 1), jacobians(UNSEEN, 2)


def of_head(rows: list[Tensor]) -> list[Tensor]:
    return [each * (index == WEIGHTS - 1) for index, each in enumerate(rows)]


def curvature(columns: int, seed: int = 0, trained: list[Tensor] = TRAINED) -> RowCurvature:
    like = torch.zeros(1, dtype=torch.float64)
    projections = [
        random_projection(WIDTH, WIDTH if index == WEIGHTS - 1 else columns, 1000 * seed + index, like)
        for index in range(WEIGHTS)
    ]
    rows = [(each @ omega).flatten(1) for each, omega in zip(trained, projections, strict=True)]
    roots = BlockDiagonal(Layout(torch.ones(ROWS)), [torch.full((ROWS, 1, 1), 0.5, dtype=torch.float64)])
    names = [WeightName(str(layer), side) for layer in range(LAYERS) for side in SIDES]
    means = [torch.ones(RANK, WIDTH, dtype=torch.float64) / 8 for _ in range(WEIGHTS)]
    return RowCurvature([*names, WeightName("head", "A")], means, rows, projections, roots)


def variances(found: RowCurvature, precisions: Tensor, tested: list[Tensor] = TESTED) -> Tensor:
    """Of unseen functions under each prior [n_weights, G], by the solvers that predictions use: [G, n]."""
    parts, solvers = found.solvers_of(precisions)
    own = torch.zeros(1 + max(parts), UNSEEN, 1, 1, dtype=torch.float64)
    cross = torch.zeros(1 + max(parts), UNSEEN, 1, ROWS, dtype=torch.float64)
    for part, each, omega, rows in zip(parts, tested, found.projections, found.rows, strict=True):
        features = (each @ omega).flatten(1)[:, None]
        own[part] += features @ features.mT
        cross[part] += features @ rows.mT
    by_prior = {solver.prior: solver.covariance(own, cross).flatten() for solver in solvers}
    return torch.stack([by_prior[prior] for prior in range(precisions.shape[1])])


@pytest.mark.parametrize("prior", [ONES, TWO], ids=["one", "several"])
@pytest.mark.parametrize("n_priors", [1, 3, 12])
def test_a_head_that_shares_no_example_with_the_sketch_is_exact(n_priors: int, prior: Tensor) -> None:
    """Half of the examples move the head alone, half the sketched weights alone: K is block diagonal."""
    mine = (torch.arange(ROWS) % 2).double()[:, None, None]
    apart = [each * (mine if index == WEIGHTS - 1 else 1 - mine) for index, each in enumerate(TRAINED)]
    priors = prior[:, None] * torch.logspace(-1, 1, n_priors, dtype=torch.float64)
    exact, found = (variances(curvature(m, trained=apart), priors, of_head(TESTED)) for m in (WIDTH, COLUMNS))
    assert_close(found, exact, 1e-9)
    assert float((curvature(COLUMNS, trained=apart).effective(priors[:, 0]) / priors[:, 0])[0]) < 0.98


@pytest.mark.parametrize("prior", [0.1 * ONES, ONES, TWO], ids=["low", "one", "several"])
def test_variances_evidence_and_effective_parameters_are_the_whole_rows(prior: Tensor) -> None:
    whole = curvature(WIDTH)
    found = [curvature(COLUMNS, seed) for seed in range(SEEDS)]
    for tested in (TESTED, of_head(TESTED)):
        exact = variances(whole, prior[:, None], tested)
        ratios = torch.cat([variances(each, prior[:, None], tested) / exact for each in found])
        assert abs(float(ratios.median()) - 1) < 0.03
    log_dets = torch.stack([each.log_det_ratio(prior) for each in found])
    assert_close(log_dets.mean(), whole.log_det_ratio(prior), 0.01)
    gammas = torch.stack([each.effective_parameters(prior) for each in found]).mean(0)
    exact_gammas = whole.effective_parameters(prior)
    assert_close(gammas.sum(), exact_gammas.sum(), 0.01)
    assert_close(gammas[-1], exact_gammas[-1], 0.03)
    assert (found[0].effective(prior) / prior)[-1] == 1


def test_the_evidence_and_the_dimension_are_one_function() -> None:
    found, step = curvature(COLUMNS), 1e-3
    up, down = (found.log_det_ratio(math.exp(s) * ONES) for s in (step, -step))
    assert float((down - up) / (2 * step)) == pytest.approx(
        float(found.effective_parameters(ONES).sum()), rel=0.01
    )


def test_many_priors_in_one_pass_are_those_priors_one_by_one() -> None:
    found, priors = curvature(COLUMNS), ONES[:, None] * torch.logspace(-3, 3, 25, dtype=torch.float64)
    one_by_one = torch.cat([variances(found, column[:, None]) for column in priors.mT])
    assert_close(variances(found, priors), one_by_one, 0.01)
    few = priors[:, ::4]
    assert_close(variances(found, few), one_by_one[::4], 1e-9)


@pytest.mark.parametrize("per", ["all", "side", "layer"])
def test_maximal_evidence_meets_mackays_condition(per: str) -> None:
    found = curvature(COLUMNS)
    keys, norms = group_keys(per, found.names), [float(mean.square().sum()) for mean in found.means]
    best = found.maximise_evidence(keys, norms)
    gammas = found.effective_parameters(torch.tensor([best[key] for key in keys], dtype=torch.float64))
    for group, value in best.items():
        mine = [index for index, key in enumerate(keys) if key == group]
        assert value * sum(norms[i] for i in mine) == pytest.approx(float(gammas[mine].sum()), rel=1e-5)


def test_the_noise_of_a_regression_meets_its_condition() -> None:
    found = curvature(COLUMNS)
    noise = found.best_noise(TWO, residuals=30.0, count=ROWS)
    gamma = float(found.scaled(noise**-2).effective_parameters(TWO).sum())
    assert 30.0 / noise**2 == pytest.approx(ROWS - gamma, rel=1e-6)


def refitted(columns: int, likelihood: Likelihood, seed: int = 0) -> RefittedCurvature:
    layout, generator = Layout(torch.ones(ROWS)), torch.Generator().manual_seed(3)
    labels = torch.randint(0, 2, (ROWS,), generator=generator)
    targets = labels if isinstance(likelihood, Categorical) else labels[:, None].double()
    prior = [torch.zeros(ROWS, 1, dtype=torch.float64)]
    return RefittedCurvature(curvature(columns, seed), Observations(layout, likelihood, prior, [targets]))


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=["classes", "regression"])
def test_refits_and_their_left_out_examples(likelihood: Likelihood) -> None:
    exact = variances(refitted(WIDTH, likelihood), ONES[:, None])
    found = [refitted(COLUMNS, likelihood, seed) for seed in range(4)]
    ratios = torch.cat([variances(each, ONES[:, None]) / exact for each in found])
    assert abs(float(ratios.median()) - 1) < 0.04
    mode = found[0].mode(ONES)
    assert mode.shrinkage > 0.02
    assert (found[0].effective(ONES) / ONES)[-1] == 1
    own = found[0].effective_parameters(ONES)
    assert float(own[:-1].sum()) == pytest.approx(mode.dimension, rel=1e-6)
    path = LeaveOneOutPath(found[0])
    path.at(2.0)
    for one, other in zip(path.at(1.0)[0], found[0].leave_one_out(ONES)[0], strict=True):
        assert_close(one, other, 1e-4)
