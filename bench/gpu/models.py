"""What fitting and predicting cost on Llama-shaped models, over the model's own passes."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor, nn

import laplace_kernels as lk
from bench.gpu.timing import Laps, Spread, no_fallback, recording
from laplace_lora_fast import KFAC, Answers, LaplaceLoRA, Rows
from laplace_lora_fast.model.contexts import frozen
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.structures.blocks import factors

Batch = dict[str, Tensor]
Case = tuple[str, str]  # model, LoRA targets
Record = dict[str, Any]

SHAPES = {
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000,
                   "num_attention_heads": 32, "num_key_value_heads": 32},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
                   "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
             "num_attention_heads": 2, "num_key_value_heads": 2},
}  # fmt: skip
TARGETS: dict[str, Any] = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}
ANSWERS = [5, 7]
BATCHES = 8
BUDGET = 12 << 30  # bytes of dense factors


def cases(dry: bool) -> list[Case]:
    """The models of interest by the usual LoRA layers first; a dry run takes a tiny one."""
    names = ["tiny"] if dry else ["Llama-2-7B", "Llama-3-8B"]
    return [(name, targets) for targets in TARGETS for name in names]


def describe(case: Case) -> Record:
    """What names a case in the report."""
    return dict(zip(("model", "targets"), case, strict=True))


@dataclass(frozen=True)
class Job:
    """Something that goes over batches once.

    Attributes:
        run: Takes the batches; each is timed from when it is handed out until the next is asked for.
        passes: The model's own passes that it is compared with.
        ops: Of laplace_kernels that it calls; a job without any does not depend on the backend.
        context: What it runs in.
    """

    run: Callable[[Laps], object]
    passes: str
    ops: tuple[str, ...] = ()
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def measure_model(case: Case, device: str, dry: bool, refused: Mapping[str, str]) -> Iterator[Record]:
    """One record per job and backend, with the model's own passes right before and after it.

    Args:
        case: model and LoRA targets.
        device: where it runs.
        dry: toy sizes.
        refused: backends that are not to be measured, and why.
    """
    name, targets = case
    on = torch.device(device)
    model = build(SHAPES[name], TARGETS[targets], on)
    size, tokens = (2, 8) if dry else (4, 512)
    long = [make_batch(SHAPES[name], size, tokens) for _ in range(BATCHES)]
    short = [make_batch(SHAPES[name], 1, tokens // 4) for _ in range(BATCHES)]
    own = {
        "forward": partial(_forward, model, on),
        "forward + backward": partial(forward_backward, model, on),
    }
    training = {"training step": partial(_training_step, model, on)}
    for job_name, passes in (own | training).items():
        yield {
            **describe(case),
            "job": job_name,
            "tokens": size * tokens,
            "seconds": asdict(_time(passes, long, on)),
        }
    for job_name, job in _jobs(model).items():
        batches = short if "short" in job_name else long
        bare = _time(own[job.passes], batches, on)
        for backend in lk.backends():
            served = {op: _serving(backend, op, on) for op in job.ops}
            if (backend not in served.values() and backend != "reference") or backend in refused:
                continue
            record: Record = {**describe(case), "job": job_name, "backend": backend if job.ops else "any"}
            record |= {"tokens": sum(b["input_ids"].numel() for b in batches) // BATCHES, "served": served}
            before = bare
            with recording(record, "failed"), lk.use_backend(backend), job.context():
                record["seconds"] = asdict(_time(job.run, batches, on))
                bare = _time(own[job.passes], batches, on)
                record |= {
                    "passes": job.passes,
                    "passes_seconds": statistics.mean([before.median, bare.median]),
                }
            yield record


def _jobs(model: nn.Module) -> dict[str, Job]:
    fit = partial(_fit, model)
    both = "forward + backward"
    at_once = partial(mock.patch.object, factors, "tokens_worth_an_update", return_value=0)
    expand = KFAC(tokens="expand")  # dense factors up to the budget: all of them for q and v
    sketches = KFAC(tokens="expand", factors="sketch")
    both_ops = ("gram_", "gram_sketch_")
    return {
        "fit, rows (default)": Job(partial(fit, Rows()), both),
        "fit, KFAC reduce": Job(partial(fit, KFAC()), both),
        "fit, KFAC expand": Job(partial(fit, expand), both, both_ops),
        "fit, KFAC expand, sketches": Job(partial(fit, sketches), both, ("gram_sketch_",)),
        "fit, KFAC expand, short batches": Job(partial(fit, expand), both, (*both_ops, "gram_group_")),
        "fit, KFAC expand, short batches, no token waits": Job(partial(fit, expand), both, both_ops, at_once),
        "predict, rows (default)": Job(partial(_predict, model, Rows()), both),
        "predict, KFAC of rank 64": Job(partial(_predict, model, KFAC(rank=64)), both),
    }  # fmt: skip


def _serving(backend: str, op: str, device: torch.device) -> str:
    with lk.use_backend(backend):
        return lk.explain(op, device, torch.bfloat16).backend


def _time(run: Callable[[Laps], object], batches: list[Batch], device: torch.device) -> Spread:
    """Seconds per batch, without the first one, on which kernels are compiled and buffers allocated."""
    laps = Laps(batches, device)
    with no_fallback():
        run(laps)
    return laps.spread()


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


def make_batch(shape: dict[str, int], size: int, tokens: int) -> Batch:
    """Random tokens without padding, in host memory as a DataLoader leaves them there."""
    ids = torch.randint(shape["vocab_size"], (size, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(2, (size,))}
    return {name: value.pin_memory() for name, value in batch.items()} if torch.cuda.is_available() else batch


class _Enough(Exception):
    """Ends a fit after its last batch: what comes then does not depend on how many there were."""


def _fit(model: nn.Module, structure: Structure, laps: Laps) -> None:
    budget = BUDGET if structure.uses_budget else None
    laplace = LaplaceLoRA(model, Answers(ANSWERS), structure=structure, budget=budget)
    with contextlib.suppress(_Enough):
        laplace.fit(_Cut(laps), progress=False)


class _Cut:
    def __init__(self, laps: Laps) -> None:
        self._laps = laps

    def __len__(self) -> int:
        return len(self._laps)

    def __iter__(self) -> Iterator[Batch]:
        yield from self._laps
        raise _Enough


def _predict(model: nn.Module, structure: Structure, laps: Laps) -> None:
    laplace = LaplaceLoRA(model, Answers(ANSWERS), structure=structure)
    laplace.fit(laps.batches, progress=False).predictions(laps, progress=False)


def _forward(model: nn.Module, device: torch.device, laps: Laps) -> None:
    with torch.no_grad():
        for batch in laps:
            answers_of(model, batch, device)


def forward_backward(model: nn.Module, device: torch.device, laps: Laps) -> None:
    """Back to the output of the first LoRA layer, with no weight gradient: what a fit cannot do without."""
    first = next(module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    start = first.register_forward_hook(lambda *args: args[-1].clone().requires_grad_())
    try:
        with frozen(model):
            for batch in laps:
                contrast(answers_of(model, batch, device)).backward()
    finally:
        start.remove()


def _training_step(model: nn.Module, device: torch.device, laps: Laps) -> None:
    """With the gradients of the LoRA weights; no optimiser."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for batch in laps:
        torch.autograd.grad(contrast(answers_of(model, batch, device)), trained)


def contrast(logits: Tensor) -> Tensor:
    return (logits[:, 0] - logits[:, 1]).sum()


def answers_of(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    inputs = {name: batch[name].to(device, non_blocking=True) for name in ("input_ids", "attention_mask")}
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, 0, ANSWERS]
