"""How time and memory grow with the number of examples: rows and low rank on a tiny decoder, streamed.

    python -m bench.scaling --rows 500 2000 8000 32000 100000 --out bench/results

Random tokens, one function an example (two answers), so that R = N. CPU seconds of the process: fit; the evidence's
prior precision; one prediction of 32 examples. MiB: the most that tensors take during the fit beyond what there was,
the batches themselves included. Slopes are of log seconds over log R, by least squares.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from laplace_lora_fast import Answers, Evidence, LaplaceLoRA, LowRank, Rows
from laplace_lora_fast.evaluation.provenance import provenance
from tests import tiny
from tests.memory import Peak

STRUCTURES = {"Rows(columns=8)": Rows(columns=8), "LowRank(rank=64)": LowRank(rank=64, columns=8)}
MOST = {"Rows(columns=8)": 4000}  # beyond it R x R is the cost, as auto knows
BATCH = 250
ANSWERS = Answers(tiny.ANSWERS[:2])


def stream(rows: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches as they are asked for; none is kept."""
    for start in range(0, rows, BATCH):
        data = tiny.batch(BATCH, 8, seed=start, padding=None)
        yield data | {"labels": data["labels"] % 2}


def measure(name: str, rows: int) -> dict[str, Any]:
    """One structure at one size."""
    torch.manual_seed(0)
    la = LaplaceLoRA(tiny.tiny_llama(torch.float32), ANSWERS, structure=STRUCTURES[name])
    with Peak() as peak:
        start = time.process_time()
        la.fit(stream(rows), progress=False)
        fitted = time.process_time()
    la.optimize_prior_precision(Evidence())
    tuned = time.process_time()
    new = tiny.batch(32, 8, seed=10**6, labels=False, padding=None)
    la.logit_distribution(new)  # what is made once
    ready = time.process_time()
    la.logit_distribution(new)
    done = time.process_time()
    return {
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
    origin, keys = (
        results["environment"],
        ["fit_seconds", "tune_seconds", "predict_seconds", "peak_megabytes"],
    )
    lines = [
        "# Time and memory over the number of rows",
        "",
        f"A tiny decoder, streamed in batches of {BATCH}; CPU seconds of a loaded machine. {origin['machine']}, "
        f"commit {origin['commit'][:12]}, {origin['date']}; `python -m bench.scaling`.",
        "",
        "| structure | rows | fit, s | tune, s | predict 32, s | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in STRUCTURES:
        rows = [row for row in results["runs"] if row["structure"] == name]
        for row in rows:
            cells = [f"{row[key]:.3g}" for key in keys]
            lines.append("| " + " | ".join([name, f"{row['rows']:,}", *cells]) + " |")
        if len(rows) > 1:
            slopes = [f"{slope(rows, key):+.2f}" for key in keys]
            lines.append("| " + " | ".join([name, "slope", *slopes]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes scaling.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 2000, 8000, 32_000, 100_000])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": provenance(("torch", "transformers", "peft")), "runs": []}
    for rows in arguments.rows:
        for name in STRUCTURES:
            if rows <= MOST.get(name, rows):
                results["runs"].append(measure(name, rows))
                print(json.dumps(results["runs"][-1]), flush=True)
        (arguments.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "scaling.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
