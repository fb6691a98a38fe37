from __future__ import annotations

import json

import pytest
import torch

from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.prompts import PromptRow, answer_token_ids, load_causal_lm, make_batches, read_rows
from tests import words


def test_rows_come_back_as_written(tmp_path):
    records = words.rows(5)
    path = words.write_rows(tmp_path / "rows.jsonl", records)
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # an empty line does no harm
    expected = [PromptRow(r["prompt"], tuple(r["choices"]), r["label"]) for r in records]
    assert read_rows(path) == expected


GOOD = {"prompt": "a film", "choices": ["A", "B"], "label": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "label"}), "line 2: field 'label' is missing"),
        (json.dumps(GOOD | {"prompt": " "}), "line 2: field 'prompt'"),
        (json.dumps(GOOD | {"prompt": 3}), "line 2: field 'prompt'"),
        (json.dumps(GOOD | {"choices": ["A"]}), "line 2: field 'choices'"),
        (json.dumps(GOOD | {"choices": "AB"}), "line 2: field 'choices'"),
        (json.dumps(GOOD | {"label": 2}), r"line 2: field 'label' must be an integer in \[0, 2\), got 2"),
        (json.dumps(GOOD | {"label": True}), "line 2: field 'label'"),
        (json.dumps(GOOD | {"label": "A"}), "line 2: field 'label'"),
        (json.dumps(GOOD | {"choices": ["B", "A"]}), "same 'choices'"),
    ],
)
def test_bad_rows_name_file_line_and_field(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(InvalidBatchError, match=message) as caught:
        read_rows(path)
    assert "rows.jsonl" in str(caught.value)


def test_missing_empty_and_binary_files_are_refused(tmp_path):
    with pytest.raises(InvalidBatchError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidBatchError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidBatchError, match="cannot be read"):
        read_rows(tmp_path / "binary.jsonl")


def test_answers_are_the_tokens_after_the_prompt():
    tokenizer = words.tokenizer()
    ids = answer_token_ids(tokenizer, [PromptRow("the film", ("B", "A", "C"), 0)])
    assert tokenizer.convert_ids_to_tokens(ids) == ["B", "A", "C"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [(("A", "good film"), "'good film' is not one token"), (("unheard", "unseen"), "share a token")],
)
def test_unusable_answers_are_refused(choices, message):
    with pytest.raises(InvalidBatchError, match=message):
        answer_token_ids(words.tokenizer(), [PromptRow("the film", choices, 0)])


@pytest.mark.parametrize("end", [" ", "\n", "\t"])
def test_prompts_that_end_in_white_space_are_refused(end):
    rows = [PromptRow(prompt, ("A", "B"), 0) for prompt in ("the film", "the plot" + end)]
    with pytest.raises(InvalidBatchError, match="row 2 ends in white space"):
        answer_token_ids(words.tokenizer(), rows)


def test_labels_can_be_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a film", "choices": ["A", "B"]}) + "\n")
    assert read_rows(path, labelled=False) == [PromptRow("a film", ("A", "B"), 0)]
    with pytest.raises(InvalidBatchError, match="'label' is missing"):
        read_rows(path)
    path.write_text(json.dumps({"prompt": "a film", "label": 0}) + "\n")
    with pytest.raises(InvalidBatchError, match="'choices' is missing"):
        read_rows(path, labelled=False)


def test_batches_hold_every_row_once_padded_on_the_left():
    tokenizer = words.tokenizer()
    rows = [PromptRow(r["prompt"], tuple(r["choices"]), r["label"]) for r in words.rows(11)]
    batches = make_batches(tokenizer, rows, 4)
    assert [len(b["labels"]) for b in batches] == [4, 4, 3]
    seen = []
    for batch in batches:
        mask = batch["attention_mask"].bool()
        assert mask[:, -1].all()
        assert mask.any(0).all()  # no column is all padding
        assert (mask.long().diff(dim=1) >= 0).all()  # no pad right of a token
        for ids, keep, label in zip(batch["input_ids"], mask, batch["labels"], strict=True):
            seen.append((tokenizer.decode(ids[keep]), label.item()))
    assert sorted(seen) == sorted((row.prompt, row.label) for row in rows)
    lengths = torch.cat([b["attention_mask"].sum(1) for b in batches])
    assert (lengths.diff() >= 0).all()


def test_a_saved_model_loads(tmp_path):
    folder, _ = words.save_model(tmp_path)
    model, tokenizer = load_causal_lm(str(folder), dtype=torch.float64)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float64
    assert tokenizer("good film")["input_ids"] == words.tokenizer()("good film")["input_ids"]
