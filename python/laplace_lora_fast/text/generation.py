"""Generation by the linearised model under samples of its weights: each token from the mixture of all of them.

The n samples are rows of one batch, with one key-value cache of dual tensors, so that a step costs what a step of a
plain batch of n does, times what forward-mode derivatives cost. At each step the next token is chosen by the mixture of
the samples' distributions, the same for all of them: their disagreement is the uncertainty.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import laplace_kernels as lk
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.model.batches import Batch, Inputs
from laplace_lora_fast.model.heads import context_length, innermost
from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.model.tokens.heads import TokenHead
from laplace_lora_fast.options import positive_integer, positive_number
from laplace_lora_fast.sampling.measures import TokenUncertainty, measured, placed
from laplace_lora_fast.sampling.tangents import StepHooks

_CACHES = ("cache", "past_key_values")  # what versions of transformers call it


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen from the mixture's distribution.

    Attributes:
        max_new_tokens: most tokens of an answer.
        do_sample: draw it, rather than take the likeliest.
        temperature: sharpens (below 1) or flattens the distribution that is drawn from.
        top_k: draw among so many of the likeliest only.
        top_p: draw among the likeliest that together have this probability only.
        eos_token_ids: tokens that end an answer.
        seed: of the draws.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    eos_token_ids: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        positive_integer("max_new_tokens", self.max_new_tokens)
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        ignored = [name for name, value in given.items() if value is not None]
        if ignored and not self.do_sample:
            raise ValueError(f"{ignored[0]} has no effect without do_sample=True: leave it out")
        if self.temperature is not None:
            positive_number("temperature", self.temperature)
        if self.top_k is not None:
            positive_integer("top_k", self.top_k)
        if self.top_p is not None and positive_number("top_p", self.top_p) > 1:
            raise ValueError(f"top_p must be at most 1, got {self.top_p}")

    def next(self, log_probs: Tensor, uniforms: Tensor) -> Tensor:
        """The next token [N] by the mixture's log probabilities [N, V], drawn by uniform numbers [N] if at all."""
        if not self.do_sample:
            return log_probs.argmax(-1)
        ordered, tokens = torch.sort(
            log_probs / (self.temperature or 1.0), dim=-1, descending=True, stable=True
        )
        p = ordered.softmax(-1)
        if self.top_k is not None:
            p[:, self.top_k :] = 0
        if self.top_p is not None:
            p = p.where(p.cumsum(-1) - p < self.top_p, 0)
        cdf = p.cumsum(-1)
        place = torch.searchsorted(cdf, uniforms.to(cdf)[:, None] * cdf[:, -1:], right=True)
        return tokens.gather(1, place.clamp_max(tokens.shape[1] - 1))[:, 0]


def generate(
    model: nn.Module, layers: Sequence[Treated], deltas: Sequence[Tensor], batch: Batch, how: Decoding
) -> TokenUncertainty:
    """Answers to prompts, and the uncertainty about each of their tokens.

    Args:
        model: a causal language model with a key-value cache.
        layers: its LoRA layers.
        deltas: steps of their weights, [n, r, d].
        batch: of `left_padded`.
        how: the next token is chosen.

    Returns:
        Of the answers' tokens [N, L], the one that ends an answer included; `mask` is False behind it.

    Raises:
        InvalidBatchError: the batch is unusable, or too long for the model's context with the answers.
        UnsupportedAdapterError: something in the model has no forward-mode derivative.
        ValueError: the model keeps no cache.
    """
    head, n = TokenHead(model), len(deltas[0])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    context = context_length(model)
    longest = int(mask.sum(1).max())
    if context is not None and longest + how.max_new_tokens > context:
        raise InvalidBatchError(
            f"a prompt has {longest} tokens, with max_new_tokens={how.max_new_tokens} more than the model's context of "
            f"{context}: shorten one of them"
        )
    generator = torch.Generator().manual_seed(how.seed)
    uniforms = torch.rand(how.max_new_tokens, len(ids), generator=generator, dtype=torch.float64)
    with StepHooks(model, layers).installed() as hooks:
        rows = _Rows(model, head, ids, mask, n)
        with hooks.repeated(deltas):
            steps = _answer(rows, how, uniforms)
    tokens = torch.stack([token for token, _ in steps], 1)
    ends = torch.isin(tokens, torch.tensor(how.eos_token_ids, dtype=tokens.dtype, device=tokens.device))
    real = ends.cumsum(1) - ends.long() == 0
    return placed(torch.cat([each for _, each in steps], -1), tokens, real)


