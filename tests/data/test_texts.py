from __future__ import annotations

import pytest

from laplace_lora_fast import InvalidBatchError, LaplaceLoRA, Tokens
from laplace_lora_fast.data import text_batches
from tests import tiny, words

ROWS = [
    {"prompt": "a good film", "completion": "positive"},
    {"prompt": "the", "completion": "dull plot"},
    {"prompt": "a bad plot", "completion": "poor film"},
]


def tokenizer() -> object:
    made = words.tokenizer()
    made.eos_token = "the"
    return made


def test_completions_are_learnt_and_prompts_are_not() -> None:
    made = tokenizer()
    batches = text_batches(made, ROWS, 2)
    assert [len(batch["labels"]) for batch in batches] == [2, 1]
    found = {}
    for batch in batches:
        for ids, mask, labels in zip(*batch.values(), strict=True):
            learnt = labels != -100
            assert not (learnt & ~mask.bool()).any()
            prompt = made.decode(ids[mask.bool() & ~learnt])
            found[prompt] = made.decode(labels[learnt])
    assert found == {row["prompt"]: row["completion"] + " the" for row in ROWS}


def test_without_an_end() -> None:
    (batch,) = text_batches(words.tokenizer(), ROWS, 3, end=False)
    assert (batch["labels"] != -100).sum() == 5


def test_a_chat_prompt() -> None:
    made = tokenizer()
    made.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}Sentiment:"
    row = {"prompt": [{"role": "user", "content": "a good film"}], "completion": "positive"}
    (batch,) = text_batches(made, [row], 1)
    assert made.decode(batch["input_ids"][0]) == "a good film Sentiment: positive the"


def test_they_fit() -> None:
    la = LaplaceLoRA(tiny.tiny_llama(), Tokens(samples=2)).fit(
        text_batches(tokenizer(), ROWS, 2), progress=False
    )
    assert la.snapshot()[0].n_examples == 3


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a"}, "row 1: field 'completion' is missing"),
        ({"prompt": "", "completion": "a"}, "row 1: field 'prompt' is missing or empty"),
        ({"prompt": "a", "completion": ["b"]}, "must be a text"),
    ],
)
def test_wrong_rows(row: dict[str, object], match: str) -> None:
    with pytest.raises(InvalidBatchError, match=match):
        text_batches(tokenizer(), [row], 1)


def test_a_tokenizer_without_an_end() -> None:
    with pytest.raises(ValueError, match="end=False"):
        text_batches(words.tokenizer(), ROWS, 1)
