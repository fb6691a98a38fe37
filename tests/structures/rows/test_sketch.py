"""How many columns a sketch has, and in how many bits its rows are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from laplace_lora_fast import Classes, LaplaceLoRA, LowRank, Rows
from laplace_lora_fast.structures.rows.sketch import columns_for, in_16_bits
from tests import tiny
from tests.oracle import assert_close


def test_columns_follow_the_rows_and_the_weights() -> None:
    small_decoder = 90 * [(8, 576)] + 30 * [(8, 192)]
    assert columns_for(None, small_decoder) == 128
    few, some, many, most = (columns_for(rows, small_decoder) for rows in (80, 1200, 4000, 20_000))
    assert few == some == 108
    assert many == 216
    assert most == 576  # all of them
    all_linear = 210 * [(16, 576)] + 210 * [(16, 1000)]
    assert columns_for(80, all_linear) == 20
    assert columns_for(400, 24 * [(8, 384)]) == 384


def test_a_fit_takes_them_of_a_loader_that_tells_its_size() -> None:
    data = tiny.batch(8, length=6, seed=1, padding="right", classes=3)
    la = LaplaceLoRA(tiny.tiny_llama_classifier(3), Classes(), structure=Rows()).fit([data], progress=False)
    assert "16 of 16" in la.summary()
    with pytest.raises(ValueError, match="columns must be an integer"):
        LowRank(columns=None)


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
        patch.setattr("laplace_lora_fast.structures.rows.fit.in_16_bits", lambda rows, _: rows)
        exact = LaplaceLoRA(model, Classes(), structure=Rows(columns=6)).fit([data], progress=False)
    assert_close(cov, exact.logit_distribution(data)[1], 2e-3)
    assert_close(la.log_marginal_likelihood(), exact.log_marginal_likelihood(), 1e-4)


def test_rows_beyond_the_range_of_fp16_stay_as_they_are() -> None:
    omega = [torch.zeros(8, 4)]
    for factor, kept in ((1.0, torch.float16), (1e6, torch.float32), (1e-6, torch.float32)):
        rows = in_16_bits([factor * torch.randn(5, 12, generator=torch.Generator().manual_seed(0))], omega)
        assert rows[0].dtype == kept
    assert in_16_bits([torch.ones(5, 12).double()], omega)[0].dtype == torch.float64
