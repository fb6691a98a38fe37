"""What fitting and predicting cost on Llama-shaped models, over a bare forward and backward pass."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor, nn

import laplace_kernels as lk
from bench.gpu.timing import Laps, Spread, no_fallback, recording, seconds
from laplace_lora_fast import LaplaceLoRA, factors

Batch = dict[str, Tensor]

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
BATCHES = 16
OPS = ("gram_", "gram_sketch_", "jacobian_stats")  # of fitting and predicting


def measure_models(device: torch.device, dry: bool, rounds: int, deadline: float) -> Iterator[dict[str, Any]]:
    """One record per model, LoRA targets and backend; a record says so when it failed or time ran out before it."""
    batch_size, tokens = (2, 8) if dry else (4, 512)
    for name, shape in (TINY if dry else SHAPES).items():
        for targets in TARGETS:
            labels = {"model": name, "targets": targets, "examples": batch_size, "tokens": tokens}
            if time.monotonic() > deadline:
                yield {**labels, "skipped": "out of time"}
                continue
            batches = [make_batch(shape, batch_size, tokens, device) for _ in range(BATCHES)]
            for record in _measure_model(shape, TARGETS[targets], batches, device, rounds, deadline):
                yield labels | record
            gc.collect()  # a model's modules refer to one another in circles


def _measure_model(
    shape: dict[str, int],
    targets: Any,
    batches: list[Batch],
    device: torch.device,
    rounds: int,
    deadline: float,
) -> Iterator[dict[str, Any]]:
    start: dict[str, Any] = {}
    with recording(start, "failed"):
        model = build(shape, targets, device)
        bare = _bare(model, batches[0], device, rounds)
    if start:
        yield start
        return
    for backend in lk.backends():
        with lk.use_backend(backend), no_fallback():
            if all(lk.explain(op, device, torch.bfloat16).backend != backend for op in OPS):
                continue
            record = {"backend": backend, **{passes: asdict(spread) for passes, spread in bare.items()}}
            if time.monotonic() > deadline:
                record["skipped"] = "out of time"
            else:
                with recording(record, "failed"):
                    record |= _costs(model, batches, bare, device, rounds)
        yield record


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


def make_batch(shape: dict[str, int], size: int, tokens: int, device: torch.device) -> Batch:
    """Random tokens without padding."""
    ids = torch.randint(shape["vocab_size"], (size, tokens), device=device)
    labels = torch.randint(len(ANSWERS), (size,), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _bare(model: nn.Module, batch: Batch, device: torch.device, rounds: int) -> dict[str, Spread]:
    """Seconds of the model's own passes over a batch."""

    def forward() -> Tensor:
        with torch.no_grad():
            return _answers(model, batch)

    def forward_backward() -> None:
        logits = _answers(model, batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), trained)

    return {
        "forward": seconds(forward, device, rounds),
        "forward_backward": seconds(forward_backward, device, rounds),
    }


def _costs(
    model: nn.Module, batches: list[Batch], bare: dict[str, Spread], device: torch.device, rounds: int
) -> dict[str, Any]:
    """Seconds per batch of fitting by either treatment of tokens; of the rest of a fit; of predicting a batch."""
    laps, start = Laps(batches, device), time.perf_counter()
    fitted = LaplaceLoRA(model, answer_token_ids=ANSWERS, structure="kfac", rank=64).fit(laps, progress=False)
    passes = sum(laps.seconds())  # waits for the device
    rest = time.perf_counter() - start - passes
    predict = seconds(lambda: fitted.predict(batches[0]), device, rounds)
    reduce, expand = laps.spread(), _expand(model, batches, device)
    with mock.patch.object(factors, "tokens_worth_an_update", return_value=0):  # no token waits for others
        at_once = _expand(model, batches, device)
    return {
        "fit_per_batch": asdict(reduce),
        "fit_overhead": reduce.median / bare["forward_backward"].median - 1,
        "fit_rest": rest,
        "fit_expand_per_batch": asdict(expand),
        "fit_expand_overhead": expand.median / bare["forward_backward"].median - 1,
        "fit_expand_at_once_per_batch": asdict(at_once),
        "fit_expand_at_once_overhead": at_once.median / bare["forward_backward"].median - 1,
        "predict": asdict(predict),
        "predict_over_forward": predict.median / bare["forward"].median,
    }


def _expand(model: nn.Module, batches: list[Batch], device: torch.device) -> Spread:
    """Seconds per batch with every token's row in the factors, dense up to 8 GiB; without their eigenvectors."""

    class Enough(Exception):
        """Ends a fit after its last batch."""

    class Passes(Laps):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            raise Enough

    laps = Passes(batches, device)
    laplace = LaplaceLoRA(model, answer_token_ids=ANSWERS, kfac="expand", memory_budget=8 << 30)
    with contextlib.suppress(Enough):
        laplace.fit(laps, progress=False)
    return laps.spread()


def _answers(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, 0, ANSWERS]
