"""Batches for `Tokens`: prompts and what is learnt to follow on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.data.groups import option_examples
from laplace_lora_fast.data.prompts import are_messages, json_of, lines_of
from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.options import positive_integer

Example = tuple[list[int], list[int]]  # prompt, completion


def read_texts(path: str | Path) -> list[dict[str, Any]]:
    """Reads a JSON-lines file of `{"prompt": str or messages, "completion": str}`; other fields are not looked at.

    Raises:
        InvalidBatchError: the file is missing, empty, or a line is wrong; names the line and the field.
    """
    rows = []
    for line, where in lines_of(path):
        fields = json_of(line, where)
        row = (
            {name: fields.get(name) for name in ("prompt", "completion")} if isinstance(fields, dict) else {}
        )
        prompt, completion = row.get("prompt"), row.get("completion")
        if not (prompt.strip() if isinstance(prompt, str) else are_messages(prompt)):
            raise InvalidBatchError(
                f"{where}: field 'prompt' must be a non-empty string, or messages with a 'role' and a 'content' each"
            )
        if not isinstance(completion, str) or not completion.strip():
            raise InvalidBatchError(f"{where}: field 'completion' must be a non-empty string")
        rows.append(row)
    return rows


def text_batches(
    tokenizer: Any, rows: Iterable[Mapping[str, Any]], batch_size: int, *, end: bool = True
) -> list[dict[str, Tensor]]:
    """Batches for `Tokens` from {"prompt", "completion"}, as TRL's SFTTrainer takes them.

    A completion follows after a space, unless one of both has white space there.

    Args:
        tokenizer: of the model.
        rows: "prompt" is text or chat messages (the chat template adds what starts an answer), "completion" text.
        batch_size: texts in a batch; those of like length stand together.
        end: whether the token that ends a text is learnt too, as it is in training with TRL.

    Returns:
        Dicts of `input_ids`, `attention_mask` and `labels` [N, T], padded on the right; labels are -100 but for the
        completions' tokens.

    Raises:
        InvalidBatchError: a row lacks a field, or a completion has no token; names the row.
        ValueError: `end` and the tokenizer has no such token.
    """
    return text_batches_from_ids(text_examples(tokenizer, rows, end), batch_size)


def text_examples(tokenizer: Any, rows: Iterable[Mapping[str, Any]], end: bool) -> list[Example]:
    """The tokens of rows as `text_batches` takes them: (prompt, completion) of each."""
    listed = list(rows)
    for number, row in enumerate(listed, 1):
        for field in ("prompt", "completion"):
            if not row.get(field):
                raise InvalidBatchError(f"row {number}: field {field!r} is missing or empty")
        if not isinstance(row["completion"], str):
            raise InvalidBatchError(f"row {number}: field 'completion' must be a text")
    last: list[int] = []
    if end:
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError("the tokenizer has no eos_token: pass end=False")
        last = [tokenizer.eos_token_id]
    options = [{"prompt": row["prompt"], "choices": [row["completion"]]} for row in listed]
    return [
        (list(prompt), [*completion, *(last if list(completion[-1:]) != last else [])])
        for prompt, (completion,), _ in option_examples(tokenizer, options)
    ]


def text_batches_from_ids(examples: Iterable[Example], batch_size: int) -> list[dict[str, Tensor]]:
    """`text_batches` of (prompt, completion) as token ids."""
    size = positive_integer("batch_size", batch_size)
    ordered = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    return [_padded(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def _padded(examples: list[Example]) -> dict[str, Tensor]:
    length = max(len(prompt) + len(completion) for prompt, completion in examples)

    def padded(values: list[list[int]], pad: int) -> Tensor:
        return torch.tensor([each + [pad] * (length - len(each)) for each in values])

    return {
        "input_ids": padded([prompt + completion for prompt, completion in examples], 0),
        "attention_mask": padded(
            [[1] * (len(prompt) + len(completion)) for prompt, completion in examples], 0
        ),
        "labels": padded([[-100] * len(prompt) + completion for prompt, completion in examples], -100),
    }
