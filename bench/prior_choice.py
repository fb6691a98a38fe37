"""Which way to choose the prior precision: with held-out data and without, on the demo's real model.

    python -m bench.prior_choice --out bench/results

Trains the demo's adapter too briefly, about right and too long, with several seeds, and compares test NLL and ECE of
the exact GGN's posterior under priors chosen by the evidence, by held-out NLL and, for the refitted
linearised model, by leave-one-out, with the best prior precision there is on the grid (which looks at the test set).
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.structures import gaussians
from laplace_lora_fast import Answers, Evidence, HeldOut, LaplaceLoRA, LaplaceWarning, LeaveOneOut, Rows
from laplace_lora_fast.data.prompts import answer_token_ids, make_batches
from laplace_lora_fast.demo import task
from laplace_lora_fast.evaluation.metrics import temperature_scale
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.model.lora import read_adapter
from laplace_lora_fast.prior.evidence import MarginalLikelihood
from laplace_lora_fast.prior.grid import DEFAULT_GRID
from laplace_lora_fast.prior.precision import group_keys
from laplace_lora_fast.weights import matrices

REGIMES = {"under-trained": 1, "well-trained": 2, "over-trained": 6}  # epochs
NAMES = (task.IN_DISTRIBUTION, task.OUT_OF_DISTRIBUTION[0])
HELD_OUT = ("MAP + temperature", "validation", "refit, validation")
ORACLES = ("best on the grid", "refit, best on the grid")
COLUMNS = 128

Loader = list[dict[str, Tensor]]
Row = dict[str, Any]


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """NLL and ECE."""
    metrics = Predictions(probs, labels).metrics()
    return {"nll": metrics.nll, "ece": metrics.ece}


def posterior_rows(
    la: LaplaceLoRA, chosen: Mapping[str, Any], tests: Mapping[str, Loader], prefix: str
) -> dict[str, Row]:
    """Scores under each chosen prior precision, and under the grid's best for the first test set."""
    tried = [*chosen.values(), *DEFAULT_GRID]
    rows: dict[str, Row] = {prefix + name: {"prior_precision": value} for name, value in chosen.items()}
    best = rows[prefix + "best on the grid"] = {}
    for name, loader in tests.items():
        block = gaussians(la, loader, tried)
        probs, labels = (
            la.likelihood.answer(block.mean, block.cov, "probit", 1, torch.Generator()),
            block.targets,
        )
        assert labels is not None
        for row, p in zip(rows.values(), probs, strict=False):
            if row is not best:
                row[name] = scores(p, labels)
        if not best:
            nll = -probs[len(chosen) :, torch.arange(len(labels)), labels].double().log().mean(1)
            index = int(nll.argmin())
            best["prior_precision"] = DEFAULT_GRID[index]
        best[name] = scores(probs[len(chosen) + index], labels)
    return rows


def plain_rows(la: LaplaceLoRA, val: Loader, tests: Mapping[str, Loader]) -> dict[str, Row]:
    """The trained model, and with a temperature from the held-out examples."""

    def log_probs(loader: Loader) -> tuple[Tensor, Tensor]:
        found = la.predictions(loader, link_approx="map", progress=False)
        assert isinstance(found, Predictions)
        return found.probs.log(), found.known_labels

    temperature = temperature_scale(*log_probs(val))
    found = {name: log_probs(loader) for name, loader in tests.items()}
    return {
        "MAP": {name: scores(p.exp(), labels) for name, (p, labels) in found.items()},
        "MAP + temperature": {
            name: scores((p / temperature).softmax(1), labels) for name, (p, labels) in found.items()
        },
    }


