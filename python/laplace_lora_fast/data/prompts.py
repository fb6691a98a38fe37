"""Prompts with worded or lettered answers: rows on disk, answer tokens, padded batches, model loading."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.data.groups import option_examples, prompt_ids
from laplace_lora_fast.data.lengths import context_of, warn_of_cut
from laplace_lora_fast.errors import InvalidBatchError


@dataclass(frozen=True)
class PromptRow:
    """A prompt, its possible answers, and which one is right.

    Attributes:
        prompt: Text up to, without, the space before the answer; or chat messages, {"role": str, "content": str} each.
        choices: The answers.
        label: Index of the right one; 0 where it was not asked for.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    choices: tuple[str, ...]
    label: int


def read_rows(path: str | Path, labelled: bool = True) -> list[PromptRow]:
    """Reads a JSON-lines file of `{"prompt": str or messages, "choices": [str, ...], "label": int}`.

    Args:
        path: The file, UTF-8. Empty lines are skipped.
        labelled: Whether labels are needed; if not, they are not looked at.

    Raises:
        InvalidBatchError: The file is missing, empty, or a line is wrong; names the line and the field.
    """
    return [_parse(line, where, labelled) for line, where in lines_of(path)]


def read_prompts(path: str | Path) -> list[Any]:
    """Reads a JSON-lines file of `{"prompt": str or messages}`; other fields are not looked at.

    Raises:
        InvalidBatchError: The file is missing, empty, or a line is wrong; names the line.
    """
    prompts = []
    for line, where in lines_of(path):
        fields = json_of(line, where)
        prompt = fields.get("prompt") if isinstance(fields, dict) else None
        if not (prompt.strip() if isinstance(prompt, str) else are_messages(prompt)):
            raise InvalidBatchError(
                f"{where}: field 'prompt' must be a non-empty string, or messages with a 'role' and a 'content' each"
            )
        prompts.append(prompt)
    return prompts


def answer_token_ids(tokenizer: Any, rows: Sequence[PromptRow]) -> list[int]:
    """The token of each choice where it follows the prompt: what `Answers` takes.

    A choice follows after a space, unless the prompt ends in white space, as that of many chat templates does.

    Args:
        tokenizer: Of the model.
        rows: Examples.

    Raises:
        InvalidBatchError: Rows have different choices, a choice is not a single token there, or not the same one
            behind every prompt, or two are the same token: rows for `Options`.
    """
    for number, row in enumerate(rows, 1):
        if row.choices != rows[0].choices:
            raise InvalidBatchError(
                f"row {number} has other 'choices' than the first, {list(row.choices)} and {list(rows[0].choices)}: "
                "Answers needs the same in all rows, Options does not"
            )
    found: list[list[int]] = []
    for number, (prompt, options, _) in enumerate(option_examples(tokenizer, [vars(row) for row in rows]), 1):
        for choice, option in zip(rows[0].choices, options, strict=True):
            if len(option) > 1:
                end = tokenizer.decode(prompt)[-20:]
                raise InvalidBatchError(
                    f"choice {choice!r} is not one token after the prompt of row {number}, which ends in {end!r}: use "
                    "letters, words the tokenizer knows, or Options"
                )
        ids = [int(option[0]) for option in options]
        found = found or [ids]
        if ids != found[0]:
            raise InvalidBatchError(
                f"the choices are the tokens {ids} after the prompt of row {number}, and {found[0]} after that of row "
                "1: let all prompts end alike, or use Options"
            )
    return found[0]


