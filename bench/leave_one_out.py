"""Tuning of a refit: CPU seconds, by 101 refits from scratch and coarse to fine with warm starts, and memory.

    python -m bench.leave_one_out --rows 1000 2000 --out bench/results
    python -m bench.leave_one_out --rows 8000 --every 0 --out bench/results

Random features with labels that follow them: a kernel [R, R] and R two-class examples, as `Rows(refit=True)` has them.
Leave-one-out from scratch is timed at every `--every`-th value of the grid and scaled to all of it, 0 for never; all in
one run. The evidence's precision is that of `Evidence`. Memory is the most that tensors take at a time beside the rows,
the kernel included, in matrices [R, R] of fp64. Runs of other numbers of rows that the file has are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.prediction import Block
from laplace_lora_fast.prior.grid import DEFAULT_GRID, scores
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.refit import RefittedCurvature
from laplace_lora_fast.structures.rows.refits.left_out import LeftOut
from laplace_lora_fast.structures.rows.refits.mode import Observations
from laplace_lora_fast.structures.rows.refits.path import LeaveOneOutPath
from laplace_lora_fast.structures.search import lowest
from laplace_lora_fast.weights import WeightName
from tests.memory import Peak

FEATURES = 2048


def problem(rows: int) -> RefittedCurvature:
    """Two-class examples whose labels are noisy signs of a linear function of their features, not sketched."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, FEATURES)
    sides = [torch.randn(rows, FEATURES, generator=generator) * scales for _ in range(2)]
    truth = sides[0] @ torch.randn(FEATURES, generator=generator)
    labels = (truth + truth.std() * torch.randn(rows, generator=generator) > 0).long()
    layout = Layout(torch.ones(rows))
    roots = BlockDiagonal(layout, [torch.full((rows, 1, 1), 0.5)])
    means, identity = [torch.ones(1, FEATURES)] * 2, [torch.eye(FEATURES)] * 2
    names = [WeightName("layer", side) for side in ("A", "B")]
    whole = RowCurvature(names, means, sides, identity, roots)
    observed = Observations(layout, Categorical(), [torch.zeros(rows, 1, dtype=torch.float64)], [labels])
    return RefittedCurvature(whole, observed)


def nll(found: list[LeftOut]) -> float:
    """Of the left-out examples."""
    blocks = [Block(examples, mean, cov[None], targets) for examples, mean, cov, targets in found]
    return float(scores(Categorical(), blocks, "probit", 1, 0, None)[0])


def measure(rows: int, every: int) -> dict[str, Any]:
    """Seconds of both ways, and what each found."""
    curvature = problem(rows)
    ones = torch.ones(2, dtype=torch.float64)
    start = time.process_time()
    with Peak() as peak:
        curvature.kernels.total([1.0, 1.0])  # all need it
        made = time.process_time()
        path, new = LeaveOneOutPath(curvature), {}

        def value_at(place: int) -> float:
            new[place] = nll(path.at(DEFAULT_GRID[place]))
            return new[place]

        best = lowest(value_at, len(DEFAULT_GRID))
        found = time.process_time()
        evidence = curvature.maximise_evidence(["all"] * 2, [1.0] * 2)["all"]
    end = time.process_time()
    result = {
        "rows": rows,
        "kernel_seconds": made - start,
        "coarse_to_fine_seconds": found - made,
        "values_looked_at": len(new),
        "best": DEFAULT_GRID[best],
        "evidence_seconds": end - found,
        "evidence_best": evidence,
        "peak_matrices": peak.most / (8 * rows**2),
    }
    if not every:
        return result
    tried = range(0, len(DEFAULT_GRID), every)
    start = time.process_time()
    old = {place: nll(curvature.leave_one_out(DEFAULT_GRID[place] * ones)) for place in tried}
    seconds = (time.process_time() - start) * len(DEFAULT_GRID) / len(tried)
    both = sorted(set(old) & set(new))
    return result | {
        "from_scratch_seconds": seconds,
        "ratio": seconds / (found - made),
        "best_from_scratch_among_tried": DEFAULT_GRID[min(old, key=old.__getitem__)],
        "largest_nll_difference": max(abs(old[place] - new[place]) for place in both),
    }


def main() -> None:
    """Writes leave_one_out.json; other numbers of rows in it are kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    path = arguments.out / "leave_one_out.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    results: dict[str, Any] = {"runs": [run for run in runs if run["rows"] not in arguments.rows]}
    for rows in arguments.rows:
        origin = {"environment": provenance(("torch",)), "every": arguments.every}
        results["runs"].append(measure(rows, arguments.every) | origin)
        results["runs"].sort(key=lambda run: run["rows"])
        print(json.dumps(results["runs"]), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
