"""Turns pytest-benchmark's JSON into bench/results/<date>-cpu.json, a Markdown table and a bar plot.

python -m bench.report benchmark.json [more.json ...]
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bayesian-lora", "laplace-torch", "curvlinops-for-pytorch")

Row = dict[str, Any]


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
        "rows": sorted(rows, key=lambda row: row["group"]),
    }


def markdown(record: dict[str, Any]) -> str:
    """The table, with what each peer computes differently below it."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    lines = [
        f"{record['cpu']}, {record['cores']} cores, {record['threads']} thread(s), clock {record['clock']}; "
        f"{versions}; commit {record['commit'][:12]}, {record['date']}. The floor is the bare forward and backward "
        "passes of the exact Fisher information (fit) or of the contrasts (predict, 8 sequences).",
        "",
        "| job | method | median s | floor s | ratio | peak MiB | floor's peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for row in record["rows"]:
        mark = ""
        if "note" in row:
            note = f"{row['note']}; check: {row['check']} = {row['check_value']:.3g}"
            notes.append(f"{len(notes) + 1}. {row['method']}, {row['group']}: {note}.")
            mark = f" ({len(notes)})"
        lines.append(
            f"| {row['group']} | {row['method']}{mark} | {row['median_s']:.3f} | {row['floor_s']:.3f} "
            f"| {row['ratio']:.2f} | {row['peak_mib']:.0f} | {row['floor_peak_mib']:.0f} |"
        )
    return "\n".join([*lines, "", *notes]) + "\n"


def plot(record: dict[str, Any], path: Path) -> None:
    """Time over the floor, a panel for each job, on a logarithmic scale."""
    groups = list(dict.fromkeys(row["group"] for row in record["rows"]))
    heights = [sum(row["group"] == group for row in record["rows"]) + 1 for group in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(7, 0.3 * sum(heights) + 1), height_ratios=heights, sharex=True, squeeze=False
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        rows = [row for row in record["rows"] if row["group"] == group][::-1]
        colours = ["tab:blue" if row["method"].startswith("this project") else "tab:grey" for row in rows]
        bars = axis.barh([row["method"] for row in rows], [row["ratio"] for row in rows], color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(group, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
    axes[-1, 0].set_xlabel("time / bare passes")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _row(entry: Row) -> Row:
    return {
        "group": entry["group"],
        "median_s": entry["stats"]["median"],
        "rounds": entry["stats"]["rounds"],
        **entry["extra_info"],
    }


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
    plot(record, RESULTS / f"{stem}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
