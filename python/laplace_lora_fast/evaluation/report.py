"""What `laplace-lora demo` and `laplace-lora evaluate` both print and write."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from rich.table import Table

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


def write_plots(grid: Mapping[str, Mapping[str, Predictions]], folder: Path) -> list[Path]:
    """Draws reliability.png and confidence.png.

    Args:
        grid: Data set -> method -> predictions.
        folder: Created if missing.

    Returns:
        The two files.
    """
    from laplace_lora_fast.evaluation.plots import confidence_histogram, reliability_diagram

    folder.mkdir(parents=True, exist_ok=True)
    reliability, confidence = folder / "reliability.png", folder / "confidence.png"
    reliability_diagram(grid, reliability)
    confidence_histogram(grid, confidence)
    return [reliability, confidence]
