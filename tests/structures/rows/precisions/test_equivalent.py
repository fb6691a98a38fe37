"""What sketches make of a precision, against the whole rows: variances, evidence, effective parameters, refits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import Classes, Evidence, LaplaceLoRA, Regression, Rows
from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.prior.precision import group_keys
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.precisions.lines import lines
from laplace_lora_fast.structures.rows.refit import RefittedCurvature
from laplace_lora_fast.structures.rows.refits.mode import Observations
from laplace_lora_fast.structures.rows.sketches.sketch import random_projection
from laplace_lora_fast.weights import SIDES, WeightName
from tests import tiny
from tests.oracle import assert_close
from tests.structures.dense import TEST, TRAIN, fitted, model_of

LAYERS, RANK, WIDTH, ROWS, UNSEEN = 6, 4, 64, 60, 40
SEEDS = 12
PRECISIONS = (0.1, 1.0, 10.0)
ONES = torch.ones(2 * LAYERS, dtype=torch.float64)


def jacobians(n: int, seed: int) -> list[Tensor]:
    """[n, r, d] of every weight: shared latent causes, energies that fall from layer to layer."""
    causes = torch.randn(200, LAYERS * 2 * RANK * WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, 200, generator=generator) * torch.logspace(0, -1, 200)
    whole = (mixed @ causes).double().view(n, 2 * LAYERS, RANK, WIDTH)
    return [whole[:, index] * 10 ** (-index / LAYERS) / 10 for index in range(2 * LAYERS)]


TRAINED, TESTED = jacobians(ROWS, 1), jacobians(UNSEEN, 2)


def curvature(columns: int, seed: int = 0) -> RowCurvature:
    like = torch.zeros(1, dtype=torch.float64)
    projections = [
        random_projection(WIDTH, columns, 1000 * seed + index, like) for index in range(2 * LAYERS)
    ]
    rows = [(each @ omega).flatten(1) for each, omega in zip(TRAINED, projections, strict=True)]
    layout = Layout(torch.ones(ROWS))
    roots = BlockDiagonal(layout, [torch.full((ROWS, 1, 1), 0.5, dtype=torch.float64)])
    names = [WeightName(str(layer), side) for layer in range(LAYERS) for side in SIDES]
    means = [torch.ones(RANK, WIDTH, dtype=torch.float64) / 8 for _ in names]
    return RowCurvature(names, means, rows, projections, roots)


def variances(found: RowCurvature, precision: Tensor) -> Tensor:
    """Of the unseen functions [n], by the solver that predictions use."""
    parts, (solver,) = found.solvers_of(precision[:, None])
    own = torch.zeros(1 + max(parts), UNSEEN, 1, 1, dtype=torch.float64)
    cross = torch.zeros(1 + max(parts), UNSEEN, 1, ROWS, dtype=torch.float64)
    for part, each, omega, rows in zip(parts, TESTED, found.projections, found.rows, strict=True):
        features = (each @ omega).flatten(1)[:, None]
        own[part] += features @ features.mT
        cross[part] += features @ rows.mT
    return solver.covariance(own, cross).flatten()


@pytest.mark.parametrize("side", [1.0, 5.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_variances_evidence_and_effective_parameters_are_the_whole_rows(
    precision: float, side: float
) -> None:
    """Over many sketches of 32 of 64 columns: what a plain sketch is off by, and what is left of it."""
    prior = precision * torch.tensor([1.0, side] * LAYERS, dtype=torch.float64)
    whole = curvature(WIDTH)
    exact, dimension = variances(whole, prior), whole.effective_parameters(prior)
    found = [curvature(32, seed) for seed in range(SEEDS)]
    ratios = torch.stack([variances(each, prior) / exact for each in found])
    assert abs(float(ratios.median()) - 1) < 0.02
    assert float(ratios.quantile(0.05)) > 0.85
    log_dets = torch.stack([each.log_det_ratio(prior) for each in found])
    assert_close(log_dets.mean(), whole.log_det_ratio(prior), 0.01)
    gammas = torch.stack([each.effective_parameters(prior) for each in found])
    assert_close(gammas.mean(0).sum(), dimension.sum(), 0.01)
    assert_close(gammas.mean(0), dimension, 0.06)
    plain = variances(
        found[0], prior / (found[0].effective(prior) / prior)
    )  # the equivalent of this is the prior
    assert float((plain / ratios[0] / exact).median()) < 0.98


def test_what_is_not_sketched_keeps_its_precision() -> None:
    whole = curvature(WIDTH)
    assert whole.effective(ONES) is ONES
    assert not whole.kernels.sketched


def test_the_evidence_and_the_dimension_are_one_function() -> None:
    """D logdet(H + Lambda) / dlog lambda = -gamma, and gamma's slope is its slope."""
    found, step = curvature(16), 1e-3
    equivalent, scale = found.equivalent(ONES)
    assert scale == 1

    def at(log_scale: float) -> float:
        return float(found.log_det_ratio(math.exp(log_scale) * ONES))

    gamma, slope = equivalent.dimension_and_slope(1.0)
    assert (at(-step) - at(step)) / (2 * step) == pytest.approx(gamma, rel=1e-6)
    assert found.effective_parameters(ONES).sum().item() == pytest.approx(gamma, rel=1e-9)
    up, down = (equivalent.dimension_and_slope(math.exp(s))[0] for s in (step, -step))
    assert slope == pytest.approx((up - down) / (2 * step), rel=1e-3)


