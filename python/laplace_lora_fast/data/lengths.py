"""Sequences that are longer than a model's context: refused with both lengths, or cut from the left with a count."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from laplace_lora_fast.errors import InvalidBatchError, LaplaceWarning

Ids = Sequence[int]


@dataclass(frozen=True)
class Context:
    """How many tokens a sequence may have.

    Args:
        length: most of them; None for any number.
        truncate: whether prompts lose tokens on the left where they have more, rather than being refused.
        begin: a token that stays in front where a prompt begins with it, as models need it there; None for none.
        advice: what the message of a refusal ends with.

    Raises:
        ValueError: there is nothing to truncate to.
    """

    length: int | None = None
    truncate: bool = False
    begin: int | None = None
    advice: str = "shorten it, or pass truncate=True"

    def __post_init__(self) -> None:
        if self.truncate and self.length is None:
            raise ValueError("truncate=True needs max_length, the number of tokens to keep")

    def fitting(self, prompt: Ids, answers: Sequence[Ids], where: Callable[[], str]) -> list[int]:
        """The prompt, short enough for the longest of the answers behind it.

        Raises:
            InvalidBatchError: it is too long, or an answer alone is; names both lengths.
        """
        longest = max(map(len, answers), default=0)
        if self.length is None or len(prompt) + longest <= self.length:
            return list(prompt)
        total = len(prompt) + longest
        if not self.truncate:
            raise InvalidBatchError(
                f"{where()} has {total} tokens, the model's context is {self.length}: {self.advice}"
            )
        kept = 1 if self.begin is not None and prompt[:1] == [self.begin] else 0
        room = self.length - longest - kept
        if room < 1:
            raise InvalidBatchError(
                f"{where()} has an option of {longest} tokens, the model's context is {self.length}"
            )
        return [*prompt[:kept], *prompt[-room:]]


def context_of(tokenizer: Any, max_length: int | None, truncate: bool) -> Context:
    """Of a tokenizer's model."""
    return Context(max_length, truncate, getattr(tokenizer, "bos_token_id", None))


def warn_of_cut(cut: int, count: int, length: int | None, what: str = "truncate=True", of: str = "") -> None:
    """Warns where prompts lost tokens.

    Args:
        cut: how many prompts did.
        count: how many there are.
        length: what they were cut to.
        what: that cut them.
        of: whose they are.
    """
    if cut:
        warnings.warn(
            f"{what} cut {cut} of {count} prompts{of} to the model's {length} tokens",
            LaplaceWarning,
            stacklevel=3,
        )
