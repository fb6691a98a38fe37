"""Batches that are not as a model takes them: right, or refused with what to do."""

from __future__ import annotations

import pytest
import torch

from laplace_lora_fast import Answers, Classes, InvalidBatchError, LaplaceLoRA, Rows
from tests import tiny

ANSWERS = Answers(tiny.ANSWERS)
BATCH = tiny.batch(4, seed=1)
IDS, MASK, LABELS = BATCH["input_ids"], BATCH["attention_mask"], BATCH["labels"]
WHOLE = tiny.batch(2, 8, padding=None)


def fitted(batch, model=None, task=ANSWERS):
    model = tiny.tiny_llama() if model is None else model
    return LaplaceLoRA(model, task, structure=Rows(columns=1 << 20)).fit([batch], progress=False)


def without(batch, *keys):
    return {key: value for key, value in batch.items() if key not in keys}


REFUSED = {
    "mask of numbered examples": (
        BATCH | {"attention_mask": MASK * torch.tensor([1, 1, 1, 2, 2, 2, 2])},
        "0 and 1",
    ),
    "mask of weights": (BATCH | {"attention_mask": MASK * 0.5}, "0 and 1"),
    "mask to be added": (BATCH | {"attention_mask": (1.0 - MASK) * -1e9}, "0 and 1"),
    "mask with NaN": (BATCH | {"attention_mask": (0.0 / MASK) + MASK}, "0 and 1"),
    "16 bits": (BATCH | {"input_ids": IDS.short()}, "int64"),
    "bytes": (BATCH | {"input_ids": IDS.byte()}, "int64"),
    "reals": (BATCH | {"input_ids": IDS.double()}, "int64"),
    "two kinds of input": (
        BATCH | {"inputs_embeds": torch.zeros(4, 7, 16, dtype=torch.float64)},
        "leave one",
    ),
    "sparse": (BATCH | {"input_ids": IDS.to_sparse()}, "dense"),
    "no values": (BATCH | {"input_ids": IDS.to("meta")}, "meta device"),
    "lists": (BATCH | {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()}, "return_tensors"),
    "a cache": (BATCH | {"past_key_values": object()}, "leave it out"),
    "fewer logits": (BATCH | {"logits_to_keep": 1}, "leave it out"),
    "a tuple": (BATCH | {"return_dict": False}, "return_dict"),
    "no dict": ((IDS, LABELS), "dict of tensors"),
    "words as labels": (BATCH | {"labels": list("abca")}, "no numbers"),
    "a label that is None": (BATCH | {"labels": [0, None, 1, 2]}, "no numbers"),
    "complex labels": (BATCH | {"labels": LABELS.to(torch.complex64)}, "class indices"),
    "real labels": (BATCH | {"labels": LABELS.double()}, "one integer an example"),
    "positions that stand still": (
        WHOLE | {"position_ids": torch.tensor([[0, 1, 2, 2, 3, 4, 5, 6]] * 2)},
        "several examples",
    ),
    "positions of one row for all": (
        WHOLE | {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])},
        "several examples",
    ),
    "positions without rows": (WHOLE | {"position_ids": torch.arange(8)}, "position_ids has shape"),
    "lengths of what is packed": (WHOLE | {"seq_lengths": torch.tensor([[4, 4], [2, 6]])}, "packs several"),
    "numbers of what is packed": (
        WHOLE | {"document_ids": torch.tensor([[0] * 4 + [1] * 4] * 2)},
        "packs several",
    ),
    "labels under another key": (without(BATCH, "labels") | {"gold": LABELS}, "rename it to 'labels'"),
    "labels in a list": (without(BATCH, "labels") | {"answer": LABELS.tolist()}, "rename it to 'labels'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_what_to_do(kind):
    batch, message = REFUSED[kind]
    with pytest.raises(InvalidBatchError, match=message):
        fitted(batch)


ACCEPTED = {
    "None": BATCH | {"position_ids": None, "inputs_embeds": None, "token_type_ids": None},
    "32 bits": BATCH | {"input_ids": IDS.int(), "attention_mask": MASK.int()},
    "mask of booleans": BATCH | {"attention_mask": MASK.bool()},
    "mask of reals": BATCH | {"attention_mask": MASK.float()},
    "numbers of rows": BATCH | {"index": torch.arange(4), "text": list("abcd")},
    "positions": BATCH | {"position_ids": (MASK.cumsum(1) - 1).clamp(min=0)},
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_of_no_account(kind):
    model = tiny.tiny_llama()
    expected = fitted(BATCH, model).logit_distribution(BATCH)
    found = fitted(ACCEPTED[kind], model).logit_distribution(ACCEPTED[kind])
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-10, atol=1e-12)


def test_numbers_of_rows_shift_no_position():
    model = tiny.tiny_gpt2()  # of absolute positions
    alone = fitted(BATCH, model).logit_distribution(BATCH)
    numbered = BATCH | {"index": torch.arange(4)}
    for each, other in zip(fitted(numbered, model).logit_distribution(numbered), alone, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-10, atol=1e-12)


def test_predictions_need_no_labels_and_mind_no_numbers():
    la = fitted(BATCH)
    batch = without(BATCH, "labels") | {"gold": LABELS}
    torch.testing.assert_close(la.predict(batch), la.predict(BATCH), rtol=0, atol=0)


def test_a_classifier_that_was_trained_for_other_labels_since():
    model = tiny.tiny_bert_classifier(3)
    la = LaplaceLoRA(model, Classes())
    model(
        **tiny.batch(2, padding="right", labels=False), labels=torch.ones(2, 3).double()
    )  # sets its problem_type
    with pytest.raises(ValueError, match=r"MultiLabel\(\)"):
        la.fit([tiny.batch(4, padding="right")], progress=False)


def test_a_bias_of_lora_a_is_refused():
    model = tiny.tiny_llama()
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    layer.lora_A["default"].bias = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="lora_A gives"):
        fitted(BATCH, model)


@pytest.mark.parametrize("value", [None, "1", float("nan"), 0.0])
def test_prior_precisions_that_are_none(value):
    with pytest.raises(ValueError, match="prior_precision must be"):
        LaplaceLoRA(tiny.tiny_llama(), ANSWERS, prior_precision=value)
