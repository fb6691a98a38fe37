"""Whether gradients are those of what the model computes: they against difference quotients.

A `.detach()` of a part, a function whose backward pass is not its derivative (a straight-through estimator, a scaled
or reversed gradient, a kernel's mistake) or a hook on gradients change a Jacobian, and nothing else. Here what all
tapped layers give is moved a little in a random direction d. What the outputs of the first sequence make of that,

    (c . u(y + e d) - c . u(y - e d)) / 2 e,

has to be what their gradients g say: the sum of <g, d> over the layers. For a random d the standard deviation of that
sum is that of all parts together, so that a part that is missing shows as its share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from laplace_lora_fast.errors import UnsupportedAdapterError
from laplace_lora_fast.model.backward_hooks import register_hook
from laplace_lora_fast.model.observer import GraphStart


@dataclass(frozen=True)
class _Ladder:
    """What passes of a dtype can tell; tolerances are in units of the standard deviation.

    Attributes:
        steps: e, growing.
        tolerance: at the finest.
        n_fine: of the steps, those within which a smooth function has no curvature to speak of.
        noisy: whether the finest meets rounding.
    """

    steps: tuple[float, ...]
    tolerance: float
    n_fine: int
    noisy: bool


# The finest step of fp64 meets neither curvature nor rounding, and next to no kinks: those of ReLU come to the root of
# it. Of quantisation to 8 bits, which training differentiates straight through, only coarse steps see the slope.
_LADDERS = {
    torch.float64: _Ladder((1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1), 1e-3, 4, noisy=False),
    torch.float32: _Ladder((1e-3, 3e-3, 1e-2, 1e-1), 5e-3, 3, noisy=True),
}
_EXACT, _SMOOTH, _COARSE = 1e-5, 3e-2, 2e-2  # likewise: at the finest, between fine ones, at any
_ROUNDING = 4  # of u, in units of its eps
_SEEDS = 0x51095, 0xD1FF  # of two directions: in one alone a missing part could hide by chance

Run = Callable[[], Tensor]


class Slopes:
    """Moves what layers give, and adds up what gradients say of that.

    Args:
        names: of all tapped layers.

    Attributes:
        listens: whether the passes that run are the proof's own, which `passed` has to see.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self.listens = names, False
        self._anchor = torch.zeros((), requires_grad=True)
        self._step, self._seed = 0.0, _SEEDS[0]
        self._only: Sequence[int] | None = None
        self._scales: dict[int, Tensor] = {}  # mean |y|, in the order in which layers run
        self._expected: dict[int, list[Tensor]] = {}  # <g, d> of each direction
        self._variances: dict[int, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Passes inside are the proof's own."""
        self.listens = True
        try:
            yield
        finally:
            self.listens = False

    def passed(self, index: int, output: Tensor) -> Tensor:
        """What follows from what a layer gives, in a pass of the proof's own."""
        if self._step:
            return self._moved(index, output)
        if index not in self._scales:
            self._scales[index] = output.detach().abs().mean().nan_to_num(0, 0, 0)
        if not torch.is_grad_enabled():  # first run of a reentrant checkpoint
            return output
        if not output.requires_grad:
            output = GraphStart.apply(output, self._anchor)  # type: ignore[no-untyped-call]
        register_hook(output, partial(self._add, index))
        return output

    def _moved(self, index: int, output: Tensor) -> Tensor:
        """A step further; the same way in every use."""
        if self._only is not None and index not in self._only:
            return output
        return output + self._step * self._direction(index, output, self._seed)

    def _add(self, index: int, g: Tensor) -> None:
        """The gradient g of the first sequence's outputs in what a layer gives."""
        expected = [(g * self._direction(index, g, seed)).sum() for seed in _SEEDS]
        variance = (self._scales[index] * g).square().sum()
        if index in self._expected:
            expected = [one + other for one, other in zip(expected, self._expected[index], strict=True)]
            variance = variance + self._variances[index]
        self._expected[index], self._variances[index] = expected, variance

    def compare(
        self, run: Run, cotangent: Callable[[Tensor], Tensor], send_back: Callable[[Tensor], None]
    ) -> UnsupportedAdapterError | str | None:
        """What is wrong where gradients say something else than difference quotients, or why that cannot be told.

        Args:
            run: gives u [S, U] of the inputs, in fp32 or fp64, through `passed`.
            cotangent: that of the first sequence, for such a u.
            send_back: sends it back from u with its graph, through `passed`'s hooks.
        """
        self._scales.clear()
        self._expected.clear()
        u = run()
        send_back(u)
        if self._scales.keys() - self._expected.keys():
            return None  # no gradient arrived at all, which the batch's own passes will say
        c, u = cotangent(u).double(), u.detach()
        weighted = (c * u.double()).nan_to_num(0, 0, 0)
        quotients = _Quotients(
            self, run, c, u.dtype, _ROUNDING * torch.finfo(u.dtype).eps * float(weighted.norm())
        )
        if quotients.fine_agree():
            return None
        if quotients.are_smooth():
            return UnsupportedAdapterError(self._message(quotients))
        return None if quotients.coarse_agree() else "its outputs change in steps"

    def u_moved(self, run: Run, step: float, direction: int) -> Tensor:
        """U, moved."""
        self._step, self._seed = step, _SEEDS[direction]
        try:
            with torch.no_grad():
                return run().double()
        finally:
            self._step = 0.0

    def sums(self, direction: int) -> tuple[float, float]:
        """What gradients say of the quotient, and the standard deviation of that over directions."""
        among = self._expected if self._only is None else self._only
        expected = sum(float(self._expected[index][direction]) for index in among)
        return expected, math.sqrt(sum(float(self._variances[index]) for index in among))

    def _message(self, quotients: _Quotients) -> str:
        layers = list(self._scales)
        right, wrong = len(layers), 0  # from where on the gradients are
        try:
            while right - wrong > 1:
                middle = (right + wrong) // 2
                self._only = layers[middle:]
                right, wrong = (middle, wrong) if quotients.of_layers().fine_agree() else (right, middle)
        finally:
            self._only = None
        return (
            f"the gradients behind layer {self._names[layers[wrong]]!r} are not those of what the model computes: "
            ".detach() of a part, a function whose backward pass is another (a straight-through estimator, a scaled "
            "gradient), a hook that changes gradients, or a kernel's mistake. Remove it while the posterior is used, "
            "or leave the layers before it out with layers=lambda name: .."
        )

    def _direction(self, index: int, like: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(seed + index)
        drawn = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        return drawn * self._scales[index]


class _Quotients:
    """Those of growing steps, each computed once, and whether they agree with the gradients.

    Args:
        slopes: which moves the layers.
        run: as for `Slopes.compare`.
        cotangent: [S, U].
        dtype: of the passes.
        rounding: of c . u.
    """

    def __init__(
        self, slopes: Slopes, run: Run, cotangent: Tensor, dtype: torch.dtype, rounding: float
    ) -> None:
        self._slopes, self._run, self._cotangent = slopes, run, cotangent
        self._dtype, self._rounding, self._ladder = dtype, rounding, _LADDERS[dtype]
        self._known: dict[tuple[float, int], float] = {}

    def of_layers(self) -> _Quotients:
        """Anew, for the layers that `slopes` moves now."""
        return _Quotients(self._slopes, self._run, self._cotangent, self._dtype, self._rounding)

    def fine_agree(self) -> bool:
        """Whether those of the finest step do, up to what comes of kinks; of any fine one where rounding comes in."""
        if self._ladder.noisy:
            fine = self._ladder.steps[: self._ladder.n_fine]
            return any(self._both_agree(step, self._ladder.tolerance) for step in fine)
        finest, following = self._ladder.steps[:2]
        if self._agree(finest, 0, _EXACT):
            return True
        # Kinks and rounding change from step to step; a missing part does not.
        distance = abs(self._quotient(finest, 0) - self._slopes.sums(0)[0])
        differs = not self._change(finest, following) < 0.3 * distance
        return differs and self._both_agree(finest, self._ladder.tolerance)

    def are_smooth(self) -> bool:
        """Whether fine ones agree with each other: else there are steps in the function, or rounding."""
        within = _SMOOTH * self._slopes.sums(0)[1]
        fine = self._ladder.steps[: self._ladder.n_fine]
        return all(self._change(*pair) <= within + self._rounding / pair[0] for pair in pairwise(fine))

    def coarse_agree(self) -> bool:
        """Whether those of some step do, about."""
        return any(self._both_agree(step, _COARSE) for step in self._ladder.steps[1:])

    def _change(self, fine: float, coarse: float) -> float:
        return abs(self._quotient(fine, 0) - self._quotient(coarse, 0))

    def _both_agree(self, step: float, tolerance: float) -> bool:
        return all(self._agree(step, direction, tolerance) for direction in range(len(_SEEDS)))

    def _agree(self, step: float, direction: int, tolerance: float) -> bool:
        """NaN, of overflows in a moved pass, says nothing."""
        expected, deviation = self._slopes.sums(direction)
        distance = abs(self._quotient(step, direction) - expected)
        return not distance > tolerance * deviation + self._rounding / step

    def _quotient(self, step: float, direction: int) -> float:
        if (step, direction) not in self._known:
            ahead, behind = (self._slopes.u_moved(self._run, each, direction) for each in (step, -step))
            change = (self._cotangent * (ahead - behind)).nan_to_num(0, 0, 0).sum()
            self._known[step, direction] = float(change) / (2 * step)
        return self._known[step, direction]
