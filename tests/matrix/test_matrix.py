"""Every cell is right to its oracle, or refused by a message that names the cause and a remedy: nothing in between."""

from __future__ import annotations

import pytest

from laplace_lora_fast.errors import LaplaceWarning, UnsupportedAdapterError
from tests.matrix import table
from tests.matrix.cells import Cell, Skip, check, outcome


@pytest.mark.parametrize(
    "cell", [pytest.param(c, id=c.id, marks=() if c.quick else pytest.mark.slow) for c in table.CELLS]
)
def test_cell(cell):
    found = check(cell)
    if found.kind == "skipped":
        pytest.skip(found.detail)


def raising(error):
    def run() -> float:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (lambda: 1e-9, "right"),
        (lambda: 1e-3, "wrong"),
        (lambda: float("nan"), "wrong"),
        (raising(UnsupportedAdapterError("layer 'q' is merged: call unmerge_adapter")), "refused"),
        (raising(UnsupportedAdapterError("layer 'q' is merged")), "unclear"),
        (raising(IndexError("call help")), "crash"),
        (raising(LaplaceWarning("some layers")), "crash"),
        (raising(Skip("needs a library")), "skipped"),
    ],
)
def test_outcomes(run, kind):
    assert outcome(Cell("a", "b", "c", run)).kind == kind


def test_a_wrong_number_and_a_missing_refusal_fail():
    with pytest.raises(AssertionError, match="wrong"):
        check(Cell("a", "b", "c", lambda: 0.2))
    with pytest.raises(AssertionError, match="right"):
        check(Cell("a", "b", "c", lambda: 0.0, refused="merged"))
    with pytest.raises(AssertionError):
        check(
            Cell("a", "b", "c", raising(UnsupportedAdapterError("is DoRA: leave it out")), refused="merged")
        )


def test_size():
    """60 causal architectures, 20 classifiers, 25 kinds of adapters, and the table has all of them."""
    rows = {group: {cell.row for cell in table.CELLS if cell.group == group} for group in table.GROUPS}
    assert len(rows["Causal language models"]) >= 60
    assert len(rows["Sequence classifiers"]) >= 20
    assert len(rows["Adapters"]) >= 25
    text = table.written({cell.id: outcome(Cell("a", "b", "c", lambda: 0.0)) for cell in table.CELLS})
    assert all(f"| {row} |" in text for group in table.GROUPS for row in rows[group])
