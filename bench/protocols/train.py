"""Trains the adapters of a protocol and keeps the checkpoints that are used."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.protocols.config import Train
from bench.protocols.model import Encoded, batched, trainable
from laplace_lora_fast import Answers
from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks
from laplace_lora_fast.progress import watched
from laplace_lora_fast.saving.atomic import replacing

SHUFFLED = "shuffled"


def kept_steps(train: Train, count: int) -> list[int]:
    """The last `count` checkpoints, the end among them, as far as there are any."""
    steps = [train.steps - back * train.checkpoints for back in range(count)]
    return sorted(step for step in steps if step > 0)


def order_of(rows: Sequence[Encoded], order: str, seed: int) -> Iterator[Encoded]:
    """Rows without end: shuffled in every epoch; or by a field, each value's rows shuffled, every epoch alike."""
    generator = random.Random(seed)
    if order != SHUFFLED:
        values = sorted({row.fields[order] for row in rows})
        listed = []
        for value in values:
            some = [row for row in rows if row.fields[order] == value]
            random.Random(seed + int(value)).shuffle(some)
            listed += some
        while True:
            yield from listed
    while True:
        listed = list(rows)
        generator.shuffle(listed)
        yield from listed


def fine_tune(
    model: nn.Module, task: Answers, rows: Sequence[Encoded], train: Train, seed: int, keep: dict[int, Path]
) -> None:
    """Trains the adapter in place by cross entropy over the answers, and writes it after the steps of `keep`."""
    from tqdm import tqdm

    parameters = [parameter for _, parameter in trainable(model)]
    optimiser = torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: factor(step, train))
    source, head = order_of(rows, train.order, seed), task.head(model)
    torch.manual_seed(seed)  # of dropout
    model.train()
    with head.installed(), tqdm(total=train.steps, desc="train", leave=False, disable=not watched()) as bar:
        for step in range(1, train.steps + 1):
            for _ in range(train.accumulate):
                some = [next(source) for _ in range(min(train.batch_size, len(rows)))]
                (batch,) = batched(some, len(some), task, in_order=True)
                loss = _loss(model, head, batch) / train.accumulate
                loss.backward()
            if train.clip:
                nn.utils.clip_grad_norm_(parameters, train.clip)
            optimiser.step()
            rate.step()
            optimiser.zero_grad()
            bar.update()
            if step in keep:
                _write(model, keep[step])
    model.eval()


def factor(step: int, train: Train) -> float:
    """What the rate is multiplied with after so many steps."""
    rising = int(train.warmup * train.steps)
    if step < rising:
        return step / rising
    return max(0.0, (train.steps - step) / max(1, train.steps - rising))


def _loss(model: nn.Module, head: Any, batch: dict[str, Tensor]) -> Tensor:
    checks = DeferredChecks()
    inputs = head.inputs(batch, device_of(model), checks)
    logits = head.u(model, head.placed(model, inputs)).float()
    checks.settle()
    return nn.functional.cross_entropy(logits, batch["labels"].to(logits.device))


def _write(model: nn.Module, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {name: parameter.detach().cpu().clone() for name, parameter in trainable(model)}
    with replacing(file) as partial:
        save_file(state, partial)


def restore(model: nn.Module, file: Path) -> nn.Module:
    """The adapter of a file."""
    state = load_file(file)
    own = dict(trainable(model))
    if set(state) != set(own):
        raise ValueError(f"{file} is of another adapter: remove it, or choose another --out")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    return model.eval()
