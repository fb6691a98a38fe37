"""Checks that a sequence's gradients stay among its own real tokens: else a curvature would be silently wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora_fast.errors import DeferredChecks, UnsupportedAdapterError


class Leaks:
    """Conditions on the streams of a tap; nothing here waits for the device.

    Args:
        checks: takes the conditions.
    """

    def __init__(self, checks: DeferredChecks) -> None:
        self._checks = checks
        self._pads: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # of a group: which tokens are pads, and see `_nonzero_at`

    def start_batch(self) -> None:
        """Forgets the last batch."""
        self._pads.clear()

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        """Input x [S, T, d] of the layers in `group`: keeps at which pads it is not zero."""
        if mask is not None:
            pads = ~mask
            self._pads[group] = pads, _nonzero_at(x, pads)

    def require_off_pads(self, group: int, g: Tensor, layer: str) -> None:
        """No weight gradient comes from pads, where the input or the output gradient g [S, T, d] has to be zero.

        BERT, say, pools the first position, a pad if padding is on the left. Mamba's gradients do reach left pads,
        but their inputs are zero there.
        """
        if group in self._pads:
            pads, inputs = self._pads[group]
            self._checks.require(
                ~(_nonzero_at(g, pads) & inputs).any(),
                f"the logits depend on padded positions of layer {layer!r}: pad on the other side, or use batches "
                "without padding",
            )

    def require_own_row(self, g: Tensor, mask: Tensor | None, layer: str) -> None:
        """The gradient g [S, T, d] of the first sequence's outputs is zero in all rows but the first.

        It is not where the first axis is something else (tokens, classes, what a router has selected) that is as long
        as the batch, nor where examples are coupled (statistics of the batch).
        """
        leak = _nonzero(g[1:]) if mask is None else _nonzero(g[1:]) & mask[1:]
        self._checks.require(
            ~leak.any(),
            f"row n of what layer {layer!r} sees is not example n, or depends on other examples too: leave the "
            "layer out with layers=lambda name: ..",
            UnsupportedAdapterError,
        )


def first_sequence(u: Tensor) -> Tensor:
    """A cotangent of u [S, U] that is zero but for the first sequence."""
    outputs, cotangent = u.shape[1], torch.zeros_like(u)
    # Not a constant, along which probabilities have no gradient.
    cotangent[0] = torch.linspace(1 / outputs, 1, outputs, device=u.device)
    return cotangent


def _nonzero_at(x: Tensor, pads: Tensor) -> Tensor:
    """Which pads of x [S, T, d] are not zero: one flag a pad, or [S, T] on a GPU, where counting pads would wait."""
    return _nonzero(x[pads]) if x.device.type == "cpu" else _nonzero(x) & pads


def _nonzero(x: Tensor) -> Tensor:
    """Which tokens of x [..., d] are not zero, [...]; NaN counts as zero. The 2-norm is one fast pass over x."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norms > 0
