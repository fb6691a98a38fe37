"""The table as Markdown and a plot, from the files of its cells: `python -m bench.table.run --draw`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast.evaluation.intervals import Interval, of_means
from laplace_lora_fast.evaluation.predictions import Predictions

RIVALS = ("temperature, held-out", "temperature, cross-fitted")
SEES_HELD_OUT = ("held-out", "training-free")
_ZERO = Interval(0.0, 0.0, 0.0)


def losses(cell: dict[str, Any], method: str, test: str) -> Tensor | None:
    """-log probability of every label, fp64 [n]; None for a method that the cell does not have."""
    odds = cell["methods"].get(method, {}).get("log_odds", {}).get(test)
    if odds is None:
        return None
    signs = 2 * torch.tensor(cell["labels"][test], dtype=torch.float64) - 1
    return torch.nn.functional.softplus(-signs * torch.tensor(odds, dtype=torch.float64))


def difference(cells: Sequence[dict[str, Any]], method: str, rival: str, *tests: str) -> Interval | None:
    """NLL of a method minus a rival's, over test sets and the cells that have both."""
    pairs = [[(losses(cell, method, test), losses(cell, rival, test)) for test in tests] for cell in cells]
    found = [
        torch.cat([a - b for a, b in some if a is not None and b is not None])
        for some in pairs
        if all(a is not None and b is not None for a, b in some)
    ]
    return of_means(found) if found and method != rival else None


def predictions(cell: dict[str, Any], method: str, test: str) -> Predictions:
    """The method's probabilities and the labels."""
    second = torch.tensor(cell["methods"][method]["log_odds"][test], dtype=torch.float64).sigmoid()
    return Predictions(torch.stack([1 - second, second], 1), torch.tensor(cell["labels"][test]))


def draw(folder: Path) -> None:
    """Writes `folder`.md and `folder`.png, a section for every model and regime."""
    sections = _sections(folder)
    lines = [
        "# The table",
        "",
        "Written by `python -m bench.table.run --draw` from the files in `table/`. NLL on each test set: mean over "
        "seeds; behind it the difference to temperature scaling with held-out examples, and to temperature scaling by "
        "cross-fitting, with 95 % intervals (1,000 bootstrap draws of seeds and test examples, paired). Intervals "
        "of one seed say nothing about other trainings. Methods marked * see held-out examples. Models without a fold "
        "take as many steps of training as the model.",
    ]
    lines += ["", summaries(folder)]
    for (model, regime), some in sections.items():
        lines += ["", *_section(model, regime, some)]
    (folder.parent / f"{folder.name}.md").write_text("\n".join(lines) + "\n")
    if sections:
        _plot(sections, folder.parent / f"{folder.name}.png")


