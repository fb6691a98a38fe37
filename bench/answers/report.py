"""Tables of what the seeds' files hold: means over seeds, and differences to a temperature with their intervals."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.answers.compare import MAP, TEMPERATURE
from laplace_lora_fast.evaluation.intervals import RESAMPLES, Interval, of_means
from laplace_lora_fast.evaluation.metrics import bin_of
from laplace_lora_fast.evaluation.predictions import Predictions

Run = dict[str, Any]
CHANCE, BEST = "chance", "the best there is"
BOUNDS = {"mean": 0.0, "lower bound, k = 1": 1.0}
RULES = (*BOUNDS, CHANCE, BEST)
TITLES = {"options": "Options of ARC-Easy", "rewards": "Rewards from pairs of movie reviews"}


def draw(out: Path) -> None:
    """Writes answers-options and answers-rewards, .json and .md, from the files of `out`/answers."""
    for what, title in TITLES.items():
        files = sorted((out / "answers").glob(f"{what}.*.json"))
        runs = [json.loads(file.read_text()) for file in files]
        if not runs:
            continue
        models = {model: [run for run in runs if run["model"] == model] for model in _models(runs)}
        found = {model: summary(some) for model, some in models.items()}
        stem = out / f"answers-{what}"
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        parts = [markdown(what, model, models[model], found[model]) for model in models]
        stem.with_suffix(".md").write_text("\n".join([f"# {title}", "", *parts]))


def _models(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run["model"] for run in reversed(runs)))


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """For each test set and method: scores, and differences to the temperature."""
    found: dict[str, Any] = {"seeds": [run["seed"] for run in runs], "tests": {}}
    for name in runs[0]["probs"]:
        sets = {
            method: [
                Predictions(torch.tensor(run["probs"][name][method]), torch.tensor(run["labels"][name]))
                for run in runs
            ]
            for method in runs[0]["probs"][name]
        }
        found["tests"][name] = {method: _scores(sets, method) for method in sets}
    found["chosen"] = {method: [run["chosen"][method] for run in runs] for method in runs[0]["chosen"]}
    found["loss"] = [run["loss"] for run in runs]
    if "picked" in runs[0]:
        found["picked"] = {
            posterior: {name: _picked([run["picked"][posterior][name] for run in runs]) for name in tests}
            for posterior, tests in runs[0]["picked"].items()
        }
    return found


def _scores(sets: dict[str, list[Predictions]], method: str) -> dict[str, Any]:
    own, scaled = sets[method], sets[TEMPERATURE]
    metrics = [each.metrics() for each in own]
    found: dict[str, Any] = {
        name: statistics.mean(getattr(each, name) for each in metrics)
        for name in ("accuracy", "nll", "ece", "brier")
    }
    found["nll_of_seeds"] = [each.nll for each in metrics]
    if method != TEMPERATURE:
        pairs = list(zip(own, scaled, strict=True))
        for name, of_example in EXAMPLES.items():
            found[f"{name}_difference"] = _ends(
                of_means([of_example(one) - of_example(other) for one, other in pairs])
            )
        found["ece_difference"] = _ends(ece_difference(pairs))
    return found


def _nll(predictions: Predictions) -> Tensor:
    return -predictions.probs.gather(1, predictions.known_labels[:, None])[:, 0].clamp_min(1e-300).log()


def _brier(predictions: Predictions) -> Tensor:
    hit = torch.nn.functional.one_hot(predictions.known_labels, predictions.probs.shape[1])
    return (predictions.probs - hit).square().sum(1)


EXAMPLES: dict[str, Callable[[Predictions], Tensor]] = {
    "nll": _nll,
    "brier": _brier,
    "accuracy": lambda predictions: predictions.correct.double(),
}


def ece_difference(pairs: Sequence[tuple[Predictions, Predictions]], resamples: int = RESAMPLES) -> Interval:
    """ECE of the first minus that of the second, mean over seeds; seeds, then examples, drawn with replacement."""
    generator = torch.Generator().manual_seed(0)

    listed = [[_binned(each) for each in pair] for pair in pairs]
    drawn = []
    for _ in range(resamples):
        seeds = torch.randint(len(listed), (len(listed),), generator=generator).tolist()
        found = []
        for pair in (listed[seed] for seed in seeds):
            count = len(pair[0][0])
            index = torch.randint(count, (count,), generator=generator)
            first, second = (_ece(bins[index], gaps[index]) for bins, gaps in pair)
            found.append(first - second)
        drawn.append(statistics.mean(found))
    low, high = torch.quantile(torch.tensor(drawn), torch.tensor([0.025, 0.975])).tolist()
    return Interval(statistics.mean(_ece(*first) - _ece(*second) for first, second in listed), low, high)


def _binned(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """The bin of each example's confidence, and by how much that is too large."""
    return bin_of(predictions.confidence), predictions.confidence - predictions.correct.double()