def make_batches(
    tokenizer: Any,
    rows: Iterable[PromptRow],
    batch_size: int,
    *,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[dict[str, Tensor]]:
    """Batches sorted by length, so that little is padding.

    Args:
        tokenizer: Of the model.
        rows: Examples.
        batch_size: Examples in a batch; the last may have fewer.
        max_length: Of a prompt, in tokens: the model's context.
        truncate: Whether longer prompts lose tokens on the left, with a warning that counts them.

    Returns:
        Dicts of `input_ids` [N, T] and `attention_mask` [N, T], padded on the left, and `labels` [N], int64.

    Raises:
        InvalidBatchError: A prompt is longer than `max_length`, or messages that there is no chat template for.
    """
    context, cut, fitting = context_of(tokenizer, max_length, truncate), 0, []
    for number, row in enumerate(rows, 1):
        ids = prompt_ids(tokenizer, row.prompt, number)[1]
        short = context.fitting(ids, [], lambda at=number: f"row {at}")  # type: ignore[misc]
        cut += len(short) < len(ids)
        fitting.append((short, row.label))
    warn_of_cut(cut, len(fitting), max_length)
    return batches_from_ids(fitting, batch_size)


def batches_from_ids(prompts: Iterable[tuple[list[int], int]], batch_size: int) -> list[dict[str, Tensor]]:
    """`make_batches` of (token ids, label); prompts of one length stay in the order they came."""
    encoded = sorted(prompts, key=lambda prompt: len(prompt[0]))
    return [_pad(encoded[start : start + batch_size]) for start in range(0, len(encoded), batch_size)]


def load_causal_lm(
    source: str, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        source: A folder, a hub name, or a .gguf file.
        device: Where the model goes.
        dtype: Of the weights; "auto" is that of the checkpoint.

    Returns:
        Model in evaluation mode, and tokenizer.

    Raises:
        FileNotFoundError: `source` is a path, and nothing is there.
        OSError: There is no model, here or on the hub, or it is damaged.
        ValueError: The model needs code of its own, which is not run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _require_source(source)
    options: dict[str, Any] = {"trust_remote_code": False}
    if source.endswith(".gguf"):
        source, options["gguf_file"] = str(Path(source).parent), Path(source).name
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return model.to(device).eval(), tokenizer


def _require_source(source: str) -> None:
    """Raises FileNotFoundError for what is neither there nor a hub's name, where libraries complain of the latter."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if Path(source).exists():
        return
    try:
        validate_repo_id(source)
        is_path = source.endswith(".gguf")
    except HFValidationError:
        is_path = True
    if is_path:
        raise FileNotFoundError(f"{source} does not exist")


def lines_of(path: str | Path) -> list[tuple[str, str]]:
    """The lines of a file that are not empty, and where each stands. Raises InvalidBatchError if there is none."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidBatchError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidBatchError(f"{path}: cannot be read: not UTF-8") from error
    lines = [
        (line, f"{path}, line {number}")
        for number, line in enumerate(text.split("\n"), 1)  # other line breaks may stand inside JSON strings
        if line.strip()
    ]
    if not lines:
        raise InvalidBatchError(f"{path}: holds no rows")
    return lines


def _pad(encoded: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    length = max(len(ids) for ids, _ in encoded)
    pads = [length - len(ids) for ids, _ in encoded]
    return {
        "input_ids": torch.tensor([[0] * pad + ids for pad, (ids, _) in zip(pads, encoded, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads]),
        "labels": torch.tensor([label for _, label in encoded]),
    }


def _parse(line: str, where: str, labelled: bool) -> PromptRow:
    names = ("prompt", "choices", "label") if labelled else ("prompt", "choices")
    fields = json_of(line, where)
    if not isinstance(fields, dict):
        raise InvalidBatchError(f"{where}: expected an object with fields {', '.join(names)}")
    for name in names:
        if name not in fields:
            raise InvalidBatchError(f"{where}: field {name!r} is missing")
    prompt, choices = fields["prompt"], fields["choices"]
    if not (prompt.strip() if isinstance(prompt, str) else are_messages(prompt)):
        raise InvalidBatchError(
            f"{where}: field 'prompt' must be a non-empty string, or messages with a 'role' and a 'content' each"
        )
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c for c in choices)
    ):
        raise InvalidBatchError(f"{where}: field 'choices' must be a list of at least two non-empty strings")
    if len(set(choices)) < len(choices):
        raise InvalidBatchError(f"{where}: field 'choices' repeats an answer: {choices}")
    texts = [prompt] if isinstance(prompt, str) else [m[key] for m in prompt for key in ("role", "content")]
    for name, text in [("prompt", text) for text in texts] + [("choices", choice) for choice in choices]:
        if not _is_unicode(text):
            raise InvalidBatchError(f"{where}: field {name!r} holds half a surrogate pair, which is no text")
    return PromptRow(
        prompt if isinstance(prompt, str) else tuple(prompt),
        tuple(choices),
        _checked_label(fields["label"], choices, where) if labelled else 0,
    )


def are_messages(prompt: Any) -> bool:
    """Whether these are a chat's messages."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
            for message in prompt
        )
    )


def json_of(line: str, where: str) -> Any:
    """The line's value. Raises InvalidBatchError where it has none, or an object names a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidBatchError(f"{where}: field {twice!r} stands there twice")
        return fields

    try:
        return json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise InvalidBatchError(f"{where}: not JSON: {error.msg}, column {error.colno}") from error
    except RecursionError as error:
        raise InvalidBatchError(f"{where}: not read: nested too deeply") from error
    except InvalidBatchError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise InvalidBatchError(f"{where}: not read: {error}") from error


def _checked_label(label: Any, choices: list[str], where: str) -> int:
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        hint = f": write {choices.index(label)} for {label!r}" if label in choices else ""
        raise InvalidBatchError(
            f"{where}: field 'label' must be an integer in [0, {len(choices)}), the place of the right answer in "
            f"{choices}, got {label!r}{hint}"
        )
    return label


def _is_unicode(text: str) -> bool:
    """Whether it can be written: JSON's escapes can spell a lone surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
