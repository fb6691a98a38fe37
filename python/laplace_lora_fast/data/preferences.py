"""Batches of preferences: TRL's {"chosen", "rejected"}, rankings, and candidates that wait for a reward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.data.groups import Text, batched, option_batches_from_ids, prompt_ids, prompt_text
from laplace_lora_fast.data.lengths import context_of, warn_of_cut
from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.fitting.passes import BatchStep, Subject, run
from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.model.contexts import unwrapped
from laplace_lora_fast.model.heads.causal import OptionHead
from laplace_lora_fast.model.lora import trained_layers

Ids = Sequence[int]
Label = int | Sequence[int]  # the best one's place, or all places, the best one's first
_FIELDS = ("ranked", "candidates")


def preference_batches(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    batch_size: int,
    *,
    ranking: bool = False,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[dict[str, Tensor]]:
    """Batches for `Preference`, as TRL's RewardTrainer reads them: the end-of-sequence token closes a text.

    A row is {"chosen", "rejected"}, {"ranked": [the best, .., the worst]} or {"candidates": [..]} without an order,
    each with a "prompt" or without; all texts, or all chat messages, which the chat template closes.

    Args:
        tokenizer: of the model.
        rows: examples.
        batch_size: examples in a batch; those of like length stand together.
        ranking: whether labels are whole rankings, for `Preference(ranking=True)`.
        max_length: of a sequence, in tokens.
        truncate: whether longer ones lose tokens on the left, with a warning that counts them.

    Returns:
        Dicts of `input_ids`, `attention_mask` [S, T], padded on the right with the tokenizer's pad token (the end of
        sequence where it has none), as the model's config.pad_token_id has to be; `group` [S]; and `labels`: [N] zeros,
        as the best one comes first, or rankings [N, most sequences]; none where a row has candidates.

    Raises:
        InvalidBatchError: a row lacks a field, or a sequence is too long; names the row.
    """
    context, cut, examples = context_of(tokenizer, max_length, truncate), 0, []
    for number, row in enumerate(rows, 1):
        answers, ordered = _answers(row, number)
        sequences = [whole_ids(tokenizer, row.get("prompt"), answer, number) for answer in answers]
        fitting = [context.fitting(ids, [], lambda at=number: f"row {at}") for ids in sequences]  # type: ignore[misc]
        cut += sum(len(short) < len(ids) for short, ids in zip(fitting, sequences, strict=True))
        examples.append((fitting, _label(len(fitting), ranking) if ordered else None))
    warn_of_cut(cut, sum(len(each) for each, _ in examples), max_length)
    ends = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    pad = next((each for each in ends if each is not None), 0)
    return preference_batches_from_ids(examples, batch_size, pad)


def preference_batches_from_ids(
    examples: Iterable[tuple[Sequence[Ids], Label | None]], batch_size: int, pad: int = 0
) -> list[dict[str, Tensor]]:
    """Batches for `Preference` from token ids.

    Args:
        examples: (sequences, label) of each; the label is the preferred one's place, or all places, the best one's
            first; None where there is none.
        batch_size: examples in a batch; those of like length stand together.
        pad: the token behind short sequences: the model's config.pad_token_id, by which a decoder with a
            classification head knows where a sequence ends.

    Raises:
        InvalidBatchError: an example has fewer than two sequences, an empty one, or a wrong label.
    """
    listed = []
    for number, (sequences, label) in enumerate(examples):
        if len(sequences) < 2 or not all(len(ids) for ids in sequences):
            raise InvalidBatchError(f"example {number} needs at least two sequences, none of them empty")
        listed.append(([list(ids) for ids in sequences], None, label))
    return batched(listed, batch_size, pad)


def direct_preference_batches(
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    batch_size: int,
    *,
    ranking: bool = False,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[dict[str, Tensor]]:
    """Batches for `DirectPreference`, as TRL's DPOTrainer reads them, but for "reference": see `add_reference`.

    Arguments and errors are those of `preference_batches`, but that rows need a "prompt", and only prompts are cut. The
    completion begins where the tokens of prompt and completion together leave those of the prompt alone; one without a
    token is an InvalidBatchError.
    """
    context, cut, examples = context_of(tokenizer, max_length, truncate), 0, []
    for number, row in enumerate(rows, 1):
        if "prompt" not in row:
            raise InvalidBatchError(f"row {number}: field 'prompt' is missing")
        answers, ordered = _answers(row, number)
        _, stem, _ = prompt_ids(tokenizer, row["prompt"], number)
        sequences = [whole_ids(tokenizer, row["prompt"], answer, number) for answer in answers]
        shared = min(_common(stem, ids) for ids in sequences)
        stem, completions = stem[:shared], [ids[shared:] for ids in sequences]
        fitting = context.fitting(stem, completions, lambda at=number: f"row {at}")  # type: ignore[misc]
        cut += len(fitting) < len(stem)
        examples.append((fitting, completions, _label(len(completions), ranking) if ordered else None))
    warn_of_cut(cut, len(examples), max_length)
    return option_batches_from_ids(examples, batch_size)


def add_reference(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches with "reference" [S]: log probabilities of the completions under the model without its adapter.

    The reference of a DPO training that was given no other model. For another one, put its own sums there.

    Args:
        model: the PEFT model; nothing of it is changed.
        batches: of `direct_preference_batches`.
    """
    head = OptionHead(unwrapped(model), mean=False)
    layers = trained_layers(unwrapped(model), head)
    subject = Subject(model, head, layers, Categorical())
    found: list[Tensor] = []

    def keep(step: BatchStep) -> None:
        found.append(step.prior_u()[:, 0].cpu())

    listed = [dict(batch) for batch in batches]
    plain = [{key: value for key, value in batch.items() if key != "labels"} for batch in listed]
    run(subject, plain, None, keep, generator=torch.Generator())
    return [batch | {"reference": each} for batch, each in zip(listed, found, strict=True)]


def whole_ids(tokenizer: Any, prompt: Text | None, answer: Text, number: int) -> list[int]:
    """Tokens of a prompt and an answer, closed by the end-of-sequence token."""
    if not isinstance(answer, str):
        messages = [*(prompt or []), *answer]  # type: ignore[misc]
        text = prompt_text(tokenizer, messages, number, begins_answer=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidBatchError(f"row {number}: a prompt of messages needs answers of messages")
    ids = list(tokenizer((prompt or "") + answer)["input_ids"])
    end = getattr(tokenizer, "eos_token_id", None)
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _answers(row: Mapping[str, Any], number: int) -> tuple[list[Text], bool]:
    """The answers of a row, the best one first where they are ordered, and whether they are."""
    for name in _FIELDS:
        if name in row:
            return list(row[name]), name == _FIELDS[0]
    for name in ("chosen", "rejected"):
        if name not in row:
            raise InvalidBatchError(f"row {number}: field {name!r} is missing")
    return [row["chosen"], row["rejected"]], True


def _label(size: int, ranking: bool) -> Label:
    return list(range(size)) if ranking else 0


def _common(one: Ids, other: Ids) -> int:
    """Number of tokens at the beginning that two sequences share."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
