"""What the benchmarks run on: random Llama decoders with LoRA on q_proj and v_proj, and random token batches.

Weights and tokens are random, lora_B is not zero: times and memory do not depend on what a model has learnt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH, RANK = 1024, 64, 8
ANSWERS = [11, 22, 33, 44]
BATCH_SIZE = 8

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """A model and how much data it is given.

    Attributes:
        hidden: width; the MLP is 8/3 as wide.
        layers: number of decoder layers.
        sequences: training examples.
        rounds: timed rounds.
        peer_rounds: the peers'.
    """

    hidden: int
    layers: int
    sequences: int
    rounds: int
    peer_rounds: int


SIZES = {
    "hidden-256": Size(hidden=256, layers=4, sequences=32, rounds=7, peer_rounds=3),
    "hidden-1024": Size(hidden=1024, layers=4, sequences=16, rounds=3, peer_rounds=1),
}


def build(size: Size) -> nn.Module:
    """A Llama decoder in fp32 with rank-8 LoRA on q_proj and v_proj, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=8 * size.hidden // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 64,
        max_position_embeddings=2 * LENGTH,
    )
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def batches(size: Size, padded: bool) -> list[Batch]:
    """The training set in batches of 8 sequences of 64 tokens.

    Args:
        size: says how many sequences.
        padded: half of the tokens to all of them are real, padding on the left; otherwise all are.
    """
    generator = torch.Generator().manual_seed(1)
    loader = []
    for start in range(0, size.sequences, BATCH_SIZE):
        n = min(BATCH_SIZE, size.sequences - start)
        batch = {
            "input_ids": torch.randint(VOCABULARY, (n, LENGTH), generator=generator),
            "attention_mask": torch.ones(n, LENGTH, dtype=torch.long),
            "labels": torch.randint(len(ANSWERS), (n,), generator=generator),
        }
        if padded:
            real = torch.randint(LENGTH // 2, LENGTH + 1, (n,), generator=generator)
            batch["attention_mask"] = (torch.arange(LENGTH) >= LENGTH - real[:, None]).long()
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        loader.append(batch)
    return loader


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [N, C] of the answers after the last position, which padding on the left makes the last real one."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    output = model(**inputs, use_cache=False, logits_to_keep=1)
    return output.logits[:, -1, ANSWERS]
