"""Prompts that the model has no positions for, tokens that it does not know."""

from __future__ import annotations

import pytest
import torch
import transformers

from laplace_lora_fast import Answers, Classes, InvalidBatchError, LaplaceLoRA
from tests.matrix import models

CONTEXT, LENGTH = 32, 40
GENERATOR = torch.Generator().manual_seed(0)
LONG = {
    "input_ids": torch.randint(3, models.VOCAB, (2, LENGTH), generator=GENERATOR),
    "labels": torch.tensor([0, 1]),
}
SHORT = {"input_ids": LONG["input_ids"][:, :9], "labels": LONG["labels"]}


def gpt2():
    base = transformers.GPT2LMHeadModel(models.config("gpt2", n_positions=CONTEXT, n_ctx=CONTEXT))
    return models.adapted(base, ["c_attn"]), Answers(models.ANSWERS)


def bert():
    config = models.config("bert", is_decoder=False, max_position_embeddings=CONTEXT, num_labels=2)
    return models.adapted(transformers.BertForSequenceClassification(config), ["query"]), Classes()


def llama():
    base = transformers.LlamaForCausalLM(models.config("llama", max_position_embeddings=CONTEXT))
    return models.adapted(base, ["q_proj"]), Answers(models.ANSWERS)


@pytest.mark.parametrize("make", [gpt2, bert, llama])
def test_longer_than_the_context(make):
    la = LaplaceLoRA(*make())
    with pytest.raises(InvalidBatchError, match=rf"(?s)(?=.*\b{CONTEXT}\b)(?=.*\b{LENGTH}\b)"):
        la.fit([SHORT, LONG], progress=False)


@pytest.mark.parametrize("make", [gpt2, bert, llama])
def test_predicting_longer_than_the_context(make):
    la = LaplaceLoRA(*make()).fit([SHORT], progress=False)
    with pytest.raises(InvalidBatchError, match=rf"(?s)(?=.*\b{CONTEXT}\b)(?=.*\b{LENGTH}\b)"):
        la.predict({"input_ids": LONG["input_ids"]})


@pytest.mark.parametrize("make", [gpt2, bert, llama])
@pytest.mark.parametrize("token", [models.VOCAB + 5, -1])
def test_token_beyond_the_vocabulary(make, token):
    ids = SHORT["input_ids"].clone()
    ids[0, 3] = token
    with pytest.raises(InvalidBatchError, match="vocabulary"):
        LaplaceLoRA(*make()).fit([SHORT | {"input_ids": ids}], progress=False)
