"""Heads that read every labelled token of a sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import laplace_kernels as lk
from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.model.batches import Batch, Inputs
from laplace_lora_fast.model.heads import innermost
from laplace_lora_fast.model.heads.causal import CausalHead, at_positions, marked_tokens
from laplace_lora_fast.model.tokens.chunks import Backbone

IGNORED = -100  # the label of what is not learnt, as transformers has it

Reduce = Callable[
    [Tensor, int], Tensor
]  # logits [S, l, V] of a chunk, at its first position -> numbers [S, ..]


class TokenHead(CausalHead):
    """Logits at the positions that predict the labelled tokens: `labels` [S, T] with -100 where there is none.

    Labels are those of transformers' causal models: label t is of token t, predicted from those before it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._backbone = Backbone(model, self._vocabulary)

    def inputs(self, batch: Batch, device: torch.device, checks: DeferredChecks) -> Inputs:
        """Where the labelled tokens are is worked out where the loader left them."""
        inputs = super().inputs(batch, device, checks)
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise InvalidBatchError("Tokens needs 'input_ids' [N, T] in every batch")
        if not isinstance(labels, Tensor) or labels.shape != ids.shape or labels.is_floating_point():
            got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise InvalidBatchError(
                f"'labels' must be token ids of shape {tuple(ids.shape)}, that of 'input_ids', with -100 where a token "
                f"is not learnt, got {got}"
            )
        labels, mask = labels.to(ids.device), batch.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        marked = (labels != IGNORED) & (real.cumsum(1) > 1)  # nothing predicts a first token
        at_pad = ((labels != IGNORED) & ~real.bool()).any()
        checks.require(~at_pad, "'labels' has a token at a pad: it must be -100 there")
        own = marked_tokens(labels, marked, device)
        if self._vocabulary is not None:
            tokens = own["tokens"]
            known = ((tokens >= 0) & (tokens < self._vocabulary)).all()
            checks.require(known, f"'labels' must be -100 or lie in [0, {self._vocabulary})")
        return replace(inputs, own=own, labels=None)

    def positions(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return inputs.own["positions"], inputs.own["counted"]

    @contextmanager
    def installed(self) -> Iterator[None]:
        with super().installed(), self._backbone.installed():
            yield

    def output_stream(self, x: Tensor, inputs: Inputs, use: int) -> tuple[Tensor, Tensor | None] | None:
        positions, counted = self.positions(inputs)
        start = use * (self._backbone.chunk(len(positions)) or 0)
        mask = counted[:, start : start + x.shape[1]] if x.dim() == 3 else counted[:, :0]
        return (x, mask) if x.shape[:2] == mask.shape else None

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        raise NotImplementedError

    def reduced(self, model: nn.Module, inputs: Inputs, reduce: Reduce) -> list[Tensor]:
        """What `reduce` makes of each chunk's logits.

        With autograd the logits of one chunk are kept for the backward pass, those of others computed again there.
        """
        positions, _ = self.positions(inputs)
        size = self.chunk(len(positions), inputs)
        chunks = positions.split(size, 1)
        logits, states, stand_in = self._first(model, inputs, chunks[0])
        results = [reduce(logits, 0)]
        for index, chunk in enumerate(chunks[1:], 1):
            hidden, start = at_positions(states, chunk), index * size

            def later(hidden: Tensor, start: int = start) -> Tensor:
                return reduce(self.logits_behind(model, inputs, stand_in, hidden), start)

            if hidden.requires_grad:
                results.append(checkpoint(later, hidden, use_reentrant=False, preserve_rng_state=False))
            else:
                results.append(later(hidden))
        return results

    def chunk(self, rows: int, inputs: Inputs) -> int:
        """How many labelled positions have their logits at a time, where those of `rows` sequences are wanted."""
        return self._backbone.chunk(rows) or self.positions(inputs)[0].shape[1]

    def states(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Any]:
        """Hidden states [S, L, d] at the labelled positions, and what `logits_behind` needs beside them."""
        positions, _ = self.positions(inputs)
        _, states, stand_in = self._first(model, inputs, positions[:, :1])
        return at_positions(states, positions), stand_in

    def logits_behind(self, model: nn.Module, inputs: Inputs, stand_in: Any, hidden: Tensor) -> Tensor:
        """The logits [S, l, V] behind hidden states [S, l, d]: the rest of the model, without its backbone."""
        if stand_in is None:
            raise InvalidBatchError(
                f"{type(innermost(model)).__name__} does not call the module that its get_decoder() gives, so that its "
                "logits cannot be computed a few positions at a time"
            )
        run = partial(self._logits, model, inputs, lambda _: hidden)
        return self._checked(self._backbone.passed_over(stand_in, run), hidden)

    def _first(self, model: nn.Module, inputs: Inputs, positions: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The whole model: logits at some positions [S, l], hidden states [S, T, d], a stand-in for the backbone."""
        self._require_accepted(inputs)
        seen: list[Tensor] = []

        def show(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return at_positions(hidden, positions)

        logits, stand_in = self._backbone.watched(partial(self._logits, model, inputs, show))
        return self._checked(logits, positions), seen[0], stand_in

    def _logits(self, model: nn.Module, inputs: Inputs, choose: Callable[[Tensor], Tensor]) -> Tensor:
        with self._showing(choose):
            return self.read(model(**inputs.model), inputs)

    def _checked(self, logits: Tensor, like: Tensor) -> Tensor:
        if logits.dim() != 3 or logits.shape[:2] != like.shape[:2]:
            raise InvalidBatchError(
                f"the model's logits have shape {tuple(logits.shape)}, expected {(*like.shape[:2], 'V')}: its output "
                "embeddings do not see the positions that are read"
            )
        return logits


class SampledLabelsHead(TokenHead):
    """Scores -log p(y) [S, M] of M label sequences drawn from the model, one token at each labelled position.

    What is drawn for a sequence depends on the seed, its own tokens and which of them are labelled: not on its batch.

    Args:
        model: the model.
        samples: M.
    """

    same_alone = False  # rounding may draw another token

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__(model)
        self.n_outputs = samples

    def inputs(self, batch: Batch, device: torch.device, checks: DeferredChecks) -> Inputs:
        inputs = super().inputs(batch, device, checks)
        assert self.n_outputs is not None
        draws = _uniforms(batch, self.n_outputs, self.seed, inputs.own["counted"].shape[1])
        return replace(inputs, own=inputs.own | {"uniforms": to_device(draws, device)})

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        drawn: dict[int, Tensor] = {}
        counted, uniforms = inputs.own["counted"], inputs.own["uniforms"]

        def scores(logits: Tensor, start: int) -> Tensor:
            log_probs = logits.log_softmax(-1, dtype=lk.accumulation_dtype(logits.dtype))
            here = slice(start, start + logits.shape[1])
            if start not in drawn:  # a checkpoint computes the rest again
                drawn[start] = _inverse_cdf(log_probs.detach(), uniforms[:, here])
            own = log_probs.gather(2, drawn[start])
            return -own.where(counted[:, here, None], 0).sum(1)

        chunks = self.reduced(model, inputs, scores)
        return torch.stack(chunks).sum(0) if len(chunks) > 1 else chunks[0]


class LabelScoreHead(TokenHead):
    """Log probability [S, 1] of each sequence's labelled tokens.

    Args:
        model: the model.
        mean: whether it is that of a token on average.
    """

    def __init__(self, model: nn.Module, mean: bool) -> None:
        super().__init__(model)
        self.n_outputs, self._mean = 1, mean

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        counted, tokens = inputs.own["counted"], inputs.own["tokens"]

        def scores(logits: Tensor, start: int) -> Tensor:
            here = slice(start, start + logits.shape[1])
            log_probs = logits.log_softmax(-1, dtype=lk.accumulation_dtype(logits.dtype))
            own = log_probs.gather(2, tokens[:, here, None])[..., 0]
            return own.where(counted[:, here], 0).sum(1, keepdim=True)

        total = torch.stack(self.reduced(model, inputs, scores)).sum(0)
        return total / counted.sum(1, keepdim=True).clamp_min(1) if self._mean else total


def _inverse_cdf(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [S, l, M] for uniform numbers [S, l, M], from log probabilities [S, l, V]."""
    cdf = log_probs.exp().cumsum(-1)
    tokens = torch.searchsorted(cdf, uniforms.to(cdf) * cdf[..., -1:], right=True)
    return tokens.clamp_max(log_probs.shape[-1] - 1)


def _uniforms(batch: Batch, samples: int, seed: int, length: int) -> Tensor:
    """Uniform numbers [S, L, M], fp64: for each sequence seeded by its tokens and which are labelled."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().cpu()
    uniforms = torch.zeros(len(ids), length, samples, dtype=torch.float64)
    for row, keep in enumerate(real):
        marked = (labels[row][keep] != IGNORED)[1:]
        content = ids[row][keep].long().numpy().tobytes() + marked.numpy().tobytes()
        key = hashlib.blake2b(content + seed.to_bytes(16, "little", signed=True), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        count = int(marked.sum())
        uniforms[row, :count] = torch.rand(samples, count, generator=generator, dtype=torch.float64).mT
    return uniforms
