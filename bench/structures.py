"""Which structure of the curvature to use: variances, evidence, calibration, time and memory on the demo's real model.

    python bench/structures.py --out bench/results

Trains the demo's adapter too long and too briefly, fits every structure, and compares the variance of the logit
contrast with the exact full-GGN Laplace's (rows without a sketch), at fixed prior precisions and at each
structure's own optimum by the evidence and by held-out NLL.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laplace_lora_fast import EKFAC, KFAC, Answers, Diagonal, Evidence, HeldOut, LaplaceLoRA, Rows
from laplace_lora_fast.data.prompts import answer_token_ids, make_batches
from laplace_lora_fast.demo import task
from laplace_lora_fast.evaluation.metrics import temperature_scale
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.prediction import Block, distribution

REGIMES = {"over-trained": task.Recipe.epochs, "under-trained": 1}
FIXED = (0.1, 1.0, 10.0, 100.0)
STRUCTURES: dict[str, dict[str, Any]] = {
    "exact GGN": {"structure": Rows(columns=10**6)},
    "rows, m = 128": {"structure": Rows()},
    "rows, m = 64": {"structure": Rows(columns=64)},
    "rows, m = 16": {"structure": Rows(columns=16)},
    "EKFAC": {"structure": EKFAC()},
    "KFAC reduce": {"structure": KFAC(tokens="reduce")},
    "KFAC expand": {"structure": KFAC(tokens="expand")},
    "diagonal": {"structure": Diagonal()},
    "last layer": {"structure": Rows(), "layers": "last"},
}


@dataclass(frozen=True)
class Data:
    """Batches of every split."""

    train: list[dict[str, Tensor]]
    val: list[dict[str, Tensor]]
    tests: dict[str, list[dict[str, Tensor]]]


def gaussians(la: LaplaceLoRA, loader: list[dict[str, Tensor]], priors: Sequence[Any]) -> Block:
    """Of the logit contrasts under several priors, in one pass."""
    with la._linearised(1.0) as linearised:
        (block,) = distribution(linearised, la._priors(priors)[0], loader)
    return block


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """NLL, ECE and accuracy."""
    metrics = Predictions(probs, labels).metrics()
    return {"nll": metrics.nll, "ece": metrics.ece, "accuracy": metrics.accuracy}


def measure(la: LaplaceLoRA, data: Data) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One structure: its figures, and the contrast's variances [len(FIXED), N] on each test set."""
    start = time.process_time()
    la.fit(data.train, progress=False)
    fit_cpu_seconds = time.process_time() - start
    evidence = float(la.optimize_prior_precision(Evidence()))  # type: ignore[arg-type]
    row: dict[str, Any] = {
        "fit_cpu_seconds": fit_cpu_seconds,
        "megabytes": sum(t.numel() * t.element_size() for t in la.posterior.curvature.tensors().values())
        / 2**20,
        "log_marginal_likelihood": float(la.log_marginal_likelihood()),
        "prior_by_evidence": evidence,
    }
    validated = float(la.optimize_prior_precision(HeldOut(data.val), progress=False))  # type: ignore[arg-type]
    row["prior_by_validation"] = validated
    variances, row["predict_cpu_seconds"] = {}, 0.0
    for name, loader in data.tests.items():
        start = time.process_time()
        block = gaussians(la, loader, [*FIXED, evidence, validated])
        row["predict_cpu_seconds"] += time.process_time() - start
        variances[name] = block.cov[: len(FIXED), :, 0, 0]
        probs = la.likelihood.answer(block.mean, block.cov, "probit", 1, torch.Generator())
        labels = block.targets
        assert labels is not None
        row[name] = {"evidence": scores(probs[-2], labels), "validation": scores(probs[-1], labels)}
    return row, variances


def compare(variances: Tensor, exact: Tensor) -> list[dict[str, float]]:
    """Median ratio to the exact variance and correlation with it, for each fixed prior precision."""
    return [
        {
            "prior_precision": prior,
            "median_ratio": float((one / other).median()),
            "correlation": float(torch.corrcoef(torch.stack([one, other]))[0, 1]),
        }
        for prior, one, other in zip(FIXED, variances, exact, strict=True)
    ]


