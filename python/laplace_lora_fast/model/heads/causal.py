"""Heads of causal language models: answers at the last position, options scored by their tokens, tokens themselves.

The language-model head is shown only the positions that are read: with a vocabulary of 128,000 that is the memory of a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.model.batches import Batch, Inputs
from laplace_lora_fast.model.contexts import PerThread
from laplace_lora_fast.model.heads.base import Head, innermost, logits_of

_TEXT = {"input_ids", "inputs_embeds", "token_type_ids", "attention_mask"}
_PROBED = 8  # tokens


class CausalHead(Head):
    """Reads some positions' logits over the vocabulary.

    Args:
        model: the model.

    Raises:
        ValueError: the model is no causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        _require_causal(model, type(self).__name__)
        self.output_layer = model.get_output_embeddings()  # type: ignore[operator]
        self._local = PerThread()
        self._counts_from_zero: bool | None = None

    def positions(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Which positions [S, L] are read, and the mask [S, L] of those that count; None where all do."""
        raise NotImplementedError

    def placed(self, model: nn.Module, inputs: Inputs) -> Inputs:
        """The inputs with `position_ids`, so that left padding shifts no position, as in generation.

        Only for a model that counts positions 0, 1, .. itself, which is found out at the first batch with a mask.
        Others, as RoBERTa, count from elsewhere, and know where the pads are.
        """
        if inputs.positions is None:
            return inputs
        if self._counts_from_zero is None:
            self._counts_from_zero = _counts_from_zero(model, inputs.model)  # waits once
        if not self._counts_from_zero:
            return inputs
        return replace(inputs, model=inputs.model | {"position_ids": inputs.positions}, positions=None)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Makes the language-model head see the positions that are read only."""
        assert self.output_layer is not None
        handle = self.output_layer.register_forward_pre_hook(self._gather)
        try:
            yield
        finally:
            handle.remove()

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        with self._showing(partial(at_positions, positions=self.positions(inputs)[0])):
            return super().u(model, inputs)

    def output_stream(self, x: Tensor, inputs: Inputs, use: int) -> tuple[Tensor, Tensor | None] | None:
        positions, mask = self.positions(inputs)
        return (x, mask) if x.dim() == 3 and x.shape[:2] == positions.shape else None

    def _places(self, inputs: Inputs) -> bool:
        """Text alone: images take places of their own. Numbers of examples that the model does not take have none.

        A classifier is called as its user calls it: its logits are the model's own, whatever padding does to them.
        """
        taken = [
            key
            for key, value in inputs.model.items()
            if isinstance(value, Tensor) and (value.dim() > 1 or key in self._accepts)
        ]
        text = all(key in _TEXT for key in taken)
        return text and "position_ids" in self._accepts

    @contextmanager
    def _showing(self, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, and in this thread alone, the language-model head sees `choose` of its input."""
        before = getattr(self._local, "choose", None)
        self._local.choose = choose
        try:
            yield
        finally:
            self._local.choose = before

    def _gather(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        choose = getattr(self._local, "choose", None)  # a plain forward beside this thread's pass has none
        return None if choose is None else (choose(args[0]), *args[1:])


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Of hidden states [S, T, d] those at `positions` [S, L]: [S, L, d]. InvalidBatchError for others."""
    if hidden.dim() != 3 or hidden.shape[0] != len(positions):
        raise InvalidBatchError(
            f"the language-model head sees a tensor of shape {tuple(hidden.shape)} in a batch of {len(positions)} "
            "sequences, not one position after the other: pass Outputs(function), which reads the model's output"
        )
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows[:, None], positions.to(hidden.device)]


class AnswerHead(CausalHead):
    """Logits of answer tokens at the last real position.

    Args:
        model: the model.
        spellings: the tokens of each answer, in the order of the classes: any of them says it.

    Raises:
        ValueError: the model is no causal language model, or a token is none of its vocabulary.
    """

    def __init__(self, model: nn.Module, spellings: Sequence[Sequence[int]]) -> None:
        super().__init__(model)
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        flat = [token for tokens in spellings for token in tokens]
        if size is not None and not (min(flat) >= 0 and max(flat) < size):
            raise ValueError(f"token_ids must lie in [0, {size}), got {flat}")
        self._sizes = [len(tokens) for tokens in spellings]
        with torch.inference_mode(False):  # the graph of the logits keeps them
            self.features = torch.tensor(flat)
        self.n_outputs = len(spellings)

    def positions(self, inputs: Inputs) -> tuple[Tensor, None]:
        if inputs.last is None:
            raise InvalidBatchError("Answers needs sequences of tokens: 'input_ids' or 'inputs_embeds'")
        return inputs.last[:, None], None

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        logits = super().read(output, inputs)
        assert self.features is not None
        self.features = self.features.to(logits.device)  # waits once
        logits = logits.flatten(0, -2).index_select(-1, self.features)
        if len(self._sizes) == logits.shape[1]:
            return logits
        parts = logits.to(lk.accumulation_dtype(logits.dtype)).split(self._sizes, 1)
        return torch.stack([part.logsumexp(1) for part in parts], 1)


class OptionHead(CausalHead):
    """The score of an option's tokens behind a prompt: the sum or mean of their log probabilities, one a sequence.

    A batch has "option_mask" [S, T], true at the option's tokens, beside "group".

    Args:
        model: the model.
        mean: whether the score is the mean.
    """

    grouped = True
    own_keys: ClassVar[tuple[str, ...]] = ("option_mask",)

    def __init__(self, model: nn.Module, mean: bool) -> None:
        super().__init__(model)
        self._mean = mean

    def inputs(self, batch: Batch, device: torch.device, checks: DeferredChecks) -> Inputs:
        """Where the options' tokens are is worked out where the loader left them: nothing waits for the device."""
        inputs = super().inputs(batch, device, checks)
        ids, option = batch.get("input_ids"), inputs.own["option_mask"].bool()
        if not isinstance(ids, Tensor) or option.shape != ids.shape:
            raise InvalidBatchError(
                f"'option_mask' has shape {tuple(option.shape)}, expected that of 'input_ids'"
            )
        mask = batch.get("attention_mask")
        if mask is not None and (option & ~mask.bool()).any():
            raise InvalidBatchError("'option_mask' is true at a pad")
        if option[:, 0].any():
            raise InvalidBatchError("'option_mask' is true at a first token, which nothing predicts")
        counts = option.sum(1)
        if not counts.all():
            raise InvalidBatchError(
                f"sequence {int(counts.argmin())} of a batch has no token in 'option_mask'"
            )
        return replace(inputs, own=marked_tokens(ids, option, device))

    def positions(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return inputs.own["positions"], inputs.own["counted"]

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        logits, tokens, counted = super().read(output, inputs), inputs.own["tokens"], inputs.own["counted"]
        if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            raise InvalidBatchError(
                f"the model's logits have shape {tuple(logits.shape)}, expected {(*tokens.shape, 'V')}: its output "
                "embeddings do not see the positions that are read"
            )
        log_probs = logits.log_softmax(-1, dtype=lk.accumulation_dtype(logits.dtype))
        of_token = log_probs.gather(2, tokens[..., None])[..., 0].where(counted, 0)
        scores = of_token.sum(1, keepdim=True)
        return scores / counted.sum(1, keepdim=True) if self._mean else scores


def marked_tokens(ids: Tensor, marked: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The tokens that are marked in each sequence, and the positions that predict them.

    Args:
        ids: [S, T].
        marked: [S, T] bool, false at first tokens; on the CPU nothing waits for a device.
        device: where the result goes.

    Returns:
        "positions" and "tokens" [S, L], L the most that a sequence has and at least 1, in their order; "counted" [S, L]
        says which are real.
    """
    counts = marked.sum(1)
    most = max(int(counts.max()), 1)
    order = torch.argsort(marked.int(), dim=1, descending=True, stable=True)[:, :most]
    real = torch.arange(most, device=counts.device) < counts[:, None]
    own = {
        "positions": (order - 1).where(real, 0),
        "tokens": ids.gather(1, order).where(real, 0),
        "counted": real,
    }
    return {key: to_device(value, device) for key, value in own.items()}


@torch.no_grad()
def _counts_from_zero(model: nn.Module, batch: Mapping[str, Any]) -> bool | None:
    """Whether an unpadded sequence has the same logits with positions 0, 1, .. as with none given.

    None where logits are not finite, which tell nothing: the next batch will.
    """
    row = {
        key: value[:1, :_PROBED] if isinstance(value, Tensor) and value.dim() > 1 else value
        for key, value in batch.items()
    }
    row["attention_mask"] = torch.ones_like(row["attention_mask"])
    positions = torch.arange(row["attention_mask"].shape[1], device=row["attention_mask"].device)[None]
    plain = logits_of(model(**row))
    if not bool(plain.isfinite().all()):
        return None
    return torch.equal(plain, logits_of(model(**row, position_ids=positions)))


def _require_causal(model: nn.Module, head: str) -> None:
    """Only there does the last real position of `input_ids` predict the answer."""
    names = {"AnswerHead": "Answers", "OptionHead": "Options", "ImplicitRewardHead": "DirectPreference"}
    task = names.get(head, "Tokens")
    get, kind = getattr(model, "get_output_embeddings", None), type(innermost(model))
    if get is None or get() is None:
        raise ValueError(f"{task} needs a causal language model")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        what = "answers at positions of its decoder"
    elif any("ForMaskedLM" in base.__name__ for base in kind.__mro__):
        what = "answers at masked positions"
    else:
        return
    raise ValueError(
        f"{task} needs a causal language model, {kind.__name__} {what}: pass Outputs(function), which reads the "
        "classes off the model's output"
    )
