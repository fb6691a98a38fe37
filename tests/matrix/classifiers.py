"""Sequence classifiers of transformers, tiny and random, with LoRA on all their linear layers."""
from __future__ import annotations
from functools import partial
from typing import Any
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES
from laplace_lora_fast import Classes
from tests.matrix import models, oracle
from tests.matrix.cells import Cell
SIDES = ("none", "left", "right")
def base(kind: str, **own: Any) -> Any:
    name = NAMES[kind]
    torch.manual_seed(0)
    return getattr(transformers, name if isinstance(name, str) else name[0])(models.config(kind, is_decoder=False, **own))
def run(kind, side, targets="all-linear", **own):
    model = models.adapted(base(kind, **own), targets)
    tokens = models.sequences(lengths=(6,) * 6) if side == "none" else models.sequences()
    return models.text_error(model, Classes(), tokens, side)