def baselines(la: LaplaceLoRA, data: Data) -> dict[str, Any]:
    """The plain model, and the plain model with a temperature fitted on the validation split."""

    def log_probs(loader: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        found = la.predictions(loader, link_approx="map", progress=False)
        assert isinstance(found, Predictions)
        return found.probs.log(), found.known_labels

    temperature = temperature_scale(*log_probs(data.val))
    rows: dict[str, Any] = {"MAP": {}, "MAP + temperature": {"temperature": temperature}}
    for name, loader in data.tests.items():
        logits, labels = log_probs(loader)
        rows["MAP"][name] = scores(logits.softmax(1), labels)
        rows["MAP + temperature"][name] = scores((logits / temperature).softmax(1), labels)
    return rows


def regime(recipe: task.Recipe, structures: list[str]) -> dict[str, Any]:
    """Trains one adapter and measures these structures on it; the first is what the others are compared with."""
    model, tokenizer = task.load_model()
    model = task.add_adapter(model, recipe)
    train_rows, val_rows = task.split(recipe)
    answers = answer_token_ids(tokenizer, train_rows)

    def batches(rows: Any) -> list[dict[str, Tensor]]:
        return make_batches(tokenizer, rows, recipe.batch_size)

    names = (task.IN_DISTRIBUTION, task.OUT_OF_DISTRIBUTION[0])
    tests = {name: batches(task.load_examples(f"{name}.test")[: recipe.n_test]) for name in names}
    data = Data(batches(train_rows), batches(val_rows), tests)
    epochs = task.fine_tune(model, data.train, answers, recipe)
    result: dict[str, Any] = {"epochs": recipe.epochs, "train_loss": epochs[-1].loss, "structures": {}}
    result["epoch_cpu_seconds"] = min(epoch.cpu_seconds for epoch in epochs)
    exact: dict[str, Tensor] = {}
    for name in structures:
        la = LaplaceLoRA(model, Answers(answers), seed=recipe.seed, **STRUCTURES[name])
        row, variances = measure(la, data)
        exact = exact or variances
        row["variance"] = compare(torch.cat(list(variances.values()), 1), torch.cat(list(exact.values()), 1))
        result["structures"][name] = row
        print(f"{recipe.epochs} epochs, {name}: {json.dumps(row['variance'][1])}", flush=True)
        if name == structures[0]:
            result["baselines"] = baselines(la, data)
    return result


def markdown(results: dict[str, Any]) -> str:
    """One table a regime."""
    origin = results["environment"]
    lines = [
        "# Structures of the curvature on a real language model",
        "",
        f"SmolLM2-135M-Instruct, LoRA r = 8 on q, v; {results['setting']['n_train']} training examples, two classes; "
        f"{results['setting']['n_val']} validation and 2 x {results['setting']['n_test']} test examples. "
        f"{origin['machine']}, {origin['threads']} threads; commit {origin['commit']}, {origin['date']}. "
        "Ratio and correlation: variance of the logit contrast against the exact "
        "full-GGN Laplace's at prior precision 1 (all four in the JSON). NLL and ECE are given as in distribution / "
        "out of distribution. Times are process CPU seconds of all threads; predict is over both test sets.",
    ]
    for title, result in results["regimes"].items():
        lines += ["", f"## {title}: {result['epochs']} epochs, training loss {result['train_loss']:.4f}", ""]
        lines.append(
            "| structure | ratio | correlation | evidence | prior by evidence | NLL | ECE | prior by validation "
            "| NLL | ECE | fit CPU s | predict CPU s | MiB |"
        )
        lines.append("|---" * 13 + "|")
        for name, row in result["structures"].items():
            ratio = row["variance"][1]
            cells = [name, f"{ratio['median_ratio']:.2f}", f"{ratio['correlation']:.3f}"]
            cells.append(f"{row['log_marginal_likelihood']:.0f}")
            for how in ("evidence", "validation"):
                cells.append(f"{row[f'prior_by_{how}']:.3g}")
                cells += [
                    " / ".join(f"{row[test][how][metric]:.3f}" for test in result["baselines"]["MAP"])
                    for metric in ("nll", "ece")
                ]
            cells += [f"{row[key]:.1f}" for key in ("fit_cpu_seconds", "predict_cpu_seconds", "megabytes")]
            lines.append("| " + " | ".join(cells) + " |")
        for name, row in result["baselines"].items():
            both = [
                " / ".join(f"{row[test][m]:.3f}" for test in result["baselines"]["MAP"])
                for m in ("nll", "ece")
            ]
            lines.append(f"| {name} | | | | | | | | {both[0]} | {both[1]} | | | |")
        lines += ["", f"One training epoch took {result['epoch_cpu_seconds']:.1f} CPU s."]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Variance ratios over the prior precision, one line a structure, one panel a regime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results["regimes"]), figsize=(11, 4.2), sharey=True, squeeze=False)
    for axis, (title, result) in zip(axes[0], results["regimes"].items(), strict=True):
        for name, row in result["structures"].items():
            axis.plot(FIXED, [v["median_ratio"] for v in row["variance"]], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="prior precision", title=title)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("median variance over the exact one's")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Runs both regimes and writes structures.json, .md and .png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--tests", type=int, default=100, help="test examples of each data set")
    parser.add_argument("--train", type=int, default=task.Recipe.n_train)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=STRUCTURES)
    arguments = parser.parse_args()
    recipe = replace(task.Recipe(), n_test=arguments.tests, n_train=arguments.train)
    results: dict[str, Any] = {
        "environment": provenance(("torch", "transformers", "peft")),
        "setting": {"n_train": recipe.n_train, "n_val": recipe.n_val, "n_test": recipe.n_test},
        "regimes": {},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for title in arguments.regimes:
        results["regimes"][title] = regime(replace(recipe, epochs=REGIMES[title]), arguments.structures)
        (arguments.out / "structures.json").write_text(json.dumps(results, indent=2) + "\n")
        (arguments.out / "structures.md").write_text(markdown(results))
        plot(results, arguments.out / "structures.png")


if __name__ == "__main__":
    main()
