"""Rows of text as token ids of prompts and options, and the order in which batches hold them."""

from __future__ import annotations

import pytest
import tokenizers
import transformers

from laplace_lora_fast.data import option_batches_from_ids
from laplace_lora_fast.data.groups import length_order, option_examples
from laplace_lora_fast.errors import InvalidBatchError
from tests import words

TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}{{ 'a :\n' }}"


def pieces(begin: bool = False, template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """Takes the space into the token of the word behind it, as BPE tokenizers do; `begin` puts a token first."""
    listed = ["[UNK]", "<s>", " ", "\n", ":", "a", "good", " good", " bad", "bad", " film", "film", " user"]
    vocabulary = {piece: index for index, piece in enumerate([*listed, "user"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    split = tokenizers.Regex(r" ?\w+|\s|[^\s\w]")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(split, "isolated")
    if begin:
        core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="<s>")
    made.chat_template = template
    return made


def texts(tokenizer, prompt, *choices: str) -> tuple[list[str], list[list[str]]]:
    ((ids, options, label),) = option_examples(tokenizer, [{"prompt": prompt, "choices": choices}])
    assert label is None
    names = tokenizer.convert_ids_to_tokens
    return names(ids), [names(option) for option in options]


@pytest.mark.parametrize("begin", [False, True])
def test_an_option_follows_after_a_space_or_a_newline(begin):
    tokenizer, first = pieces(begin), ["<s>"] * begin
    assert texts(tokenizer, "a film", "good", "bad film") == (
        [*first, "a", " film"],
        [[" good"], [" bad", " film"]],
    )
    assert texts(tokenizer, "a film\n", "good", " bad") == (
        [*first, "a", " film", "\n"],
        [["good"], [" bad"]],
    )


@pytest.mark.parametrize("begin", [False, True])
def test_chats_are_rendered(begin):
    """Special tokens are the template's, not added once more."""
    tokenizer = pieces(begin, TEMPLATE)
    chat = [{"role": "user", "content": "film"}]
    rendered = ["user", " ", ":", " film", "\n", "a", " ", ":", "\n"]
    assert texts(tokenizer, chat, "good", "bad film") == (rendered, [["good"], ["bad", " film"]])


def test_chats_need_a_template_that_takes_them():
    rows = [{"prompt": "a film", "choices": ["good", "bad"]}]
    rows.append(rows[0] | {"prompt": [{"role": "user", "content": "film"}]})
    with pytest.raises(InvalidBatchError, match="row 2: the tokenizer's chat template does not take"):
        option_examples(pieces(), rows)
    with pytest.raises(InvalidBatchError, match=r"row 2: .*only robots"):
        option_examples(pieces(template="{{ raise_exception('only robots') }}"), rows)


def test_a_space_that_belongs_to_the_option_is_refused():
    with pytest.raises(InvalidBatchError, match="row 1: the prompt ends in a space"):
        texts(pieces(), "a film ", "good", "bad")


def test_options_that_are_the_same_to_the_model_are_refused():
    with pytest.raises(InvalidBatchError, match="row 1: options 'unheard' and 'unseen' have the same tokens"):
        texts(words.tokenizer(), "a film", "good", "unheard", "unseen")


def test_the_order_is_that_of_the_batches():
    examples = [([5] * n, [[6 + n], [7] * m], 1) for n, m in ((4, 1), (1, 2), (2, 2), (3, 1), (1, 1))]
    order = length_order(examples)
    batches = option_batches_from_ids(examples, 2)
    seen = [
        int(row[keep][0])
        for batch in batches
        for row, keep in zip(batch["input_ids"][::2], batch["option_mask"][::2], strict=True)
    ]
    assert seen == [examples[place][1][0][0] for place in order]
    assert sorted(order) == list(range(5)) != order
