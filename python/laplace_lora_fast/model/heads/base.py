"""From a batch to u [S, U]: what the model's output says of every sequence.

A head is what a task needs of the model. `ClassHead` reads classifiers, `OutputHead` whatever a function of the user's
makes of the output; causal.py has those of language models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.model.batches import LABEL_KEYS, Batch, Inputs, read_batch
from laplace_lora_fast.model.proofs.behaviour import Code, Sample

OutputFn = Callable[[Any, Mapping[str, Any]], Tensor]


class Head:
    """Reads u off a model's output.

    Args:
        model: the model.

    Attributes:
        grouped: whether an example is a group of sequences.
        own_keys: of a batch's tensors that are the head's, not the model's.
        n_outputs: U where it is known beforehand.
        output_layer: the layer that is shown the last real position of every sequence only, or None.
        features: of `output_layer`, those that carry gradient.
        rows_checked: whether a tap has found that each layer's rows are the sequences.
        is_deterministic: whether a tap has found that two forward passes agree.
        slopes_checked: whether a tap has found that gradients are those of what the model computes.
        plain_layers: names of the layers that a tap has found to compute W0 x + s B A x.
        layers_alone: names of the layers that a tap has found to have no streams with a row a sequence.
        same_alone: whether u of a sequence is the same in any batch, up to rounding.
        of_batches: whether u may be about the batch it is made for, so that a sequence alone cannot be asked for it.
        keeps_sample: whether a tap shall keep a sample, for later ones to compare with.
        sample: the first sequence that a tap has seen, and its u.
        code: what ran beside the modules' own code when the last tap ended: see `behaviour`.
        seed: of what the head draws.
        forward_mode_is_exact: whether forward-mode derivatives have been found to be those of a backward pass.
    """

    grouped = False
    same_alone = True
    of_batches = False
    own_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module) -> None:
        self.n_outputs: int | None = None
        self.output_layer: nn.Module | None = None
        self.features: Tensor | None = None
        self.forget_proofs()
        self.layers_alone: set[str] = set()
        self.keeps_sample, self.sample, self.seed = False, None, 0
        parameters = inspect.signature(innermost(model).forward).parameters
        self._accepts = set(parameters)
        self._accepts_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._vocabulary, self._context = _vocabulary(model), context_length(model)

    sample: Sample | None
    code: Code | None

    def forget_proofs(self) -> None:
        """What was proved of the model is to be proved again."""
        self.code = None
        self.rows_checked = self.is_deterministic = self.slopes_checked = self.forward_mode_is_exact = False
        self.plain_layers: set[str] = set()

    def recall(self, code: Code, run: Callable[[Inputs], Tensor], casts: bool) -> None:
        """Before a first pass: forgets what was proved of other code.

        Args:
            code: of the model, now.
            run: gives u of a batch.
            casts: whether that is under autocast.

        Raises:
            NotFittedError: the model computes something else than what the sample is of.
        """
        if self.code is None or self.code == code:
            return
        if self.sample is not None:
            with torch.no_grad():
                self.sample.require_same(run(self.sample.inputs), casts)
        self.forget_proofs()

    def expect_fit(self) -> None:
        """A posterior of the model as it is now begins, or has been loaded: a sample is kept of its first batch."""
        self.keeps_sample, self.sample = True, None

    def inputs(self, batch: Batch, device: torch.device, checks: DeferredChecks) -> Inputs:
        """Checks a batch and moves it to `device`. Raises InvalidBatchError as `read_batch` does."""
        inputs = read_batch(batch, device, checks, self.grouped, self.own_keys)
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
            raise InvalidBatchError(
                f"a batch has {unknown[0]!r}, which the model does not take: leave it out"
            )

    def refuse_other_labels(self, inputs: Inputs) -> None:
        """Raises InvalidBatchError for what may be the labels of a batch without them, under another key."""
        for key, value in inputs.model.items():
            several = isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.dim() > 0)
            per_sequence = several and len(value) == inputs.n_sequences
            if key not in self._accepts and per_sequence and _is_flat(value):
                raise InvalidBatchError(
                    f"a batch has {key!r}, one number an example, which the model does not take, and no 'labels': "
                    "rename it to 'labels' if it holds them, or leave it out"
                )

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

    def output_stream(self, x: Tensor, inputs: Inputs, use: int) -> tuple[Tensor, Tensor | None] | None:
        """A stream of `output_layer` with its mask, where that sees other positions than the model's other layers.

        `use` counts its runs in a forward pass.
        """
        return None

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
        self._require_accepted(inputs)
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
        return logits_of(output)


class ClassHead(Head):
    """Models with a `logits` [S, C] output: sequence classifiers, reward models."""


class RewardHead(ClassHead):
    """One score a sequence of a classifier with one output; examples are groups of sequences."""

    grouped = True


class ChoiceHead(Head):
    """Models for multiple choice: one score a sequence. Batches [N, C, T] are taken apart into N C sequences.

    Such models put the choices of an example beside each other again: each is given alone here, as the only one.
    """

    grouped = True

    def inputs(self, batch: Batch, device: torch.device, checks: DeferredChecks) -> Inputs:
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 3 and "group" not in batch:
            n, choices = ids.shape[:2]
            flat = {
                key: value.flatten(0, 1)
                if isinstance(value, Tensor) and value.shape[:2] == (n, choices)
                else value
                for key, value in batch.items()
                if key not in LABEL_KEYS
            }
            labels = {key: batch[key] for key in LABEL_KEYS if key in batch}
            batch = {**flat, **labels, "group": torch.arange(n).repeat_interleave(choices)}
        return super().inputs(batch, device, checks)

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        single = {
            key: value[:, None]
            if isinstance(value, Tensor) and value.shape[:1] == (inputs.n_sequences,)
            else value
            for key, value in inputs.model.items()
        }
        return super().u(model, replace(inputs, model=single))


class OutputHead(Head):
    """A function of the model's output, which may know the batch otherwise than by its arguments.

    Args:
        model: the model.
        fn: (model output, batch) -> u [S, U].
    """

    of_batches = True

    def __init__(self, model: nn.Module, fn: OutputFn) -> None:
        super().__init__(model)
        self._fn = fn

    def read(self, output: Any, inputs: Inputs) -> Tensor:
        return self._fn(output, inputs.model)


def logits_of(output: Any) -> Tensor:
    """Of a model's output, which may be the logits themselves."""
    if isinstance(output, tuple):
        raise InvalidBatchError(
            "the model gives a tuple, not an output with logits: leave 'return_dict' out of batches, and set "
            "config.return_dict=True"
        )
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    return logits


def _is_flat(values: Any) -> bool:
    """Whether it is one number an example."""
    if isinstance(values, Tensor):
        return values.dim() == 1
    return all(isinstance(value, int | float) for value in values)


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


def context_length(model: nn.Module) -> int | None:
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
