"""Which tokenizer made a posterior's batches, where somebody says so: another one makes other tokens of a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from laplace_lora_fast.errors import StateError

_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  Déjà vu, naïve façade: 你好，世界 🙂\n\tdef f(x): return x ** 2",
    "Question: is it so?\nAnswer:",
    " yes",
)


def described(tokenizer: Any) -> dict[str, str]:
    """Digests of its vocabulary, of what it makes of some texts, and of its chat template."""
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "tokens of a text": [tokenizer(text)["input_ids"] for text in _TEXTS],
        "chat template": getattr(tokenizer, "chat_template", None),
    }
    return {
        name: hashlib.blake2b(json.dumps(part).encode(), digest_size=16).hexdigest()
        for name, part in parts.items()
    }


def require_same(saved: Mapping[str, str], tokenizer: Any) -> None:
    """Raises StateError for a tokenizer that differs from the one that was described; says in what."""
    now = described(tokenizer)
    for name, digest in saved.items():
        if now.get(name) != digest:
            raise StateError(
                f"the tokenizer's {name} is not that of the tokenizer the posterior was fitted with: load that one"
            )