def _answer(rows: _Rows, how: Decoding, uniforms: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The token [N] and its measures [3 + n, N, 1] of every step."""
    ends = torch.tensor(how.eos_token_ids, dtype=torch.long, device=rows.ids.device)
    finished = torch.zeros(len(rows.ids), dtype=torch.bool, device=rows.ids.device)
    steps: list[tuple[Tensor, Tensor]] = []
    while len(steps) < how.max_new_tokens and not finished.all():
        logits = rows.logits() if not steps else rows.logits_behind(steps[-1][0])
        mixture = logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
        token = how.next(mixture, uniforms[len(steps)].to(mixture.device))
        steps.append((token, measured(logits[:, :, None], token[:, None])))
        finished |= torch.isin(token, ends)
    return steps


class _Rows:
    """Prompts and what has been generated behind them, n times in one batch, sample by sample."""

    def __init__(self, model: nn.Module, head: TokenHead, ids: Tensor, mask: Tensor, n: int) -> None:
        checks, device = DeferredChecks(), device_of(model)
        inputs: Inputs = head.inputs(
            {"input_ids": ids, "attention_mask": mask, "labels": ids * mask - 100 * (1 - mask)},
            device,
            checks,
        )
        checks.settle()
        inputs = head.placed(model, inputs)
        self._model, self._n, self._cache = model, n, None
        self.ids, self._mask = ids.to(device), mask.to(device)
        self._positions: Tensor | None = inputs.model.get("position_ids")
        accepted = inspect.signature(innermost(model).forward).parameters
        known = [name for name in _CACHES if name in accepted]
        if not known:
            raise ValueError(
                f"{type(innermost(model)).__name__} takes no key-value cache, which generation needs"
            )
        self._cache_name = known[0]
        self._options = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._options["logits_to_keep"] = 1  # type: ignore[assignment]

    def logits(self) -> Tensor:
        """[n, N, V] of every sample behind the prompts."""
        return self._run(self.ids, self._positions)

    def logits_behind(self, token: Tensor) -> Tensor:
        """[n, N, V] of every sample behind one token more."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], 1)
        if self._positions is not None:
            self._positions = self._positions[:, -1:] + 1
        return self._run(token[:, None], self._positions)

    def _run(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": self._mask}
        if positions is not None:
            arguments["position_ids"] = positions
        arguments = {key: value.repeat(self._n, 1) for key, value in arguments.items()}
        output = self._model(**arguments, **{self._cache_name: self._cache}, **self._options)
        self._cache = next((output[name] for name in _CACHES if output.get(name) is not None), None)
        if self._cache is None:
            raise ValueError(f"{type(innermost(self._model)).__name__} gives no key-value cache back")
        dual = forward_ad.unpack_dual(output.logits[:, -1])
        dtype = lk.accumulation_dtype(dual.primal.dtype)
        logits: Tensor = dual.primal.to(dtype)
        if dual.tangent is not None:
            logits = logits + dual.tangent.to(dtype)
        return logits.view(self._n, len(ids), -1)


def left_padded(batch: Batch) -> dict[str, Tensor]:
    """A batch of prompts with all pads on the left. Raises InvalidBatchError where it holds anything else."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        raise InvalidBatchError("generation needs 'input_ids' [N, T] of at least one token")
    other = sorted(
        key
        for key, value in batch.items()
        if isinstance(value, Tensor) and key not in ("input_ids", "attention_mask")
    )
    if other:
        raise InvalidBatchError(
            f"a batch of prompts has {other[0]!r}, which generation does not use: leave it out"
        )
    mask = torch.ones_like(ids) if mask is None else mask.to(ids)
    if mask.shape != ids.shape or not mask.any(1).all():
        raise InvalidBatchError(
            "'attention_mask' must be that of 'input_ids', with a real token in every prompt"
        )
    order = mask.bool().int().argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    start = int((~mask.bool()).sum(1).min())
    return {"input_ids": ids[:, start:], "attention_mask": mask[:, start:]}
