"""The story on screen: over-train an adapter, fit its posterior, tune the prior, and compare."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from laplace_lora_fast import Answers, Evidence, HeldOut, LaplaceLoRA, LeaveOneOut, Rows
from laplace_lora_fast.data.prompts import answer_token_ids, make_batches
from laplace_lora_fast.demo import task
from laplace_lora_fast.demo.task import Epoch, Recipe
from laplace_lora_fast.evaluation.metrics import temperature_scale
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.evaluation.report import metrics_table, score, write_plots
from laplace_lora_fast.prediction import MAP_LINK
from laplace_lora_fast.saving.atomic import replacing

MAP, TEMPERATURE = "MAP", "MAP + temperature"
VALIDATED = "Laplace (validated)"
EVIDENCE, LEFT_OUT = "Laplace (refit, evidence)", "Laplace (refit, leave-one-out)"

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
    """What held-out examples chose, and what the evidence and leaving out training examples did without them.

    Attributes:
        validated: Prior precision with the lowest held-out NLL.
        evidence: Prior precision of the refitted model with the highest marginal likelihood.
        left_out: Prior precision of the refitted model with the lowest leave-one-out NLL.
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
    la = LaplaceLoRA(model, Answers(answers), seed=recipe.seed)
    with watch.phase("fit the posterior"):
        la.fit(train)
    refit = LaplaceLoRA(model, Answers(answers), structure=Rows(refit=True), seed=recipe.seed)
    with watch.phase("fit the posterior of the refitted model"):
        refit.fit(train)
    tuned = _tune(la, refit, val, watch)
    console.print(
        f"    on {len(val_rows)} held-out examples: prior precision {tuned.validated:.3g}, temperature "
        f"{tuned.temperature:.3g}; refitted, by the evidence: prior precision {tuned.evidence:.3g}, by leaving out one "
        f"training example at a time: {tuned.left_out:.3g}"
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
    with replacing(files[-1]) as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print("Written: " + ", ".join(escape(str(file)) for file in files))


def _test_sets(tokenizer: Any, recipe: Recipe) -> dict[str, Loader]:
    kinds = dict.fromkeys(task.OUT_OF_DISTRIBUTION, "out of distribution")
    sets = {}
    for name, kind in ({task.IN_DISTRIBUTION: "in distribution"} | kinds).items():
        rows = task.load_examples(f"{name}.test")[: recipe.n_test]
        sets[f"{name.replace('_', ' ')}, {kind}"] = make_batches(tokenizer, rows, recipe.batch_size)
    return sets


def _tune(la: LaplaceLoRA, refit: LaplaceLoRA, val: Loader, watch: Stopwatch) -> Tuned:
    """What each way chooses."""
    with watch.phase("tune the prior by the evidence"):
        evidence = refit.optimize_prior_precision(Evidence())
    with watch.phase("tune the prior by held-out NLL"):
        validated = la.optimize_prior_precision(HeldOut(val))
    with watch.phase("tune the prior by leaving one out"):
        left_out = refit.optimize_prior_precision(LeaveOneOut())
    with watch.phase("tune the temperature"):
        plain = _predictions(la, val, link_approx=MAP_LINK)
        temperature = temperature_scale(_log_probs(plain), plain.known_labels)
    assert isinstance(evidence, float)
    assert isinstance(left_out, float)
    assert isinstance(validated, float)  # one scalar for all blocks was asked for
    return Tuned(validated, evidence, left_out, temperature)


def _predict(
    la: LaplaceLoRA, refit: LaplaceLoRA, tests: dict[str, Loader], tuned: Tuned, watch: Stopwatch
) -> dict[str, dict[str, Predictions]]:
    """All methods on all test sets."""
    with watch.phase("predict with the plain model"):
        plain = {name: _predictions(la, loader, link_approx=MAP_LINK) for name, loader in tests.items()}
    grid = {
        name: {
            MAP: predictions,
            TEMPERATURE: replace(predictions, probs=(_log_probs(predictions) / tuned.temperature).softmax(1)),
        }
        for name, predictions in plain.items()
    }
    with watch.phase("predict with the posterior"):
        for name, loader in tests.items():
            grid[name][VALIDATED] = _predictions(la, loader, prior_precision=tuned.validated)
    with watch.phase("predict with the refitted posterior"):
        for name, loader in tests.items():
            both = [
                refit.predict(batch, prior_precision=[tuned.evidence, tuned.left_out]) for batch in loader
            ]
            for place, method in enumerate((EVIDENCE, LEFT_OUT)):
                probs = torch.cat([each[place] for each in both])
                grid[name][method] = replace(plain[name], probs=probs)
    return grid


def _predictions(la: LaplaceLoRA, loader: Loader, **options: Any) -> Predictions:
    predictions = la.predictions(loader, **options)
    assert isinstance(predictions, Predictions)  # answers are classes
    return predictions


def _log_probs(predictions: Predictions) -> Tensor:
    """Log probabilities [N, C] in fp64; those below the smallest of fp32 count as that."""
    return predictions.probs.clamp_min(torch.finfo(torch.float32).tiny).log()


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
