"""How many columns a sketch has, and in how many bits its rows are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from laplace_lora_fast import Classes, LaplaceLoRA, LowRank, Rows
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.rows.sketches.energies import EnergyAccumulator
from laplace_lora_fast.structures.rows.sketches.sketch import features_for, in_16_bits, mean_columns, spread
from tests import tiny
from tests.oracle import assert_close

SMALL_DECODER = 90 * [(8, 576)] + 30 * [(8, 192)]


def test_features_follow_the_rows_and_the_weights() -> None:
    few, some, many = (features_for(rows, SMALL_DECODER) for rows in (80, 1200, 4000))
    assert (few, some, many) == (50_000, 50_000, 160_000)
    assert features_for(20_000, SMALL_DECODER) is None  # all of them
    assert features_for(1300, 24 * [(8, 384)]) is None
    assert [mean_columns(rows, SMALL_DECODER) for rows in (None, 80, 20_000)] == [128, 52, 576]


def test_columns_are_spread_by_energy() -> None:
    energies = [10 ** (-index / 30) for index in range(120)]
    columns = spread(25_000, energies, SMALL_DECODER)
    assert sorted(columns, reverse=True) == columns
    assert all(each % 4 == 0 for each in columns)
    assert columns[30] / columns[0] == pytest.approx(10**-0.5, rel=0.1)
    assert 0.95 < 8 * sum(columns) / 25_000 <= 1
    steep = spread(25_000, [10.0**-index for index in range(120)], SMALL_DECODER)
    assert (steep[0], steep[-1]) == (572, 4)  # never all: what is whole would need a precision of its own
    assert len(set(spread(25_000, [0.0] * 120, SMALL_DECODER))) == 1
    assert spread(25_000, [2 * each for each in energies], SMALL_DECODER) == columns
    assert min(spread(10, energies, SMALL_DECODER)) == 4  # at least


def sketching(patch: pytest.MonkeyPatch) -> None:
    """As if the tiny models' 500 features were many."""
    patch.setattr("laplace_lora_fast.structures.rows.sketches.sketch._FEATURES", 200)
    patch.setattr("laplace_lora_fast.structures.rows.sketches.sketch._A_ROW", 5)


@pytest.mark.parametrize("structure", [Rows(), Rows(refit=True), LowRank(rank=30)], ids=repr)
def test_a_fit_spreads_columns_by_the_energy_of_its_first_batch(
    structure: Rows | LowRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketching(monkeypatch)
    model = tiny.tiny_llama_classifier(3)
    data = tiny.split(tiny.batch(20, length=6, seed=1, padding="right", classes=3), 10)
    la = LaplaceLoRA(model, Classes(), structure=structure).fit(data, progress=False)
    kept = [omega.shape[1] for omega in la.posterior.curvature.projections]
    whole = LaplaceLoRA(model, Classes(), structure=Rows(columns=999)).fit(data[:1], progress=False)
    curvature = whole.posterior.curvature
    energies = [float(rows.square().sum()) for rows in curvature.rows]
    wanted = spread(200, energies, [tuple(mean.shape) for mean in curvature.means])
    assert len(set(kept)) > 1
    assert (
        sum(abs(one - other) for one, other in zip(kept, wanted, strict=True)) <= 8
    )  # squared norms of a sketch
    assert la.snapshot()[0].n_examples == 20


def test_energies_are_squared_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laplace_lora_fast.structures.rows.sketches.energies._COLUMNS", 999)
    model = tiny.tiny_llama_classifier(3)
    data = tiny.batch(6, length=6, seed=1, padding="right", classes=3)
    la = LaplaceLoRA(model, Classes(), structure=Rows(columns=999)).fit([data], progress=False)
    found: list[list[float]] = []
    with pytest.MonkeyPatch.context() as patch:
        sketching(patch)
        patch.setattr(
            "laplace_lora_fast.structures.rows.sketches.energies.spread",
            lambda features, energies, shapes: found.append(energies) or [4] * len(shapes),
        )
        LaplaceLoRA(model, Classes(), structure=Rows()).fit([data], progress=False)
    expected = [rows.square().sum() for rows in la.posterior.curvature.rows]
    assert_close(torch.tensor(found[0], dtype=torch.float64), torch.stack(expected), 1e-9)


def test_a_fit_takes_them_of_a_loader_that_tells_its_size() -> None:
    data = tiny.batch(8, length=6, seed=1, padding="right", classes=3)
    la = LaplaceLoRA(tiny.tiny_llama_classifier(3), Classes(), structure=Rows()).fit([data], progress=False)
    assert "16 of 16" in la.summary()


def test_sketched_rows_of_a_single_precision_model_are_kept_in_16_bits(tmp_path: Path) -> None:
    """As the file has them; predictions hardly move."""
    data = tiny.batch(20, length=6, seed=1, padding="right", classes=3)
    model = tiny.tiny_llama_classifier(3, torch.float32)
    la = LaplaceLoRA(model, Classes(), structure=Rows(columns=6)).fit([data], progress=False)
    curvature = la.posterior.curvature
    assert {rows.dtype for rows in curvature.rows} == {torch.float16}
    _, cov = la.logit_distribution(data)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, model)
    assert torch.equal(again.predict(data), la.predict(data))
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert len(la.posterior.sample(2, torch.Generator())[0]) == 2
    whole = LaplaceLoRA(model, Classes(), structure=Rows(columns=999)).fit([data], progress=False)
    assert {rows.dtype for rows in whole.posterior.curvature.rows} == {torch.float32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("laplace_lora_fast.structures.rows.fit.in_16_bits", lambda rows, *_: rows)
        exact = LaplaceLoRA(model, Classes(), structure=Rows(columns=6)).fit([data], progress=False)
    assert_close(cov, exact.logit_distribution(data)[1], 2e-3)
    assert_close(la.log_marginal_likelihood(), exact.log_marginal_likelihood(), 1e-4)


def test_rows_beyond_the_range_of_fp16_stay_as_they_are() -> None:
    omega = [torch.zeros(8, 4)]
    for factor, kept in ((1.0, torch.float16), (1e6, torch.float32), (1e-6, torch.float32)):
        rows = in_16_bits([factor * torch.randn(5, 12, generator=torch.Generator().manual_seed(0))], omega)
        assert rows[0].dtype == kept
    assert in_16_bits([torch.ones(5, 12).double()], omega)[0].dtype == torch.float64


def test_energies_go_on_from_their_state() -> None:
    layers = [layer.weights for layer in LaplaceLoRA(tiny.tiny_llama_classifier(3), Classes()).layers]
    first, second = EnergyAccumulator(layers, seed=0), EnergyAccumulator(layers, seed=0)
    first.observe_rows(1, torch.full((2, 3), 2.0))
    first.finish()
    second.restore(first.state())
    second.observe_rows(0, torch.ones(1, 2))
    second.join(Ranks(None))
    assert second.result()[:3] == pytest.approx([2.0, 24.0, 0.0])
    second.observe_rows(2, torch.full((1, 1), torch.inf))
    assert second.result()[2] == 0  # its batch is skipped, or fails, in the fit
