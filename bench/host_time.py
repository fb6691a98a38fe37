"""Python time of a fit's hooks beside that of the model itself: `python -m bench.host_time`.

With short texts a GPU waits for Python, which then is what a fit costs. So: a Llama with the 32 decoder layers of a 7B
model and next to no width, whose arithmetic takes no time. Its fits go the way of 16-bit streams on a GPU, made by the
CPU's fp32 products, of which as many are called; what a call of CUDA takes is in neither side. One batch of a fit
beside a forward and a backward pass of the bare model, in processor time, in turns, the medians of many. Beside them
what no fit by hooks can do without: hooks on every LoRA layer and its output that do nothing, and gradients that are
not written to anyone's `.grad`.

Writes bench/results/host_time.json and .md, to which it adds what it finds under the name of a commit.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor, nn

from bench.gpu.models import ANSWERS, TARGETS, answers_of, contrast, forward_backward
from laplace_kernels.ops import blocks
from laplace_lora_fast import KFAC, Answers, LaplaceLoRA, Rows
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.fitting.finite import Screen
from laplace_lora_fast.model.contexts import frozen
from laplace_lora_fast.model.observer import GraphStart
from laplace_lora_fast.structures import Structure

RESULT = Path(__file__).parent / "results" / "host_time.json"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 32, "vocab_size": 64,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
EMPTY = "hooks that do nothing"
STRUCTURES: dict[str, Structure] = {"rows": Rows(columns=8), "KFAC reduce": KFAC(factors="dense")}
SEQUENCES, TOKENS, BATCHES = 2, 8, 12
TARGET = 0.25
CPU = torch.device("cpu")


def build(targets: str) -> nn.Module:
    """The model, with a random adapter."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, max_position_embeddings=64))
    adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS[targets], init_lora_weights=False)
    return peft.get_peft_model(base, adapter).eval()


def make_batch(padded: bool, seed: int) -> dict[str, Tensor]:
    """With pads, half of the sequences lack a quarter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SHAPE["vocab_size"], (SEQUENCES, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[: SEQUENCES // 2, : TOKENS // 4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, (SEQUENCES,))}


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Streams go as 16-bit ones do; the library's products ignore that their sums are to be more precise."""

    def plainly(product: Any) -> Any:
        return lambda a, b, out_dtype=None, *, out=None: product(a, b, out=out)

    with (
        mock.patch.object(blocks, "sums_in_fp32", _of_any),
        mock.patch.object(Screen, "_reads", _of_none),  # on a CPU it reads every stream
        mock.patch.object(torch, "mm", plainly(torch.mm)),
        mock.patch.object(torch, "bmm", plainly(torch.bmm)),
    ):
        yield


def _of_any(X: Tensor) -> bool:
    return True


def _of_none(screen: Screen, x: Tensor) -> bool:
    return False


class Laps:
    """Batches, and the processor time from when each is handed out until the next is asked for."""

    def __init__(self, batches: Sequence[dict[str, Tensor]]) -> None:
        self._batches = batches
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._batches:
            start = time.process_time()
            yield batch
            self.seconds.append(time.process_time() - start)


def measure(targets: str, padded: bool, rounds: int) -> list[dict[str, Any]]:
    """A record a structure, and one of empty hooks: milliseconds of a batch, but the first two, and of bare passes."""
    model, batches = build(targets), [make_batch(padded, seed) for seed in range(BATCHES)]
    times: dict[str, list[float]] = {name: [] for name in ("bare", EMPTY, *STRUCTURES)}
    for _ in range(rounds):
        for name, seconds in times.items():
            laps = Laps(batches)
            gc.collect()
            if name == "bare":
                forward_backward(model, CPU, laps)  # type: ignore[arg-type]
            elif name == EMPTY:
                with_empty_hooks(model, laps)
            else:
                fit(model, STRUCTURES[name], laps)
            seconds += laps.seconds[2:]
    bare = statistics.median(times.pop("bare"))
    about = {"targets": targets, "padded": padded, "bare_ms": bare * 1e3}
    return [
        {**about, "structure": name, "fit_ms": statistics.median(seconds) * 1e3}
        for name, seconds in times.items()
    ]


def with_empty_hooks(model: nn.Module, laps: Laps) -> None:
    """The bare passes, with the hooks of a fit but not what they do."""
    anchor = torch.zeros((), requires_grad=True)

    def on_output(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        started: Tensor = output if output.requires_grad else GraphStart.apply(output, anchor)
        started.register_hook(_nothing)
        return started

    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    hooks = [layer.register_forward_hook(on_output, prepend=True, with_kwargs=True) for layer in layers]
    try:
        with frozen(model):
            for batch in laps:
                answers = contrast(answers_of(model, batch, CPU))
                torch.autograd.grad(answers, [anchor], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()


def _nothing(g: Tensor) -> None:
    pass


def fit(model: nn.Module, structure: Structure, laps: Laps) -> None:
    """All of it; what comes after the last batch is in no lap."""
    with as_on_a_gpu():
        LaplaceLoRA(model, Answers(ANSWERS), structure=structure).fit(laps, progress=False)


def added(record: dict[str, Any]) -> float:
    """What a fit adds, over the model's own."""
    return float(record["fit_ms"] / record["bare_ms"] - 1)


def markdown(found: dict[str, Any]) -> str:
    """The table: a column for every name under which something was measured."""
    lines = [
        "# Python time of a fit",
        "",
        "What one batch of a fit adds to the processor time of the model's own forward and backward pass, by",
        f"`python -m bench.host_time`: a Llama of {SHAPE['num_hidden_layers']} decoder layers and",
        f"width {SHAPE['hidden_size']} on a CPU, whose arithmetic takes next to no time, with 64 LoRA layers (q, v)",
        f"or 224; {SEQUENCES} texts of {TOKENS} tokens, two classes, the way of 16-bit streams on a GPU. In brackets",
        "milliseconds of the fit and of the model. Hooks that do nothing, and gradients that are written to no one's",
        "`.grad`, are what no fit by hooks can do without. They alone take about the 25% that were the aim of a whole",
        f"fit: the aim is {TARGET:.0%} over them.",
        "",
        "| LoRA on | structure | pads | " + " | ".join(found) + " |",
        "|---|---|---|" + "---:|" * len(found),
    ]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for name, one in found.items():
        for record in one["records"]:
            row = record["targets"], record["structure"], "yes" if record["padded"] else "no"
            text = f"{added(record):.0%} ({record['fit_ms']:.1f}, {record['bare_ms']:.1f})"
            cells.setdefault(row, {})[name] = text
    order = [EMPTY, *STRUCTURES]
    for row, texts in sorted(
        cells.items(), key=lambda cell: (cell[0][0] != "q, v", cell[0][2], order.index(cell[0][1]))
    ):
        lines.append("| " + " | ".join([*row, *(texts.get(name, "") for name in found)]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and add to what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="now", help="of the column; one of the same name is replaced")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for targets in TARGETS:
        for padded in (False, True):
            for record in measure(targets, padded, options.rounds):
                records.append(record)
                print(json.dumps(record), f"+{added(record):.0%}", flush=True)
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    found[options.name] = {**provenance(("torch", "transformers", "peft")), "records": records}
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
