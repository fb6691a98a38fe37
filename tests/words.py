"""A word-level tokenizer and a decoder small enough to save, load and train within a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers

from tests import tiny

WORDS = (
    "good",
    "fine",
    "nice",
    "bad",
    "poor",
    "dull",
    "film",
    "plot",
    "A",
    "B",
    "C",
    "Sentiment:",
    "a",
    "the",
)
ANSWERS = ("negative", "positive")


def tokenizer() -> Any:
    """Splits at white space; unknown words are one token."""
    vocabulary = {word: index for index, word in enumerate(("[UNK]", *WORDS, *ANSWERS))}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def base_model() -> Any:
    """A seeded decoder without adapter, fp32."""
    torch.manual_seed(0)
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {
        "num_key_value_heads": 2,
        "vocab_size": tiny.VOCAB,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()


def save_model(folder: Path) -> tuple[Path, Path]:
    """Writes `folder`/base (with the tokenizer) and `folder`/adapter."""
    base, adapter = folder / "base", folder / "adapter"
    model = base_model()
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    tiny.randomise(adapted, seed=1)
    adapted.save_pretrained(adapter)
    return base, adapter


def rows(count: int, seed: int = 0, choices: tuple[str, ...] = ("A", "B")) -> list[dict[str, Any]]:
    """Prompts of two to six words; the label is drawn."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(2, 7, (), generator=generator))
        picked = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        label = int(torch.randint(0, len(choices), (), generator=generator))
        out.append({"prompt": " ".join(WORDS[i] for i in picked), "choices": list(choices), "label": label})
    return out


def write_rows(path: Path, records: list[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
