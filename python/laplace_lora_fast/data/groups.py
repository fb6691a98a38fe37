"""Batches of examples that are groups of sequences: options behind a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.data.lengths import context_of, warn_of_cut
from laplace_lora_fast.errors import InvalidBatchError

Ids = Sequence[int]
Messages = Sequence[Mapping[str, Any]]  # of a chat
Text = str | Messages
Example = tuple[Sequence[int], Sequence[Ids], int | Sequence[int] | None]  # prompt, options, label or ranking


def option_batches(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    batch_size: int,
    *,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[dict[str, Tensor]]:
    """Batches for `Options` from {"prompt", "choices", "label"}.

    An option follows after a space, unless one of both has white space there. Prompt and option are tokenised together
    where that leaves the prompt's tokens as they are, as a model has read them in training; where it does not, apart.

    Args:
        tokenizer: of the model.
        rows: examples; "prompt" is text or chat messages (the chat template adds what starts an answer), "choices" a
            list of texts, "label" the place of the right one; without labels, no batch has any.
        batch_size: examples in a batch; those of like length stand together.
        max_length: of prompt and option, in tokens: the model's context.
        truncate: whether longer prompts lose tokens on the left, with a warning that counts them.

    Raises:
        InvalidBatchError: as `option_examples`, or a row is longer than `max_length`; names both lengths.
    """
    context, examples = context_of(tokenizer, max_length, truncate), option_examples(tokenizer, rows)
    fitting: list[Example] = [
        (context.fitting(prompt, options, lambda at=number: f"row {at}"), options, label)  # type: ignore[misc]
        for number, (prompt, options, label) in enumerate(examples, 1)
    ]
    cut = sum(len(one[0]) < len(other[0]) for one, other in zip(fitting, examples, strict=True))
    warn_of_cut(cut, len(examples), max_length)
    return option_batches_from_ids(fitting, batch_size)


def option_examples(tokenizer: Any, rows: Iterable[Mapping[str, Any]]) -> list[Example]:
    """The token ids of rows as `option_batches` takes them: (prompt, options, label) of each.

    Raises:
        InvalidBatchError: a row lacks a field, an option has no token, two have the same, or there is no chat template
            for messages; names the row.
    """
    examples: list[Example] = []
    for number, row in enumerate(rows, 1):
        _require(row, ("prompt", "choices"), number)
        prompt, stem, special = prompt_ids(tokenizer, row["prompt"], number)
        options = [_option_ids(tokenizer, prompt, stem, choice, special, number) for choice in row["choices"]]
        for place, option in enumerate(options):
            if option in options[:place]:
                twin = row["choices"][options.index(option)]
                raise InvalidBatchError(
                    f"row {number}: options {twin!r} and {row['choices'][place]!r} have the same tokens"
                )
        examples.append((stem, options, row.get("label")))
    return examples


def length_order(examples: Sequence[Example]) -> list[int]:
    """The places of examples in the order in which `option_batches_from_ids` puts them into batches."""
    lengths = [len(prompt) + max(map(len, options), default=0) for prompt, options, _ in examples]
    return sorted(range(len(examples)), key=lengths.__getitem__)


def option_batches_from_ids(examples: Iterable[Example], batch_size: int) -> list[dict[str, Tensor]]:
    """Batches for `Options` from token ids.

    Args:
        examples: (prompt, options, label) of each; label None where there is none.
        batch_size: examples in a batch; those of like length stand together, otherwise in the order they came.

    Returns:
        Dicts of `input_ids`, `attention_mask`, `option_mask` [S, T], padded on the right, `group` [S], and `labels` [N]
        where all have one.

    Raises:
        InvalidBatchError: an example has no prompt, fewer than two options, an empty one, or a wrong label.
    """
    listed = []
    for number, (prompt, options, label) in enumerate(examples):
        if not len(prompt) or len(options) < 2 or not all(len(option) for option in options):
            raise InvalidBatchError(
                f"example {number} needs a prompt and at least two options, none of them empty"
            )
        if isinstance(label, int) and not 0 <= label < len(options):
            raise InvalidBatchError(f"example {number} has label {label} for {len(options)} options")
        sequences = [[*prompt, *option] for option in options]
        scored = [[False] * len(prompt) + [True] * len(option) for option in options]
        listed.append((sequences, scored, label))
    return batched(listed, batch_size)


def batched(listed: Sequence[tuple[Any, Any, Any]], batch_size: int, pad: int = 0) -> list[dict[str, Tensor]]:
    """Batches of (sequences, flags of their tokens or None, label or ranking or None), padded with token `pad`."""
    if not listed:
        raise InvalidBatchError("there are no rows")
    order = sorted(range(len(listed)), key=lambda i: max(map(len, listed[i][0])))
    labelled = all(label is not None for _, _, label in listed)
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = [listed[i] for i in order[start : start + batch_size]]
        sequences = [ids for each, _, _ in chosen for ids in each]
        batch = {
            "input_ids": _padded(sequences, pad),
            "attention_mask": _padded([[1] * len(s) for s in sequences], 0),
        }
        if chosen[0][1] is not None:
            batch["option_mask"] = _padded([flags for _, each, _ in chosen for flags in each], False)
        sizes = torch.tensor([len(each) for each, _, _ in chosen])
        batch["group"] = torch.arange(len(chosen)).repeat_interleave(sizes)
        if labelled:
            batch["labels"] = _labels([label for _, _, label in chosen], sizes.tolist())
        batches.append(batch)
    return batches


def _labels(labels: Sequence[int | Sequence[int]], sizes: Sequence[int]) -> Tensor:
    """Places [N], or rankings [N, most sequences] with -1 behind the last."""
    for label, size in zip(labels, sizes, strict=True):
        wrong = sorted(label) != list(range(size)) if isinstance(label, Sequence) else not 0 <= label < size
        if wrong:
            raise InvalidBatchError(f"an example of {size} sequences has label {label}")
    ranked = [isinstance(label, Sequence) for label in labels]
    if any(ranked) != all(ranked):
        raise InvalidBatchError("some examples have a ranking and some one preferred sequence")
    return _padded(labels, -1) if all(ranked) else torch.tensor(labels)  # type: ignore[arg-type]


def _padded(rows: Sequence[Sequence[Any]], pad: Any) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])


def _option_ids(tokenizer: Any, prompt: str, stem: Ids, choice: str, special: bool, number: int) -> list[int]:
    if not isinstance(choice, str) or not choice:
        raise InvalidBatchError(f"row {number}: field 'choices' must hold non-empty texts, got {choice!r}")
    spaced = choice if not prompt or prompt[-1].isspace() or choice[0].isspace() else f" {choice}"
    whole = without_end(tokenizer, tokenizer(prompt + spaced, add_special_tokens=special)["input_ids"])
    if list(whole[: len(stem)]) == list(stem) and len(whole) > len(stem):
        return list(whole[len(stem) :])
    if special and prompt.endswith(" "):
        raise InvalidBatchError(
            f"row {number}: the prompt ends in a space, {prompt[-20:]!r}, that belongs to the token of {choice!r}: end "
            "prompts without, the option follows after one space"
        )
    alone = without_end(tokenizer, tokenizer(spaced, add_special_tokens=False)["input_ids"])
    if not alone:
        raise InvalidBatchError(f"row {number}: option {choice!r} has no token")
    return list(alone)


def without_end(tokenizer: Any, ids: Ids) -> list[int]:
    """Without an end-of-sequence token that the tokenizer appends: nothing would follow it."""
    end = getattr(tokenizer, "eos_token_id", None)
    return list(ids[:-1]) if len(ids) > 1 and end is not None and ids[-1] == end else list(ids)


def prompt_ids(tokenizer: Any, prompt: Text, number: int) -> tuple[str, list[int], bool]:
    """A prompt as text, its tokens, and whether the tokenizer adds special ones: a chat template writes them itself.

    Raises:
        InvalidBatchError: the template does not take the messages; names the row.
    """
    text, special = prompt_text(tokenizer, prompt, number), isinstance(prompt, str)
    return text, without_end(tokenizer, tokenizer(text, add_special_tokens=special)["input_ids"]), special


def prompt_text(tokenizer: Any, prompt: Text, number: int, begins_answer: bool = True) -> str:
    """A text as it is, messages by the tokenizer's chat template; it may begin the answer.

    Raises:
        InvalidBatchError: the template does not take the messages; names the row.
    """
    if isinstance(prompt, str):
        return prompt
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=begins_answer
        )
    except Exception as error:  # a template is code, and may raise anything
        raise InvalidBatchError(
            f"row {number}: the tokenizer's chat template does not take its messages: {error}"
        ) from error
    return rendered


def _require(row: Mapping[str, Any], names: Sequence[str], number: int) -> None:
    for name in names:
        if name not in row:
            raise InvalidBatchError(f"row {number}: field {name!r} is missing")
