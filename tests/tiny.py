"""Tiny randomly initialised models with a LoRA adapter, and batches for them. Everything is seeded.

lora_B is random, not zero: an adapter as after training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

VOCAB = 48
ANSWERS = (5, 11, 7)  # answer tokens of the causal models; not ascending

Batch = dict[str, Tensor]


def adapt(
    base: nn.Module,
    dtype: torch.dtype = torch.float64,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    r: int = 4,
    seed: int = 1,
    **lora: Any,
) -> peft.PeftModel:
    """A LoRA adapter with random A and B on `base`, which is cast to `dtype`."""
    targets = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(**{"r": r, "lora_alpha": 2 * r, "target_modules": targets, **lora})
    model = peft.get_peft_model(base.to(dtype), config)
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Draws all adapter weights, seeded, in their own dtype: entries of A as 1 / sqrt(d_in), of B as 0.2."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            scale = parameter.shape[-1] ** -0.5 if "lora_A" in name and parameter.dim() > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                parameter.copy_(scale * noise)


def without_fp32_norms(model: nn.Module) -> nn.Module:
    """Replaces RMSNorm layers that round to fp32 inside, so that an fp64 model is fp64 throughout."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    return model


def _llama_config(layers: int, config: dict[str, Any]) -> transformers.LlamaConfig:
    """Grouped-query attention: 4 heads, 2 key-value heads."""
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return transformers.LlamaConfig(**defaults | config)


def tiny_llama(
    dtype: torch.dtype = torch.float64,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    r: int = 4,
    layers: int = 2,
    config: dict[str, Any] | None = None,
    **lora: Any,
) -> peft.PeftModel:
    """A causal decoder; its answers are the tokens `ANSWERS`."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(_llama_config(layers, config or {}))
    return adapt(without_fp32_norms(base), dtype, targets, r, **lora)


def tiny_llama_classifier(
    num_labels: int,
    dtype: torch.dtype = torch.float64,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    r: int = 4,
    layers: int = 2,
    config: dict[str, Any] | None = None,
    **lora: Any,
) -> peft.PeftModel:
    """A decoder with a sequence-classification head `score`."""
    torch.manual_seed(0)
    base = transformers.LlamaForSequenceClassification(
        _llama_config(layers, {"num_labels": num_labels} | (config or {}))
    )
    return adapt(without_fp32_norms(base), dtype, targets, r, **lora)


def tiny_gpt2(
    dtype: torch.dtype = torch.float64,
    targets: Sequence[str] | str = ("c_attn",),
    r: int = 4,
    layers: int = 2,
    config: dict[str, Any] | None = None,
    **lora: Any,
) -> peft.PeftModel:
    """A causal decoder of Conv1D layers, with dropout in its configuration and lm_head tied to the embedding."""
    torch.manual_seed(0)
    defaults = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 64}
    defaults |= {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**defaults | (config or {})))
    return adapt(base, dtype, targets, r, **{"fan_in_fan_out": True} | lora)


def tiny_bert_classifier(
    num_labels: int,
    dtype: torch.dtype = torch.float64,
    targets: Sequence[str] | str = ("query", "value"),
    r: int = 4,
    layers: int = 2,
    config: dict[str, Any] | None = None,
    **lora: Any,
) -> peft.PeftModel:
    """An encoder with a pooler and a head `classifier`, with dropout in its configuration."""
    torch.manual_seed(0)
    defaults = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    defaults |= {"num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": num_labels}
    defaults |= {"initializer_range": 0.3, "pad_token_id": 0}
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**defaults | (config or {})))
    return adapt(base, dtype, targets, r, **lora)


def batch(
    n: int,
    length: int = 7,
    vocab: int = VOCAB,
    classes: int = 3,
    seed: int = 0,
    padding: str | None = "left",
    labels: bool = True,
) -> Batch:
    """Sequences of 2 to `length` real tokens (all `length` without padding), the first one full.

    Args:
        n: number of examples.
        length: of the padded sequences.
        vocab: real tokens lie in [1, vocab); the pad token is 0.
        classes: labels lie in [0, classes); 0 gives real-valued labels [n].
        seed: of everything.
        padding: the side with the pads, or None for none (and no attention mask).
        labels: whether to have them.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (n, length), generator=generator)
    real = torch.randint(min(2, length), length + 1, (n,), generator=generator)
    real[0] = length
    out = {"input_ids": ids}
    if padding is not None:
        place = torch.arange(length)
        mask = place >= length - real[:, None] if padding == "left" else place < real[:, None]
        out = {"input_ids": ids * mask, "attention_mask": mask.long()}
    if labels:
        drawn = torch.randint(0, max(classes, 1), (n,), generator=generator)
        out["labels"] = drawn if classes else torch.randn(n, generator=generator, dtype=torch.float64)
    return out


def repad(batch: Batch, padding: str, length: int) -> Batch:
    """The same examples padded to `length` on the side `padding`; other entries are kept."""
    mask = batch["attention_mask"].bool()
    ids = torch.zeros(len(mask), length, dtype=torch.long)
    new = torch.zeros(len(mask), length, dtype=torch.long)
    for row, (tokens, keep) in enumerate(zip(batch["input_ids"], mask, strict=True)):
        real = tokens[keep]
        start = length - len(real) if padding == "left" else 0
        ids[row, start : start + len(real)] = real
        new[row, start : start + len(real)] = 1
    return {**batch, "input_ids": ids, "attention_mask": new}


def split(batch: Batch, size: int) -> list[Batch]:
    """The batch in pieces of at most `size` examples."""
    n = len(next(iter(batch.values())))
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, n, size)]
