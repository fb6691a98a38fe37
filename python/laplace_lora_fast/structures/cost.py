"""What a structure takes of a machine: stated by the structure itself, before a pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Bytes and operations beside the model's own weights and activations.

    Attributes:
        layers: bytes that the curvature keeps of each LoRA layer.
        fitting: most bytes of a fit, its end included: what accumulates, what is kept, what comes and goes.
        solving: most bytes while the prior is tuned and answers are given, what is kept included.
        least: smallest budget with which the structure works; 0 where it goes to memory or disk beyond the budget.
        backward: backward passes over the data, in all stages.
        forward: forward passes likewise.
        operations: fp64 floating-point operations of a fit, its end included, and of one tuning of the prior.
    """

    layers: Sequence[int]
    fitting: int
    solving: int
    least: int
    backward: float
    forward: float
    operations: float

    @property
    def kept(self) -> int:
        """Bytes of the curvature."""
        return sum(self.layers)
