"""Passes of the linearised model over texts: logits at every labelled token under samples of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.errors import InvalidBatchError
from laplace_lora_fast.fitting.choose import first_batch
from laplace_lora_fast.fitting.passes import BatchStep, Loader, run
from laplace_lora_fast.likelihoods import SampledTokens
from laplace_lora_fast.model.batches import Batch, Inputs
from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.model.tokens.heads import IGNORED, TokenHead
from laplace_lora_fast.prediction import LinearisedModel
from laplace_lora_fast.progress import track
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.sampling.measures import TokenUncertainty, measured, placed
from laplace_lora_fast.sampling.tangents import StepHooks

_TOKENS = 2**14  # whose derivatives are computed at a time


class SampledTokensHead(TokenHead):
    """What a function makes of the linearised logits of all samples at the labelled tokens.

    Args:
        model: the model.
        layers: those under the posterior.
        deltas: steps of every weight, [n, r, d].
        keep: whether all that `of_logits` gives is kept, in `kept`.

    Attributes:
        kept: of every batch: `measured` [3 + n, S, L].
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Treated], deltas: Sequence[Tensor], keep: bool
    ) -> None:
        super().__init__(model)
        self._hooks, self._deltas, self._keep = StepHooks(model, layers), deltas, keep
        self.kept: list[tuple[Inputs, Tensor]] = []

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Log probability [S, 1] of the labelled tokens under the mixture of samples, fp64."""
        counted, tokens = inputs.own["counted"], inputs.own["tokens"]
        n, (rows, length) = len(self._deltas[0]), counted.shape
        parts = []
        with self._hooks.installed():
            hidden, moved, stand_in = self._hidden(model, inputs)
            size = self.chunk(rows * n, inputs)
            for start in range(0, length, size):
                here = slice(start, start + size)
                behind = partial(self.logits_behind, model, inputs, stand_in)
                logits, change = self._hooks.linearised(
                    self._deltas, behind, hidden[:, here], tangents=[moved[:, :, here]], at_a_time=n
                )
                dtype = lk.accumulation_dtype(logits.dtype)
                of = measured if self._keep else _own
                parts.append(of(logits.to(dtype) + change.to(dtype), tokens[:, here]))
        found = torch.cat(parts, -1)
        if self._keep:
            self.kept.append((inputs, found))
        own = found[-n:].double().logsumexp(0) - math.log(n)
        return own.where(counted, 0).sum(1, keepdim=True)

    def _hidden(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
        """Hidden states [S, L, d] at the labelled positions, their derivatives [n, S, L, d], and a stand-in."""
        stand_ins = []

        def states() -> Tensor:
            hidden, stand_in = self.states(model, inputs)
            stand_ins.append(stand_in)
            return hidden

        at_a_time = max(1, _TOKENS // (inputs.n_sequences * (inputs.length or 1)))
        hidden, moved = self._hooks.linearised(self._deltas, states, at_a_time=at_a_time)
        return hidden, moved, stand_ins[-1]


def _own(logits: Tensor, tokens: Tensor) -> Tensor:
    """Each sample's log probability [n, S, l] of the tokens."""
    own = logits.gather(-1, tokens.expand(len(logits), *tokens.shape)[..., None])[..., 0]
    return own - logits.logsumexp(-1)


def drawn_steps(linearised: LinearisedModel, prior: Tensor, n: int, seed: int) -> list[Tensor]:
    """Steps [n, r, d] of every weight from its trained value, drawn from the posterior under a prior [n_weights].

    The same random numbers for each prior.
    """
    curvature = linearised.curvature
    with torch.autocast(curvature.means[0].device.type, enabled=False):
        samples = curvature.sample(n, torch.Generator().manual_seed(seed), prior)
    return [sample - mean.to(sample) for sample, mean in zip(samples, curvature.means, strict=True)]


def token_uncertainty(
    linearised: LinearisedModel, deltas: Sequence[Tensor], batch: Batch
) -> TokenUncertainty:
    """Measures of every labelled token of a batch; of every token but the first where it has no labels.

    Raises:
        InvalidBatchError: the batch is unusable.
        UnsupportedAdapterError: the model has no forward-mode derivatives.
    """
    batch = with_labels(batch)
    head = SampledTokensHead(linearised.subject.model, _layers(linearised), deltas, keep=True)
    _run(linearised, head, [batch], lambda _: None)
    ((inputs, found),) = head.kept
    ids = batch["input_ids"]
    counted, positions = inputs.own["counted"], inputs.own["positions"] + 1
    rows, places = counted.nonzero(as_tuple=True)
    whole = found.new_zeros(len(found), *ids.shape)
    whole[:, rows, positions[rows, places]] = found[:, rows, places]
    mask = torch.zeros(ids.shape, dtype=torch.bool, device=found.device)
    mask[rows, positions[rows, places]] = True
    return placed(whole, ids.to(found.device), mask)


def held_out_nll(
    linearised: LinearisedModel, deltas: Sequence[Tensor], loader: Loader, progress: bool, ranks: Ranks
) -> float:
    """Mean over labelled tokens, of all ranks, of -log of the samples' mean probability.

    Raises:
        InvalidBatchError: the loader is empty, or without labelled tokens.
    """
    head = SampledTokensHead(linearised.subject.model, _layers(linearised), deltas, keep=False)
    total, count = 0.0, 0

    def take(step: BatchStep) -> None:
        nonlocal total, count
        total -= float(step.u.sum())
        count += int(step.inputs.own["counted"].sum())

    with ranks.together():
        first, loader = first_batch(loader)
        if first is not None or ranks.size == 1:
            _run(linearised, head, track(loader, "validate", progress and ranks.rank == 0), take)
    nll, tokens = (float(each) for each in ranks.gather_numbers([total, count]).sum(0))
    if not tokens:
        raise InvalidBatchError("the loader has no labelled token: 'labels' are all -100")
    return nll / tokens


def with_labels(batch: Batch) -> Batch:
    """The batch with every real token labelled, where it has no labels."""
    if batch.get("labels") is not None or not isinstance(batch.get("input_ids"), Tensor):
        return batch
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return {**batch, "labels": ids if mask is None else ids.masked_fill(~mask.bool().to(ids.device), IGNORED)}


def _layers(linearised: LinearisedModel) -> list[Treated]:
    return [layer for layer in linearised.subject.layers if isinstance(layer, Treated)]


def _run(linearised: LinearisedModel, head: TokenHead, loader: Loader, take: Any) -> None:
    subject = replace(linearised.subject, head=head, likelihood=SampledTokens())
    run(subject, loader, None, take, generator=torch.Generator())
