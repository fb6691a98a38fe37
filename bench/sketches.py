"""How good sketched rows and low rank are: variances against the exact GGN's on a real model, over rows and precisions.

    python -m bench.sketches --model minilm --rows 400 1200 4000 --cache /somewhere
    python -m bench.sketches --report

Whole Jacobian rows of training and test examples are made once, in pieces that a killed run goes on from; structures
are made of them as their own fits make them, by the algebra of the package: only passes are shared. KFAC has passes of
its own. Ratios of the variance of the logit contrast to the exact GGN: median [5 %, 95 % quantile] over test examples.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.real_rows import MODELS, NAMES, PIECE, Jacobians, jacobians, subject, texts
from laplace_lora_fast import KFAC, LaplaceLoRA
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.structures.low_rank.algebra import (
    add_rows_,
    as_curvature,
    as_rows,
    nystrom,
    test_matrix,
)
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.sketches.sketch import (
    features_for,
    in_16_bits,
    random_projection,
    spread,
)

FIXED = (0.1, 1.0, 10.0, 100.0)
PLACES = [  # of structures in the table
    "Rows()",
    "Rows(columns=128)",
    "Rows(columns=128) at the prior's own precision",
    "LowRank()",
    "LowRank(rank=2048)",
    "LowRank(rank=512)",
    "KFAC()",
]
LARGEST = 4096  # rank that the default budget holds for both models


def kfac_variances(model: str, n_train: int, n_test: int, cache: Path) -> tuple[Tensor, float, float]:
    """KFAC's variances [len(FIXED), N], seconds of its fit, and its size in bytes."""
    module, answers, batches = subject(model, cache)
    train, test = texts()
    la = LaplaceLoRA(module, answers, structure=KFAC())
    start = time.process_time()
    la.fit(batches(train[:n_train]), progress=False)
    seconds = time.process_time() - start
    covs = [la.logit_distribution(each, prior_precision=list(FIXED))[1] for each in batches(test[:n_test])]
    cov = torch.cat(covs, 1).double()
    kept = la.posterior.curvature.tensors().values()
    variances = cov[..., 0, 0] + cov[..., 1, 1] - 2 * cov[..., 0, 1]
    return variances, seconds, sum(each.numel() * each.element_size() for each in kept)


