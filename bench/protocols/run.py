"""Runs a published protocol: trains the adapters of its seeds, fits every method, writes results and the table.

    python -m bench.protocols.run bench/protocols/configs/arc_easy.toml --model meta-llama/Llama-2-7b-hf --data hub
    python -m bench.protocols.run bench/protocols/configs/arc_easy.toml --plan
    torchrun --nproc-per-node 3 -m bench.protocols.run bench/protocols/configs/arc_easy.toml --data hub

Resumable: adapters and results that are in --out are not made again. Under torchrun every process takes its share of
the seeds, on a GPU of its own; with --device-map auto a model is spread over all GPUs of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.protocols import dry, plan, table
from bench.protocols.config import Protocol, Source, read
from bench.protocols.methods import METHODS, Answer, NotHereError, Trained
from bench.protocols.model import (
    Encoded,
    adapted,
    answer_ids,
    batched,
    encoded,
    load,
    task_of,
    with_answers_alone,
)
from bench.protocols.records import HUB, questions
from bench.protocols.train import fine_tune, kept_steps, restore
from laplace_lora_fast import LaplaceWarning
from laplace_lora_fast.evaluation.provenance import provenance
from laplace_lora_fast.fitting.planner import Rates
from laplace_lora_fast.saving.atomic import replacing

EVAL_BATCH = 8
MEMBER_SEEDS = 1000  # from one member of a deep ensemble to the next: the published ones are not known


@dataclass(frozen=True)
class Job:
    """A protocol with the model and the data.

    Attributes:
        protocol: the configuration.
        base: the base model, with a head for the answers alone.
        name: of the base model.
        rows: of the train set, held-out ones included.
        tests: rows by the name of their set.
        out: folder of adapters and results.
    """

    protocol: Protocol
    base: Any
    name: str
    rows: list[Encoded]
    tests: dict[str, list[Encoded]]
    out: Path

    @property
    def folder(self) -> Path:
        """Of this protocol; rows held out make another training."""
        held_out = self.protocol.held_out
        return self.out / (self.protocol.name + (f".held-out-{held_out:g}" if held_out else ""))

    def split(self) -> tuple[list[Encoded], list[Encoded]]:
        """Rows to train on, and those held out: the last ones."""
        count = len(self.rows) - round(len(self.rows) * self.protocol.held_out)
        return self.rows[:count], self.rows[count:]

    def run(self, seed: int) -> None:
        """Fills the results of a seed with the methods that they lack."""
        protocol, file = self.protocol, self.folder / f"{seed}.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        missing = [method for method in METHODS if method not in found.get("methods", {})]
        if not missing:
            return
        train, held_out = self.split()
        every = [*self.rows, *(row for rows in self.tests.values() for row in rows)]
        task = task_of(every, len(protocol.prompt.answers))
        # a fresh adapter a training: the first draws its weights, later ones are put into it
        model = adapted(self.base, protocol.lora, seed)
        fresh = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        steps = kept_steps(protocol.train, protocol.methods.checkpoints)
        checkpoints = self._ensure(model, task, train, seed, steps)
        members = []
        for number in range(1, protocol.methods.members):
            own = seed + MEMBER_SEEDS * number
            _draw(model, fresh, own)
            members += self._ensure(model, task, train, own, [protocol.train.steps])
        restore(model, checkpoints[-1])

        def batches(rows: list[Encoded]) -> list[dict[str, Tensor]]:
            return batched(rows, EVAL_BATCH, task)

        trained = Trained(
            model,
            task,
            batches(train),
            batches(held_out) if held_out else None,
            {name: batches(rows) for name, rows in self.tests.items()},
            checkpoints,
            members,
            protocol.methods,
            seed,
        )
        found = {  # what a table needs
            "protocol": protocol.name,
            "column": protocol.column,
            "model": self.name,
            "seed": seed,
            "held_out": protocol.held_out,
            "tests": {name: len(rows) for name, rows in self.tests.items()},
            "trained_on": len(train),
            "methods": found.get("methods", {}),
        }
        for method in missing:
            found["methods"][method] = self._scored(METHODS[method], trained)
            found["environment"] = provenance(("torch", "transformers", "peft"))
            with replacing(file) as partial:
                partial.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{protocol.name} seed {seed}: {method}", flush=True)
        model.unload()

    def _ensure(self, model: Any, task: Any, rows: list[Encoded], seed: int, steps: list[int]) -> list[Path]:
        """Files of a training after some steps, which is made where one is missing."""
        files = {step: self.folder / "adapters" / str(seed) / f"{step}.safetensors" for step in steps}
        if not all(file.exists() for file in files.values()):
            fine_tune(model, task, rows, self.protocol.train, seed, files)
        return list(files.values())

    def _scored(self, method: Any, trained: Trained) -> dict[str, Any]:
        try:
            answer: Answer = method(trained)
        except NotHereError as error:
            return {"left_out": str(error)}
        bins = self.protocol.methods.bins
        found = {name: table.scores(each, bins) for name, each in answer.predictions.items()}
        return {"scores": found, **answer.facts}


def _draw(model: Any, fresh: dict[str, Tensor], seed: int) -> None:
    """Weights of an untrained adapter: lora_A as PEFT draws them, by another seed; the rest as it was."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in fresh:
                if "lora_A" in name:
                    torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
                else:
                    parameter.copy_(fresh[name])


