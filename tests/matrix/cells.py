"""Cells of the compatibility matrix: something a user may do, and what the package makes of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from laplace_lora_fast.errors import LaplaceError, LaplaceWarning
from tests.matrix.oracle import FP64

# What a message has to have beside the cause: something to do about it.
REMEDY = re.compile(
    r"\b(pass|load|leave|exclude|call|use|pad|remove|set|select|switch|activate|enable|save|train|choose|cut|truncate"
    r"|install|put|make|let|give|expected)\b",
    re.IGNORECASE,
)


class Skip(Exception):
    """The cell cannot be tried here; says why."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        group: the table it is in.
        row: what is tried.
        column: in which way.
        run: does it, and returns the largest relative error of mean and covariance.
        tolerance: below which an error is rounding.
        refused: words of the error that is right here; "" if the numbers have to be right.
        quick: part of the subset that every change is tested with.
        note: what the table says beside "right".
    """

    group: str
    row: str
    column: str
    run: Callable[[], float] = field(compare=False)
    tolerance: float = FP64
    refused: str = ""
    quick: bool = False
    note: str = ""

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.group}-{self.row}-{self.column}".replace(" ", "_")


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        kind: "right", "refused", "wrong", "crash", "unclear" or "skipped".
        detail: error, message or reason.
    """

    kind: str
    detail: str


def outcome(cell: Cell) -> Outcome:
    """Runs a cell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", LaplaceWarning)
            # Of inputs quantised to 8 bits there is no slope to compare; here they are compared with the oracle.
            warnings.filterwarnings("ignore", ".*outputs change in steps", LaplaceWarning)
            deviation = cell.run()
    except Skip as skip:
        return Outcome("skipped", str(skip))
    except LaplaceError as error:
        message = " ".join(str(error).split())
        return Outcome(
            "refused" if REMEDY.search(message) else "unclear", f"{type(error).__name__}: {message}"
        )
    except Exception as error:
        return Outcome("crash", f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
    return Outcome("right" if deviation <= cell.tolerance else "wrong", f"{deviation:.1e}")


def check(cell: Cell) -> Outcome:
    """Asserts that a cell is as it should be."""
    found = outcome(cell)
    if found.kind != "skipped":
        expected = "refused" if cell.refused else "right"
        assert found.kind == expected, f"{cell.id}: {found.kind}: {found.detail}"
        assert cell.refused in found.detail, f"{cell.id}: {found.detail}"
    return found


def cell_list(*parts: Any) -> list[Cell]:
    """All cells of several lists, whose names have to differ."""
    cells = [cell for part in parts for cell in part]
    names = [cell.id for cell in cells]
    repeated = {name for name in names if names.count(name) > 1}
    assert not repeated, repeated
    return cells