def sketched(found: Jacobians, n: int, columns: Sequence[int], seed: int) -> RowCurvature:
    """The first n rows, as a fit with so many columns a weight keeps them."""
    projections = [
        random_projection(mean.shape[1], most, seed + index, mean)
        for index, (mean, most) in enumerate(zip(found.means, columns, strict=True))
    ]
    rows = []
    for index, (mean, omega) in enumerate(zip(found.means, projections, strict=True)):
        pieces = [piece[index].view(-1, *mean.shape) for piece in found.train[: -(-n // PIECE)]]
        whole = omega.shape[0] == omega.shape[1]
        made = [(piece if whole else piece @ omega.to(piece.dtype)).flatten(1) for piece in pieces]
        rows.append(torch.cat(made)[:n])
    roots = BlockDiagonal(Layout(torch.ones(n)), [found.roots[:n, None, None]])
    return RowCurvature(found.names, found.means, in_16_bits(rows, projections), projections, roots)


def default_columns(found: Jacobians, rows: int) -> list[int]:
    """What a fit chooses where that is left open, for so many rows or directions."""
    features = features_for(rows, found.shapes)
    if features is None:
        return [width for _, width in found.shapes]
    return spread(features, found.energies, found.shapes)


def low_rank(found: Jacobians, n: int, rank: int, seed: int) -> RowCurvature:
    """Its leading directions, as `LowRank` streams them."""
    whole = sketched(found, n, default_columns(found, rank), seed)
    device = torch.device("cpu")
    features = sum(rows.shape[1] for rows in whole.rows)
    omega = test_matrix(features, min(rank, features), seed + len(found.means), device)
    sketch, trace = torch.zeros_like(omega, dtype=torch.float64), 0.0
    for start in range(0, n, PIECE):
        place = slice(start, min(n, start + PIECE))
        weighted = torch.cat([rows[place].double() for rows in whole.rows], 1) * found.roots[place, None]
        add_rows_(sketch, omega, weighted)
        trace += float(weighted.square().sum())
    back = nystrom(sketch, omega)
    parts = [
        as_rows(part, back, torch.float32) for part in sketch.split([rows.shape[1] for rows in whole.rows])
    ]
    return as_curvature(found.names, found.means, whole.projections, parts, trace, n)


class Tested:
    """Inner products of the test rows with a structure's rows."""

    def __init__(self, found: Jacobians, curvature: RowCurvature) -> None:
        n, self._curvature = len(found.test[0]), curvature
        self._own = torch.zeros(1, n, 1, 1, dtype=torch.float64)
        self._cross = torch.zeros(1, n, 1, curvature.n_rows, dtype=torch.float64)
        for each, mean, omega, rows in zip(
            found.test, found.means, curvature.projections, curvature.rows, strict=True
        ):
            features = (each.view(n, *mean.shape) @ omega.to(each.dtype)).flatten(1)
            self._own[0, :, 0, 0] += features.double().square().sum(1)
            self._cross[0, :, 0] += (features @ rows.to(features.dtype).mT).double()

    def variances(self, plain: bool = False) -> Tensor:
        """[len(FIXED), N]; plain: at the prior's own precision, as sketches used to."""
        ones = torch.ones(len(self._curvature.names), dtype=torch.float64)
        found = []
        for precision in FIXED:
            prior = precision * ones
            effective = self._curvature.effective
            if plain:
                self._curvature.effective = lambda each: each  # type: ignore[method-assign]
            solver = next(iter(self._curvature.solvers_of(prior[:, None])[1]))
            self._curvature.effective = effective  # type: ignore[method-assign]
            self._curvature._latest_solver = None
            found.append(solver.covariance(self._own, self._cross).flatten())
        return torch.stack(found)


def measure(
    found: Jacobians,
    n: int,
    seed: int,
    kfac: Callable[[], tuple[Tensor, float, float]] | None,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """All structures at n rows, what takes longest last; each is written as soon as it is there."""
    widths, ones = [width for _, width in found.shapes], torch.ones(len(found.names), dtype=torch.float64)
    default, rank = default_columns(found, n), min(LARGEST, n * 5 // 4 + 16)
    start = time.process_time()
    exact_curvature = sketched(found, n, widths, seed)
    exact = Tested(found, exact_curvature).variances()
    seconds = time.process_time() - start
    gammas = [float(exact_curvature.effective_parameters(p * ones).sum()) for p in FIXED]
    features = sum(rank * columns for (rank, _), columns in zip(found.shapes, default, strict=True))

    def keep(name: str, variances: Tensor, errors: list[float], seconds: float, kept: float) -> None:
        ratios = variances / exact
        row = {
            "structure": name,
            "rows": n,
            "seed": seed,
            "exact_effective_parameters": gammas,
            "median": ratios.median(1).values.tolist(),
            "q05": ratios.quantile(0.05, 1).tolist(),
            "q95": ratios.quantile(0.95, 1).tolist(),
            "estimated_error": errors,
            "cpu_seconds": seconds,
            "megabytes": kept / 2**20,
        }
        print(json.dumps(row), flush=True)
        write(row)

    def keep_rows(name: str, make: Callable[[], RowCurvature], plain: bool = False) -> None:
        start = time.process_time()
        curvature = make()
        variances = Tested(found, curvature).variances(plain)
        seconds = time.process_time() - start
        errors = []
        if curvature.kernels.sketched and not plain:
            errors = [curvature.estimated_error(p * ones) for p in FIXED]
        keep(name, variances, errors, seconds, kept_bytes(curvature))

    if default == widths:
        keep(f"Rows(), all {features:,} features", exact, [], seconds, kept_bytes(exact_curvature))
        del exact_curvature
    else:
        del exact_curvature
        keep_rows(f"Rows(), {features:,} features", lambda: sketched(found, n, default, seed))
    for fewer in (each for each in (512, 2048) if each < rank):
        keep_rows(f"LowRank(rank={fewer})", partial(low_rank, found, n, fewer, seed))
    if kfac is not None:
        variances, seconds, size = kfac()
        keep("KFAC()", variances, [], seconds, size)
    uniform = [min(128, width) for width in widths]
    keep_rows(
        "Rows(columns=128) at the prior's own precision",
        lambda: sketched(found, n, uniform, seed),
        plain=True,
    )
    keep_rows("Rows(columns=128)", lambda: sketched(found, n, uniform, seed))
    keep_rows(f"LowRank(), rank {rank:,}", lambda: low_rank(found, n, rank, seed))


def kept_bytes(curvature: RowCurvature) -> float:
    """Of rows and sketches."""
    return float(
        sum(each.numel() * each.element_size() for each in [*curvature.rows, *curvature.projections])
    )


def kind(row: dict[str, Any]) -> str:
    """What its structure is called in the legend."""
    return str(row["structure"].partition(", ")[0])


def markdown(results: dict[str, Any]) -> str:
    """One table."""
    lines = [
        "# Sketched rows and low rank against the exact GGN",
        "",
        "Variance of the logit contrast over the exact GGN's: median [5 %, 95 %] over test examples, at four prior "
        "precisions. d is the exact GGN's effective number of parameters there. Seconds (CPU, of a loaded machine): of "
        "rows and low rank to make the structure of whole rows and to solve for the four precisions; of KFAC, of its "
        "fit. MiB: rows, or factors, with their sketches. `python -m bench.sketches`.",
        "",
    ]
    lines += ["<!-- --8<-- [start:table] -->", *table(results), "<!-- --8<-- [end:table] -->"]
    for model, each in results["models"].items():
        origin = each["environment"]
        lines += [
            "",
            f"{NAMES[model]}: {each['tests']} test examples; {origin['machine']}, commit {origin['commit'][:12]}, "
            f"{origin['date']}.",
        ]
    return "\n".join(lines) + "\n"


def table(results: dict[str, Any]) -> list[str]:
    """Its lines, for the pages too."""
    lines = [
        "| model, rows | structure | 0.1 | 1 | 10 | 100 | summary's error at 1 | s | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, each in results["models"].items():
        seen = None
        for row in each["results"]:
            if row["rows"] != seen:
                seen = row["rows"]
                gammas = " | ".join(f"d = {gamma:.0f}" for gamma in row["exact_effective_parameters"])
                lines.append(f"| **{NAMES[model]}, {seen:,}** | exact | {gammas} | | | |")
            cells = [
                f"{m:.3f} [{a:.2f}, {b:.2f}]"
                for m, a, b in zip(row["median"], row["q05"], row["q95"], strict=True)
            ]
            said = row["estimated_error"][1:2]
            text = f"{25 * said[0]:+.1f} to {100 * said[0]:+.1f} %" if said else ""
            rest = [text, f"{row['cpu_seconds']:.0f}", f"{row['megabytes']:.0f}"]
            lines.append("| " + " | ".join(["", row["structure"], *cells, *rest]) + " |")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Ratios over the prior precision, a panel for each model and number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        (model, n, [row for row in each["results"] if row["rows"] == n])
        for model, each in results["models"].items()
        for n in dict.fromkeys(row["rows"] for row in each["results"])
    ]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (model, n, rows) in zip(axes[0], panels, strict=True):
        axis.axhspan(0.95, 1.05, color="0.9")
        for index, row in enumerate(rows):
            label = kind(row)
            axis.plot(FIXED, row["median"], marker="o", color=f"C{index}", label=label)
            axis.fill_between(FIXED, row["q05"], row["q95"], color=f"C{index}", alpha=0.12)
        axis.set(xscale="log", yscale="log", xlabel="prior precision", title=f"{NAMES[model]}, {n:,} rows")
        axis.set_ylim(0.6, 8)
        axis.set_yticks([0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5, 8], minor=False)
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("variance over the exact GGN's")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(results: dict[str, Any], folder: Path) -> None:
    """The table and the plot."""
    (folder / "sketches.md").write_text(markdown(results))
    plot(results, folder / "sketches.png")


def main() -> None:
    """Writes sketches.json, .md and .png; other models' results in them are kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--rows", type=int, nargs="+", default=[400, 1200])
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--cache", type=Path, help="folder that keeps adapters and Jacobian rows", default=Path(".")
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--without-kfac", action="store_true", help="it alone has passes of its own")
    parser.add_argument(
        "--report", action="store_true", help="only table and plot, of the file that there is"
    )
    arguments = parser.parse_args()
    path = arguments.out / "sketches.json"
    results = json.loads(path.read_text()) if path.exists() else {"models": {}}
    if arguments.report:
        write(results, arguments.out)
        return
    model, cache = arguments.model, arguments.cache / arguments.model
    cache.mkdir(parents=True, exist_ok=True)
    found = jacobians(model, max(arguments.rows), arguments.tests, cache)
    kept = results["models"].get(model, {}).get("results", [])
    results["models"][model] = mine = {
        "environment": provenance(("torch", "transformers", "peft")),
        "tests": arguments.tests,
        "results": [row for row in kept if row["rows"] not in arguments.rows],
    }
    for n in arguments.rows:
        for seed in arguments.seeds:
            kfac = partial(kfac_variances, model, n, arguments.tests, cache)

            def keep(row: dict[str, Any]) -> None:
                mine["results"].append(row)
                mine["results"].sort(key=lambda each: (each["rows"], PLACES.index(kind(each))))
                path.write_text(json.dumps(results, indent=1) + "\n")
                write(results, arguments.out)

            measure(found, n, 1000 * seed, None if arguments.without_kfac else kfac, keep)


if __name__ == "__main__":
    main()
