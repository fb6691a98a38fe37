"""The leading directions of the GGN against all of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from laplace_lora_fast import Evidence, HeldOut, LaplaceLoRA, LowRank, MonteCarlo, Rows
from laplace_lora_fast.structures.low_rank import algebra as low_rank
from laplace_lora_fast.structures.low_rank.algebra import add_rows_, as_rows, nystrom
from tests import tiny
from tests.oracle import assert_close
from tests.structures.dense import PRIORS, TEST, fitted, model_of


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("fisher", ["exact", "empirical", MonteCarlo(2)])
def test_as_many_directions_as_rows_are_the_rows(fisher: str | MonteCarlo, prior: str) -> None:
    """Covariance, evidence, effective parameters, covariance of a weight: 14 rows, 40 directions."""
    model = model_of(3)
    rows = fitted(model, Rows(fisher=fisher), prior_precision=PRIORS[prior])
    low = fitted(model, LowRank(rank=40, fisher=fisher), prior_precision=PRIORS[prior])
    assert_close(low.logit_distribution(TEST)[1], rows.logit_distribution(TEST)[1], 1e-6)
    assert low.log_marginal_likelihood().item() == pytest.approx(
        rows.log_marginal_likelihood().item(), rel=1e-6
    )
    gammas = (la.posterior.effective_parameters() for la in (low, rows))
    assert_close(*gammas, 1e-6)
    name = low.posterior.curvature.names[0]
    assert_close(low.posterior.covariance(*name), rows.posterior.covariance(*name), 1e-6)


def test_a_few_directions_leave_curvature_out_and_never_add_any() -> None:
    """Variances are between the rows' and the prior's, and fall with the rank."""
    model, many = model_of(3), tiny.batch(40, length=6, seed=1, padding="right", classes=3)

    def variances(structure: Rows | LowRank) -> torch.Tensor:
        la = LaplaceLoRA(model, "classes", structure=structure).fit(tiny.split(many, 8), progress=False)
        return la.logit_distribution(TEST)[1].diagonal(dim1=1, dim2=2)

    exact, *found = (
        variances(each) for each in (Rows(), LowRank(rank=60), LowRank(rank=20), LowRank(rank=5))
    )
    medians = [float((each / exact).median()) for each in found]
    assert all((each > exact * (1 - 1e-6)).all() for each in found)
    assert medians[0] < 1.1 < medians[1] < medians[2]


def approximated(sketch: torch.Tensor, omega: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """B^T of a sketch, which is changed."""
    return as_rows(sketch, nystrom(sketch, omega), dtype)


def test_batches_add_up_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test matrix is kept in 16 bits, and used as it is."""
    monkeypatch.setattr(low_rank, "BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 31, generator=generator, dtype=torch.float64)
    omega = low_rank.test_matrix(31, 5, 0, torch.device("cpu"))
    assert omega.dtype == torch.float16
    sketch = torch.zeros(31, 5, dtype=torch.float64)
    for batch in rows.split(5):
        add_rows_(sketch, omega, batch)
    assert_close(sketch, rows.mT @ (rows @ omega.double()), 1e-12)


def test_the_approximation_is_below_the_matrix_and_ordered() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 80, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 80)
    omega = torch.randn(80, 20, generator=generator, dtype=torch.float64)
    whole = rows.mT @ rows
    found = approximated(whole @ omega, omega, torch.float64)
    gap = torch.linalg.eigvalsh(whole - found.mT @ found)
    assert gap.min() > -1e-9 * whole.trace()
    energies = found.square().sum(1)
    assert (energies.diff() <= 1e-12 * energies[0]).all()
    assert_close(found @ found.mT, torch.diag(energies), 1e-9)
    assert energies.sum() > 0.9 * whole.trace()
    assert approximated(torch.zeros(80, 20).double(), omega, torch.float64).abs().max() == 0


def test_a_model_in_single_precision_keeps_what_small_precisions_look_at() -> None:
    """Eigenvalues over eight decades: a sketch in fp32 lost all below 1e-6 of the largest, whatever the rank."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 400, generator=generator) * torch.logspace(2, -2, 30)[:, None]
    omega = low_rank.test_matrix(400, 60, 0, torch.device("cpu"))
    wide = rows.double()
    found = approximated(wide.mT @ (wide @ omega.double()), omega, torch.float32)
    assert found.dtype == torch.float32
    exact, kept = (torch.linalg.eigvalsh(each @ each.mT)[-30:] for each in (wide, found.double()))
    assert exact[0] < 1e-7 * exact[-1]
    assert ((kept / exact - 1).abs() < 1e-3).all()


def test_directions_of_a_model_in_single_precision_are_its_rows() -> None:
    """At a prior precision a millionth of the largest curvature."""
    model = tiny.tiny_llama_classifier(3, torch.float32)
    with torch.no_grad():
        model.score.weight.mul_(30)
    rows, low = (fitted(model, each) for each in (Rows(), LowRank(rank=40)))
    largest = float(rows.posterior.curvature.whitened_spectrum(torch.ones(8).double())[0].max())
    prior = 1e-6 * largest
    covs = [la.logit_distribution(TEST, prior_precision=prior)[1] for la in (rows, low)]
    assert_close(*covs, 1e-3)


@pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")  # the grid's edge
def test_tuning_samples_and_files(tmp_path: Path) -> None:
    la = fitted(model_of(3), LowRank(rank=10))
    grid = (0.1, 1.0, 10.0)
    held_out = tiny.batch(6, seed=7, padding="right", classes=3)
    best = la.optimize_prior_precision(HeldOut([held_out], grid=grid), progress=False)
    assert best in grid
    best = la.optimize_prior_precision(Evidence())
    up, down = (la.log_marginal_likelihood(best * math.exp(s)).item() for s in (1e-4, -1e-4))
    assert abs(up - down) / 2e-4 < 1e-5
    assert len(la.sample_adapters(tmp_path / "samples", 2, force=True)) == 2
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, la.model)
    assert torch.equal(again.predict(TEST), la.predict(TEST))
    assert str(again.summary()) == str(la.summary())
    assert "% of the trace of 14 rows" in la.summary()


def test_nothing_grows_with_the_number_of_examples() -> None:
    model = model_of(3)
    sizes = []
    for n in (20, 200):
        data = tiny.batch(n, length=6, seed=1, padding="right", classes=3)
        la = LaplaceLoRA(model, "classes", structure=LowRank(rank=16)).fit(
            tiny.split(data, 20), progress=False
        )
        sizes.append(sum(each.numel() for each in la.posterior.curvature.tensors().values()))
    assert sizes[0] == sizes[1]


def test_what_is_refused() -> None:
    model = model_of(3)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LowRank(rank=0)
    with pytest.raises(ValueError, match="keeps to no budget"):
        LaplaceLoRA(model, "classes", structure=LowRank(rank=3), budget=10**6)
    with pytest.raises(ValueError, match="holds no direction"):
        fitted(model, LowRank(), budget=100)
    with pytest.raises(ValueError, match="columns must be at least 2"):
        LowRank(columns=1)
    with pytest.raises(ValueError, match=r"needs structure=Rows\(refit=True\)"):
        fitted(model, LowRank(rank=3)).optimize_prior_precision("leave_one_out", progress=False)
