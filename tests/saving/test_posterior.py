"""Posterior files: what was fitted comes back bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from laplace_lora_fast import Answers, Classes, Evidence, LaplaceLoRA, Outputs, StateError
from laplace_lora_fast.saving import checked
from tests import tiny
from tests.saving.cases import (
    ANSWERS,
    CASES,
    QKV,
    assert_equal,
    build,
    build_model,
    data_for,
    ends,
    everything,
    with_code,
)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bitwise(name, tmp_path):
    la, model = build(name)
    expected, summary = everything(la), la.summary()
    la.save(tmp_path / "new" / "folder")
    again = LaplaceLoRA.load(tmp_path / "new" / "folder", model, task=with_code(name))
    assert_equal(everything(again), expected)
    assert again.summary() == summary
    for setting in ("prior_precision", "task", "structure", "sigma_noise", "seed", "budget"):
        assert getattr(again, setting) == getattr(la, setting), setting
    fresh = LaplaceLoRA.load(str(tmp_path / "new" / "folder"), CASES[name][0](), task=with_code(name))
    assert_equal(everything(fresh), expected)


@pytest.mark.parametrize(
    "name",
    [
        "rank",
        "sketch",
        "regression",
        "regression, tuned noise",
        "prior mean",
        "ekfac",
        "diagonal",
        "rows sketched",
        "rows regression",
        "budget",
    ],
)
def test_settings_survive(name, tmp_path):
    """A fit and a tuning after loading are those of the original."""
    la, model = build(name)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, model)
    for one in (la, again):
        one.fit([data_for(name, 5)], progress=False)
        one.optimize_prior_precision(Evidence(per="side"))
    assert_equal(everything(again), everything(la))


def test_tuned_precisions_survive(tmp_path):
    for per in ("all", "side", "layer"):
        la, model = build("dense")
        tuned = la.optimize_prior_precision(Evidence(per=per))
        la.save(tmp_path)
        assert LaplaceLoRA.load(tmp_path, model).prior_precision == tuned


@pytest.mark.parametrize("value", [np.float32(2.5), torch.tensor(2.5), {"A": np.float64(2.5), "B": 3}])
def test_precisions_of_other_number_types_can_be_saved(value, tmp_path):
    la, model = build("dense")
    la.prior_precision = value
    la.save(tmp_path)
    expected = {"A": 2.5, "B": 3.0} if isinstance(value, dict) else 2.5
    assert LaplaceLoRA.load(tmp_path, model).prior_precision == expected


def test_through_peft_on_disk(tmp_path):
    """The adapter as PEFT saves and loads it, the posterior as this package does."""
    la, model = build("dense")
    expected = everything(la)
    model.save_pretrained(tmp_path / "adapter")
    la.save(tmp_path / "adapter")
    base = tiny.tiny_llama(targets=QKV).unload()
    base = tiny.peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_equal(everything(LaplaceLoRA.load(tmp_path / "adapter", base)), expected)


def test_file_is_plain_safetensors_and_shared_spectra_are_stored_once(tmp_path):
    la, model = build("dense")
    la.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["posterior.safetensors"]
    tensors = safetensors.torch.load_file(tmp_path / "posterior.safetensors")
    bases = [name for name in tensors if name.startswith("spectrum.") and name.endswith(".vectors")]
    assert (
        len(bases) == 2 * (1 + 3) + 2
    )  # per layer one input and three outputs; the input and output of lm_head
    with safe_open(tmp_path / "posterior.safetensors", "pt") as file:
        header = json.loads(file.metadata()["header"])
    assert header["settings"]["task"] == {"Answers": {"token_ids": list(tiny.ANSWERS)}}
    assert header["n_examples"] == 8
    again = LaplaceLoRA.load(tmp_path, model)
    for one in (la, again):
        curvature = one.posterior.curvature
        blocks = dict(zip(curvature.names, curvature.blocks, strict=True))
        q, k, v = (f"base_model.model.model.layers.0.self_attn.{name}" for name in QKV)
        assert blocks[q, "A"].large is blocks[k, "A"].large is blocks[v, "A"].large
        assert blocks[q, "B"].large is not blocks[k, "B"].large


def test_saving_again_replaces_and_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch):
    la, model = build("dense")
    la.save(tmp_path)
    la.prior_precision = 5.0
    la.save(tmp_path)
    assert LaplaceLoRA.load(tmp_path, model).prior_precision == 5.0

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left")

    monkeypatch.setattr(checked, "save_file", full_disk)
    la.prior_precision = 6.0
    with pytest.raises(OSError, match="no space"):
        la.save(tmp_path)
    assert LaplaceLoRA.load(tmp_path, model).prior_precision == 5.0


def test_missing_file(tmp_path):
    model = tiny.tiny_llama()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StateError, match=r"posterior.safetensors does not exist"):
            LaplaceLoRA.load(folder, model)


def test_a_task_with_code_has_to_be_passed_again(tmp_path):
    la, model = build("outputs")
    la.save(tmp_path)
    with pytest.raises(ValueError, match=r"task=Outputs\(\.\.\) to load"):
        LaplaceLoRA.load(tmp_path, model)
    for task in (Outputs(ends, "regression"), Classes()):
        with pytest.raises(ValueError, match="task must be the one the posterior was fitted with"):
            LaplaceLoRA.load(tmp_path, model, task=task)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "rows"])
@pytest.mark.parametrize(
    ("fitted", "used"), [("float32", "float64"), ("float64", "float32"), ("float32", "bfloat16")]
)
def test_model_held_in_another_precision(fitted, used, structure, tmp_path):
    fitted, used = getattr(torch, fitted), getattr(torch, used)
    batch = tiny.batch(3, labels=False)
    la = LaplaceLoRA(tiny.tiny_llama(fitted), ANSWERS, structure=structure)
    la.fit([tiny.batch(5)], progress=False)
    expected = la.predict(batch)
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, tiny.tiny_llama(fitted).to(used))
    tolerance = 2e-2 if used == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        again.predict(batch).double(), expected.double(), rtol=tolerance, atol=tolerance
    )
    assert all(w.isfinite().all() for w in again.posterior.sample(1, torch.Generator()))


def test_a_task_without_code_may_be_passed_if_it_is_the_same(tmp_path):
    la, _ = build("dense")
    la.save(tmp_path)
    again = LaplaceLoRA.load(tmp_path, build_model(), task=ANSWERS)
    assert_equal(everything(again), everything(la))
    with pytest.raises(ValueError, match="task must be the one"):
        LaplaceLoRA.load(tmp_path, build_model(), task=Answers(tiny.ANSWERS[::-1]))
