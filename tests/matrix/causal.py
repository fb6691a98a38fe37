"""Causal language models of transformers, tiny and random, with LoRA on all their linear layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from laplace_lora_fast import Answers
from tests.matrix import models
from tests.matrix.cells import Cell

SIDES = ("none", "left", "right")


def base(kind: str, **own: Any) -> Any:
    """A tiny model of a kind."""
    name = NAMES[kind]
    torch.manual_seed(0)
    return getattr(transformers, name if isinstance(name, str) else name[0])(models.config(kind, **own))


def run(kind: str, side: str, targets: Any = "all-linear", **own: Any) -> float:
    model = models.adapted(base(kind, **own), targets)
    tokens = models.sequences(lengths=(6,) * 6) if side == "none" else models.sequences()
    return models.text_error(model, Answers(models.ANSWERS), tokens, side)
