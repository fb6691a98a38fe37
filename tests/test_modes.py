"""Modes of the caller's do not reach what is computed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from laplace_lora_fast import EKFAC, KFAC, Answers, Diagonal, Evidence, LaplaceLoRA, LowRank, Rows
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)
TRAIN, TEST = tiny.split(tiny.batch(6, seed=1), 3), tiny.batch(3, seed=2)
STRUCTURES = [Rows(), Rows(columns=8), Rows(refit=True), KFAC(), EKFAC(), Diagonal(), LowRank(rank=8)]


@contextmanager
def by_default(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {"inference": torch.inference_mode, "default device": lambda: by_default("meta")}


def answers(structure):
    la = LaplaceLoRA(tiny.tiny_llama(torch.float32), ANSWERS, structure=structure).fit(TRAIN, progress=False)
    la.optimize_prior_precision(Evidence(), progress=False)
    found = [la.predict(TEST), *la.logit_distribution(TEST), la.uncertainty(TEST).total]
    refitted = structure == Rows(refit=True)  # has no weights to sample around
    return found if refitted else [*found, la.sample(2).outputs(TEST)]


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize("mode", MODES)
def test_no_mode_changes_a_number(mode, structure, monkeypatch):
    model = tiny.tiny_llama(torch.float32)
    monkeypatch.setattr(tiny, "tiny_llama", lambda dtype: model)
    expected = answers(structure)
    with MODES[mode]():
        found = answers(structure)
        assert torch.get_default_device().type == ("meta" if mode == "default device" else "cpu")
    for each, other in zip(found, expected, strict=True):
        assert torch.equal(each, other)
        assert not each.is_inference()


def test_the_model_runs_with_the_caller_s_default_device():
    model, seen = tiny.tiny_llama(), []
    model.register_forward_hook(lambda module, args, out: seen.append(torch.get_default_device().type))
    with by_default("meta"):
        LaplaceLoRA(model, ANSWERS).fit(TRAIN, progress=False).predict(TEST)
    assert set(seen) == {"meta"}
