"""What is tried with every architecture: LoRA on all linear layers, pads on either side."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.tasks import Task
from tests.matrix import models, oracle
from tests.matrix.cells import Cell

SIDES = {"none": "no padding", "left": "pads on the left", "right": "pads on the right"}

# Words of refusals
UNUSED = "the forward pass went around the layer"
NO_GRADIENT = "no gradient arrived"
PADS = "the logits depend on padded positions"
HEAD = "the language-model head sees a tensor of shape"
NOT_FINITE = "not finite"
SLOPES = "are not those of what the model computes"


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        own: what its configuration needs beside small sizes.
        targets: LoRA's, where PEFT or the model cannot have LoRA on all linear layers.
        refused: words of the refusal with LoRA on all linear layers.
        left_out: pattern of the layers that `layers` then leaves out.
        sides: words of the refusal, by side of the pads.
        shifted: pads on the left move the positions that it counts itself: its logits are those of padded rows.
        fp32: sides that the model computes in fp32 only: in fp64, transformers' attention gives NaN there.
    """

    own: dict[str, Any] = field(default_factory=dict)
    targets: Any = "all-linear"
    refused: str = ""
    left_out: str = ""
    sides: dict[str, str] = field(default_factory=dict)
    shifted: bool = False
    fp32: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Architectures for one task.

    Attributes:
        group: name of the table.
        kinds: architectures by name.
        base: (name, what its configuration needs) -> a tiny model.
        task: what it answers.
        quick: names in the subset that every change is tested with.
        usual: side on which such models are padded: of every architecture, it is in that subset.
        last_token: that all sequences end with, or None.
    """

    group: str
    kinds: Mapping[str, Kind]
    base: Callable[..., nn.Module]
    task: Task
    quick: frozenset[str]
    usual: str
    last_token: int | None = None

    def sequences(self, side: str) -> list[Tensor]:
        """Of different lengths where they are padded."""
        tokens = models.sequences(lengths=(6,) * 6) if side == "none" else models.sequences()
        if self.last_token is None:
            return tokens
        return [torch.cat([sequence[:-1], torch.tensor([self.last_token])]) for sequence in tokens]

    def error(self, kind: str, side: str, all_layers: bool = False) -> float:
        """Of an architecture with pads on one side; `all_layers` as a user tries first, with nothing left out."""
        what = self.kinds[kind]
        model = models.adapted(self.base(kind, **what.own), what.targets, _precision(what, side)[0])
        options = {} if all_layers or not what.left_out else {"layers": partial(_stays, what.left_out)}
        shifted = what.shifted and side == "left"
        return models.text_error(model, self.task, self.sequences(side), side, shifted, **options)

    def cells(self) -> list[Cell]:
        """All of them."""
        found = []
        for kind, what in self.kinds.items():
            cell = partial(Cell, self.group, kind)
            if what.refused:
                first = partial(self.error, kind, "none", True)
                found.append(cell("all linear layers", first, refused=what.refused, quick=kind in self.quick))
            if what.refused and not what.left_out:
                continue
            for side, column in SIDES.items():
                found.append(
                    cell(
                        column,
                        partial(self.error, kind, side),
                        tolerance=_precision(what, side)[1],
                        refused=what.sides.get(side, ""),
                        quick=kind in self.quick or side == self.usual,
                        note=_note(what, side),
                    )
                )
        return found


def named(names: str, kind: Kind) -> dict[str, Kind]:
    """Architectures that are alike."""
    return dict.fromkeys(names.split(), kind)


def _note(what: Kind, side: str) -> str:
    notes = {
        "in fp32": side in what.fp32,
        "with `layers`": bool(what.left_out),
        "positions shift": what.shifted and side == "left",
    }
    return ", ".join(note for note, holds in notes.items() if holds)


def _precision(what: Kind, side: str) -> tuple[torch.dtype, float]:
    return (torch.float32, oracle.FP32) if side in what.fp32 else (torch.float64, oracle.FP64)


def _stays(pattern: str, name: str) -> bool:
    return re.search(pattern, name) is None
