"""What a fit would take, from a model's configuration alone: nothing is downloaded and no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from laplace_lora_fast.fitting import planner
from laplace_lora_fast.likelihoods import Categorical
from laplace_lora_fast.options import positive_number
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.base import Problem
from laplace_lora_fast.weights import LoraWeights

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Plan:
    """A plan as text.

    Attributes:
        title: of the model.
        rows: of a table, headings first.
        advice: what "auto" would take, and why.
    """

    title: str
    rows: list[list[str]]
    advice: str


@dataclass(frozen=True)
class Setting:
    """What is planned.

    Attributes:
        config: a configuration of transformers, the file or its folder.
        targets: "all-linear", or names of modules with commas between them.
        rank: of the adapter.
        examples: N.
        classes: C.
        tokens: of an example.
        budget: bytes.
    """

    config: Path
    targets: str
    rank: int
    examples: int
    classes: int
    tokens: int
    budget: int


def plan(setting: Setting, rates: planner.Rates) -> Plan:
    """The plan at the rates of a machine.

    Raises:
        ValueError: no linear layer has such a name; or the configuration is none.
    """
    model = on_meta(setting.config)
    names = target_names(model, setting.targets)
    problem = Problem(
        layers=[_weights(name, model.get_submodule(name), setting.rank) for name in names],
        likelihood=Categorical(),
        budget=setting.budget,
        seed=0,
        ranks=Ranks(None),
        n_examples=setting.examples,
        n_functions=setting.examples * (setting.classes - 1),
        shared_inputs=shared_inputs(model, names),
    )
    plans = planner.priced(problem)
    weights = sum(parameter.numel() for parameter in model.parameters())
    best = planner.chosen(plans)
    why = "; ".join(f"{type(each.structure).__name__}: {each.verdict.reason}" for each in plans)
    title = (
        f"{type(model).__name__}, {weights / 1e9:.3g}e9 weights ({planner.size(2 * weights)} in 16 bits, beside all "
        f"that follows); {len(names)} LoRA layers of rank {setting.rank}, {problem.n_parameters / 1e6:.3g}e6 LoRA "
        f"weights; {setting.examples:,} examples of {setting.tokens} tokens, {setting.classes} classes; budget "
        f"{planner.size(setting.budget)}"
    )
    advice = f"structure='auto' takes {best.structure!r}. {why}."
    if best.structure.uses_budget and best.cost is not None and best.cost.least > setting.budget:
        advice += (
            f" The budget is too small for it: the smallest that works is {planner.size(best.cost.least)}."
        )
    return Plan(title, planner.table(plans, setting.examples * setting.tokens, weights, rates), advice)


def show(console: Console, setting: Setting, tflops: float, tflops_fp64: float) -> None:
    """Prints the plan. Raises ValueError for a rate that is not positive."""
    positive_number("--tflops", tflops)
    positive_number("--tflops-fp64", tflops_fp64)
    rates = planner.Rates(tflops * 1e12, tflops_fp64 * 1e12)
    found = plan(setting, rates)
    shown = Table(*found.rows[0])
    for row in found.rows[1:]:
        shown.add_row(*map(escape, row))
    console.print(escape(found.title), soft_wrap=True)
    console.print(shown)
    console.print(escape(found.advice), soft_wrap=True)
    console.print(
        f"Seconds at {tflops:g}e12 operations a second in the passes and {tflops_fp64:g}e12 in fp64, as stated by "
        "--tflops and --tflops-fp64: not measured.",
        soft_wrap=True,
    )


def on_meta(config: Path) -> nn.Module:
    """The model without weights."""
    try:
        settings = AutoConfig.from_pretrained(str(config), local_files_only=True)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(settings)
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is no configuration of a causal language model: {error}") from error
    return model.eval()


def target_names(model: Any, targets: str) -> list[str]:
    """The linear layers that the adapter is on; as PEFT, "all-linear" leaves the output head out."""
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if targets == ALL_LINEAR:
        names = list(linear)
    else:
        wanted = {target.strip() for target in targets.split(",")}
        names = [name for name in linear if name.rpartition(".")[2] in wanted]
    if not names:
        kinds = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"--targets {targets!r}: no linear layer has such a name; there are {kinds}")
    return names


def shared_inputs(model: nn.Module, names: list[str]) -> list[int] | None:
    """For each layer the first fed by the same tensor, by a forward pass without numbers; None if that fails."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.append((name, args[0]))
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            tokens = torch.ones(1, 8, dtype=torch.long, device="meta")
            mask = torch.zeros(1, 1, 8, 8, device="meta")  # of a shape that nobody looks into
            model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except (RuntimeError, NotImplementedError, ValueError):  # code that looks at numbers
        return None
    finally:
        for handle in handles:
            handle.remove()
    first: dict[int, str] = {}
    leaders = {name: first.setdefault(id(x), name) for name, x in seen}
    return [names.index(leaders.get(name, name)) for name in names]


def _weights(name: str, module: Any, rank: int) -> LoraWeights:
    """Of a LoRA layer, on no device."""
    a, b = (
        torch.empty(*shape, device="meta")
        for shape in ((rank, module.in_features), (module.out_features, rank))
    )
    return LoraWeights(name, a, b, 1.0)
