"""Turns pytest-benchmark's JSON into bench/results/<date>-cpu.json, a Markdown table and bar plots.

python -m bench.report benchmark.json [more.json ...]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from bench.models import ABOUT, BATCH_SIZE, RANK

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bayesian-lora",
    "laplace-torch",
    "curvlinops-for-pytorch",
    "asdfghjkl",
    "kronfluence",
)

Row = dict[str, Any]
JOBS = ("fit", "fit, one label", "predict", "Jacobian", "evidence", "prior precision")
HEADINGS = ("s", "/ floor", "/ fastest peer", "peak MiB")


def collect(files: list[Path]) -> dict[str, Any]:
    """One record of a run: where it ran, on what, and a row per benchmark."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    machine, commit = runs[0]["machine_info"], runs[0]["commit_info"]
    rows = [_row(entry) for run in runs for entry in run["benchmarks"]]
    return {
        "date": runs[0]["datetime"][:10],
        "commit": commit["id"] + (" with changes" if commit["dirty"] else ""),
        "cpu": machine["cpu"].get("brand_raw"),
        "cores": machine["cpu"].get("count"),
        "threads": rows[0]["threads"],
        "clock": runs[0]["benchmarks"][0]["options"]["timer"],
        "python": machine["python_version"],
        "versions": {name: _version(name) for name in PACKAGES},
        "rows": sorted(rows, key=lambda row: JOBS.index(row["job"])),
    }


def markdown(record: dict[str, Any]) -> str:
    """Every row of every size, the error against the oracle, and what is not exact about it."""
    head = [*HEADINGS, "floor's MiB", "error"]
    lines = [provenance(record), "", LEGEND, "", *_heading(["job", "size", "method", *head])]
    notes: list[str] = []
    for job, size, rows in _groups(record["rows"]):
        floor = _floor(rows)
        if floor:
            lines.append(_line([job, size, "*bare passes (floor)*", *_cells(floor, rows), "", ""]))
        for row in rows:
            cells = [*_cells(row, rows), _number(row.get("floor_peak_mib"), ".0f"), f"{row['error']:.1e}"]
            lines.append(_line([job, size, row["method"] + _mark(row, notes), *cells]))
    return "\n".join([*lines, "", *_numbered(notes)]) + "\n"


def summary(record: dict[str, Any], sizes: Sequence[str]) -> str:
    """A line for each job and headline method, side by side for the given sizes, and notes."""
    notes: list[str] = []
    lines = _heading(["job", "method", *(f"{size}: {head}" for size in sizes for head in HEADINGS)])
    for job in dict.fromkeys(row["job"] for row in record["rows"]):
        groups = [
            [row for row in record["rows"] if row["job"] == job and row["size"] == size] for size in sizes
        ]
        if all(_floor(rows) for rows in groups):
            cells = [cell for rows in groups for cell in _cells(_floor(rows), rows)]
            lines.append(_line([job, "*bare passes (floor)*", *cells]))
        for method in dict.fromkeys(row["method"] for rows in groups for row in rows if row["headline"]):
            found = [next((row for row in rows if row["method"] == method), {}) for rows in groups]
            cells = [cell for row, rows in zip(found, groups, strict=True) for cell in _cells(row, rows)]
            noted = next((row for row in found if row.get("note")), {"note": ""})
            lines.append(_line([job, method + _mark(noted, notes), *cells]))
    return "\n".join([*lines, "", " ".join(f"({note})" for note in _numbered(notes))])


LEGEND = (
    f"{' '.join(f'{name}: {about}.' for name, about in ABOUT.items())} "
    f"LoRA r = {RANK} on q_proj and v_proj, batches of {BATCH_SIZE}.\n\n"
    "The floor is the bare forward and backward passes that a job takes: of the exact Fisher information, of one "
    "label, or, for 8 sequences, of the contrasts or the logits. No method that computes the job can be faster, so the "
    "floor's line says what there is to gain over the fastest peer. Errors are relative, against an oracle that takes "
    "one unpadded example at a time and plain autograd. The allocator keeps freed memory, so that page faults, which "
    "come and go by accident, are in no time. Seconds and ratios are each the median over rounds in which method and "
    "floor run side by side, so that a ratio is not exactly that of the seconds beside it."
)


