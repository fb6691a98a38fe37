"""What is true of every structure: files, samples, tuning, padding, checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from laplace_lora_fast import HeldOut, LaplaceLoRA
from tests import tiny
from tests.oracle import assert_close
from tests.structures.dense import TEST, TRAIN, fitted, model_of

STRUCTURES = ["kfac", "ekfac", "rows", "diagonal"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_round_trips_and_samples(structure: str, tmp_path: Path) -> None:
    model = model_of(3)
    la = fitted(model, structure, prior_precision={"A": 0.5, "B": 1.5})
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, model)
    assert torch.equal(again.predict(TEST), la.predict(TEST))
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert again.structure == la.structure
    draws = [x.posterior.sample(2, torch.Generator().manual_seed(3)) for x in (la, again)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert f"structure {la.structure!r}" in la.summary()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_tunes_by_held_out_data(structure: str) -> None:
    la, grid = fitted(model_of(3), structure), [1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3]
    val = tiny.batch(6, seed=7, padding="right")
    for per in ("all", "side"):
        choices = grid if per == "all" else [{"A": a, "B": b} for a in grid for b in grid]
        nll = []
        for choice in choices:
            probs = la.predict(val, prior_precision=choice)
            nll.append(-probs[torch.arange(len(probs)), val["labels"]].log().mean().item())
        expected = choices[min(range(len(nll)), key=nll.__getitem__)]
        ends = expected.values() if isinstance(expected, dict) else [expected]
        tuning = HeldOut([val], per=per, grid=grid)
        if grid[0] in ends or grid[-1] in ends:
            with pytest.warns(Warning, match="edge"):
                assert la.optimize_prior_precision(tuning, progress=False) == expected
        else:
            assert la.optimize_prior_precision(tuning, progress=False) == expected


@pytest.mark.parametrize("structure", STRUCTURES[1:])
def test_structures_see_through_padding_and_checkpointing(structure: str) -> None:
    model = model_of(3)
    plain = fitted(model, structure)
    padded = LaplaceLoRA(model, "classes", structure=structure)
    padded.fit(tiny.split(tiny.repad(TRAIN, "right", 11), 2), progress=False)
    assert_close(padded.logit_distribution(TEST)[1], plain.logit_distribution(TEST)[1], 1e-9)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        again = fitted(model, structure)
        assert_close(again.logit_distribution(TEST)[1], plain.logit_distribution(TEST)[1], 1e-9)
