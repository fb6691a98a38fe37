"""What `laplace-lora select` prints and writes: risks at a coverage, and conformal sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.evaluation.selective import abstention_curve, conformal_sets
from laplace_lora_fast.prediction import MAP_LINK

Found = dict[str, dict[str, float]]  # method -> quantity -> value


def select(
    la: Any,
    reader: Any,
    files: Mapping[str, tuple[Any, Any]],
    link_approx: str,
    coverage: float,
    alpha: float,
    method: str,
) -> tuple[Found, list[dict[str, Any]]]:
    """Figures and lines for the path and rows in `files`: those of "test", and of "held" where there are any."""
    methods = {"MAP": MAP_LINK, "Laplace": link_approx}
    batches = {name: reader.batches(la.task, rows, path) for name, (path, rows) in files.items()}
    probs = {
        name: {kind: la.predictions(some.batches, link_approx=link) for kind, link in methods.items()}
        for name, some in batches.items()
    }
    test, held = probs["test"], probs.get("held")
    own = None if held is None else held["Laplace"]
    rows, order = files["test"][1], batches["test"].order
    return (
        _measured(test, held, coverage, alpha, method),
        _lines(rows, order, test["Laplace"], own, coverage, alpha, method),
    )


def _measured(
    test: Mapping[str, Predictions],
    calibration: Mapping[str, Predictions] | None,
    coverage: float,
    alpha: float,
    method: str,
) -> Found:
    """For the plain adapter and its posterior what abstention does, and with calibration rows what sets look like."""
    found: Found = {}
    for name, predictions in test.items():
        curve = abstention_curve(predictions)
        found[name] = {
            "risk of all": curve.risk_at(1.0),
            f"risk at {coverage:g}": curve.risk_at(coverage),
            "area under risk": curve.area,
        }
        if calibration is not None:
            sets = conformal_sets(calibration[name], predictions, alpha, method)
            found[name] |= {
                f"sets at {1 - alpha:g}: coverage": sets.coverage,
                "classes in a set": float(sets.size.double().mean()),
            }
    return found


def _lines(
    rows: Any,
    order: list[int],
    test: Predictions,
    calibration: Predictions | None,
    coverage: float,
    alpha: float,
    method: str,
) -> list[dict[str, Any]]:
    """One object a row, in the rows' order: its probabilities, whether it is answered, and its set."""
    answered = 1 - test.confidence <= abstention_curve(test).threshold_at(coverage)
    sets = None if calibration is None else conformal_sets(calibration, test, alpha, method).members
    found: list[dict[str, Any]] = [{} for _ in rows]
    for place, number in enumerate(order):
        row = rows[number]
        line = {"prompt": row.prompt, "choices": row.choices}
        line |= {
            "probs": test.probs[place, : len(row.choices)].tolist(),
            "answered": bool(answered[place]),
        }
        if sets is not None:
            members = sets[place].tolist()
            line["set"] = [choice for choice, inside in zip(row.choices, members, strict=False) if inside]
        found[number] = line
    return found


def table(found: Found) -> Table:
    """One row a method."""
    shown = Table(caption="share of errors among the rows that are answered, the surest first")
    shown.add_column("method")
    for name in next(iter(found.values())):
        shown.add_column(name, justify="right")
    for method, values in found.items():
        shown.add_row(method, *(f"{value:.3f}" for value in values.values()))
    return shown
