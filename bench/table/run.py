"""Fills the table, cell by cell and method by method, and redraws it.

    python -m bench.table.run --model MiniLM --regimes long --seeds 0 1 2

Resumable: what a file in bench/results/table has is not computed again. `bench.table.train` trains what is missing.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.table.draw import draw
from bench.table.methods import FOLDED, GROUPS, Cell
from bench.table.subjects import REGIMES, SUBJECTS
from bench.table.train import FOLDS, MEMBERS, N_HELD_OUT, N_TEST, N_TRAIN, ensure
from laplace_lora_fast import LaplaceWarning
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.saving.atomic import replacing

OUT = Path("bench/results/table")


def fill(cell: Cell, regime: str, groups: list[str]) -> None:
    """Runs the groups of methods that the cell's file does not have yet."""
    file = OUT / f"{cell.subject.name}.{regime}.{cell.seed}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found.setdefault(
        "cell", {"model": cell.subject.name, "regime": regime, "seed": cell.seed, "epochs": cell.epoch}
    )
    found.setdefault("setting", {"train": N_TRAIN, "held_out": N_HELD_OUT, "test": N_TEST, "folds": FOLDS})
    found.setdefault("labels", {name: [row.label for row in rows] for name, rows in cell.data.tests.items()})
    for group in groups:
        if group in found.setdefault("groups", []):
            continue
        try:
            methods = GROUPS[group](cell)
        except ValueError as error:  # what this model or regime has not: an ensemble of one checkpoint, say
            methods = {group: {"left_out": str(error)}}
        found.setdefault("methods", {}).update(methods)
        found["groups"].append(group)
        found["environment"] = provenance(("torch", "transformers", "peft"))
        OUT.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(json.dumps(found) + "\n")
        print(f"{file.stem}: {', '.join(methods)}", flush=True)


def main() -> None:
    """Runs what is asked for and redraws the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SUBJECTS, default="MiniLM")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--draw", action="store_true", help="redraw the table only")
    arguments = parser.parse_args()
    if not arguments.draw:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore", LaplaceWarning)  # the grid's edge is an answer here
        subject = SUBJECTS[arguments.model]
        needed = ["main"]
        if FOLDED & set(arguments.groups):
            needed += [f"fold{k}" for k in range(FOLDS)]
        if "ensemble" in arguments.groups:
            needed += [f"member{k + 1}" for k in range(MEMBERS)]
        epochs = max(subject.epochs[regime] for regime in arguments.regimes)
        for seed in arguments.seeds:
            for run in needed:
                ensure(subject, seed, run, epochs)
            for regime in arguments.regimes:
                fill(Cell(subject, seed, subject.epochs[regime]), regime, arguments.groups)
    draw(OUT)


if __name__ == "__main__":
    main()
