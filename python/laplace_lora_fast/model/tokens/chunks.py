"""Logits over the vocabulary, some positions at a time: those of a batch's tokens together may not fit.

A causal language model is a backbone, which gives hidden states, and what is behind it: the language-model head and
what the model's own code makes of its output (a soft cap, a scale). The backbone runs once. For each chunk the model's
own forward runs again with a stand-in for the backbone, and the chunk's hidden states put before the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.model.contexts import PerThread
from laplace_lora_fast.model.heads import innermost

CHUNK = 2**25  # logits at a time: 128 MiB in fp32


class Backbone:
    """The backbone of a causal language model, which can be passed over.

    Args:
        model: the model.
        vocabulary: its size, where it is known.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None) -> None:
        self._module, self._vocabulary = _backbone_of(innermost(model)), vocabulary
        self._local = PerThread()

    def chunk(self, rows: int) -> int | None:
        """How many positions of each of `rows` sequences have their logits at a time; None for all.

        All where the model has no backbone that can be passed over.
        """
        if self._module is None or self._vocabulary is None:
            return None
        return max(1, CHUNK // (rows * self._vocabulary))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Makes the backbone ready to be passed over, in the thread that asks for it."""
        module = self._module
        if module is None:
            yield
            return
        former, inner = vars(module).get("forward"), module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            stand_in = getattr(self._local, "stand_in", None)
            if stand_in is not None:
                self._local.used = True
                return stand_in
            output = inner(*args, **kwargs)
            if getattr(self._local, "watching", False):
                self._local.output = output
            return output

        module.forward = forward
        try:
            yield
        finally:
            if former is None:
                vars(module).pop("forward", None)
            else:
                module.forward = former

    def watched(self, run: Callable[[], Tensor]) -> tuple[Tensor, Any]:
        """What `run` gives, in which the model runs as a whole, and what may stand in for the backbone later."""
        self._local.watching, self._local.output = True, None
        try:
            result = run()
            output = self._local.output
        finally:
            self._local.watching, self._local.output = False, None
        return result, None if output is None else _blank(output)

    def passed_over(self, stand_in: Any, run: Callable[[], Tensor]) -> Tensor:
        """What `run` gives, in which the model runs without its backbone."""
        self._local.stand_in, self._local.used = stand_in, False
        try:
            result = run()
            used = self._local.used
        finally:
            self._local.stand_in = None
        assert used, "the backbone ran in the first pass and was not asked for in the second"
        return result


def _backbone_of(model: nn.Module) -> nn.Module | None:
    """The part of a model that gives the hidden states; None where there is none to be found.

    What `get_decoder` gives may be the language-model head (ModernBERT's decoder) or the model itself (Llama 4).
    """
    get, head = (getattr(model, f"get_{what}", None) for what in ("decoder", "output_embeddings"))
    others = (model, head() if callable(head) else None)
    parts = (
        get() if callable(get) else None,
        *(getattr(model, name, None) for name in ("base_model", "model")),
    )
    found = (
        part for part in parts if isinstance(part, nn.Module) and all(part is not each for each in others)
    )
    return next(found, None)


def _blank(output: Any) -> Any:
    """An output of the same kind with one hidden state of zeros a sequence, and nothing else: it is not looked at."""
    hidden: Tensor = output[0]
    # Made anew, not like `hidden`: that may be of a derivative that is over when this is used.
    zero = torch.zeros(hidden.shape[0], 1, *hidden.shape[2:], dtype=hidden.dtype, device=hidden.device)
    if isinstance(output, tuple):
        return (zero, *[None] * (len(output) - 1))
    if is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in fields(output)]
        return type(output)(**{name: zero if name == names[0] else None for name in names})
    return type(output)({next(iter(output)): zero})
