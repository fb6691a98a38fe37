"""What fitting and predicting cost on Llama-shaped models, over a bare forward and backward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import peft
import torch
import transformers
from torch import nn

import laplace_kernels as lk
from bench.gpu.timing import seconds
from laplace_lora_fast import LaplaceLoRA

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
FEW, MANY = 2, 6  # batches; their difference separates the cost per batch from that of finishing a fit


def measure_models(device: torch.device, dry: bool, rounds: int, deadline: float) -> Iterator[dict[str, Any]]:
    """One record per model, LoRA targets and backend; a record says so when time ran out before it."""
    batch_size, tokens = (2, 8) if dry else (4, 512)
    for name, shape in (TINY if dry else SHAPES).items():
        for targets in TARGETS:
            labels = {"model": name, "targets": targets, "examples": batch_size, "tokens": tokens}
            if time.monotonic() > deadline:
                yield {**labels, "skipped": "out of time"}
                continue
            model = build(shape, TARGETS[targets], device)
            batches = [make_batch(shape, batch_size, tokens, device) for _ in range(MANY)]
            for backend in lk.backends():
                with lk.use_backend(backend):
                    if lk.explain("gram_", device, torch.bfloat16).backend == backend:
                        yield {**labels, "backend": backend, **_costs(model, batches, device, rounds)}
            del model


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


def make_batch(
    shape: dict[str, int], size: int, tokens: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Random tokens without padding."""
    ids = torch.randint(shape["vocab_size"], (size, tokens), device=device)
    labels = torch.randint(len(ANSWERS), (size,), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _costs(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], device: torch.device, rounds: int
) -> dict[str, Any]:
    """Seconds: bare passes, fit per batch, finishing a fit, predicting a batch."""
    inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return _answers(model, inputs)

    def forward_backward() -> None:
        logits = _answers(model, inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), trained)

    def fit(count: int) -> LaplaceLoRA:
        laplace = LaplaceLoRA(model, answer_token_ids=ANSWERS, rank=64)
        return laplace.fit(batches[:count], progress=False)

    bare, both = seconds(forward, device, rounds), seconds(forward_backward, device, rounds)
    few, many = (seconds(lambda count=count: fit(count), device, rounds) for count in (FEW, MANY))
    fitted = fit(FEW)
    predict = seconds(lambda: fitted.predict(batches[0]), device, rounds)
    per_batch = (many.median - few.median) / (MANY - FEW)
    return {
        "forward": asdict(bare),
        "forward_backward": asdict(both),
        "fit_few": asdict(few),
        "fit_many": asdict(many),
        "fit_per_batch": per_batch,
        "fit_overhead": per_batch / both.median - 1,
        "fit_fixed": few.median - FEW * per_batch,
        "predict": asdict(predict),
        "predict_over_forward": predict.median / bare.median,
    }


def _answers(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, 0, ANSWERS]
