"""Rows of a file as batches of the task that serves them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from laplace_lora_fast import Answers, InvalidBatchError, LaplaceWarning, Options
from laplace_lora_fast.data.groups import Example, length_order, option_batches_from_ids, option_examples
from laplace_lora_fast.data.prompts import PromptRow, answer_token_ids, batches_from_ids
from laplace_lora_fast.tasks import Task


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

    def batches(self, task: Task, rows: Sequence[PromptRow], path: Path) -> RowBatches:
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
        fitting = [
            self._fitting(example, f"{path}: row {number}") for number, example in enumerate(examples, 1)
        ]
        if isinstance(task, Answers):
            batches = batches_from_ids(
                [(list(ids), label or 0) for ids, _, label in fitting], self.batch_size
            )
        else:
            batches = option_batches_from_ids(fitting, self.batch_size)
        cut = sum(len(one[0]) < len(other[0]) for one, other in zip(fitting, examples, strict=True))
        if cut:
            warnings.warn(
                f"--truncate cut {cut} of {len(rows)} prompts of {path} to the model's {self.context} tokens",
                LaplaceWarning,
                stacklevel=2,
            )
        return RowBatches(batches, length_order(fitting))

    def _examples(self, task: Task, rows: Sequence[PromptRow]) -> list[Example]:
        """Token ids; answers are no part of the sequences, so that `Answers` has no options here."""
        if isinstance(task, Options):
            return option_examples(self.tokenizer, [vars(row) for row in rows])
        if not isinstance(task, Answers):
            raise ValueError(f"a posterior of {task!r} has no prompts: only Answers(..) and Options(..) have")
        if answer_token_ids(self.tokenizer, rows) != list(task.token_ids):
            raise InvalidBatchError(
                "field 'choices' names other answers, or in another order, than the training rows"
            )
        return [(self.tokenizer(row.prompt)["input_ids"], [], row.label) for row in rows]

    def _fitting(self, example: Example, where: str) -> Example:
        """The example with no more tokens than the model has places for."""
        prompt, options, label = example
        longest = max(map(len, options), default=0)
        if self.context is None or len(prompt) + longest <= self.context:
            return example
        if not self.truncate:
            raise InvalidBatchError(
                f"{where} has {len(prompt) + longest} tokens, the model's context is {self.context}: shorten it, or "
                "pass --truncate"
            )
        begin = 1 if prompt[0] == getattr(self.tokenizer, "bos_token_id", None) else 0  # models need it there
        room = self.context - longest - begin
        if room < 1:
            raise InvalidBatchError(
                f"{where} has an option of {longest} tokens, the model's context is {self.context}"
            )
        return [*prompt[:begin], *prompt[-room:]], options, label


@dataclass(frozen=True)
class RowBatches:
    """Batches, and what they are made of.

    Attributes:
        batches: of examples.
        order: the row of each example, in the batches' order.
    """

    batches: list[dict[str, Tensor]]
    order: list[int]
