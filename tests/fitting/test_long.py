"""A hundred thousand examples as a stream: what is in memory does not grow with them."""

from __future__ import annotations

import logging

import pytest
import torch

from laplace_lora_fast import KFAC, Answers, LaplaceLoRA, LowRank, progress
from tests import tiny
from tests.memory import Peak

ANSWERS = Answers(tiny.ANSWERS)


def stream(batches, size, peak, after):
    """Makes its batches as they are asked for; notes the peak so far after some of them."""
    for index in range(batches):
        if index == after:
            peak.early = peak.most
        yield tiny.batch(size, 2, seed=index, padding=None)


@pytest.mark.parametrize(
    ("structure", "batches"), [(KFAC(factors="dense"), 100), (LowRank(rank=8, columns=4), 20)], ids=repr
)
def test_memory_is_constant(structure, batches):
    model = tiny.tiny_llama(torch.float32, targets=("q_proj",), r=2, layers=1)
    la = LaplaceLoRA(model, ANSWERS, structure=structure)
    with Peak() as peak:
        la.fit(stream(batches, 1000, peak, after=4), progress=False)
    assert la.snapshot()[0].n_examples == 1000 * batches
    assert peak.most <= 1.01 * peak.early


def test_a_log_says_how_far_and_how_long_yet(caplog, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="laplace_lora_fast"):
        assert list(progress.track([1, 2, 3, 4], "fit", True)) == [1, 2, 3, 4]
        assert list(progress.track(iter([1, 2]), "fit", True)) == [1, 2]
        assert list(progress.track([1], "fit", False)) == [1]
    lines = [record.message for record in caplog.records]
    assert [line.partition(" batches")[0] for line in lines] == [
        *(f"fit: {done} of 4" for done in range(1, 5)),
        "fit: 1",
        "fit: 2",
    ]
    assert lines[3].endswith("0 s left")


def test_lines():
    assert (
        progress.line("fit", 1200, 12500, 84.5) == "fit: 1,200 of 12,500 batches, 14.2 a second, 13 min left"
    )
    assert progress.line("fit", 5, None, 10) == "fit: 5 batches, 0.5 a second"
    assert [progress.duration(s) for s in (40, 99.4, 600, 18720)] == ["40 s", "99 s", "10 min", "5.2 h"]
