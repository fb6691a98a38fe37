"""What the benchmarks run on: random Llama decoders and the demo's real model, with LoRA on q_proj and v_proj.

lora_B is random, not zero: times and memory do not depend on what an adapter has learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from laplace_lora_fast import KFAC, Answers, LaplaceLoRA
from laplace_lora_fast.data.prompts import answer_token_ids, make_batches
from laplace_lora_fast.demo import task

VOCABULARY, LENGTH, RANK = 1024, 64, 8
ANSWERS = [11, 22, 33, 44]
BATCH_SIZE = 8

Batch = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Setting:
    """One model with its training batches.

    Attributes:
        name: of the size.
        model: a PEFT model in fp32 and evaluation mode.
        loader: training batches of 8.
        answers: token ids of the classes.
        rounds: timed rounds.
        peer_rounds: the peers'.
    """

    name: str
    model: nn.Module
    loader: list[Batch]
    answers: list[int]
    rounds: int
    peer_rounds: int

    @property
    def padded(self) -> bool:
        return not all(bool(batch["attention_mask"].all()) for batch in self.loader)

    @property
    def layers(self) -> list[str]:
        """The LoRA layers, in the order of `named_modules`."""
        return [
            name for name, module in self.model.named_modules() if "default" in getattr(module, "lora_A", {})
        ]

    def logits(self, batch: Batch) -> Tensor:
        return answer_logits(self.model, batch, self.answers)

    def default(self) -> LaplaceLoRA:
        return LaplaceLoRA(self.model, Answers(self.answers))

    def kfac(self, **options: Any) -> LaplaceLoRA:
        """With dense factors."""
        structure = KFAC(factors="dense", **options)
        return LaplaceLoRA(self.model, Answers(self.answers), structure=structure)


def answer_logits(model: nn.Module, batch: Batch, answers: Sequence[int]) -> Tensor:
    """Logits [N, C] of the answers after the last position, which padding on the left makes the last real one."""
    output = model(**inputs(batch))
    return output.logits[:, -1, list(answers)]


def inputs(batch: Batch) -> dict[str, Any]:
    """What the model takes of a batch; the head sees the last position only."""
    return {key: batch[key] for key in batch if key != "labels"} | {"use_cache": False, "logits_to_keep": 1}


def random_llama(name: str, hidden: int, sequences: int, rounds: int, peer_rounds: int) -> Setting:
    """Four layers of random weights, and sequences of 64 random tokens without padding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=4,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2 * LENGTH,
    )
    model = _with_adapter(LlamaForCausalLM(config))
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(1))
    loader = [
        {
            "input_ids": draw(VOCABULARY, (BATCH_SIZE, LENGTH)),
            "attention_mask": torch.ones(BATCH_SIZE, LENGTH, dtype=torch.long),
            "labels": draw(len(ANSWERS), (BATCH_SIZE,)),
            "position_ids": torch.arange(LENGTH).expand(BATCH_SIZE, -1),
        }
        for _ in range(sequences // BATCH_SIZE)
    ]
    return Setting(name, model, loader, ANSWERS, rounds, peer_rounds)


def demo_model(name: str, sequences: int, rounds: int, peer_rounds: int) -> Setting:
    """The demo's language model on its film reviews, padded on the left."""
    try:
        model, tokenizer = task.load_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    rows, _ = task.split(task.Recipe(n_train=sequences))
    loader = make_batches(tokenizer, rows, BATCH_SIZE)
    for batch in loader:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return Setting(name, _with_adapter(model), loader, answer_token_ids(tokenizer, rows), rounds, peer_rounds)


SIZES: dict[str, Callable[[], Setting]] = {
    name: partial(build, name, **options)
    for name, build, options in (
        ("hidden-256", random_llama, {"hidden": 256, "sequences": 32, "rounds": 25, "peer_rounds": 3}),
        ("hidden-1024", random_llama, {"hidden": 1024, "sequences": 16, "rounds": 3, "peer_rounds": 1}),
        ("SmolLM2-135M", demo_model, {"sequences": 16, "rounds": 3, "peer_rounds": 1}),
    )
}

_RANDOM = f"random Llama, 4 layers, {{}} sequences of {LENGTH} tokens, {len(ANSWERS)} classes; "
ABOUT = {
    "hidden-256": _RANDOM.format(32) + "25 rounds, peers 3",
    "hidden-1024": _RANDOM.format(16) + "3 rounds, peers 1",
    "SmolLM2-135M": "the demo's model, 30 layers, 16 film reviews of 16 to 54 tokens, padded on the left, 2 classes; "
    "3 rounds, peers 1",
}


def _with_adapter(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()
