"""From a batch to u [S, U]: what the model's output says of every sequence.

A head is what a task needs of the model. `ClassHead` reads classifiers, `AnswerHead` the answers' logits at the last
real position, `OutputHead` whatever a function of the user's makes of the output.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.model.batches import Batch, Inputs, read_batch

OutputFn = Callable[[Any, Mapping[str, Any]], Tensor]

_TEXT = {"input_ids", "inputs_embeds", "token_type_ids", "attention_mask"}
_PROBED = 8  # tokens


class Head:
    """Reads u off a model's output.

    Args:
        model: the model.

    Attributes:
        grouped: whether an example is a group of sequences.
        n_outputs: U where it is known beforehand.
        output_layer: the layer that is shown the last real position of every sequence only, or None.
        features: of `output_layer`, those that carry gradient.
        rows_checked: whether a tap has found that each layer's rows are the sequences.
        is_deterministic: whether a tap has found that two forward passes agree.
        plain_layers: names of the layers that a tap has found to compute W0 x + s B A x.
    """

    grouped = False

    def __init__(self, model: nn.Module) -> None:
        self.n_outputs: int | None = None
        self.output_layer: nn.Module | None = None
        self.features: Tensor | None = None
        self.rows_checked = self.is_deterministic = False
        self.plain_layers: set[str] = set()
        parameters = inspect.signature(innermost(model).forward).parameters
        self._accepts = set(parameters)
        self._accepts_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._vocabulary, self._context = _vocabulary(model), _context(model)

    def inputs(self, batch: Batch, device: torch.device, checks: DeferredChecks) -> Inputs:
        """Checks a batch and moves it to `device`. Raises InvalidBatchError as `read_batch` does."""
        inputs = read_batch(batch, device, checks, self.grouped)
        self._require_accepted(inputs)
        self._require_in_range(inputs, checks)
        positions = inputs.positions if self._places(inputs) else None
        return replace(
            inputs,
            model=inputs.model | ({"use_cache": False} if "use_cache" in self._accepts else {}),
            positions=None if positions is None else to_device(positions, device),
        )

    def _require_accepted(self, inputs: Inputs) -> None:
        unknown = [] if self._accepts_any else [key for key in inputs.model if key not in self._accepts]
        if unknown:
            raise InvalidBatchError(f"a batch has {unknown[0]!r}, which the model does not take: leave it out")

    def _require_in_range(self, inputs: Inputs, checks: DeferredChecks) -> None:
        """Tokens in the vocabulary, and no more of them than the model has positions."""
        ids = inputs.model.get("input_ids")
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            return
        if self._context is not None and ids.dim() == 2:
            real = ids.shape[1] if inputs.mask is None else inputs.mask.sum(1).max()
            message = f"a prompt is longer than the model's context of {self._context} tokens"
            fits = torch.as_tensor(real <= self._context)
            if fits.device.type == "cpu" and not fits:
                message += f": it has {int(real)}"
            checks.require(fits, message + ": shorten it, from the left where the answer stands at its end")
        if self._vocabulary is not None:
            known = ((ids >= 0) & (ids < self._vocabulary)).all()
            checks.require(known, f"'input_ids' must lie in [0, {self._vocabulary}), the model's vocabulary")

    def placed(self, model: nn.Module, inputs: Inputs) -> Inputs:
        """The inputs with `position_ids` where the model has to be told them."""
        return inputs

    def _places(self, inputs: Inputs) -> bool:
        """Whether the model may have to be told the positions of tokens."""
        return False

    def as_called(self, inputs: Inputs) -> Inputs:
        """The inputs as the model has been given them in this forward pass."""
        return inputs

    @contextmanager
    def installed(self) -> Iterator[None]:
        """What the model is made to do differently inside."""
        yield

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Runs the model and returns u [S, U].

        Raises:
            InvalidBatchError: the output is not [S, U]; says what to pass.
        """
        u = self.read(model(**inputs.model), inputs)
        if not isinstance(u, Tensor) or u.dim() != 2 or u.shape[0] != inputs.n_sequences:
            shape = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise InvalidBatchError(
                f"the model's output gives logits of shape {shape}, expected [{inputs.n_sequences}, C]: pass "
                "Answers(token_ids) for a causal language model, or Outputs(function)"
            )
        return u

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        """The output's `logits`, or the output itself."""
        logits: Tensor = output.logits if hasattr(output, "logits") else output
        return logits


