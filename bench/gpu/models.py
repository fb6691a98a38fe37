"""What fitting and predicting cost on Llama-shaped models, over a bare forward and backward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import peft
import torch
import transformers
from torch import nn

import laplace_kernels as lk
from bench.gpu.timing import seconds
from laplace_lora_fast import LaplaceLoRA, factors

SHAPES = {
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000,
                   "num_attention_heads": 32, "num_key_value_heads": 32},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
                   "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
TINY = {
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
             "num_attention_heads": 2, "num_key_value_heads": 2},
}  # fmt: skip
TARGETS: dict[str, Any] = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}
ANSWERS = [5, 7]


class Batches(NamedTuple):
    """What a model is fitted on; the difference between few and many separates a batch from finishing a fit."""

    examples: int
    tokens: int
    few: int
    many: int


# Enough tokens for an update of C at once, and so few that those of 8 batches wait for each other at d = 4096.
BATCHES = (Batches(4, 512, few=2, many=6), Batches(1, 256, few=8, many=24))
TINY_BATCHES = (Batches(2, 8, few=2, many=6), Batches(1, 3, few=2, many=6))
METHODS = {"reduce": "reduce", "expand": "expand", "expand, nothing waits": "expand"}


def measure_models(device: torch.device, dry: bool, rounds: int, deadline: float) -> Iterator[dict[str, Any]]:
    """One record per model, LoRA targets, batch and backend; a record says so when time ran out before it."""
    for name, shape in (TINY if dry else SHAPES).items():
        for targets in TARGETS:
            model = None
            for kind, backend in product(TINY_BATCHES if dry else BATCHES, serving(device)):
                labels = {"model": name, "targets": targets, **kind._asdict(), "backend": backend}
                if time.monotonic() > deadline:
                    yield {**labels, "skipped": "out of time"}
                    continue
                model = model or build(shape, TARGETS[targets], device)
                batches = [make_batch(shape, kind, device) for _ in range(kind.many)]
                with lk.use_backend(backend):
                    yield {**labels, **_costs(model, batches, kind.few, device, rounds)}


def serving(device: torch.device) -> list[str]:
    """The backends that have a kernel for a flush of bf16 rows."""
    chosen = []
    for backend in lk.backends():
        with lk.use_backend(backend):
            if lk.explain("gram_group_", device, torch.bfloat16).backend == backend:
                chosen.append(backend)
    return chosen


def build(shape: dict[str, int], targets: Any, device: torch.device) -> nn.Module:
    """A randomly initialised bf16 model with a random LoRA adapter of rank 8."""
    config = transformers.LlamaConfig(**shape, max_position_embeddings=2048)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, adapter).eval()


def make_batch(shape: dict[str, int], kind: Batches, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens without padding."""
    ids = torch.randint(shape["vocab_size"], (kind.examples, kind.tokens), device=device)
    labels = torch.randint(len(ANSWERS), (kind.examples,), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _costs(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], few: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Seconds: bare passes, fit per batch and finishing it by each method, predicting a batch."""
    inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return _answers(model, inputs)

    def forward_backward() -> None:
        logits = _answers(model, inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), trained)

    def fit(count: int, kfac: str = "reduce") -> LaplaceLoRA:
        laplace = LaplaceLoRA(model, answer_token_ids=ANSWERS, rank=64, kfac=kfac)
        return laplace.fit(batches[:count], progress=False)

    bare, both = seconds(forward, device, rounds), seconds(forward_backward, device, rounds)
    fits = {}
    for method, kfac in METHODS.items():
        with nullcontext() if method == kfac else nothing_waits():
            short, long = (
                seconds(lambda count=count, kfac=kfac: fit(count, kfac), device, rounds)
                for count in (few, len(batches))
            )
        per_batch = (long.median - short.median) / (len(batches) - few)
        fits[method] = {
            "few": asdict(short),
            "many": asdict(long),
            "per_batch": per_batch,
            "overhead": per_batch / both.median - 1,
            "fixed": short.median - few * per_batch,
        }
    fitted = fit(few)
    predict = seconds(lambda: fitted.predict(batches[0]), device, rounds)
    return {
        "forward": asdict(bare),
        "forward_backward": asdict(both),
        "fit": fits,
        "predict": asdict(predict),
        "predict_over_forward": predict.median / bare.median,
    }


def nothing_waits() -> AbstractContextManager[object]:
    """Adds the tokens of each batch to the factors at once, however few they are."""
    return mock.patch.object(factors, "tokens_worth_an_update", return_value=0)


def _answers(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, 0, ANSWERS]