def measure(recipe: task.Recipe) -> tuple[dict[str, Row], float]:
    """Trains one adapter, scores every choice on it; and its last training loss."""
    model, tokenizer = task.load_model()
    model = task.add_adapter(model, recipe)
    start = {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" in name}
    rows, val_rows = task.split(recipe)
    answers = answer_token_ids(tokenizer, rows)
    train, val = (make_batches(tokenizer, each, recipe.batch_size) for each in (rows, val_rows))
    tests = {
        name: make_batches(tokenizer, task.load_examples(f"{name}.test")[: recipe.n_test], recipe.batch_size)
        for name in NAMES
    }
    loss = task.fine_tune(model, train, answers, recipe)[-1].loss

    def fitted(refit: bool) -> LaplaceLoRA:
        structure = Rows(columns=COLUMNS, refit=refit)
        la = LaplaceLoRA(model, Answers(answers), structure=structure, seed=recipe.seed)
        return la.fit(train, progress=False)

    la = fitted(refit=False)
    fit, centre = la.snapshot()[0], matrices(read_adapter(start, la.layers))
    centred, names = MarginalLikelihood(fit, centre, la.likelihood), fit.curvature.names
    chosen: dict[str, Any] = {
        "evidence": la.optimize_prior_precision(Evidence()),
        "evidence, centred": centred.maximise(group_keys("all", names), None)[""],
        "evidence, centred, A and B": centred.maximise(group_keys("side", names), None),
        "validation": la.optimize_prior_precision(HeldOut(val), progress=False),
    }
    found = plain_rows(la, val, tests) | posterior_rows(la, chosen, tests, "")
    refit = fitted(refit=True)
    chosen = {
        "evidence": refit.optimize_prior_precision(Evidence()),
        "leave-one-out": refit.optimize_prior_precision(LeaveOneOut(), progress=False),
        "validation": refit.optimize_prior_precision(HeldOut(val), progress=False),
    }
    return found | posterior_rows(refit, chosen, tests, "refit, "), loss


def mean_over_seeds(runs: list[dict[str, Row]]) -> dict[str, Row]:
    """Means of the scores; the smallest and largest prior precision."""
    summary: dict[str, Row] = {}
    for method in runs[0]:
        rows = [run[method] for run in runs]
        summary[method] = {
            name: {key: statistics.mean(row[name][key] for row in rows) for key in ("nll", "ece")}
            for name in NAMES
        }
        scalars = [row.get("prior_precision") for row in rows]
        if all(isinstance(value, float) for value in scalars):
            summary[method]["prior_precision"] = [min(scalars), max(scalars)]
    return summary


def marked(method: str) -> str:
    """The name, with stars where it sees held-out or test data."""
    return method + (" \\*" if method in HELD_OUT else " \\*\\*" if method in ORACLES else "")


def markdown(results: dict[str, Any]) -> str:
    """One table a regime, means over seeds."""
    setting, environment = results["setting"], results["environment"]
    lines = [
        "# How to choose the prior precision",
        "",
        f"SmolLM2-135M-Instruct, LoRA r = 8 on q, v; {setting['n_train']} training examples, two classes, "
        f"{setting['n_val']} held out, {setting['n_test']} test examples in and out of distribution; exact GGN, rows "
        f"of {setting['columns']} columns; means over seeds {', '.join(map(str, setting['seeds']))}. "
        "NLL and ECE in / out of distribution. "
        f"{environment['machine']}, {environment['threads']} threads, "
        f"torch {environment['versions']['torch']}, transformers {environment['versions']['transformers']}. "
        "`refit`: the mean is the linearised model's own optimum under the prior (`Rows(refit=True)`). Rows marked * "
        "see held-out examples, rows marked ** the test set.",
    ]
    for title, regime in results["regimes"].items():
        losses = ", ".join(f"{loss:.4f}" for loss in regime["train_loss"])
        lines += [
            "",
            f"## {title}: {regime['epochs']} epochs, training loss {losses}; commit "
            f"{regime['commit']}, {regime['date']}",
            "",
            "| choice | prior precision | NLL | ECE |",
            "|---|---|---|---|",
        ]
        for method, row in regime["mean"].items():
            span = row.get("prior_precision")
            where = "" if span is None else " to ".join(dict.fromkeys(f"{value:.3g}" for value in span))
            cells = [" / ".join(f"{row[name][key]:.3f}" for name in NAMES) for key in ("nll", "ece")]
            lines.append(f"| {marked(method)} | {where} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """NLL in distribution of every choice and seed, a panel for each regime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    regimes = results["regimes"]
    figure, axes = plt.subplots(1, len(regimes), figsize=(12, 4.2), sharey=True, squeeze=False)
    for axis, (title, regime) in zip(axes[0], regimes.items(), strict=True):
        methods = list(regime["mean"])[::-1]
        for place, method in enumerate(methods):
            values = [run[method][NAMES[0]]["nll"] for run in regime["runs"]]
            colour = "tab:blue" if method.startswith("refit") else "tab:grey"
            axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.7)
        axis.set(yticks=range(len(methods)), yticklabels=methods, xlabel="test NLL", title=title)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Runs all regimes and seeds and writes prior_choice.json, .md and .png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--tests", type=int, default=150, help="test examples of each data set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=task.Recipe.n_train)
    parser.add_argument(
        "--regimes", nargs="+", default=list(REGIMES), choices=REGIMES, help="others are kept"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", LaplaceWarning)  # the grid's edge is an answer here: no prior uncertainty
    recipe = replace(task.Recipe(), n_test=arguments.tests, n_train=arguments.train)
    setting = {
        "n_train": recipe.n_train,
        "n_val": recipe.n_val,
        "n_test": recipe.n_test,
        "seeds": arguments.seeds,
        "columns": COLUMNS,
    }
    environment = provenance(("torch", "transformers", "peft"))
    origin = {key: environment.pop(key) for key in ("commit", "date")}  # of a regime: others may be older
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "prior_choice.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    same = kept.get("setting") == setting and kept.get("environment") == environment
    found: dict[str, Any] = kept["regimes"] if same else {}
    for title in arguments.regimes:
        epochs = REGIMES[title]
        measured = [measure(replace(recipe, epochs=epochs, seed=seed)) for seed in arguments.seeds]
        runs = [rows for rows, _ in measured]
        found[title] = {
            **origin,
            "epochs": epochs,
            "train_loss": [loss for _, loss in measured],
            "mean": mean_over_seeds(runs),
            "runs": runs,
        }
        regimes = {title: found[title] for title in REGIMES if title in found}
        results = {"environment": environment, "setting": setting, "regimes": regimes}
        file.write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "prior_choice.md").write_text(markdown(results))
        plot(results, arguments.out / "prior_choice.png")
        print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
