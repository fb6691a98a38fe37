"""What an accumulator holds, in a form that can be written to a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class State:
    """What an accumulator holds between two batches: from it another process goes on bit for bit.

    Attributes:
        values: JSON-serialisable.
        tensors: those that batches change.
        grown: lists of tensors that batches only add to, and that are joined along their first axis in the end.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    grown: dict[str, Sequence[Tensor]] = field(default_factory=dict)


def numbered(**parts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Lists of tensors in one dict: "name.0", "name.1", .."""
    return {f"{name}.{i}": tensor for name, each in parts.items() for i, tensor in enumerate(each)}
