"""Writes the figures of the README and of docs/benchmarks.md from bench/results: no number is typed by hand.

python -m bench.docs
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import report
from bench.gpu.output import markdown
from bench.prior_choice import NAMES, ORACLES, marked
from bench.table.draw import summaries
from laplace_lora_fast.demo.run import TEMPERATURE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
SIZES = "hidden-1024", "SmolLM2-135M"  # of the headline table


def headline() -> str:
    """The demo's scores in a few lines, for the README."""
    record = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    recipe, metrics = record["recipe"], record["metrics"]
    methods = list(next(iter(metrics.values())))
    lines = [
        f"| test NLL / ECE-15 | {' | '.join(data.split(',')[0] for data in metrics)} |",
        "|---" * (1 + len(metrics)) + "|",
    ]
    for method in methods:
        cells = [f"{m[method]['nll']:.3f} / {m[method]['ece']:.3f}" for m in metrics.values()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    count = next(iter(metrics.values()))[methods[0]]["count"]
    return "\n".join(
        [
            *lines,
            "",
            f"SmolLM2-135M, {recipe['n_train']} training examples seen {recipe['epochs']} times; temperature and "
            f"validated precision chosen on {recipe['n_val']} held-out examples; {count} test examples each, one "
            "seed, no error bars. Product reviews and tweets are out of distribution.",
        ]
    )


def demo() -> str:
    """The demo's table and where its time went."""
    record = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    recipe, phases = record["recipe"], record["phases"]
    origin = ""
    if record.get("commit"):  # older files name none
        origin = f"; {record['machine']}, commit {record['commit'][:12]}, {record['date']}"
    lines = [
        f"What the demo printed ({recipe['n_train']} training examples seen {recipe['epochs']} times, "
        f"{recipe['n_val']} held out to choose prior precision and temperature; {record['threads']} CPU threads, "
        f"{sum(phase['seconds'] for phase in phases.values()):.0f} s in all, the fit cost "
        f"{record['fit_cost_in_epochs']:.2f} training epochs{origin}; [all of it](results/demo.json)):",
        "",
        "| data | method | accuracy | ECE-15 | NLL | Brier |",
        "|---|---|---|---|---|---|",
    ]
    for data, methods in record["metrics"].items():
        for place, (method, m) in enumerate(methods.items()):
            name = f"{data} (n = {m['count']})" if place == 0 else ""
            cells = [f"{m[key]:.3f}" for key in ("accuracy", "ece", "nll", "brier")]
            lines.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
    scores = [
        list(methods.values()) for methods in record["metrics"].values()
    ]  # from MAP to the refitted model
    moved = ", ".join(f"{each[-1]['accuracy'] - each[0]['accuracy']:+.3f}" for each in scores)
    chosen = record["prior_precision"]
    lines += [
        "",
        f"Held-out likelihood chose prior precision {chosen['validated']:.3g}; for the refitted model and without "
        f"held-out data the evidence chose {chosen['evidence']:.3g}, and leaving out one training example at a time "
        f"{chosen['left_out']:.3g}, which moves the accuracy by {moved}. There are no error bars here.",
        "",
        "![reliability diagram](results/demo-reliability.png)",
    ]
    return "\n".join(lines)


def bench() -> str:
    """The newest benchmark's headline rows; the full table is linked."""
    newest = sorted(RESULTS.glob("*-cpu.json"))[-1]
    record = json.loads(newest.read_text(encoding="utf-8"))
    stem = f"results/{newest.stem}"
    measured = {row["size"] for row in record["rows"]}
    lines = [
        report.provenance(record),
        "",
        f"{report.LEGEND} A number in brackets says what a method computes differently: see below the table; "
        f"[all rows, sizes and errors]({stem}.md), [peak memory]({stem}-memory.png).",
        "",
        report.summary(record, [size for size in SIZES if size in measured]),
        "",
        f"![time over the bare passes]({stem}.png)",
    ]
    return "\n".join(lines)


def structures() -> str:
    """What each structure's variance is worth, at a glance; the full table is linked."""
    record = json.loads((RESULTS / "structures.json").read_text(encoding="utf-8"))
    regimes = record["regimes"]
    head = " | ".join(f"{title}: variance ratio, correlation, NLL" for title in regimes)
    lines = [
        "Variance of the logit contrast against the exact full-GGN Laplace's (median ratio and "
        "correlation at prior precision 1), and test NLL in / out of distribution with the validated prior precision, "
        "on the demo's model; [full table](results/structures.md).",
        "",
        f"| structure | {head} |",
        "|---" * (1 + len(regimes)) + "|",
    ]
    names = next(iter(regimes.values()))["structures"]
    lines += [
        f"| {name} | " + " | ".join(_structure(result, name) for result in regimes.values()) + " |"
        for name in names
    ]
    return "\n".join([*lines, "", _larger()])


def _larger() -> str:
    """The same with more training examples, where the sketch and the rows cost more."""
    record = json.loads((RESULTS / "structures-n400.json").read_text(encoding="utf-8"))
    (result,) = record["regimes"].values()
    rows, kfac = (result["structures"][name] for name in ("dual, m = 64", "KFAC reduce"))
    fit, predict = (rows[key] / kfac[key] for key in ("fit_cpu_seconds", "predict_cpu_seconds"))
    ratios = [structure["variance"][1]["median_ratio"] for structure in (rows, kfac)]
    return (
        f"With {record['setting']['n_train']} training examples ([table](results/structures-n400.md)) the variance "
        f"ratio of `Rows(columns=64)` is {ratios[0]:.2f}, KFAC's {ratios[1]:.2f}: more rows make the sketch show, more "
        f"`columns` reduce that. The rows cost {fit:.2f} times KFAC's fit and {predict:.2f} times its prediction."
    )


def prior_choice() -> str:
    """Test NLL in distribution under each choice of the prior precision; the full table is linked."""
    record = json.loads((RESULTS / "prior_choice.json").read_text(encoding="utf-8"))
    setting, regimes = record["setting"], record["regimes"]
    heads = [f"{title}, epoch {regime['epochs']}" for title, regime in regimes.items()]
    lines = [
        f"Test NLL in / out of distribution on the demo's model, means over {len(setting['seeds'])} seeds; \\* sees "
        f"{setting['n_val']} held-out examples, \\*\\* the test set; [full table](results/prior_choice.md), "
        "[every seed](results/prior_choice.png).",
        "",
        f"| mean, choice of prior precision | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for method in next(iter(regimes.values()))["mean"]:
        cells = [
            " / ".join(
                f"{scores['nll']:.3f}" for name, scores in regime["mean"][method].items() if name in NAMES
            )
            for regime in regimes.values()
        ]
        lines.append(f"| {marked(method)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _leave_one_out(record)])


def _leave_one_out(record: dict[str, Any]) -> str:
    """How often leaving one out has the least NLL, and what it loses where it has not."""
    name, setting, regimes = "refit, leave-one-out", record["setting"], record["regimes"]
    centred = [row for row in next(iter(regimes.values()))["mean"] if not row.startswith("refit")]
    rivals = [row for row in centred if row not in ORACLES]
    cells = [(regime["mean"], data) for regime in regimes.values() for data in NAMES]
    gaps = [mean[name][data]["nll"] - min(mean[row][data]["nll"] for row in rivals) for mean, data in cells]
    scaled = sum(mean[name][data]["nll"] < mean[TEMPERATURE][data]["nll"] for mean, data in cells)
    return (
        f"`{name}` has less NLL than everything that keeps the trained model in the centre in "
        f"{sum(gap < 0 for gap in gaps)} of {len(gaps)} cells, temperature scaling and validation included, and "
        f"at most {max(gaps):.3f} more; less than temperature scaling in {scaled}. "
        f"{len(setting['seeds'])} seeds and {setting['n_test']} test examples are few: there are no error bars here, "
        "and small differences may be chance."
    )


def table() -> str:
    """Methods beside temperature scaling; the full table is linked."""
    return f"{summaries(RESULTS / 'table')}\n\n[Every length of training](results/table.md), [plot](results/table.png)."


def gpu() -> str:
    """The tables of the newest GPU report."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*/gpu_report.json")]
    return markdown(max(reports, key=lambda report: str(report["environment"]["date"]))).strip()


def _structure(result: dict[str, Any], name: str) -> str:
    row, tests = result["structures"][name], result["baselines"]["MAP"]
    ratio = row["variance"][1]
    nll = " / ".join(f"{row[test]['validation']['nll']:.3f}" for test in tests)
    return f"{ratio['median_ratio']:.2f}, {ratio['correlation']:.3f}, {nll}"


# File -> block -> the results it needs, and what writes it.
BLOCKS: dict[str, dict[str, tuple[str, Callable[[], str]]]] = {
    "README.md": {"headline": ("demo.json", headline)},
    "docs/benchmarks.md": {
        "demo": ("demo.json", demo),
        "bench": ("*-cpu.json", bench),
        "structures": ("structures.json", structures),
        "prior": ("prior_choice.json", prior_choice),
        "table": ("table/*.json", table),
        "gpu": ("*/gpu_report.json", gpu),
    },
}


def rendered(file: str) -> str:
    """A file's text with what stands between the markers of each block written anew, where its results exist."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for name, (needs, render) in BLOCKS[file].items():
        if list(RESULTS.glob(needs)):
            pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
            body = render()
            text = re.sub(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for file in BLOCKS:
        (ROOT / file).write_text(rendered(file), encoding="utf-8")