class ClassHead(Head):
    """Models with a `logits` [S, C] output: sequence classifiers, reward models."""


class OutputHead(Head):
    """A function of the model's output.

    Args:
        model: the model.
        fn: (model output, batch) -> u [S, U].
    """

    def __init__(self, model: nn.Module, fn: OutputFn) -> None:
        super().__init__(model)
        self._fn = fn

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        return self._fn(output, inputs.model)


class AnswerHead(Head):
    """Logits of answer tokens at the last real position of a causal language model.

    Args:
        model: the model.
        token_ids: of the answers, in the order of the classes.

    Raises:
        ValueError: the model is no causal language model, or a token is none of its vocabulary.
    """

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        super().__init__(model)
        _require_causal(model)
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        if size is not None and not (min(token_ids) >= 0 and max(token_ids) < size):
            raise ValueError(f"token_ids must lie in [0, {size}), got {list(token_ids)}")
        with torch.inference_mode(False):  # the graph of the logits keeps them
            self.features = torch.tensor(list(token_ids))
        self.output_layer = model.get_output_embeddings()  # type: ignore[operator]
        self.n_outputs = len(token_ids)
        self._local = threading.local()
        self._counts_from_zero: bool | None = None

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
        """Makes the language-model head see the last real position of each sequence only."""
        assert self.output_layer is not None
        handle = self.output_layer.register_forward_pre_hook(self._gather_last)
        try:
            yield
        finally:
            handle.remove()

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        self._local.last = inputs.last
        try:
            return super().u(model, inputs)
        finally:
            self._local.last = None

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        logits = super().read(output, inputs)
        assert self.features is not None
        self.features = self.features.to(logits.device)  # waits once
        return logits.flatten(0, -2).index_select(-1, self.features)

    def _places(self, inputs: Inputs) -> bool:
        """Text alone: images take places of their own.

        A classifier is called as its user calls it: its logits are the model's own, whatever padding does to them.
        """
        text = all(key in _TEXT for key, value in inputs.model.items() if isinstance(value, Tensor))
        return text and "position_ids" in self._accepts

    def _gather_last(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        last = getattr(self._local, "last", None)  # of this thread's pass: a plain forward beside it has none
        if last is None:
            return None
        hidden = args[0]
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return (hidden[rows, last.to(hidden.device)][:, None], *args[1:])


@torch.no_grad()
def _counts_from_zero(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether an unpadded sequence has the same logits with positions 0, 1, .. as with none given."""
    row = {key: value[:1, :_PROBED] if isinstance(value, Tensor) else value for key, value in batch.items()}
    row["attention_mask"] = torch.ones_like(row["attention_mask"])
    positions = torch.arange(row["attention_mask"].shape[1], device=row["attention_mask"].device)[None]
    return torch.equal(model(**row).logits, model(**row, position_ids=positions).logits)


def _vocabulary(model: nn.Module) -> int | None:
    """Rows of the input embedding, where it is one."""
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            try:
                embedding = module.get_input_embeddings()  # type: ignore[operator]
            except (NotImplementedError, AttributeError):
                return None
            return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
    return None


def _context(model: nn.Module) -> int | None:
    """Most tokens that the model has positions for; None where it says nothing, or counts relatively."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return None


def innermost(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrappers, whose forward names the arguments it takes."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _require_causal(model: nn.Module) -> None:
    """Only there does the last real position of `input_ids` predict the answer."""
    get, kind = getattr(model, "get_output_embeddings", None), type(innermost(model))
    if get is None or get() is None:
        raise ValueError("Answers needs a causal language model")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        what = "answers at positions of its decoder"
    elif any("ForMaskedLM" in base.__name__ for base in kind.__mro__):
        what = "answers at masked positions"
    else:
        return
    raise ValueError(
        f"Answers needs a causal language model, {kind.__name__} {what}: pass Outputs(function), which reads the "
        "classes off the model's output"
    )