@pytest.mark.parametrize("per", ["all", "side", "layer"])
def test_maximal_evidence_meets_mackays_condition(per: str) -> None:
    found = curvature(16)
    keys, norms = group_keys(per, found.names), [float(mean.square().sum()) for mean in found.means]
    best = found.maximise_evidence(keys, norms)
    prior = torch.tensor([best[key] for key in keys], dtype=torch.float64)
    gammas = found.effective_parameters(prior)
    for group, value in best.items():
        mine = [index for index, key in enumerate(keys) if key == group]
        assert value * sum(norms[i] for i in mine) == pytest.approx(float(gammas[mine].sum()), rel=1e-5)


def test_refits_of_a_sketch_are_closer_to_the_whole_rows() -> None:
    layout = Layout(torch.ones(ROWS))
    generator = torch.Generator().manual_seed(3)
    observed = Observations(
        layout,
        Categorical(),
        [torch.zeros(ROWS, 1, dtype=torch.float64)],
        [torch.randint(0, 2, (ROWS,), generator=generator)],
    )
    whole = RefittedCurvature(curvature(WIDTH), observed)
    exact, sharper = variances(whole, ONES), []
    for seed in range(4):
        found = RefittedCurvature(curvature(16, seed), observed)
        sharper.append(variances(found, ONES) / exact)
        assert found.mode(ONES).shrinkage > 0.02
        evidences = [float(each.log_marginal_likelihood(ONES, 0.0, 0.0)) for each in (found, whole)]
        assert evidences[0] == pytest.approx(evidences[1], rel=0.1)
        assert found.effective_parameters(ONES).sum().item() == pytest.approx(
            found.mode(ONES).dimension, rel=1e-6
        )
    assert abs(float(torch.stack(sharper).median()) - 1) < 0.04


def test_lines_group_what_differs_in_scale_alone() -> None:
    grid = torch.logspace(-2, 2, 5, dtype=torch.float64)
    found = lines(torch.cartesian_prod(grid, grid).mT)
    assert len(found) == 9
    assert sorted(place for line in found for place in line.places) == list(range(25))
    assert max(len(line.places) for line in found) == 5


SKETCHED = Rows(columns=6)


def test_several_priors_in_one_pass_are_those_priors_one_by_one() -> None:
    la = fitted(model_of(3), SKETCHED)
    many = [0.1, {"A": 1.0, "B": 3.0}, 30.0, {"A": 10.0, "B": 30.0}, {"A": 3.0, "B": 1.0}]
    _, covs = la.logit_distribution(TEST, prior_precision=many)
    for found, value in zip(covs, many, strict=True):
        assert_close(found, la.logit_distribution(TEST, prior_precision=value)[1], 1e-9)
        assert torch.linalg.eigvalsh(found).min() > 0


@pytest.mark.parametrize("refit", [False, True])
def test_a_file_keeps_it(refit: bool, tmp_path: Path) -> None:
    la = fitted(model_of(3), Rows(columns=6, refit=refit))
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, la.model)
    assert torch.equal(again.predict(TEST), la.predict(TEST))
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())


def test_samples_have_the_predictive_covariance() -> None:
    found = curvature(16)
    samples = found.sample(20_000, torch.Generator().manual_seed(0), ONES)
    outputs = 0
    for drawn, mean, each in zip(samples, found.means, TESTED, strict=True):
        outputs = outputs + (drawn - mean).flatten(1) @ each.flatten(1).mT
    assert_close(outputs.var(0), variances(found, ONES), 0.05)


def test_the_noise_of_a_regression_meets_its_condition() -> None:
    data = TRAIN | {
        "labels": torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    }
    model = tiny.tiny_llama_classifier(2)
    la = LaplaceLoRA(model, Regression(), structure=SKETCHED).fit([data], progress=False)
    la.optimize_prior_precision(Evidence())
    unit = la.snapshot()[0]
    gamma = float(la.posterior.effective_parameters().sum())
    assert -2 * unit.log_likelihood / la.sigma_noise**2 == pytest.approx(14 - gamma, rel=1e-4)


def test_the_summary_says_what_the_sketch_costs() -> None:
    la = fitted(model_of(3), SKETCHED)
    x = 1 - float((la.posterior.curvature.effective(ONES[:8]) / ONES[:8])[0])
    (line,) = [line for line in str(la.summary()).splitlines() if line.startswith("sketch")]
    assert f"{1 - x:.3f} times the prior precision" in line
    assert "sketch" not in str(fitted(model_of(3), "rows").summary())


def test_the_estimated_error_is_about_the_error() -> None:
    """Where the sketch is too small for its correction, which 12 of 64 columns are: from a quarter to all of it."""
    exact = variances(curvature(WIDTH), 0.1 * ONES)
    found = [curvature(12, seed) for seed in range(6)]
    off = torch.stack([variances(each, 0.1 * ONES) / exact - 1 for each in found]).median()
    said = torch.tensor([each.estimated_error(0.1 * ONES) for each in found]).mean()
    assert off < -0.05
    assert said / 5 > off > said


def test_one_column_is_refused() -> None:
    with pytest.raises(ValueError, match="columns must be at least 2"):
        Rows(columns=1)
    LaplaceLoRA(model_of(2), Classes(), structure=Rows(columns=2))
