"""From a batch to logits [N, C]: what a model's output means, and which tokens of a batch are real."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError

OutputFn = Callable[[Any, Mapping[str, Any]], Tensor]

_NOT_FOR_THE_MODEL = ("labels", "label")
_TEXT = {"input_ids", "inputs_embeds", "token_type_ids", "attention_mask"}
_PROBED = 8  # tokens


@dataclass(frozen=True)
class Inputs:
    """A batch, checked and on the model's device.

    Attributes:
        model: keyword arguments of the model's forward.
        mask: [N, T] bool, True at real tokens; None when every token is real.
        batch_size: N.
        length: T, or None for inputs that are not token sequences.
        labels: what the batch holds under "labels", or None.
        last: [N] position of each example's last real token, or None for inputs that are not token sequences.
        positions: [N, T] number of real tokens before each one, where the model may have to be told them.
    """

    model: dict[str, Any]
    mask: Tensor | None
    batch_size: int
    length: int | None
    labels: Tensor | None
    last: Tensor | None
    positions: Tensor | None = None


class Head:
    """Reads logits off a model's output.

    Args:
        model: the model.
        answer_token_ids: for causal language models, the tokens whose logits at the last real position are the
            classes, in this order.
        output_fn: (model output, batch) -> logits [N, C], instead.

    Attributes:
        rows_checked: whether a tap has found that each layer's rows are the examples.

    Raises:
        ValueError: both or an unusable `answer_token_ids` were given.
    """

    def __init__(
        self,
        model: nn.Module,
        answer_token_ids: Sequence[int] | None = None,
        output_fn: OutputFn | None = None,
    ) -> None:
        if answer_token_ids is not None and output_fn is not None:
            raise ValueError("pass either answer_token_ids or output_fn, not both")
        self.output_fn = output_fn
        self.answer_token_ids = None
        self.output_layer: nn.Module | None = None
        self.rows_checked = False
        self._last: Tensor | None = None
        parameters = inspect.signature(_innermost(model).forward).parameters
        self._accepts = {name for name in ("use_cache", "position_ids") if name in parameters}
        self._counts_from_zero: bool | None = None
        if answer_token_ids is not None:
            self.answer_token_ids = _checked_answers(model, answer_token_ids)
            self.output_layer = model.get_output_embeddings()  # type: ignore[operator]

    def inputs(self, batch: Mapping[str, Any], device: torch.device, checks: DeferredChecks) -> Inputs:
        """Checks a batch and moves it to `device`; labels stay where they are.

        Raises:
            InvalidBatchError: not a mapping of tensors, empty, or with a sequence that has no real token.
        """
        if not isinstance(batch, Mapping):
            raise InvalidBatchError(
                f"a batch must be a dict of tensors as transformers makes them, got {type(batch)}"
            )
        if batch.get("adapter_names") is not None:
            raise InvalidBatchError(
                "a batch mixes adapters ('adapter_names'): use the model's one active adapter"
            )
        n, length = _batch_shape(batch)
        if n == 0:
            raise InvalidBatchError("a batch has no examples")
        mask = batch.get("attention_mask")
        last = positions = None
        if mask is not None:
            mask = _checked_mask(mask, n, length, checks)
            positions = mask.long().cumsum(1)
            last = positions.argmax(1)  # the first position that has seen every real token
            if mask.device.type == "cpu" and mask.all():
                mask = None
        elif length is not None:
            last = torch.full((n,), length - 1, device=device)
        model = {
            k: _usable(v, device) if isinstance(v, Tensor) else v
            for k, v in batch.items()
            if k not in _NOT_FOR_THE_MODEL
        }
        if "use_cache" in self._accepts:
            model["use_cache"] = False
        if mask is not None and positions is not None and self._may_place(model):
            positions = to_device((positions - 1).clamp(min=0), device)
        else:
            positions = None
        labels = batch.get("labels", batch.get("label"))
        return Inputs(
            model=model,
            mask=None if mask is None else to_device(mask, device),
            batch_size=n,
            length=length,
            labels=None if labels is None else torch.as_tensor(labels),
            last=None if last is None else to_device(last, device),
            positions=positions,
        )

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
        """Makes the language-model head see the last real position of each example only."""
        if self.output_layer is None:
            yield
            return
        handle = self.output_layer.register_forward_pre_hook(self._gather_last)
        try:
            yield
        finally:
            handle.remove()

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Runs the model and returns its logits [N, C].

        Raises:
            InvalidBatchError: the output is not [N, C]; says what to pass.
        """
        self._last = inputs.last
        try:
            output = model(**inputs.model)
        finally:
            self._last = None
        if self.output_fn is not None:
            logits = self.output_fn(output, inputs.model)
        else:
            logits = output.logits if hasattr(output, "logits") else output
            if self.answer_token_ids is not None:
                self.answer_token_ids = self.answer_token_ids.to(logits.device)  # waits once
                logits = logits.flatten(0, -2).index_select(-1, self.answer_token_ids)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != inputs.batch_size:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InvalidBatchError(
                f"the model's output gives logits of shape {shape}, expected [{inputs.batch_size}, C]: pass "
                "answer_token_ids for a causal language model, or output_fn"
            )
        return logits

    def _may_place(self, batch: Mapping[str, Any]) -> bool:
        """Whether places may be found for a batch's tokens: of text alone, images take places of their own.

        A classifier is called as its user calls it: its logits are the model's own, whatever padding does to them.
        """
        return (
            self.answer_token_ids is not None
            and "position_ids" in self._accepts
            and all(key in _TEXT for key, value in batch.items() if isinstance(value, Tensor))
        )

    def _gather_last(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._last is None:
            return None
        hidden = args[0]
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return (hidden[rows, self._last.to(hidden.device)][:, None], *args[1:])


def check_outputs(logits: Tensor, n_outputs: int) -> None:
    """Raises InvalidBatchError unless logits [N, C] have the number of outputs that other batches had."""
    if logits.shape[1] != n_outputs:
        raise InvalidBatchError(
            f"a batch gives {logits.shape[1]} logits per example, earlier ones gave {n_outputs}"
        )


@torch.no_grad()
def _counts_from_zero(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether an unpadded sequence has the same logits with positions 0, 1, .. as with none given."""
    row = {key: value[:1, :_PROBED] if isinstance(value, Tensor) else value for key, value in batch.items()}
    row["attention_mask"] = torch.ones_like(row["attention_mask"])
    positions = torch.arange(row["attention_mask"].shape[1], device=row["attention_mask"].device)[None]
    return torch.equal(model(**row).logits, model(**row, position_ids=positions).logits)


def _innermost(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrappers, whose forward names the arguments it takes."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _usable(x: Tensor, device: torch.device) -> Tensor:
    """On `device`, and fit for a graph: a tensor made in inference mode is not."""
    x = to_device(x, device)
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def _batch_shape(batch: Mapping[str, Any]) -> tuple[int, int | None]:
    """Batch size and sequence length (None for inputs that are not token sequences)."""
    for key in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(key), Tensor):
            shape = batch[key].shape
            if len(shape) < 2 or shape[1] == 0:
                raise InvalidBatchError(
                    f"{key} has shape {tuple(shape)}, expected [N, T] with at least one token"
                )
            return shape[0], shape[1]
    tensors = [
        v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() > 0 and k not in _NOT_FOR_THE_MODEL
    ]
    if not tensors:
        raise InvalidBatchError(f"a batch holds no input tensor; its keys are {sorted(map(str, batch))}")
    mask = batch.get("attention_mask")
    return tensors[0].shape[0], mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _checked_mask(mask: Any, n: int, length: int | None, checks: DeferredChecks) -> Tensor:
    if not isinstance(mask, Tensor):
        raise InvalidBatchError(f"attention_mask must be a tensor [N, T], got {type(mask).__name__}")
    if mask.dim() != 2 or mask.shape[0] != n or (length is not None and mask.shape[1] != length):
        raise InvalidBatchError(f"attention_mask has shape {tuple(mask.shape)}, expected {(n, length)}")
    real: Tensor = mask.bool()
    checks.require(real.any(1).all(), "attention_mask has an all-zero row: an example without a real token")
    return real


def _checked_answers(model: nn.Module, ids: Sequence[int]) -> Tensor:
    try:
        with torch.inference_mode(False):  # the graph of the logits keeps them
            answers = torch.as_tensor(list(ids))
    except (TypeError, ValueError):
        answers = torch.empty(0)
    if answers.dim() != 1 or len(answers) < 2 or answers.is_floating_point():
        raise ValueError(f"answer_token_ids must be at least two integers, got {ids!r}")
    if len(set(answers.tolist())) < len(answers):
        raise ValueError(f"answer_token_ids repeats a token: {answers.tolist()}")
    _require_causal(model)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is not None and not (int(answers.min()) >= 0 and int(answers.max()) < size):
        raise ValueError(f"answer_token_ids must lie in [0, {size}), got {answers.tolist()}")
    return answers


def _require_causal(model: nn.Module) -> None:
    """Only there does the last real position of `input_ids` predict the answer."""
    get, kind = getattr(model, "get_output_embeddings", None), type(_innermost(model))
    if get is None or get() is None:
        raise ValueError("answer_token_ids needs a causal language model")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        what = "answers at positions of its decoder"
    elif any("ForMaskedLM" in base.__name__ for base in kind.__mro__):
        what = "answers at masked positions"
    else:
        return
    raise ValueError(
        f"answer_token_ids needs a causal language model, {kind.__name__} {what}: pass output_fn, which reads the "
        "classes off the model's output"
    )
