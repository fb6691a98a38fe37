"""The story on screen: over-train an adapter, fit its posterior, tune the prior, and compare."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from laplace_lora_fast import LaplaceLoRA
from laplace_lora_fast.demo import task
from laplace_lora_fast.demo.task import Epoch, Recipe
from laplace_lora_fast.evaluate import Predictions, temperature_scale
from laplace_lora_fast.prompts import answer_token_ids, make_batches
from laplace_lora_fast.provenance import provenance
from laplace_lora_fast.report import metrics_table, score, write_plots

MAP, TEMPERATURE = "MAP", "MAP + temperature"
VALIDATED, EVIDENCE, REFIT = "Laplace (validated)", "Laplace (evidence)", "Laplace (refit, leave-one-out)"

Loader = list[dict[str, Tensor]]


class Stopwatch:
    """Measures named phases and prints each when it ends."""

    def __init__(self, console: Console) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self._console = console

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block: wall seconds, and CPU seconds of all threads."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        self.phases[name] = taken
        self._console.print(f"  {name:<41}{taken['seconds']:7.1f} s")


@dataclass(frozen=True)
class Tuned:
    """What the validation split, the evidence and leaving out training examples chose.

    Attributes:
        validated: Prior precision with the lowest held-out NLL.
        evidence: Prior precision with the highest marginal likelihood.
        left_out: Prior precision of the refitted model with the lowest leave-one-out NLL; saw no held-out example.
        temperature: Temperature with the lowest held-out NLL of the plain model.
    """

    validated: float
    evidence: float
    left_out: float
    temperature: float


def run(out: Path, recipe: Recipe, console: Console) -> None:
    """Runs the demonstration, prints it, and writes results.json and two plots.

    Args:
        out: Folder for the results, created if missing.
        recipe: What to train.
        console: Where to print.

    Raises:
        FileNotFoundError: The model's package is not installed.
    """
    watch = Stopwatch(console)
    console.print("[bold]Laplace-LoRA on SmolLM2-135M: is this movie review positive?[/bold]")
    with watch.phase("load the model and the data"):
        model, tokenizer = task.load_model()
        model = task.add_adapter(model, recipe)
        train_rows, val_rows = task.split(recipe)
        answers = answer_token_ids(tokenizer, train_rows)
        train, val = (make_batches(tokenizer, rows, recipe.batch_size) for rows in (train_rows, val_rows))
        tests = _test_sets(tokenizer, recipe)
    with watch.phase(f"fine-tune, {recipe.epochs} epochs"):
        epochs = task.fine_tune(model, train, answers, recipe)
    losses = " ".join(f"{epoch.loss:.4f}" for epoch in epochs)
    console.print(f"    loss on the {len(train_rows)} training examples, by epoch: {losses}")
    la = LaplaceLoRA(model, answer_token_ids=answers, seed=recipe.seed)
    with watch.phase("fit the posterior"):
        la.fit(train)
    refit = LaplaceLoRA(model, answer_token_ids=answers, mean="refit", seed=recipe.seed)
    with watch.phase("fit the posterior of the refitted model"):
        refit.fit(train)
    tuned = _tune(la, refit, val, watch)
    console.print(
        f"    on {len(val_rows)} held-out examples: prior precision {tuned.validated:.3g}, temperature "
        f"{tuned.temperature:.3g}; by the evidence: prior precision {tuned.evidence:.3g}; by leaving out one training "
        f"example at a time, refitted: {tuned.left_out:.3g}"
    )
    grid = _predict(la, refit, tests, tuned, watch)
    with watch.phase("plot"):
        files = write_plots(grid, out)
    scores = score(grid)
    console.print(metrics_table(scores))
    ratio = watch.phases["fit the posterior"]["seconds"] / median(epoch.seconds for epoch in epochs)
    total = sum(phase["seconds"] for phase in watch.phases.values())
    console.print(f"The fit cost {ratio:.2f} training epochs. Everything took {total:.0f} s.")
    files.append(out / "results.json")
    results = _results(recipe, epochs, tuned, watch, ratio)
    results["metrics"] = {
        data: {method: asdict(m) for method, m in row.items()} for data, row in scores.items()
    }
    files[-1].write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print("Written: " + ", ".join(escape(str(file)) for file in files))


def _test_sets(tokenizer: Any, recipe: Recipe) -> dict[str, Loader]:
    kinds = dict.fromkeys(task.OUT_OF_DISTRIBUTION, "out of distribution")
    sets = {}
    for name, kind in ({task.IN_DISTRIBUTION: "in distribution"} | kinds).items():
        rows = task.load_examples(f"{name}.test")[: recipe.n_test]
        sets[f"{name.replace('_', ' ')}, {kind}"] = make_batches(tokenizer, rows, recipe.batch_size)
    return sets


def _tune(la: LaplaceLoRA, refit: LaplaceLoRA, val: Loader, watch: Stopwatch) -> Tuned:
    """Leaves the validated prior precision in place, and that of the refitted model."""
    with watch.phase("tune the prior by the evidence"):
        evidence = la.optimize_prior_precision(method="marglik")
    with watch.phase("tune the prior by held-out NLL"):
        validated = la.optimize_prior_precision(method="val_nll", val_loader=val)
    with watch.phase("tune the prior by leaving one out"):
        left_out = refit.optimize_prior_precision(method="loo")
    with watch.phase("tune the temperature"):
        log_probs, labels = _map_log_probs(la, val)
        temperature = temperature_scale(log_probs, labels)
    assert isinstance(evidence, float)
    assert isinstance(left_out, float)
    assert isinstance(validated, float)  # one scalar for all blocks was asked for
    return Tuned(validated, evidence, left_out, temperature)


def _predict(
    la: LaplaceLoRA, refit: LaplaceLoRA, tests: dict[str, Loader], tuned: Tuned, watch: Stopwatch
) -> dict[str, dict[str, Predictions]]:
    """All methods on all test sets."""
    with watch.phase("predict with the plain model"):
        plain = {name: _map_log_probs(la, loader) for name, loader in tests.items()}
    precisions = [tuned.validated, tuned.evidence]
    with watch.phase("predict with the posterior"):
        laplace = {
            name: la.predict_loader(loader, prior_precision=precisions)[0] for name, loader in tests.items()
        }
    with watch.phase("predict with the refitted posterior"):
        refitted = {name: refit.predict_loader(loader)[0] for name, loader in tests.items()}
    grid = {}
    for name, (log_probs, labels) in plain.items():
        scaled = (log_probs / tuned.temperature).softmax(1)
        probs = (log_probs.exp(), scaled, *laplace[name], refitted[name])
        methods = (MAP, TEMPERATURE, VALIDATED, EVIDENCE, REFIT)
        grid[name] = {method: Predictions(p, labels) for method, p in zip(methods, probs, strict=True)}
    return grid


def _map_log_probs(la: LaplaceLoRA, loader: Loader) -> tuple[Tensor, Tensor]:
    """The plain model's log probabilities [N, C] in fp64 and the labels [N]."""
    probs, labels = la.predict_loader(loader, link_approx="map")
    assert isinstance(probs, Tensor)
    assert labels is not None
    return probs.double().clamp_min(torch.finfo(torch.float32).tiny).log(), labels


def _results(
    recipe: Recipe, epochs: Sequence[Epoch], tuned: Tuned, watch: Stopwatch, ratio: float
) -> dict[str, Any]:
    return {
        "model": task.MODEL_PACKAGE,
        "recipe": asdict(recipe),
        **provenance(("laplace-lora-fast", "torch", "transformers", "peft")),
        "epochs": [asdict(epoch) for epoch in epochs],
        "prior_precision": {
            "validated": tuned.validated,
            "evidence": tuned.evidence,
            "left_out": tuned.left_out,
        },
        "temperature": tuned.temperature,
        "phases": watch.phases,
        "fit_cost_in_epochs": ratio,
    }