def provenance(record: dict[str, Any]) -> str:
    """Machine, versions, commit, date."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    return (
        f"{record['cpu']}, {record['cores']} cores, {record['threads']} thread(s), clock {record['clock']}; "
        f"{versions}; commit {record['commit'][:12]}, {record['date']}."
    )


def plot(record: dict[str, Any], value: str, base: str, label: str, path: Path) -> None:
    """Bars of value / base: a row of panels for each job, a column for each size, on logarithmic scales."""
    rows = [row for row in record["rows"] if base in row]
    jobs, sizes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("job", "size"))
    methods = {
        job: list(dict.fromkeys(row["method"] for row in rows if row["job"] == job))[::-1] for job in jobs
    }
    figure, axes = plt.subplots(
        len(jobs),
        len(sizes),
        figsize=(4 + 2.4 * len(sizes), 0.25 * sum(len(names) + 2 for names in methods.values())),
        height_ratios=[len(methods[job]) + 1 for job in jobs],
        sharex="col",
        sharey="row",
        squeeze=False,
    )
    for axis, (job, size) in zip(axes.flat, ((job, size) for job in jobs for size in sizes), strict=True):
        shown = {row["method"]: row for row in rows if row["job"] == job and row["size"] == size}
        heights = [shown[name][value] / shown[name][base] if name in shown else 0 for name in methods[job]]
        colours = ["tab:blue" if name.startswith("this project") else "tab:grey" for name in methods[job]]
        bars = axis.barh(methods[job], heights, color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(f"{job}, {size}", fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.margins(x=0.25)
    for axis in axes[-1]:
        axis.set_xlabel(label, fontsize=8)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _mark(row: Row, notes: list[str]) -> str:
    """The number of a row's note, which joins `notes` if it is new; empty without one."""
    if not row["note"]:
        return ""
    if row["note"] not in notes:
        notes.append(row["note"])
    return f" ({notes.index(row['note']) + 1})"


def _numbered(notes: list[str]) -> list[str]:
    return [f"{number}. {note}." for number, note in enumerate(notes, 1)]


def _groups(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    for job, size in dict.fromkeys((row["job"], row["size"]) for row in rows):
        yield job, size, [row for row in rows if (row["job"], row["size"]) == (job, size)]


def _floor(rows: list[Row]) -> Row:
    """The floor as a row of its own; empty where the job has none."""
    times = [row["floor_s"] for row in rows if "floor_s" in row]
    if not times:
        return {}
    return {"median_s": statistics.median(times), "ratio": 1.0, "peak_mib": rows[0]["floor_peak_mib"]}


def _cells(row: Row, group: list[Row]) -> list[str]:
    """Under `HEADINGS`; peers are compared by their ratios to the floor, each timed side by side with it."""
    scale = "ratio" if all("ratio" in other for other in group) else "median_s"
    fastest = min((other[scale] for other in group if other["peer"]), default=None)
    share = row[scale] / fastest if row and fastest else None
    return [
        _number(row.get("median_s"), ".3g"),
        _number(row.get("ratio"), ".2f"),
        _number(share, ".2g"),
        _number(row.get("peak_mib"), ".1f" if row.get("peak_mib", 0) < 10 else ".0f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _heading(names: Sequence[str]) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _row(entry: Row) -> Row:
    return {"median_s": entry["stats"]["median"], "rounds": entry["stats"]["rounds"], **entry["extra_info"]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(files: list[str]) -> None:
    record = collect([Path(file) for file in files])
    RESULTS.mkdir(exist_ok=True)
    stem = f"{record['date']}-cpu"
    (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text(markdown(record), encoding="utf-8")
    plot(record, "median_s", "floor_s", "time / bare passes", RESULTS / f"{stem}.png")
    plot(record, "peak_mib", "floor_peak_mib", "peak memory / bare passes'", RESULTS / f"{stem}-memory.png")


if __name__ == "__main__":
    main(sys.argv[1:])
