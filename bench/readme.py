"""Writes the README's figures from the files in bench/results, so that no number is typed by hand.

python -m bench.readme
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
from laplace_lora_fast.demo.run import MAP, REFIT, TEMPERATURE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
SIZES = "hidden-1024", "SmolLM2-135M"  # in the README


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
        f"{record['fit_cost_in_epochs']:.2f} training epochs{origin}; [results.json](bench/results/demo.json)):",
        "",
        "| data | method | accuracy | ECE-15 | NLL | Brier |",
        "|---|---|---|---|---|---|",
    ]
    for data, methods in record["metrics"].items():
        for place, (method, m) in enumerate(methods.items()):
            name = f"{data} (n = {m['count']})" if place == 0 else ""
            cells = [f"{m[key]:.3f}" for key in ("accuracy", "ece", "nll", "brier")]
            lines.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
    moved = ", ".join(
        f"{methods[REFIT]['accuracy'] - methods[MAP]['accuracy']:+.3f}"
        for methods in record["metrics"].values()
    )
    chosen = record["prior_precision"]
    lines += [
        "",
        f"Held-out likelihood chose prior precision {chosen['validated']:.3g}, the evidence {chosen['evidence']:.3g}; "
        f"leaving out one training example at a time {chosen['left_out']:.3g}, for the refitted model and without "
        f"held-out data, which moves the accuracy by {moved}. There are no error bars here.",
        "",
        "![reliability diagram](bench/results/demo-reliability.png)",
    ]
    return "\n".join(lines)


def bench() -> str:
    """The newest benchmark's headline rows; the full table is linked."""
    newest = sorted(RESULTS.glob("*-cpu.json"))[-1]
    record = json.loads(newest.read_text(encoding="utf-8"))
    stem = newest.with_suffix("").relative_to(ROOT)
    measured = {row["size"] for row in record["rows"]}
    lines = [
        "## Speed",
        "",
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
        "**Which structure?** Variance of the logit contrast against the exact full-GGN Laplace's (median ratio and "
        "correlation at prior precision 1), and test NLL in / out of distribution with the validated prior precision, "
        "on the demo's model; [full table](bench/results/structures.md).",
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
    dual, kfac = (result["structures"][name] for name in ("dual, m = 64", "KFAC reduce"))
    fit, predict = (dual[key] / kfac[key] for key in ("fit_cpu_seconds", "predict_cpu_seconds"))
    ratios = [row["variance"][1]["median_ratio"] for row in (dual, kfac)]
    return (
        f"With {record['setting']['n_train']} training examples ([table](bench/results/structures-n400.md)) the dual's "
        f"variance ratio at m = 64 is {ratios[0]:.2f} (KFAC's {ratios[1]:.2f}): more rows make the sketch show, "
        f"`row_sketch_size` reduces it. It costs {fit:.2f} times KFAC's fit and {predict:.2f} times its prediction."
    )


def prior_choice() -> str:
    """Test NLL in distribution under each choice of the prior precision; the full table is linked."""
    record = json.loads((RESULTS / "prior_choice.json").read_text(encoding="utf-8"))
    setting, regimes = record["setting"], record["regimes"]
    heads = [f"{title}, epoch {regime['epochs']}" for title, regime in regimes.items()]
    lines = [
        f"Test NLL in / out of distribution on the demo's model, means over {len(setting['seeds'])} seeds; \\* sees "
        f"{setting['n_val']} held-out examples, \\*\\* the test set; [full table](bench/results/prior_choice.md), "
        "[every seed](bench/results/prior_choice.png).",
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


def gpu() -> str:
    """The tables of the newest GPU report."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*/gpu_report.json")]
    return markdown(max(reports, key=lambda report: str(report["environment"]["date"]))).strip()


def _structure(result: dict[str, Any], name: str) -> str:
    row, tests = result["structures"][name], result["baselines"]["MAP"]
    ratio = row["variance"][1]
    nll = " / ".join(f"{row[test]['validation']['nll']:.3f}" for test in tests)
    return f"{ratio['median_ratio']:.2f}, {ratio['correlation']:.3f}, {nll}"


def main() -> None:
    """Replaces what stands between the markers of each block whose results exist."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    blocks: dict[str, tuple[str, Callable[[], str]]] = {
        "demo": ("demo.json", demo),
        "bench": ("*-cpu.json", bench),
        "structures": ("structures.json", structures),
        "prior": ("prior_choice.json", prior_choice),
        "gpu": ("*/gpu_report.json", gpu),
    }
    for name, (needs, render) in blocks.items():
        if list(RESULTS.glob(needs)):
            pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
            body = render()
            text = re.sub(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.S)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
