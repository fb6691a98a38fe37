from __future__ import annotations

import json

import pytest
import tokenizers
import torch
import transformers

from laplace_lora_fast.data import option_batches
from laplace_lora_fast.data.prompts import PromptRow, answer_token_ids, load_causal_lm, make_batches
from laplace_lora_fast.errors import InvalidBatchError, LaplaceWarning
from tests import words


def test_answers_are_the_tokens_after_the_prompt():
    tokenizer = words.tokenizer()
    ids = answer_token_ids(tokenizer, [PromptRow("the film", ("B", "A", "C"), 0)])
    assert tokenizer.convert_ids_to_tokens(ids) == ["B", "A", "C"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (("A", "good film"), "'good film' is not one token"),
        (("unheard", "unseen"), "'unheard' and 'unseen' have the same tokens"),
    ],
)
def test_unusable_answers_are_refused(choices, message):
    with pytest.raises(InvalidBatchError, match=message):
        answer_token_ids(words.tokenizer(), [PromptRow("the film", choices, 0)])


def test_rows_that_only_options_can_take_are_refused():
    rows = [PromptRow("the film", ("A", "B"), 0), PromptRow("the film", ("B", "A"), 0)]
    with pytest.raises(InvalidBatchError, match="row 2 has other 'choices' than the first"):
        answer_token_ids(words.tokenizer(), rows)
    chat = PromptRow(({"role": "user", "content": "a film"},), ("A", "B"), 0)
    with pytest.raises(InvalidBatchError, match="row 2: the tokenizer's chat template"):
        answer_token_ids(words.tokenizer(), [rows[0], chat])


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


def pieces(end: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Takes spaces into words, splits digits, and may append an end-of-sequence token."""
    listed = [
        "[UNK]",
        "</s>",
        "\n",
        ":",
        "a",
        " film",
        " yes",
        "yes",
        " no",
        "no",
        "Yes",
        "1",
        "2",
        " 1",
        " 2",
    ]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({piece: index for index, piece in enumerate(listed)}, unk_token="[UNK]")
    )
    split = tokenizers.Regex(r" ?[a-zA-Z]+| ?\d|\s|[^\s\w]")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(split, "isolated")
    if end:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            "$A </s>", special_tokens=[("</s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="</s>")


@pytest.mark.parametrize("end", [False, True])
def test_a_tokenizer_that_appends_its_end(end):
    """The last position is the prompt's own; answers are what follows it."""
    tokenizer, rows = pieces(end), [PromptRow("a film:", ("yes", "no"), 1)]
    assert tokenizer.convert_ids_to_tokens(answer_token_ids(tokenizer, rows)) == [" yes", " no"]
    (batch,) = make_batches(tokenizer, rows, 1)
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == ["a", " film", ":"]


def test_answers_behind_a_newline_have_no_space():
    tokenizer = pieces()
    rows = [PromptRow("a film:\n", ("yes", "no"), 1), PromptRow("a:\n", ("yes", "no"), 0)]
    assert tokenizer.convert_ids_to_tokens(answer_token_ids(tokenizer, rows)) == ["yes", "no"]
    with pytest.raises(
        InvalidBatchError, match=r"after the prompt of row 2, and .* let all prompts end alike"
    ):
        answer_token_ids(tokenizer, [rows[0], PromptRow("a film:", ("yes", "no"), 1)])


def test_numbers_of_several_digits_are_options():
    rows = [PromptRow("a:", ("1", "12"), 1)]
    with pytest.raises(InvalidBatchError, match="'12' is not one token after the prompt of row 1"):
        answer_token_ids(pieces(), rows)
    (batch,) = option_batches(pieces(), [vars(row) for row in rows], 1)
    assert batch["option_mask"].sum(1).tolist() == [1, 2]
    one = [PromptRow("a:", ("1", "2"), 1)]
    assert pieces().convert_ids_to_tokens(answer_token_ids(pieces(), one)) == [" 1", " 2"]


def test_long_prompts_are_refused_with_both_lengths_or_cut_with_a_count():
    rows = [PromptRow("a film a film:", ("yes", "no"), 1), PromptRow("a:", ("yes", "no"), 1)]
    tokenizer, options = pieces(), [vars(row) for row in rows]
    for make, given, total in ((make_batches, rows, 5), (option_batches, options, 6)):
        with pytest.raises(InvalidBatchError, match=f"row 1 has {total} tokens, the model's context is 3"):
            make(tokenizer, given, 2, max_length=3)
        with pytest.warns(LaplaceWarning, match="cut 1 of 2 prompts to the model's 3 tokens"):
            (batch,) = make(tokenizer, given, 2, max_length=3, truncate=True)
        assert batch["input_ids"].shape[1] == 3
        assert "</s>" not in tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
        with pytest.raises(ValueError, match="truncate=True needs max_length"):
            make(tokenizer, given, 2, truncate=True)
    assert (
        tokenizer.convert_ids_to_tokens(make_batches(tokenizer, rows, 2, max_length=5)[0]["input_ids"][1])[3]
        == " film"
    )
