"""Runs the whole matrix and writes docs/compatibility.md: `python -m tests.matrix.table`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.matrix import adapters, causal, classifiers, modes, multimodal, precisions, quantisers
from tests.matrix.cells import Cell, Outcome, cell_list, outcome

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
PARTS = (causal, classifiers, multimodal, adapters, precisions, quantisers, modes)
CELLS = cell_list(*(part.cells() for part in PARTS))
GROUPS = list(dict.fromkeys(cell.group for cell in CELLS))
LONGEST = 160

INTRODUCTION = """\
# Compatibility

What was tried, and what came of it. Each cell fits a posterior to a tiny random model and compares the mean and the
covariance of its logits with the exact linearised Laplace posterior, which plain autograd gives one sequence at a time.

- **right**: they agree. Models in fp64 to 1e-5 (transformers rounds norms, softmax and rotary angles to fp32 in them),
  fp32 to 1e-3, bf16 and fp16 to 0.1.
- **refused**: an error before any number, which names the cause and what to do. Its beginning is quoted.
- **not tried**: the library is not installed or does not load here.

Anything else is a bug: please report it. `make matrix` runs all cells.

*With `layers`*: the layers that the refusal names were left out, `LaplaceLoRA(.., layers=lambda name: ..)`.
*Positions shift*: the model counts positions itself, so that pads on the left give it other logits, here as in any use
of it. It is compared on the same padded rows.
"""


def written(found: Mapping[str, Outcome]) -> str:
    """The page.

    Args:
        found: of every cell, by its id.
    """
    parts = [INTRODUCTION, _counts(found)]
    for group in GROUPS:
        cells = [cell for cell in CELLS if cell.group == group]
        rows = list(dict.fromkeys(cell.row for cell in cells))
        parts.append(f"## {group}\n")
        lines = ["| | right | refused | not tried |", "|---|---|---|---|"]
        for row in rows:
            mine = [(cell, found[cell.id]) for cell in cells if cell.row == row]
            columns = [_column(mine, kind) for kind in ("right", "refused", "skipped")]
            lines.append(f"| {row} | {' | '.join(columns)} |")
        parts.append("\n".join(lines) + "\n")
        if group == causal.GROUP:
            left = "\n".join(f"- {names}: {reason}" for names, reason in causal.LEFT_TO_OTHERS.items())
            parts.append(f"Not tried:\n\n{left}\n")
    return "\n".join(parts)


def _counts(found: Mapping[str, Outcome]) -> str:
    lines = ["| | right | refused | not tried |", "|---|---|---|---|"]
    for group in GROUPS:
        kinds = Counter(found[cell.id].kind for cell in CELLS if cell.group == group)
        lines.append(f"| {group} | {kinds['right']} | {kinds['refused']} | {kinds['skipped']} |")
    return "\n".join(lines) + "\n"


def _column(mine: list[tuple[Cell, Outcome]], kind: str) -> str:
    """The cells of one outcome; those that are refused for the same reason together."""
    reasons: dict[str, list[str]] = {}
    for cell, result in mine:
        if result.kind == kind:
            note = f" ({cell.note})" if cell.note else ""
            reason = "" if kind == "right" else _short(result.detail)
            reasons.setdefault(reason, []).append(cell.column + note)
    return "; ".join(
        ", ".join(columns) + (f": {reason}" if reason else "") for reason, columns in reasons.items()
    )


def _short(message: str) -> str:
    message = message.partition("Error: ")[2] or message
    shown = message if len(message) <= LONGEST else message[:LONGEST].rpartition(" ")[0] + " .."
    return shown.replace("|", "\\|").replace("<", "&lt;").replace("base_model.model.", "")


def main() -> int:
    """Runs all cells, writes the page if each is as it should be, and says what is not."""
    torch.set_num_threads(1)
    found, bad = {}, []
    for cell in CELLS:
        found[cell.id] = result = outcome(cell)
        expected = "refused" if cell.refused else "right"
        if result.kind not in (expected, "skipped") or (
            result.kind == "refused" and cell.refused not in result.detail
        ):
            bad.append(f"{cell.id}: {result.kind}: {result.detail}")
            print(bad[-1], flush=True)
    print(dict(Counter(result.kind for result in found.values())))
    if not bad:
        PAGE.write_text(written(found), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