def _ece(bins: Tensor, gaps: Tensor) -> float:
    return float(torch.bincount(bins, gaps).abs().sum() / len(gaps))


def _picked(runs: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    """Mean rating of what each rule picks, and the lower bound's minus the mean's."""
    found: dict[str, Any] = {
        rule: statistics.mean(map(statistics.mean, (r[rule] for r in runs))) for rule in RULES
    }
    mean, bound = BOUNDS
    found["difference"] = _ends(of_means([torch.tensor(r[bound]) - torch.tensor(r[mean]) for r in runs]))
    return found


def _ends(found: Interval) -> list[float]:
    return [found.value, found.low, found.high]


def markdown(what: str, model: str, runs: Sequence[Run], found: dict[str, Any]) -> str:
    """One model's tables."""
    setting, environment = runs[0]["setting"], runs[0]["environment"]
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in setting.items())
    own = f"--arc FOLDER --model {model} " if what == "options" else ""
    seeds = " ".join(str(run["seed"]) for run in runs)
    seconds = {key: [run["cpu_seconds"][key] for run in runs] for key in runs[0]["cpu_seconds"]}
    lines = [
        f"## {model}",
        "",
        f"LoRA r = 8 on queries and values{_where(runs[0])}; {setting['train']} training, {setting['held_out']} "
        f"held-out and {setting['test']} test examples, {_counted(setting['epochs'], 'epoch')} at {setting['rate']:g}"
        f"{_short(setting)}; training loss {', '.join(f'{loss:.3f}' for loss in found['loss'])}. "
        f"{environment['machine']}, 1 thread, {environment['date']}; CPU seconds a seed: "
        f"{', '.join(f'{key} {statistics.mean(values):.0f}' for key, values in seconds.items())}.",
        f"Command: `python -m bench.answers {what} {own}{given} --seeds {seeds}`.",
        f"Brackets: 95 % paired bootstrap intervals, over {'seeds and ' if len(runs) > 1 else ''}examples, of the "
        f"difference to the temperature; {_counted(len(runs), 'seed')}.",
        "",
    ]
    for name, methods in found["tests"].items():
        lines += [
            f"### {name}, {len(runs[0]['labels'][name])} examples",
            "",
            *_table(methods, found["chosen"]),
            "",
        ]
    if "picked" in found:
        lines += _best_of(found["picked"])
    return "\n".join(lines).rstrip("\n") + "\n"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _where(run: Run) -> str:
    top = run["setting"].get("top")
    return f" of the last {top} of {run['layers']} layers" if top else ""


def _short(setting: Run) -> str:
    return (
        f"; questions of at most {setting['tokens']} tokens with all options" if "tokens" in setting else ""
    )


def _table(methods: dict[str, Any], chosen: dict[str, list[float]]) -> list[str]:
    lines = [
        "| | accuracy | - temperature's | NLL | - temperature's | ECE-15 | - temperature's | Brier | - temperature's | "
        "chosen |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, row in methods.items():
        cells = []
        for key in ("accuracy", "nll", "ece", "brier"):
            cells += [f"{row[key]:.3f}", _shown(row.get(f"{key}_difference"))]
        picked = "" if method == MAP else ", ".join(f"{value:.3g}" for value in chosen[method])
        lines.append(f"| {method} | {' | '.join(cells)} | {picked} |")
    return lines


def _shown(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:+.3f} [{ends[1]:+.3f}, {ends[2]:+.3f}]"


def _best_of(picked: dict[str, Any]) -> list[str]:
    lines = [
        "### Mean rating of the one that is picked of eight",
        "",
        f"| texts | posterior | {' | '.join(RULES)} | lower bound - mean |",
        "|---|---|" + "---|" * (len(RULES) + 1),
    ]
    for posterior, tests in picked.items():
        for name, rules in tests.items():
            cells = " | ".join(f"{rules[rule]:.3f}" for rule in RULES)
            lines.append(f"| {name} | {posterior} | {cells} | {_shown(rules['difference'])} |")
    return lines