def summaries(folder: Path) -> str:
    """For each model every method beside held-out temperature scaling, over all trainings."""
    sections = _sections(folder)
    models = dict.fromkeys(model for model, _ in sections)
    parts = [
        _summary(model, [some for (whose, _), some in sections.items() if whose == model]) for model in models
    ]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _sections(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The cells of every model and regime."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        cell = json.loads(file.read_text())
        found.setdefault((cell["cell"]["model"], cell["cell"]["regime"]), []).append(cell)
    return found


def _summary(model: str, sections: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    cells = [cell for some in sections for cell in some]
    first, *others = cells[0]["labels"]
    lines = [
        f"{model}, {len(cells)} trainings: NLL minus that of temperature scaling with held-out examples, in "
        f"distribution ({first}), out of it ({', '.join(others)}), and the worst mean over seeds of a length of "
        "training and a test set; 95 % intervals, paired. \\* sees held-out examples too. What fewer trainings are "
        "behind is not to be compared with the rest.",
        "",
        "| method | trainings | in distribution | out of distribution | worst |",
        "|---|---|---|---|---|",
    ]
    for method in _methods(cells):
        found = [difference(some, method, RIVALS[0], test) for some in sections for test in (first, *others)]
        inside, outside = (difference(cells, method, RIVALS[0], *some) for some in ([first], others))
        if inside is None or outside is None:
            continue
        worst = max(each.value for each in found if each)
        count = sum("log_odds" in cell["methods"].get(method, {}) for cell in cells)
        scores = f"{_signed(inside)} | {_signed(outside)} | {worst:+.3f}"
        lines.append(f"| {method}{_star(method)} | {count} | {scores} |")
    return lines


def _section(model: str, regime: str, cells: list[dict[str, Any]]) -> list[str]:
    setting, tests = cells[0]["setting"], list(cells[0]["labels"])
    seeds = ", ".join(str(cell["cell"]["seed"]) for cell in cells)
    lines = [
        f"## {model}, {regime}: {cells[0]['cell']['epochs']} epochs",
        "",
        f"{setting['train']} training, {setting['held_out']} held-out, {setting['test']} test examples a set; seeds "
        f"{seeds}.",
        "",
        f"| method | prior precision | {' | '.join(f'{test}: NLL' for test in tests)} | accuracy | ECE |",
        f"|---|---|{'---|' * len(tests)}---|---|",
    ]
    for method in _methods(cells):
        having = [cell for cell in cells if "log_odds" in cell["methods"].get(method, {})]
        if not having:
            continue
        spans = [cell["methods"][method].get("prior_precision") for cell in having]
        numbers = [span for span in spans if isinstance(span, float)]
        where = "" if not numbers else f"{min(numbers):.3g} to {max(numbers):.3g}"
        row = [method + _star(method), where]
        for test in tests:
            mean = torch.stack([losses(cell, method, test).mean() for cell in having]).mean()  # type: ignore[union-attr]
            apart = [difference(having, method, rival, test) for rival in RIVALS]
            row.append(" ".join([f"{float(mean):.3f}", *(f"({_signed(each)})" for each in apart if each)]))
        scores = [predictions(cell, method, tests[0]).metrics() for cell in having]
        row += [f"{sum(getattr(s, key) for s in scores) / len(scores):.3f}" for key in ("accuracy", "ece")]
        lines.append(f"| {' | '.join(row)} |")
    left = {
        method: facts["left_out"]
        for cell in cells
        for method, facts in cell["methods"].items()
        if "left_out" in facts
    }
    return lines + ([""] if left else []) + [f"Left out, {method}: {why}" for method, why in left.items()]


def _star(method: str) -> str:
    return " \\*" if any(word in method for word in SEES_HELD_OUT) else ""


def _signed(value: Interval) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def _methods(cells: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(method for cell in cells for method in cell["methods"]))


def _plot(sections: dict[tuple[str, str], list[dict[str, Any]]], path: Path) -> None:
    """Differences in NLL to held-out temperature scaling, a row of panels a section, a panel a test set."""
    from matplotlib.figure import Figure

    tests = list(next(iter(sections.values()))[0]["labels"])
    figure = Figure(figsize=(4.2 * len(tests), 3.6 * len(sections)), layout="constrained")
    axes = figure.subplots(len(sections), len(tests), squeeze=False, sharey="row")
    for line, ((model, regime), cells) in zip(axes, sections.items(), strict=True):
        methods = [m for m in _methods(cells) if m != RIVALS[0] and difference(cells, m, RIVALS[0], tests[0])]
        for ax, test in zip(line, tests, strict=True):
            for place, method in enumerate(reversed(methods)):
                found = difference(cells, method, RIVALS[0], test) or _ZERO
                ax.plot([found.low, found.high], [place, place], color="#0072B2")
                ax.plot(found.value, place, "o", color="#0072B2")
            ax.axvline(0, color="#5F5F5F", linestyle="--", linewidth=1)
            ax.set(yticks=range(len(methods)), yticklabels=methods[::-1], title=f"{model}, {regime}: {test}")
            ax.set_xlabel("NLL minus that of temperature scaling, 95 % interval")
    figure.savefig(path, dpi=120)
