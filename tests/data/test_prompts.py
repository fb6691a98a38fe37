from __future__ import annotations

import json

import pytest
import torch

from laplace_lora_fast.data.prompts import PromptRow, answer_token_ids, load_causal_lm, make_batches
from laplace_lora_fast.errors import InvalidBatchError
from tests import words


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


def test_rows_that_only_options_can_take_are_refused():
    rows = [PromptRow("the film", ("A", "B"), 0), PromptRow("the film", ("B", "A"), 0)]
    with pytest.raises(InvalidBatchError, match="row 2 has other 'choices' than the first"):
        answer_token_ids(words.tokenizer(), rows)
    chat = PromptRow(({"role": "user", "content": "a film"},), ("A", "B"), 0)
    with pytest.raises(InvalidBatchError, match="row 2 is a chat"):
        answer_token_ids(words.tokenizer(), [rows[0], chat])


@pytest.mark.parametrize("end", [" ", "\n", "\t"])
def test_prompts_that_end_in_white_space_are_refused(end):
    rows = [PromptRow(prompt, ("A", "B"), 0) for prompt in ("the film", "the plot" + end)]
    with pytest.raises(InvalidBatchError, match="row 2 ends in white space"):
        answer_token_ids(words.tokenizer(), rows)


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


@pytest.mark.parametrize("path", ["./none", "/none", "../none", "a/b/none", "~/none", "none.gguf"])
def test_a_path_to_nothing_is_named_as_such(path):
    with pytest.raises(FileNotFoundError, match=f"^{path} does not exist$"):
        load_causal_lm(path)


def test_a_models_own_code_is_not_run(tmp_path):
    folder, _ = words.save_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="custom code"):
        load_causal_lm(str(folder))
    assert not (tmp_path / "ran").exists()
