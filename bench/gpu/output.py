"""The report's numbers as a Markdown table and as plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Report = dict[str, Any]


def markdown(report: Report) -> str:
    """Tables of all measurements, under the line that says where they come from."""
    lines = [f"# {'Dry run, not a measurement' if report['dry'] else 'GPU report'}", ""]
    lines += [f"{name}: {value}  " for name, value in report["environment"].items()]
    lines += ["", *_verdicts(report)]
    if "smoke" in report:
        lines += ["", *_smoke(report["smoke"])]
    if "fits" in report:
        lines += ["", *_fits(report["fits"])]
    if "ops" in report:
        lines += ["", *_ops(report["ops"])]
    if "models" in report:
        lines += ["", *_models(report["models"])]
    return "\n".join(lines) + "\n"


def _verdicts(report: Report) -> list[str]:
    lines = [f"{report['build']}  "] if "build" in report else []
    if "tests" in report:
        tests = report["tests"]
        state = "" if tests["finished"] else ", stopped before the end"
        lines.append(f"tests/gpu: {tests['passed']} passed, {len(tests['failed'])} failed{state}  ")
    lines += [f"{name} is not measured: {why}  " for name, why in report.get("refused", {}).items()]
    named = {"profile": "ncu", "sanitize": "compute-sanitizer"}
    return lines + [f"{name}: {report[part]}  " for part, name in named.items() if part in report]


def _smoke(records: list[Report]) -> list[str]:
    """Whether each op is right, by whom."""
    lines = [
        "| op | d | T | backend | right | largest error | first call, s |",
        "|---|---:|---:|---|---|---:|---:|",
    ]
    for record in records:
        where = f"| {record['op']} | {record['d']} | {record['T'] or ''} | {record.get('backend', '')} "
        if what := _missing(record):
            lines.append(f"{where}| {what} | | |")
        else:
            right = "yes" if record["right"] else "NO"
            lines.append(f"{where}| {right} | {record['error']:.1e} | {record['seconds']:.2f} |")
    return lines


def _fits(records: list[Report]) -> list[str]:
    """Cost of a batch of each fit, and over the bare passes before it; Python waits where host and GPU take as long."""
    lines = [
        "| model | LoRA on | batch | job | ms a batch (p20-p80) | over its passes | host ms | busy ms | kernels "
        "| end, s | peak GB |"
    ]
    lines += ["|---|---|---|---|---|---:|---:|---:|---:|---:|---:|"]
    bare = 0.0
    for record in records:
        where = f"| {record['model']} | {record['targets']} | {record.get('batch', '')} | {record.get('job', '')} "
        if what := _missing(record):
            lines.append(f"{where}| {what} | | | | | | |")
            continue
        ms = {name: record["seconds"][name] * 1e3 for name in ("median", "p20", "p80")}
        bare = ms["median"] if record["job"] == "bare passes" else bare
        over = f"{ms['median'] / bare - 1:+.1%}" if bare and record["job"] != "bare passes" else ""
        busy = f"{record['busy_seconds'] * 1e3:.1f}" if "busy_seconds" in record else ""
        peak = f"{record['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in record else ""
        lines.append(
            f"{where}| {ms['median']:.1f} ({ms['p20']:.1f}-{ms['p80']:.1f}) | {over} "
            f"| {record['host_seconds']['median'] * 1e3:.1f} | {busy} | {record.get('kernels', '')} "
            f"| {record['end_seconds']:.2f} | {peak} |"
        )
    return lines


def _ops(cases: list[Report]) -> list[str]:
    """Speed of each op. The product and the copy are what this machine reaches at most."""
    lines = ["| op | d | T | variant | microseconds (p20-p80) | over baseline | TFLOP/s | executed | GB/s |"]
    lines += ["|---|---:|---:|---|---|---:|---:|---:|---:|"]
    for case in cases:
        where = f"| {case['op']} | {case['d']} | {case['T'] or ''} "
        if (what := _missing(case)) or not case["microseconds"]:
            lines.append(f"{where}| | {what} | | | | |")
            continue
        baseline = case["microseconds"].get("baseline", {}).get("median", float("nan"))
        for name, spread in case["microseconds"].items():
            us, executed = spread["median"], case["executed_gflop"] if name == "triton" else None
            lines.append(
                f"{where}| {name} | {us:.1f} ({spread['p20']:.1f}-{spread['p80']:.1f}) | {baseline / us:.2f} "
                f"| {case['gflop'] / us * 1e3:.4g} | {f'{executed / us * 1e3:.4g}' if executed else ''} "
                f"| {case['megabytes'] / us * 1e3:.4g} |"
            )
        lines += [f"{where}| {name} | {_cell(error)} | | | | |" for name, error in case["failed"].items()]
    return lines


def _models(records: list[Report]) -> list[str]:
    """Cost of each job, over the model's own passes on the same batches."""
    lines = ["| model | LoRA on | job | backend | tokens a batch | ms a batch (p20-p80) | over its passes |"]
    lines += ["|---|---|---|---|---:|---|---:|"]
    for record in records:
        where = f"| {record['model']} | {record['targets']} | {record.get('job', '')} | {record.get('backend', '')} "
        if what := _missing(record):
            lines.append(f"{where}| | {what} | |")
            continue
        ms = {name: record["seconds"][name] * 1e3 for name in ("median", "p20", "p80")}
        over = ""
        if "passes" in record:
            over = f"{record['seconds']['median'] / record['passes_seconds'] - 1:+.1%} {record['passes']}"
        lines.append(
            f"{where}| {record['tokens']} | {ms['median']:.1f} ({ms['p20']:.1f}-{ms['p80']:.1f}) | {over} |"
        )
    return lines


def _missing(record: Report) -> str:
    """Why a record has no numbers; empty where it has them."""
    for what in ("skipped", "failed"):
        if isinstance(record.get(what), str):
            return f"{what}: {_cell(record[what])}"
    return ""


def _cell(text: str) -> str:
    return text.replace("|", "/")


def plot(report: Report, path: Path) -> None:
    """Speed over the baseline against d: a row of panels for each op, a panel for each T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [case for case in report.get("ops", []) if "baseline" in case.get("microseconds", {})]
    cases = [case for case in timed if len(case["microseconds"]) > 1]
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
