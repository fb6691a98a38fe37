"""Which batch and which layer first gave numbers that are not finite, and what becomes of such a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.errors import DeferredChecks, NumericalError
from laplace_lora_fast.model.alone import takes_jacobians
from laplace_lora_fast.structures.base import Accumulator, Listener, Step
from laplace_lora_fast.structures.pads import PadImage

NON_FINITE = ("raise", "skip")
Shown = TypeVar("Shown")
_REMEDY = (
    "load the model in bfloat16 or float32, or pad on the other side; fit(.., non_finite='skip') leaves such batches "
    "out and counts them"
)


class Screen(Listener):
    """Stands between a tap and an accumulator, and looks at every stream that passes.

    With "raise" the streams go on at once. Of those on a GPU, where each look is a pass over memory, one a backward
    pass is looked at: the last, of the earliest layer, into which what is not finite behind it flows. No batch waits.

    With "skip" the streams of a batch are held until its last backward pass is over, and then shown to the accumulator
    or dropped: the inputs and all output gradients of a batch are in memory together, and each batch waits for a GPU.

    Args:
        accumulator: behind it.
        names: of the layers.
        skip: whether to leave batches out.
        first: index of the first batch.

    Attributes:
        skipped: how many batches were left out.
        first_skipped: what was wrong with the first of them; "" if there is none.
        dropped: whether the last batch was.
    """

    def __init__(self, accumulator: Accumulator, names: Sequence[str], skip: bool, first: int = 0) -> None:
        self._inner, self._names, self._skip, self._index = accumulator, names, skip, first
        self.takes_jacobians = takes_jacobians(accumulator)
        self.skipped, self.first_skipped, self.dropped = 0, "", False
        self._checks = DeferredChecks()
        self._wrong = ""  # of this batch
        self._held: list[Callable[[], object]] = []  # what the accumulator is to be shown yet
        self._latest: tuple[int, Tensor, Tensor | None] | None = None

    def wrong_input(self) -> str:
        """After a forward pass: the first input that is not finite, as text; "" if all are."""
        return self._wrong

    def rejects(self, u: Tensor) -> bool:
        """Whether to leave a batch out whose forward pass has just ended; counts it."""
        if not self._skip or not (self._wrong or not bool(u.isfinite().all())):
            return False
        self._drop(self._wrong or "the logits")
        return True

    def settle(self) -> None:
        """Raises NumericalError for the first batch on a GPU that was not finite; waits for it."""
        self._checks.settle()

    def start(self, step: Step) -> Tensor:
        if self._wrong:
            raise NumericalError(self._message(self._wrong))
        return self._inner.start(step)

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> PadImage | None:
        if self._reads(x) and not self._wrong and not _is_finite(x, mask):
            self._wrong = f"the input of layer {self._names[group]!r}"
        if not self._skip:  # at once, as `_show` does, without a partial at every layer
            return self._inner.observe_input(group, x, mask)
        return self._show(partial(self._inner.observe_input, group, x, mask))

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> PadImage | None:
        self._latest = layer, g, mask
        if self._reads(g) and not self._wrong and not _is_finite(g, mask):
            self._wrong = f"the gradient at the output of layer {self._names[layer]!r}"
            if not self._skip:
                raise NumericalError(self._message(self._wrong))
        if not self._skip:
            return self._inner.observe_gradient(layer, g, mask)
        return self._show(partial(self._inner.observe_gradient, layer, g, mask))

    def observe_alignment(self, layer: int, aligned: Tensor) -> None:
        self._show(partial(self._inner.observe_alignment, layer, aligned))

    def observe_jacobians(self, layer: int, jacobians: Sequence[Tensor]) -> None:
        for each in jacobians:
            if self._reads(each) and not self._wrong and not bool(each.isfinite().all()):
                self._wrong = f"the Jacobian of layer {self._names[layer]!r}"
                if not self._skip:
                    raise NumericalError(self._message(self._wrong))
        self._show(partial(self._inner.observe_jacobians, layer, jacobians))

    def observe_parameters(self, gradients: Sequence[Tensor | None]) -> None:
        self._show(partial(self._inner.observe_parameters, gradients))

    def finish_pass(self) -> None:
        if self._latest is not None and not self._reads(self._latest[1]):
            layer, g, mask = self._latest
            what = f"the gradient at the output of layer {self._names[layer]!r}, or of one behind it,"
            message = f"in batch {{index}} {what} is not finite: {_REMEDY}"
            self._checks.require_at(_total(g, mask).isfinite(), self._index, message, NumericalError)
        self._show(self._inner.finish_pass)

    def finish(self) -> None:
        if self._skip and self._wrong:
            self._drop(self._wrong)
            return
        for show in self._held:
            show()
        self.dropped = False
        self._inner.finish()

    def forget(self) -> None:
        """A batch is over."""
        self._inner.forget()
        self._held, self._latest, self._wrong = [], None, ""
        self._index += 1

    def _show(self, what: Callable[[], Shown]) -> Shown | None:
        """Now, or once it is known that the batch is sound."""
        if not self._skip:
            return what()
        self._held.append(what)
        return None

    def _drop(self, what: str) -> None:
        self.dropped = True
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"batch {self._index}, {what}"

    def _reads(self, x: Tensor) -> bool:
        return self._skip or x.device.type == "cpu"

    def _message(self, what: str) -> str:
        return f"in batch {self._index} {what} is not finite: {_REMEDY}"


def _total(x: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of a stream [S, T, d] over real tokens, a scalar that is not finite where a number in it is not."""
    tokens = x.sum(-1, dtype=lk.accumulation_dtype(x.dtype))
    return (tokens if mask is None else tokens.where(mask, 0)).sum()


def _is_finite(x: Tensor, mask: Tensor | None) -> bool:
    if bool(_total(x, mask).isfinite()):
        return True
    real = x if mask is None else x.where(mask[..., None], 0)
    return bool(torch.isfinite(real).all())  # the sum may have overflowed
