"""How time and memory grow with the number of examples: rows and low rank on a tiny decoder, and on MiniLM, streamed.

    python -m bench.scaling --rows 500 2000 8000 32000 100000 --out bench/results
    python -m bench.scaling --model minilm --rows 500 1000 2000 --cache /somewhere --out bench/results

Random tokens, or the texts of bench/real_rows.py; one function an example (two answers), so that R = N. CPU seconds of
the process: fit; the evidence's prior precision; one prediction of 32 examples. MiB: the most that tensors take during
the fit beyond what there was, the batches themselves included. Slopes are of log seconds over log R, by least squares.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.real_rows import subject, texts
from laplace_lora_fast import Answers, Evidence, LaplaceLoRA, LowRank, Rows
from laplace_lora_fast.evaluation.provenance import provenance
from tests import tiny
from tests.memory import Peak

STRUCTURES = {
    "tiny": {"Rows(columns=8)": Rows(columns=8), "LowRank(rank=64)": LowRank(rank=64, columns=8)},
    "minilm": {"Rows(columns=64)": Rows(columns=64), "LowRank(rank=256)": LowRank(rank=256, columns=64)},
}
MOST = {"Rows(columns=8)": 4000}  # beyond it R x R is the cost, as auto knows
BATCH = 250
NAMES = {"tiny": "tiny decoder", "minilm": "MiniLM"}
ANSWERS = Answers(tiny.ANSWERS[:2])


@dataclass(frozen=True)
class Subject:
    """A model, its task, a stream of so many examples, and a batch of 32 new ones."""

    model: nn.Module
    task: Any
    stream: Callable[[int], Iterable[dict[str, torch.Tensor]]]
    new: dict[str, torch.Tensor]


def tiny_decoder(cache: Path) -> Subject:
    """Batches are made as they are asked for; none is kept."""

    def stream(rows: int) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, rows, BATCH):
            data = tiny.batch(BATCH, 8, seed=start, padding=None)
            yield data | {"labels": data["labels"] % 2}

    torch.manual_seed(0)
    new = tiny.batch(32, 8, seed=10**6, labels=False, padding=None)
    return Subject(tiny.tiny_llama(torch.float32), ANSWERS, stream, new)


def encoder(cache: Path) -> Subject:
    """MiniLM with an adapter that is trained once."""
    folder = cache / "minilm"
    folder.mkdir(parents=True, exist_ok=True)
    model, classes, batches = subject("minilm", folder)
    train, test = texts()

    def stream(rows: int) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, rows, 16):
            yield from batches(train[start : start + 16])

    pieces = batches(test[:32])
    length = max(piece["input_ids"].shape[1] for piece in pieces)
    padded = [
        {
            key: nn.functional.pad(piece[key], (0, length - piece[key].shape[1]))
            for key in piece
            if key != "labels"
        }
        for piece in pieces
    ]
    return Subject(
        model, classes, stream, {key: torch.cat([each[key] for each in padded]) for key in padded[0]}
    )


SUBJECTS = {"tiny": tiny_decoder, "minilm": encoder}


def measure(model: str, name: str, rows: int, cache: Path) -> dict[str, Any]:
    """One structure at one size."""
    found = SUBJECTS[model](cache)
    la = LaplaceLoRA(found.model, found.task, structure=STRUCTURES[model][name])
    with Peak() as peak:
        start = time.process_time()
        la.fit(found.stream(rows), progress=False)
        fitted = time.process_time()
    la.optimize_prior_precision(Evidence())
    tuned = time.process_time()
    la.logit_distribution(found.new)  # what is made once
    ready = time.process_time()
    la.logit_distribution(found.new)
    done = time.process_time()
    return {
        "model": model,
        "structure": name,
        "rows": rows,
        "fit_seconds": fitted - start,
        "tune_seconds": tuned - fitted,
        "predict_seconds": done - ready,
        "peak_megabytes": peak.most / 2**20,
    }


def slope(rows: list[dict[str, Any]], key: str) -> float:
    """Of log seconds over log R."""
    x = torch.tensor([math.log(row["rows"]) for row in rows], dtype=torch.float64)
    y = torch.tensor([math.log(row[key]) for row in rows], dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def markdown(results: dict[str, Any]) -> str:
    """One table, a line of slopes for each structure."""
    keys = ["fit_seconds", "tune_seconds", "predict_seconds", "peak_megabytes"]
    lines = [
        "# Time and memory over the number of rows",
        "",
        f"Streamed in batches of {BATCH} (tiny decoder) and 16 (MiniLM); CPU seconds of a loaded machine; "
        "`python -m bench.scaling`.",
        "",
        "| model | structure | rows | fit, s | tune, s | predict 32, s | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, structures in STRUCTURES.items():
        for name in structures:
            rows = [row for row in results["runs"] if (row["model"], row["structure"]) == (model, name)]
            for row in rows:
                cells = [f"{row[key]:.3g}" for key in keys]
                lines.append("| " + " | ".join([NAMES[model], name, f"{row['rows']:,}", *cells]) + " |")
            if len(rows) > 1:
                slopes = [f"{slope(rows, key):+.2f}" for key in keys]
                lines.append("| " + " | ".join([NAMES[model], name, "slope", *slopes]) + " |")
    for model, origin in results["environments"].items():
        lines += [
            "",
            f"{NAMES[model]}: {origin['machine']}, commit {origin['commit'][:12]}, {origin['date']}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes scaling.json and .md; the other model's results in them are kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SUBJECTS, default="tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 2000, 8000, 32_000, 100_000])
    parser.add_argument(
        "--cache", type=Path, default=Path("."), help="folder that keeps the adapter of MiniLM"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    model, path = arguments.model, arguments.out / "scaling.json"
    results = json.loads(path.read_text()) if path.exists() else {"environments": {}, "runs": []}
    results["runs"] = [run for run in results["runs"] if run["model"] != model]
    results["environments"][model] = provenance(("torch", "transformers", "peft"))
    for rows in arguments.rows:
        for name in STRUCTURES[model]:
            if rows <= MOST.get(name, rows):
                results["runs"].append(measure(model, name, rows, arguments.cache))
                print(json.dumps(results["runs"][-1]), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "scaling.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
