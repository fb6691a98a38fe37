"""Whether gradients are those of what the model computes: they against difference quotients.

A `.detach()` of a part, a function whose backward pass is not its derivative (a straight-through estimator, a scaled
or reversed gradient, a kernel's mistake) or a hook of autograd's nodes change a Jacobian, and nothing else. Here what
all tapped layers give is moved a little in a random direction d. What the outputs of the first sequence make of that,

    (c . u(y + e d) - c . u(y - e d)) / 2 e,

has to be what their gradients g say: the sum of <g, d> over the layers. For a random d the standard deviation of that
sum is that of all parts together, so that a part that is missing shows as its share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import UnsupportedAdapterError
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.model.proofs.leaks import first_sequence

_STEPS = 1e-2, 1e-3, 1e-1  # the first serves, unless there are kinks or other routes close by
_TOLERANCE = 0.005  # of the standard deviation
_ROUNDING = 4 * torch.finfo(torch.float32).eps  # of u: norms and softmax round so in models of fp64 as well
_FULL = torch.float32, torch.float64
_SEED = 0x51095

Run = Callable[[Inputs], Tensor]


class Slopes:
    """Moves what layers give, and adds up what gradients say of that.

    Args:
        names: of all tapped layers.

    Attributes:
        step: e of the pass that runs; 0 outside of this proof.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self.step = names, 0.0
        self._only: int | None = None
        self._scales: dict[int, Tensor] = {}  # mean |y|, in the order in which layers run
        self._expected: dict[int, Tensor] = {}  # <g, d>
        self._variances: dict[int, Tensor] = {}

    def moved(self, index: int, output: Tensor) -> Tensor:
        """What a layer gives, `step` further; the same way in every use."""
        if self._only not in (None, index):
            return output
        if index not in self._scales:
            self._scales[index] = output.abs().mean().nan_to_num(0, 0, 0)
        return output + self.step * self._direction(index, output)

    def add(self, index: int, g: Tensor) -> None:
        """The gradient g of the first sequence's outputs in what a layer gives."""
        if index not in self._scales:
            return
        expected, variance = (g * self._direction(index, g)).sum(), (self._scales[index] * g).square().sum()
        if index in self._expected:
            expected, variance = expected + self._expected[index], variance + self._variances[index]
        self._expected[index], self._variances[index] = expected, variance

    def compare(
        self, u: Tensor, inputs: Inputs, run: Run, send_back_first: Callable[[], None]
    ) -> UnsupportedAdapterError | None:
        """What is wrong where gradients say something else than difference quotients; names a layer.

        Args:
            u: [S, U] of the batch, with its graph.
            inputs: the batch.
            run: gives u of a batch, through `moved`.
            send_back_first: sends the first sequence's cotangent back from u, through `add`.
        """
        cotangent = first_sequence(u).double()
        rounding = _ROUNDING * float((cotangent * u.detach().double()).nan_to_num(0, 0, 0).norm())

        def quotient(step: float) -> float:
            ahead, behind = self._pass(step, inputs, run), self._pass(-step, inputs, run)
            return float((cotangent * (ahead - behind)).nan_to_num(0, 0, 0).sum()) / (2 * step)

        coarse = quotient(_STEPS[0])
        send_back_first()
        if self._scales.keys() - self._expected.keys():
            return None  # no gradient arrived at all, which the batch's own passes will say
        expected, deviation = self._sum()
        if _agree(coarse, expected, deviation, _STEPS[0], rounding):
            return None
        quotients = [quotient(_STEPS[1]), coarse, quotient(_STEPS[2])]
        if not _contradict(quotients, expected, deviation, rounding):
            return None
        return UnsupportedAdapterError(self._message(quotient, rounding))

    def _pass(self, step: float, inputs: Inputs, run: Run) -> Tensor:
        self.step = step
        try:
            with torch.no_grad():
                return run(inputs).double()
        finally:
            self.step = 0.0

    def _sum(self) -> tuple[float, float]:
        """What gradients say of the quotient, and the standard deviation of that over directions."""
        among = self._expected if self._only is None else [self._only]
        expected = sum(float(self._expected[index]) for index in among)
        return expected, math.sqrt(sum(float(self._variances[index]) for index in among))

    def _message(self, quotient: Callable[[float], float], rounding: float) -> str:
        step, behind = _STEPS[0], ""
        try:
            for index in reversed(self._scales):
                self._only = index
                if not _agree(quotient(step), *self._sum(), step, rounding):
                    behind = f" behind layer {self._names[index]!r}"
                    break
        finally:
            self._only = None
        return (
            f"the gradients{behind} are not those of what the model computes: .detach() of a part, a function whose "
            "backward pass is another (a straight-through estimator, a scaled gradient), a hook on a node of "
            "autograd's, or a kernel's mistake. Remove it while the posterior is used, or leave the layers before it "
            "out with layers=lambda name: .."
        )

    def _direction(self, index: int, like: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(_SEED + index)
        drawn = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return drawn * self._scales[index]


def can_be_compared(model: nn.Module, u: Tensor, casts: bool) -> bool:
    """Whether rounding leaves anything to compare: not in 16 bits."""
    return not casts and all(dtype in _FULL for dtype in _floating((u, *model.parameters())))


def _floating(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _contradict(quotients: Sequence[float], expected: float, deviation: float, rounding: float) -> bool:
    """Whether quotients of steps of growing size settle, on something else than what is expected of them.

    Those of a function with kinks or steps close by do not settle, and say nothing.
    """
    steps = sorted(_STEPS)
    for n, (fine, coarse) in enumerate(itertools.pairwise(quotients)):
        settled = _agree(coarse, fine, deviation, steps[n], rounding)
        if settled and not any(
            _agree(each, expected, deviation, step, rounding)
            for each, step in zip([quotients[0], fine, coarse], [steps[0], *steps[n : n + 2]], strict=True)
        ):
            return True
    return False


def _agree(quotient: float, expected: float, deviation: float, step: float, rounding: float) -> bool:
    """NaN, of overflows in a moved pass, says nothing."""
    return not abs(quotient - expected) > _TOLERANCE * deviation + rounding / step
