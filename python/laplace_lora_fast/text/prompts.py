"""Prompts of any form as a batch, and what ends an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.model.batches import Batch
from laplace_lora_fast.model.heads import innermost
from laplace_lora_fast.options import integer


def prompt_batch(prompts: str | Sequence[Any] | Batch, tokenizer: Any) -> tuple[Batch, list[list[int]]]:
    """A batch of prompts, and the tokens of each.

    Raises:
        InvalidBatchError: there is none, or one is empty.
        ValueError: texts without a tokenizer.
    """
    if isinstance(prompts, Mapping):
        return prompts, _tokens(prompts)
    if tokenizer is None:
        raise ValueError("prompts are texts: pass a tokenizer, or a batch of 'input_ids'")
    listed: list[Any] = [prompts] if isinstance(prompts, str) or _is_chat(prompts) else list(prompts)
    encoded = [_encoded(tokenizer, prompt, number) for number, prompt in enumerate(listed, 1)]
    if not encoded:
        raise InvalidBatchError("there are no prompts")
    length = max(map(len, encoded))
    batch = {
        "input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids in encoded]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded]),
    }
    return batch, encoded


def end_tokens(model: nn.Module, given: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end an answer: those given, or those of the model's generation config or config."""
    if given is None:
        inner = innermost(model)
        for config in (getattr(inner, "generation_config", None), getattr(inner, "config", None)):
            given = getattr(config, "eos_token_id", None)
            if given is not None:
                break
    if given is None:
        return ()
    listed = given if isinstance(given, Sequence) else [given]
    return tuple(integer("eos_token_id", each) for each in listed)


def _tokens(batch: Batch) -> list[list[int]]:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise InvalidBatchError("generation needs 'input_ids' [N, T] of at least one token")
    real = torch.ones_like(ids) if mask is None else mask
    if real.shape != ids.shape:
        raise InvalidBatchError("'attention_mask' must have the shape of 'input_ids'")
    return [row[keep].tolist() for row, keep in zip(ids, real.bool(), strict=True)]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(each, Mapping) for each in prompt)


def _encoded(tokenizer: Any, prompt: Any, number: int) -> list[int]:
    if _is_chat(prompt):
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if len(ids) > 1 and ids[-1] == getattr(tokenizer, "eos_token_id", None):
            ids = ids[:-1]  # of tokenizers that end every text: the answer goes on from here
    else:
        raise InvalidBatchError(f"prompt {number} is neither a text nor a chat: {type(prompt).__name__}")
    if not ids:
        raise InvalidBatchError(f"prompt {number} is empty")
    return list(ids)
