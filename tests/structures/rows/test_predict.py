"""Predictions from rows that wait for each other."""

from __future__ import annotations

import pytest
import torch

from laplace_lora_fast import Answers, LaplaceLoRA, Rows
from laplace_lora_fast.prediction import distribution
from laplace_lora_fast.structures.rows.predict import RowPredictor
from tests import tiny
from tests.oracle import assert_close


@pytest.mark.parametrize("priors", [[1.0], [0.5, 2.0, {"A": 1.0, "B": 3.0}]])
@pytest.mark.parametrize("refit", [False, True])
def test_training_rows_are_read_once_for_many_batches(
    refit: bool, priors: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two functions an example: five batches of three, alone, in pairs and together."""
    la = LaplaceLoRA(tiny.tiny_llama(), Answers(tiny.ANSWERS), structure=Rows(columns=6, refit=refit))
    la.fit(tiny.split(tiny.batch(7, 5), 3), progress=False)
    loader, read = tiny.split(tiny.batch(14, 6, seed=4), 3), []
    multiply = RowPredictor._multiply

    def watched(self: RowPredictor) -> None:
        read.append(sum(block.mean.numel() for block in self._waiting))
        multiply(self)

    monkeypatch.setattr(RowPredictor, "_multiply", watched)
    found, counts = [], []
    for together in (1, 9, 1000):
        monkeypatch.setattr(RowPredictor, "together", together)
        read.clear()
        with la._linearised(1.0) as linearised:
            (block,) = distribution(linearised, la._priors(priors)[0], loader)
        found.append((block.mean, block.cov, block.targets))
        counts.append([count for count in read if count])
    assert counts == [[6, 6, 6, 6, 4], [12, 12, 4], [28]]
    for one in found[1:]:
        for mine, theirs in zip(one, found[0], strict=True):
            assert mine.shape == theirs.shape
            assert_close(mine.double(), theirs.double(), 1e-12)
    assert torch.isfinite(found[0][1]).all()