def share(seeds: list[int]) -> list[int]:
    """The seeds of this process under torchrun; all of them otherwise."""
    return seeds[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


def own_device(device: str) -> str:
    """This process's GPU under torchrun."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def job_of(protocol: Protocol, base: Any, tokenizer: Any, name: str, data: str, out: Path) -> Job:
    """A job, its test prompts that stand in the train set dropped."""

    def rows(source: Source) -> list[Encoded]:
        found = questions(source, data, protocol.prompt)
        return encoded(tokenizer, found, protocol.prompt, source.prompt)

    train = rows(protocol.train_set)
    seen = {tuple(row.ids) for row in train}
    tests = {}
    for source in protocol.test_sets:
        listed = rows(source)
        tests[source.name] = [row for row in listed if tuple(row.ids) not in seen]
        if len(tests[source.name]) < len(listed):
            print(
                f"{source.name}: {len(listed) - len(tests[source.name])} prompts stand in the train set: dropped"
            )
    base = with_answers_alone(base, answer_ids(tokenizer, protocol.prompt))
    return Job(protocol, base, name, train, tests, out)


def main() -> None:
    """Runs, or plans, a protocol."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--model", help="folder or hub name; by default the protocol's")
    parser.add_argument("--data", default=HUB, help='folder of local files, or "hub"')
    parser.add_argument("--out", type=Path, default=Path("build/protocols"))
    parser.add_argument("--seeds", type=int, nargs="+", help="by default the protocol's")
    parser.add_argument("--held-out", type=float, help="share of the training rows to tune by")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of the base model: auto, float32, bfloat16, float16")
    parser.add_argument("--quantise", type=int, choices=(0, 4, 8), default=0, help="bits; needs bitsandbytes")
    parser.add_argument("--device-map", help='such as "auto": the model over several GPUs')
    parser.add_argument("--plan", action="store_true", help="print what it would cost, and do nothing")
    parser.add_argument("--dry", action="store_true", help="a tiny random model, a few rows and steps")
    parser.add_argument("--budget", type=float, default=4.0, help="GiB for the posterior, for --plan")
    parser.add_argument("--tflops", type=float, default=300.0, help="sustained in the passes, for --plan")
    parser.add_argument("--tflops-fp64", type=float, default=10.0, help="sustained in fp64, for --plan")
    given = parser.parse_args()
    protocol = read(given.config)
    protocol = replace(protocol, seeds=given.seeds or protocol.seeds)
    if given.held_out is not None:
        protocol = replace(protocol, held_out=given.held_out)
    if given.plan:
        rates = Rates(given.tflops * 1e12, given.tflops_fp64 * 1e12)
        print("\n".join(plan.lines(protocol, given.model, int(given.budget * 2**30), rates)))
        return
    warnings.simplefilter("ignore", LaplaceWarning)  # the grid's edge is an answer here
    if given.dry:
        protocol, name, data = dry.smaller(protocol), "a tiny random model", str(dry.ROWS)
        base, tokenizer = dry.model(protocol)
    else:
        name, data = given.model or protocol.model, given.data
        base, tokenizer = load(name, own_device(given.device), given.dtype, given.quantise, given.device_map)
    job = job_of(protocol, base, tokenizer, name, data, given.out)
    for seed in share(protocol.seeds):
        job.run(seed)
    print(table.write(given.out))


if __name__ == "__main__":
    main()
