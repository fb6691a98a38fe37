"""What `laplace-lora demo` and `laplace-lora evaluate` both print and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.table import Table

from laplace_lora_fast.evaluation.calibration import auroc, calibration, fpr_at_tpr
from laplace_lora_fast.evaluation.intervals import RESAMPLES, Interval, difference, interval
from laplace_lora_fast.evaluation.metrics import Metrics
from laplace_lora_fast.evaluation.predictions import Predictions

Results = Mapping[str, Mapping[str, Metrics]]  # data set -> method -> scores


def score(grid: Mapping[str, Mapping[str, Predictions]]) -> dict[str, dict[str, Metrics]]:
    """Scores every method on every data set."""
    return {data: {method: p.metrics() for method, p in row.items()} for data, row in grid.items()}


def metrics_table(results: Results) -> Table:
    """A table with one section a data set and one row a method; commas in a data set's name break its line."""
    table = Table(caption="accuracy: higher is better; ECE (15 bins), NLL (nats), Brier: lower is better")
    table.add_column("data set")
    table.add_column("method")
    for name in ("accuracy", "ECE", "NLL", "Brier"):
        table.add_column(name, justify="right")
    for data, row in results.items():
        headings = [*data.split(", "), f"n = {next(iter(row.values())).count}"]
        lines = [_cells(method, scores) for method, scores in row.items()]
        for heading, cells in zip_longest(headings, lines):
            table.add_row(heading or "", *(cells or ()))
        table.add_section()
    return table


def _cells(method: str, scores: Metrics) -> list[str]:
    return [method, *(f"{value:.3f}" for value in (scores.accuracy, scores.ece, scores.nll, scores.brier))]


SCORES: dict[str, Callable[[Predictions], float]] = {
    "accuracy": lambda predictions: predictions.metrics().accuracy,
    "nll": lambda predictions: predictions.metrics().nll,
    "brier": lambda predictions: predictions.metrics().brier,
    "ece": lambda predictions: predictions.metrics().ece,
}


def details(row: Mapping[str, Predictions], resamples: int = RESAMPLES) -> dict[str, dict[str, Any]]:
    """All scores of every method on one data set, as plain values.

    Args:
        row: Method -> predictions of the same examples, with labels. The first is what the others are compared with.
        resamples: Of the bootstrap.

    Returns:
        Method -> its `Metrics`, its `Calibration`, how well one minus its confidence finds its errors ("auroc" and
        "fpr95"; None where it makes none, or nothing else), 95 % "intervals" of accuracy, NLL, Brier score and ECE,
        and the same of their differences to the first method, paired.
    """
    first = next(iter(row.values()))
    found: dict[str, dict[str, Any]] = {}
    for method, predictions in row.items():
        unsure, correct = 1 - predictions.confidence, predictions.correct
        both = bool(correct.any() and not correct.all())
        found[method] = asdict(predictions.metrics()) | {
            "calibration": asdict(calibration(predictions)),
            "errors": {
                "auroc": auroc(unsure[correct], unsure[~correct]) if both else None,
                "fpr95": fpr_at_tpr(unsure[correct], unsure[~correct]) if both else None,
            },
            "intervals": {
                name: _ends(interval(predictions, score, resamples=resamples))
                for name, score in SCORES.items()
            },
        }
        if predictions is not first:
            found[method]["minus_first"] = {
                name: asdict(difference(predictions, first, score, resamples=resamples))
                for name, score in SCORES.items()
            }
    return found


def markdown(data: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """What `details` gave as a Markdown table with intervals, a row a method."""
    lines = [
        f"{data}, n = {next(iter(found.values()))['count']}; 95 % intervals by bootstrap over examples.",
        "",
        "| method | accuracy | NLL | Brier | ECE | adaptive | class-wise | smooth | AUROC of errors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, scores in found.items():
        cells = [str(Interval(scores[name], *scores["intervals"][name])) for name in SCORES]
        cells += [f"{scores['calibration'][name]:.3f}" for name in ("adaptive", "class_wise", "smooth")]
        separation = scores["errors"]["auroc"]
        cells.append("" if separation is None else f"{separation:.3f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ends(found: Interval) -> Sequence[float]:
    return [found.low, found.high]


def write_plots(grid: Mapping[str, Mapping[str, Predictions]], folder: Path) -> list[Path]:
    """Draws reliability.png, confidence.png and risk_coverage.png.

    Args:
        grid: Data set -> method -> predictions.
        folder: Created if missing.

    Returns:
        The files.
    """
    from laplace_lora_fast.evaluation.plots import confidence_histogram, reliability_diagram, risk_coverage

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "reliability": reliability_diagram,
        "confidence": confidence_histogram,
        "risk_coverage": risk_coverage,
    }
    for name, draw in drawn.items():
        draw(grid, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in drawn]
