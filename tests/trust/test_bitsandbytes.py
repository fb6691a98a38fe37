"""QLoRA on a CPU, where an evaluation pass packs 4-bit weights into a form that lets no gradient through."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch

from laplace_lora_fast import Answers, LaplaceLoRA, Rows
from tests.matrix import models, oracle, quantisers

pytest.importorskip("bitsandbytes")

NF4 = partial(quantisers.bitsandbytes, **quantisers.NF4)
INT8 = partial(quantisers.bitsandbytes, load_in_8bit=True)
TARGETS = ["q_proj", "v_proj", "down_proj"]
BATCH = models.padded(models.sequences(), "left")
ANSWERS = Answers(models.ANSWERS)


def qlora(double=False):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    return models.randomised(peft.get_peft_model(NF4(bnb_4bit_use_double_quant=double), config)).eval()


def evaluate(model):
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.filterwarnings("ignore:.*outputs change in steps")  # of inputs quantised to 8 bits
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("load", "tolerance"), [(NF4, 1e-4), (INT8, 5e-2)], ids=["nf4", "int8"])
def test_right(load, tolerance, prepared):
    assert quantisers.error(load, TARGETS, prepared=prepared) < tolerance


@pytest.mark.parametrize("load", [NF4, partial(NF4, bnb_4bit_use_double_quant=True)], ids=["plain", "double"])
def test_an_evaluation_pass_before_changes_no_more_than_its_rounding(load):
    """The pass rounds the scales of blocks to bf16, for good: that is the model then."""
    assert quantisers.error(load, TARGETS, evaluated=True) < 2e-2


@pytest.mark.parametrize("first", [False, True], ids=["fitted first", "evaluated first"])
@pytest.mark.parametrize("double", [False, True])
def test_evaluation_passes_in_between(first, double):
    model = qlora(double)
    if first:
        evaluate(model)
    la = models.fitted(model, ANSWERS, BATCH, torch.arange(6) % 3)
    before = la.logit_distribution(BATCH)
    evaluate(model)
    after = la.logit_distribution(BATCH)
    assert oracle.error(after[0], before[0]) < 1e-5
    assert oracle.error(after[1], before[1]) < 1e-5


def test_samples_leave_the_base_model_as_it_is(tmp_path):
    model = qlora()
    before = evaluate(model)
    la = models.fitted(model, ANSWERS, BATCH, torch.arange(6) % 3)
    evaluate(model)
    la.sample_adapters(tmp_path / "samples", 1, force=True)
    assert oracle.error(evaluate(model), before) < 1e-2


def test_saved_loaded_and_refitted(tmp_path):
    model = qlora()
    la = models.fitted(model, ANSWERS, BATCH, torch.arange(6) % 3)
    la.save(tmp_path / "posterior")
    evaluate(model)
    loaded = LaplaceLoRA.load(tmp_path / "posterior", model)
    torch.testing.assert_close(loaded.predict(BATCH), la.predict(BATCH), rtol=1e-5, atol=1e-7)
    refitted = models.fitted(model, ANSWERS, BATCH, torch.arange(6) % 3, structure=Rows(refit=True))
    assert torch.isfinite(refitted.predict(BATCH)).all()
