"""Rows of a file as batches of the task that serves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from laplace_lora_fast import Answers, InvalidBatchError, Options, Tokens
from laplace_lora_fast.data.groups import (
    Example,
    length_order,
    option_batches_from_ids,
    option_examples,
    prompt_ids,
)
from laplace_lora_fast.data.lengths import Context, warn_of_cut
from laplace_lora_fast.data.prompts import (
    PromptRow,
    answer_token_ids,
    batches_from_ids,
    json_of,
    lines_of,
)
from laplace_lora_fast.data.texts import text_batches_from_ids, text_examples
from laplace_lora_fast.tasks import Task


def holds_texts(path: Path) -> bool:
    """Whether a file's rows are texts, {"prompt", "completion"}, as its first one says.

    Raises:
        InvalidBatchError: it cannot be read.
    """
    first = json_of(*lines_of(path)[0])
    return isinstance(first, dict) and "completion" in first and "choices" not in first


@dataclass(frozen=True)
class RowReader:
    """Makes batches of rows.

    Args:
        tokenizer: of the model.
        context: most tokens that the model has places for; None where it does not say.
        batch_size: examples in a batch.
        truncate: whether prompts that are too long lose tokens on the left.

    Raises:
        ValueError: there is nothing to truncate to.
    """

    tokenizer: Any
    context: int | None
    batch_size: int
    truncate: bool

    def __post_init__(self) -> None:
        if self.truncate and self.context is None:
            raise ValueError("--truncate: the model does not say how long its context is")

    def task(self, rows: Sequence[PromptRow], score: str | None) -> Task:
        """`Answers` where all rows have the same choices of one token, otherwise `Options`.

        Raises:
            ValueError: there are no options to score.
        """
        try:
            task = Answers(answer_token_ids(self.tokenizer, rows))
        except InvalidBatchError:
            return Options() if score is None else Options(score)
        if score is not None:
            raise ValueError(
                "--score is for rows with different choices, or with choices of several tokens: here all rows have the "
                f"same ones, {list(rows[0].choices)}, of one token each"
            )
        return task

    def tokens(self, samples: int | None) -> Task:
        """Of texts. Raises ValueError where the tokenizer has no token that ends one."""
        if getattr(self.tokenizer, "eos_token_id", None) is None:
            raise ValueError("the tokenizer has no eos_token to end texts with")
        return Tokens() if samples is None else Tokens(samples)

    def batches(self, task: Task, rows: Sequence[Any], path: Path) -> RowBatches:
        """Batches of the rows of a file, those of like length together.

        Warns:
            LaplaceWarning: prompts lost tokens.

        Raises:
            ValueError: the task has no such rows.
            InvalidBatchError: a row cannot be used; names the file and the row.
        """
        try:
            examples = self._examples(task, rows)
        except InvalidBatchError as error:
            raise InvalidBatchError(f"{path}: {error}") from error
        context = Context(
            self.context,
            self.truncate,
            getattr(self.tokenizer, "bos_token_id", None),
            "shorten it, or pass --truncate",
        )
        fitting: list[Example] = [
            (context.fitting(prompt, options, lambda at=number: f"{path}: row {at}"), options, label)  # type: ignore[misc]
            for number, (prompt, options, label) in enumerate(examples, 1)
        ]
        if isinstance(task, Tokens):
            texts = [(list(prompt), list(completion)) for prompt, (completion,), _ in fitting]
            batches = text_batches_from_ids(texts, self.batch_size)
        elif isinstance(task, Answers):
            batches = batches_from_ids(
                [(list(ids), row.label) for (ids, _, _), row in zip(fitting, rows, strict=True)],
                self.batch_size,
            )
        else:
            batches = option_batches_from_ids(fitting, self.batch_size)
        cut = sum(len(one[0]) < len(other[0]) for one, other in zip(fitting, examples, strict=True))
        warn_of_cut(cut, len(rows), self.context, "--truncate", f" of {path}")
        return RowBatches(batches, length_order(fitting))

    def _examples(self, task: Task, rows: Sequence[Any]) -> list[Example]:
        """Token ids; answers are no part of the sequences, so that `Answers` has no options here."""
        if isinstance(task, Tokens):
            if not isinstance(rows[0], dict):
                raise ValueError(
                    f"a posterior of {task!r} says nothing of choices: see `laplace-lora generate`"
                )
            pairs = text_examples(self.tokenizer, rows, end=True)
            return [(prompt, [completion], None) for prompt, completion in pairs]
        if isinstance(task, Options):
            return option_examples(self.tokenizer, [vars(row) for row in rows])
        if not isinstance(task, Answers):
            raise ValueError(f"a posterior of {task!r} has no prompts: only Answers(..) and Options(..) have")
        if answer_token_ids(self.tokenizer, rows) != list(task.token_ids):
            raise InvalidBatchError(
                "field 'choices' names other answers, or in another order, than the training rows"
            )
        return [
            (prompt_ids(self.tokenizer, row.prompt, number)[1], [], row.label)
            for number, row in enumerate(rows, 1)
        ]


@dataclass(frozen=True)
class RowBatches:
    """Batches, and what they are made of.

    Attributes:
        batches: of examples.
        order: the row of each example, in the batches' order.
    """

    batches: list[dict[str, Tensor]]
    order: list[int]
