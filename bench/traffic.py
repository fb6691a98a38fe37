"""Bytes and launches that a fit adds to a model's passes, counted without a GPU: `python -m bench.traffic`.

Llama-shaped models on torch's meta device, which runs no kernel but says which ones would run, with which operands. One
batch of a fit, not the first, is counted, and so is one whose listener does nothing: the difference is what the fit
costs. The floor is one read of every distinct input and of every output gradient of a tapped layer.

Counted are the operands and results of each operation, once each, as memory that has to be moved at least; caches are
not modelled, views are free. So this is no measurement of time, and says nothing about how fast an operation is.

Writes bench/results/traffic.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laplace_lora_fast import KFAC, Answers, Rows
from laplace_lora_fast.fitting.fit import Tally
from laplace_lora_fast.fitting.passes import Subject, run
from laplace_lora_fast.model.lora import lora_layers
from laplace_lora_fast.model.proofs.leaks import Leaks
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures import Structure
from laplace_lora_fast.structures.base import Listener, Problem, Step
from laplace_lora_fast.structures.rows import fit as rows_fit

RESULTS = Path(__file__).parent / "results"
META = torch.device("meta")
SHAPES = {
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32},
    "Llama-2-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
TARGETS: dict[str, Any] = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}
STRUCTURES: dict[str, Structure] = {"rows": Rows(), "KFAC reduce": KFAC(factors="dense")}
TEXTS = {"long": (4, 512), "short": (16, 64)}  # sequences, tokens
RANK = 8
_FEW = (2, 4)  # decoder layers
_BATCHES = {
    "rows": 2,
    "KFAC reduce": 4,
}  # the last is counted: where rows wait, their memory has grown by then
# Operations that move nothing.
_VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "slice",
        "select",
        "t",
        "transpose",
        "permute",
        "unsqueeze",
    ),
    *("squeeze", "detach", "alias", "as_strided", "split", "unbind", "split_with_sizes", "_reshape_alias"),
    *(
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "view_as",
        "diagonal",
        "unfold",
    ),
    *("lift_fresh", "is_pinned", "unsafe_split"),
}
# Operations that write to an argument and do not read it.
_OVERWRITES = {"copy_": 0, "fill_": 0, "zero_": 0}


@dataclass(frozen=True)
class Case:
    """What is counted."""

    model: str
    targets: str
    structure: str
    padded: bool
    classes: int
    texts: str


@dataclass(frozen=True)
class Count:
    """Of one batch.

    Attributes:
        floor: bytes of one read of x and g.
        bytes: that the fit moves beside the model's passes.
        launches: of kernels, likewise.
        streams: LoRA layers times backward passes.
    """

    floor: int
    bytes: int
    launches: int
    streams: int

    @property
    def over_floor(self) -> float:
        return self.bytes / self.floor

    @property
    def launches_a_stream(self) -> float:
        """A layer and pass."""
        return self.launches / self.streams


def count(case: Case) -> Count:
    """Counts a case with few decoder layers, and what all of them give: each adds the same."""
    few, more = (asdict(count_with(case, layers)) for layers in _FEW)
    steps = (SHAPES[case.model]["num_hidden_layers"] - _FEW[0]) / (_FEW[1] - _FEW[0])
    return Count(**{name: round(few[name] + steps * (more[name] - few[name])) for name in few})


def count_with(case: Case, layers: int) -> Count:
    """Counts a case for a model with so many decoder layers."""
    with autocast_on_meta():
        model = build(case.model, case.targets, layers)
        head = Answers(list(range(5, 5 + case.classes))).head(model)
        head._counts_from_zero = head.is_deterministic = head.rows_checked = head.slopes_checked = (
            True  # nothing can be proved without values
        )
        tapped = lora_layers(model, head)
        head.plain_layers |= {layer.name for layer in tapped}
        subject = Subject(model, head, tapped, Answers(list(range(5, 5 + case.classes))).likelihood)
        problem = Problem([layer.weights for layer in tapped], subject.likelihood, 1 << 60, 0, Ranks(None))
        batches = [batch(case, seed) for seed in range(_BATCHES[case.structure])]
        with mock.patch.object(rows_fit, "random_projection", _no_values):
            listener = STRUCTURES[case.structure].stages(problem)[-1].accumulator(None)
        if hasattr(listener, "_padded"):
            listener._padded.finite = True  # likewise
        whole = counted(subject, listener, batches)
        with without_checks():
            bare = counted(subject, Nothing(case.classes - 1), batches[-2:])
    own = {name: whole[1][name] - bare[1][name] for name in whole[1] | bare[1]}
    floor, streams = _floor(subject, listener, case)
    return Count(floor, whole[0] - bare[0], sum(own.values()), streams)


def counted(
    subject: Subject, listener: Listener, batches: Sequence[dict[str, Tensor]]
) -> tuple[int, Counter[str]]:
    """Bytes and launches of the last batch."""
    meter = Meter()

    class End(Exception):
        pass

    def watched() -> Iterator[dict[str, Tensor]]:
        yield from batches[:-1]
        with meter:
            yield batches[-1]
        raise End

    try:
        run(subject, watched(), listener, Tally([]).count, generator=torch.Generator())
    except End:
        return meter.bytes, meter.launches
    raise AssertionError("the loader is not at its end")


class Nothing(Listener):
    """Sends as many cotangents back as a fit would and looks at nothing."""

    def __init__(self, passes: int) -> None:
        self._passes = passes

    def start(self, step: Step) -> Tensor:
        return step.functions.plain(step.u)

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        pass

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> None:
        pass


class Meter(TorchDispatchMode):
    """Counts operations on the meta device, and what they have to move."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.launches = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        read = {
            id(leaf): leaf
            for leaf in tree_leaves((args, {key: value for key, value in kwargs.items() if key != "out"}))
            if isinstance(leaf, Tensor)
        }
        if name in _OVERWRITES:
            read.pop(id(args[_OVERWRITES[name]]), None)
        if name in _VIEWS or not any(leaf.device == META for leaf in (*read.values(), *written)):
            return result
        self.launches[name] += 1
        if name == "index_select":  # reads what it writes
            read = {0: written[0], 1: args[2]}
        self.bytes += sum(_size(leaf) for leaf in (*read.values(), *written))
        return result


