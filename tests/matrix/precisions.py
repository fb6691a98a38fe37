"""Precisions of weights, adapters and computation, against an fp64 copy of the same weights."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch import nn

from laplace_lora_fast import Answers
from tests.matrix import models, oracle
from tests.matrix.cells import Cell

GROUP = "Precisions"
COARSE = 0.1  # bf16 and fp16 have 8 and 11 bits, which a deep network's Jacobian loses some of
TARGETS = ["q_proj", "v_proj", "down_proj"]


def decoder(dtype: torch.dtype, adapter: torch.dtype, attention: str, **own: Any) -> nn.Module:
    """A tiny decoder whose adapter may have a precision of its own."""
    torch.manual_seed(0)
    config = models.config("llama", initializer_range=0.1, **own)
    config._attn_implementation = attention
    base = transformers.LlamaForCausalLM(config).to(dtype)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS), autocast_adapter_dtype=False
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    return models.randomised(model).eval()


def error(
    dtype: torch.dtype,
    adapter: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    attention: str = "eager",
) -> float:
    """Of a posterior in a precision; `autocast` around fit and prediction."""
    model = decoder(dtype, adapter or dtype, attention)
    exact = copy.deepcopy(model).double()
    tokens = models.sequences()
    alone = [{"input_ids": sequence[None]} for sequence in tokens]
    expected = oracle.posterior(exact, models.answers_of, alone[: models.TRAIN], alone[models.TRAIN :])
    side = "right" if dtype == torch.float64 else "left"  # eager attention in fp64 gives NaN for left pads
    batches = [models.padded(part, side) for part in (tokens[: models.TRAIN], tokens[models.TRAIN :])]
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        return models.compared(model, Answers(models.ANSWERS), *batches, expected)


def cells() -> list[Cell]:
    """All of them."""
    names = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    tolerances = {"fp64": oracle.FP64, "fp32": oracle.FP32, "bf16": COARSE, "fp16": COARSE}
    found = [
        Cell(
            GROUP,
            name,
            f"{attention} attention",
            partial(error, dtype, attention=attention),
            tolerances[name],
        )
        for name, dtype in names.items()
        for attention in ("eager", "sdpa")
    ]
    for name in ("bf16", "fp16"):
        dtype = names[name]
        found += [
            Cell(
                GROUP,
                f"{name} model",
                "fp32 adapter",
                partial(error, dtype, torch.float32),
                COARSE,
                quick=True,
            ),
            Cell(
                GROUP, "fp32 model", f"autocast to {name}", partial(error, torch.float32, None, dtype), COARSE
            ),
            Cell(
                GROUP,
                f"{name} model, fp32 adapter",
                f"autocast to {name}",
                partial(error, dtype, torch.float32, dtype),
                COARSE,
            ),
        ]
    return found
