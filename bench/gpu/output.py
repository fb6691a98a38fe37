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
        baseline = case["microseconds"]["baseline"]["median"]
        for name, spread in case["microseconds"].items():
            us = spread["median"]
            lines.append(
                f"| {case['op']} | {case['d']} | {case['T'] or ''} | {name} "
                f"| {us:.1f} ({spread['p20']:.1f}-{spread['p80']:.1f}) | {baseline / us:.2f} "
                f"| {case['gflop'] / us * 1e3:.4g} | {case['executed_gflop'][name] / us * 1e3:.4g} "
                f"| {case['megabytes'] / us * 1e3:.4g} |"
            )
    lines += ["", "| model | LoRA on | batch | backend | method | per batch | over bare passes |"]
    lines += ["|---|---|---|---|---|---:|---:|"]
    for record in report["models"]:
        lines += [f"| {record['model']} | {record['targets']} | {cells} |" for cells in _model_cells(record)]
    return "\n".join(lines) + "\n"


def _model_cells(record: Report) -> list[str]:
    """One row for each way to fit, over forward and backward pass, and one for predicting, over a forward pass."""
    where = f"{record['examples']} x {record['tokens']} | {record['backend']}"
    if "skipped" in record:
        return [f"{where} | skipped: {record['skipped']} | | "]
    rows = [
        f"{where} | fit, {method} | {cost['per_batch'] * 1e3:.1f} ms | {1 + cost['overhead']:.2f}"
        for method, cost in record["fit"].items()
    ]
    predict = f"{record['predict']['median'] * 1e3:.1f} ms | {record['predict_over_forward']:.2f}"
    return [*rows, f"{where} | predict | {predict}"]


def plot(report: Report, folder: Path) -> None:
    """One PNG per op: speed over the baseline against d, a panel for each T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for op in dict.fromkeys(case["op"] for case in report["ops"]):
        cases = [case for case in report["ops"] if case["op"] == op]
        tokens = sorted({case["T"] for case in cases})
        figure, panels = pyplot.subplots(
            1, len(tokens), squeeze=False, sharey=True, figsize=(4 * len(tokens), 3.2)
        )
        for panel, T in zip(panels[0], tokens, strict=True):
            _plot_panel(panel, [case for case in cases if case["T"] == T])
            panel.set_title(f"{op}, T = {T}" if T else op)
        panels[0][0].set_ylabel("speed over baseline")
        panels[0][0].legend()
        figure.tight_layout()
        figure.savefig(folder / f"{op.replace(' ', '_')}.png", dpi=120)
        pyplot.close(figure)


def _plot_panel(panel: Any, cases: list[Report]) -> None:
    for name in dict.fromkeys(name for case in cases for name in case["microseconds"]):
        served = [case["microseconds"] for case in cases if name in case["microseconds"]]
        widths = [case["d"] for case in cases if name in case["microseconds"]]
        panel.plot(widths, [us["baseline"]["median"] / us[name]["median"] for us in served], "o-", label=name)
    panel.set_xlabel("d")
    panel.set_ylim(bottom=0)
