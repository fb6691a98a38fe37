"""Gradient checkpointing changes no result, and costs the forward passes it must and no more. fp64, relative 1e-9."""

from __future__ import annotations

import pytest
import torch

from laplace_lora_fast import KFAC, Classes, UnsupportedAdapterError
from tests import tiny
from tests.fits import ANSWERS, MODES, assert_same, fitted, pooled_model, results


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *a: calls.append(torch.is_grad_enabled()))
    return calls


CHECKPOINTED = {
    "llama": (lambda **k: tiny.tiny_llama(targets=("q_proj", "v_proj", "down_proj"), **k), ANSWERS, "mlp"),
    "llama classifier": (lambda **k: tiny.tiny_llama_classifier(3, **k), Classes(), "mlp"),
    "gpt2": (lambda **k: tiny.tiny_gpt2(**k), ANSWERS, "mlp"),
    "bert": (lambda **k: tiny.tiny_bert_classifier(3, **k), Classes(), "intermediate"),
}


@pytest.mark.parametrize("input_grads", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing(name, reentrant, input_grads):
    build, task, part = CHECKPOINTED[name]
    train, test = tiny.batch(6, seed=1, padding="right"), tiny.batch(4, seed=2, padding="right")
    expected = {
        structure: results(fitted(build(), task, tiny.split(train, 4), structure), test)
        for structure in (KFAC(tokens="expand"), KFAC(tokens="reduce"))
    }
    model = build().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if input_grads:
        model.enable_input_require_grads()
    inner = [m for n, m in model.named_modules() if n.endswith("." + part)]
    calls = [count_calls(module) for module in inner]
    for structure, value in expected.items():
        for seen in calls:
            seen.clear()
        la = fitted(model, task, tiny.split(train, 4), structure)
        # Nothing is random, rows are sequences, the first sequence alone; its gradients, forward and again, are slopes,
        # ahead and behind; where positions start.
        proofs = 3 + 4 + 2 * (task == ANSWERS)
        for seen in calls:  # two batches, each one forward and two backward passes that run the forward again
            assert len(seen) == 2 * (1 + 2) + proofs
        assert_same(results(la, test), value)


def test_a_model_with_dropout():
    """The checkpointed layers run in training mode, what is inside them does not."""
    train, test = tiny.batch(6, seed=1), tiny.batch(4, seed=2)
    rates = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    la = fitted(tiny.tiny_gpt2(lora_dropout=0.5, config=rates), ANSWERS, [train])
    model = tiny.tiny_gpt2(lora_dropout=0.5, config=rates).train()
    model.gradient_checkpointing_enable()
    assert_same(results(fitted(model, ANSWERS, [train]), test), results(la, test))


@pytest.mark.parametrize("structure", MODES, ids=repr)
@pytest.mark.parametrize("segment", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_custom_code(segment, structure):
    train, test = tiny.batch(6, seed=1), tiny.batch(4, seed=2)
    expected = results(fitted(pooled_model(3), Classes(), tiny.split(train, 4), structure), test)
    model = pooled_model(3, segment=segment)
    la = fitted(model, Classes(), tiny.split(train, 4), structure)
    assert (
        model.get_base_model().calls == 2 * (1 + (2 if structure.fisher == "exact" else 1)) + 7
    )  # the last are proofs
    assert_same(results(la, test), expected)


def test_reentrant_custom_code_whose_input_needs_no_gradient():
    """Its backward pass cannot reach a layer inside, in training neither; that is said."""
    batch, segment = tiny.batch(6, seed=1), {"use_reentrant": True}
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(UnsupportedAdapterError, match="use_reentrant"),
    ):
        fitted(pooled_model(3, segment=segment, targets=("second",)), Classes(), [batch])
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(UnsupportedAdapterError, match=r"'base_model.model.second': no gradient arrived"),
    ):
        fitted(pooled_model(3, segment=segment, targets=("second", "head")), Classes(), [batch])
