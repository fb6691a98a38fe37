"""The table of the paper from files of results: `python -m bench.protocols.table OUT`.

A block a metric, a row a method, a column a test set; mean and standard deviation (n - 1) over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.saving.atomic import replacing

METRICS = ("ACC", "ECE", "NLL", "Brier")
ARROWS = {"ACC": "↑", "ECE": "↓", "NLL": "↓", "Brier": "↓"}


def ece(predictions: Predictions, bins: int) -> float:
    """Expected calibration error of the confidence in equal bins (Guo et al. 2017)."""
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    gaps = predictions.correct.double() - predictions.confidence
    sums = torch.bincount(torch.bucketize(predictions.confidence, edges), gaps, minlength=bins)
    return float(sums.abs().sum()) / len(gaps)


def scores(predictions: Predictions, bins: int) -> dict[str, float]:
    """The metrics, accuracy and calibration error in per cent."""
    found = predictions.metrics()
    return {
        "ACC": 100 * found.accuracy,
        "ECE": 100 * ece(predictions, bins),
        "NLL": found.nll,
        "Brier": found.brier,
    }


def results(out: Path) -> list[dict[str, Any]]:
    """What there is, one of a protocol and seed, in the order of columns and seeds."""
    found = [json.loads(file.read_text()) for file in sorted(out.glob("*/*.json"))]
    return sorted(found, key=lambda each: (each["column"], each["seed"]))


def markdown(found: list[dict[str, Any]]) -> str:
    """Tables in distribution and out of it, for each model, and for trainings with rows held out; and costs."""
    lines: list[str] = []
    for model, held_out in sorted({(each["model"], each["held_out"]) for each in found}):
        some = [each for each in found if (each["model"], each["held_out"]) == (model, held_out)]
        for shifted in (False, True):
            columns = _columns(some, shifted)
            if columns:
                lines += [*_table(some, held_out, columns), ""]
        lines += [*_costs(some), ""]
    return "\n".join(lines)


def _columns(found: list[dict[str, Any]], shifted: bool) -> list[tuple[str, str]]:
    """Protocol and test set: those of the protocol's own name, or the others."""
    pairs = [(each["protocol"], test) for each in found for test in each["tests"]]
    return list(dict.fromkeys(pair for pair in pairs if (pair[0] != pair[1]) == shifted))


def _methods(found: list[dict[str, Any]]) -> list[str]:
    """Those that have scores somewhere."""
    scored = (name for each in found for name, facts in each["methods"].items() if "scores" in facts)
    return list(dict.fromkeys(scored))


def _costs(found: list[dict[str, Any]]) -> Iterator[str]:
    """Seconds of fits and predictions, and on a GPU the peak of reserved memory: means over protocols and seeds."""
    yield "| method | fit, s | predict, s | reserved while fitting, GB | while predicting, GB |"
    yield "|---|---|---|---|---|"
    for method in _methods(found):
        facts = [each["methods"][method] for each in found if method in each["methods"]]

        def mean(phase: str, name: str, scale: float, facts: list[Any] = facts) -> str:
            values = [each[phase][name] / scale for each in facts if name in each.get(phase, {})]
            return f"{statistics.fmean(values):.3g}" if values else ""

        cells = [mean("fit", "seconds", 1), mean("predict", "seconds", 1)]
        cells += [mean("fit", "reserved", 1e9), mean("predict", "reserved", 1e9)]
        yield f"| {method} | {' | '.join(cells)} |"


def _table(found: list[dict[str, Any]], held_out: float, columns: list[tuple[str, str]]) -> Iterator[str]:
    methods = _methods(found)
    names = [test if test == own else f"{own} → {test}" for own, test in columns]
    tuned = f"{held_out:.0%} of the training rows held out to tune by" if held_out else "no held-out rows"
    seeds: dict[str, list[str]] = {}
    for each in found:
        seeds.setdefault(each["protocol"], []).append(str(each["seed"]))
    yield (
        f"{found[0]['model']}, {tuned}. Seeds: "
        + "; ".join(f"{k} {', '.join(v)}" for k, v in seeds.items())
        + "."
    )
    yield ""
    yield f"| metric | method | {' | '.join(names)} |"
    yield f"|---|---|{'---|' * len(names)}"
    for metric in METRICS:
        for place, method in enumerate(methods):
            cells = [_cell(found, own, test, method, metric) for own, test in columns]
            yield f"| {metric + ' ' + ARROWS[metric] if not place else ''} | {method} | {' | '.join(cells)} |"
    left = {
        f"{method}, {each['protocol']}: {facts['left_out']}"
        for each in found
        for method, facts in each["methods"].items()
        if "left_out" in facts
    }
    if left:
        yield ""
        yield "Left out. " + " ".join(f"{line}." for line in sorted(left))


def _cell(found: list[dict[str, Any]], own: str, test: str, method: str, metric: str) -> str:
    values = [
        each["methods"][method]["scores"][test][metric]
        for each in found
        if each["protocol"] == own and test in each["methods"].get(method, {}).get("scores", {})
    ]
    if not values:
        return ""
    digits = 1 if metric in ("ACC", "ECE") else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def write(out: Path) -> str:
    """Writes OUT/table.md and returns it."""
    text = markdown(results(out))
    with replacing(out / "table.md") as partial:
        partial.write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Draws the table of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    print(write(parser.parse_args().out))


if __name__ == "__main__":
    main()