def _size(x: Tensor) -> int:
    """Bytes behind a tensor; an expanded axis has one entry."""
    entries = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        entries *= length if stride else 1
    return entries * x.element_size()


def _floor(subject: Subject, listener: Any, case: Case) -> tuple[int, int]:
    """Bytes of one read of every distinct x and, in each pass, every g; and the number of those g."""
    tokens = TEXTS[case.texts][0] * TEXTS[case.texts][1]
    passes = case.classes - 1
    shared = listener._shared_inputs
    layers = [layer.weights for layer in subject.layers]
    inputs = sum(layer.d_in for index, layer in enumerate(layers) if shared[index] == index)
    outputs = sum(layer.d_out for layer in layers)
    return 2 * tokens * (inputs + passes * outputs), passes * len(layers)


def build(name: str, targets: str, layers: int) -> nn.Module:
    """A model with an adapter, bf16, without values."""
    shape = SHAPES[name] | {"num_hidden_layers": layers}
    config = transformers.LlamaConfig(
        vocab_size=32000, max_position_embeddings=4096, attn_implementation="eager", **shape
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with META:
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    adapter = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS[targets], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # PEFT trains adapters in fp32; it does not cast without values
            parameter.data = parameter.data.float()
    return adapted


def batch(case: Case, seed: int) -> dict[str, Tensor]:
    """On the CPU, as a loader gives it; with pads, the first half of the sequences lacks about a quarter."""
    n, length = TEXTS[case.texts]
    mask = torch.ones(n, length, dtype=torch.long)
    if case.padded:
        mask[: max(1, n // 2), : length // 4 + seed] = 0
    return {
        "input_ids": torch.ones_like(mask),
        "attention_mask": mask,
        "labels": torch.zeros(n, dtype=torch.long),
    }


@contextmanager
def without_checks() -> Iterator[None]:
    """A tap that checks nothing at pads."""
    quiet = {name: lambda *args: None for name in ("observe_input", "observe_gradient", "finish_pass")}
    with mock.patch.multiple(Leaks, **quiet):
        yield


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """The meta device has no autocast of its own."""

    def on_cpu(real: Any) -> Any:
        return lambda device, *args, **kwargs: real("cpu" if device == "meta" else device, *args, **kwargs)

    names = ("autocast", "is_autocast_enabled", "get_autocast_dtype")
    with mock.patch.multiple(torch, **{name: on_cpu(getattr(torch, name)) for name in names}):
        yield


def _no_values(dim: int, columns: int, seed: int, like: Tensor) -> Tensor:
    return torch.empty(dim, min(columns, dim), device=like.device, dtype=torch.bfloat16)


def cases() -> list[Case]:
    """All that the table holds."""
    found = []
    for model in SHAPES:
        for targets in TARGETS:
            for structure in STRUCTURES:
                for texts in TEXTS:
                    for padded in (False, True):
                        found += [
                            Case(model, targets, structure, padded, classes, texts) for classes in (2, 5)
                        ]
    return found


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "# What a fit moves on a GPU",
        "",
        f"Counted on torch's meta device (torch {torch.__version__}) by `python -m bench.traffic`; nothing here",
        "was run or timed. One batch of a bf16 model, LoRA of rank 8 in fp32 (as PEFT trains it). Bytes are operands",
        "and results of all operations that the fit adds to the model's own passes, checks included; the floor is one",
        "read of every distinct input x and, in each backward pass, of every output gradient g. Launches are per LoRA",
        f"layer and backward pass. Long texts are {' sequences of '.join(map(str, TEXTS['long']))} tokens, short ones",
        f"{' of '.join(map(str, TEXTS['short']))}; with pads, half of the sequences lack a quarter. Counted with",
        f"{_FEW[0]} and {_FEW[1]} decoder layers, and extended along the line through both to those of the model (but",
        "for the few reductions of pads more, two launches for each 64 MB of them).",
        "",
        "| model | LoRA on | structure | texts | pads | classes | floor, GB | moved, GB | over the floor | launches |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for each in records:
        case, counts = Case(**each["case"]), Count(**each["count"])
        lines.append(
            f"| {case.model} | {case.targets} | {case.structure} | {case.texts} | {'yes' if case.padded else 'no'} "
            f"| {case.classes} | {counts.floor / 1e9:.3g} | {counts.bytes / 1e9:.3g} | {counts.over_floor:.2f} "
            f"| {counts.launches_a_stream:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    folder = parser.parse_args().output
    records = []
    for case in cases():
        records.append({"case": asdict(case), "count": asdict(count(case))})
        print(json.dumps(records[-1]), flush=True)
    (folder / "traffic.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (folder / "traffic.md").write_text(markdown(records), encoding="utf-8")


if __name__ == "__main__":
    main()
