"""The report's numbers as a Markdown table and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Report = dict[str, Any]


def markdown(report: Report) -> str:
    """Tables of all measurements, under the line that says where they come from."""
    about = report["environment"]
    lines = [f"# {'Dry run, not a measurement' if report['dry'] else 'GPU report'}", ""]
    lines += [f"{name}: {value}  " for name, value in about.items()]
    lines += ["", *(f"{name}: {value:.4g}  " for name, value in report["ceilings"].items()), ""]
    lines += ["| op | d | T | variant | microseconds (p20-p80) | over baseline | TFLOP/s | executed | GB/s |"]
    lines += ["|---|---:|---:|---|---|---:|---:|---:|---:|"]
    for case in report["ops"]:
        where = f"| {case['op']} | {case['d']} | {case['T'] or ''} "
        baseline = case["microseconds"].get("baseline", {}).get("median", float("nan"))
        for name, spread in case["microseconds"].items():
            us = spread["median"]
            lines.append(
                f"{where}| {name} | {us:.1f} ({spread['p20']:.1f}-{spread['p80']:.1f}) | {baseline / us:.2f} "
                f"| {case['gflop'] / us * 1e3:.4g} | {case['executed_gflop'][name] / us * 1e3:.4g} "
                f"| {case['megabytes'] / us * 1e3:.4g} |"
            )
        lines += [f"{where}| {name} | {_cell(error)} | | | | |" for name, error in case["failed"].items()]
    lines += [
        "",
        "| model | LoRA on | backend | fit, per batch | every token a row | at once | predict over forward |",
    ]
    lines += ["|---|---|---|---|---|---|---:|"]
    for record in report["models"]:
        lines.append(f"| {record['model']} | {record['targets']} | {_model_cells(record)} |")
    return "\n".join(lines) + "\n"


def _model_cells(record: Report) -> str:
    backend = record.get("backend", "")
    for what in ("skipped", "failed"):
        if what in record:
            return f"{backend} | {what}: {_cell(record[what])} | | | "
    fits = (
        f"{record[fit + '_per_batch']['median'] * 1e3:.1f} ms, {record[fit + '_overhead']:+.1%}"
        for fit in ("fit", "fit_expand", "fit_expand_at_once")
    )
    return f"{backend} | {' | '.join(fits)} | {record['predict_over_forward']:.2f}"


def _cell(text: str) -> str:
    return text.replace("|", "/")


def plot(report: Report, path: Path) -> None:
    """Speed over the baseline against d: a row of panels for each op, a panel for each T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in report["ops"] if "baseline" in case["microseconds"]]
    ops = list(dict.fromkeys(case["op"] for case in cases))
    if not ops:
        return
    columns = max(len({case["T"] for case in cases if case["op"] == op}) for op in ops)
    figure, panels = pyplot.subplots(
        len(ops), columns, squeeze=False, figsize=(4 * columns, 3.2 * len(ops)), sharey="row"
    )
    for row, op in zip(panels, ops, strict=True):
        tokens = sorted({case["T"] for case in cases if case["op"] == op})
        for panel, T in zip(row, tokens, strict=False):
            _plot_panel(panel, [case for case in cases if (case["op"], case["T"]) == (op, T)])
            panel.set_title(f"{op}, T = {T}" if T else op)
        for panel in row[len(tokens) :]:
            panel.set_axis_off()
        row[0].set_ylabel("speed over baseline")
        row[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_panel(panel: Any, cases: list[Report]) -> None:
    for name in dict.fromkeys(name for case in cases for name in case["microseconds"]):
        served = [case["microseconds"] for case in cases if name in case["microseconds"]]
        widths = [case["d"] for case in cases if name in case["microseconds"]]
        panel.plot(widths, [us["baseline"]["median"] / us[name]["median"] for us in served], "o-", label=name)
    panel.set_xlabel("d")
    panel.set_ylim(bottom=0)
