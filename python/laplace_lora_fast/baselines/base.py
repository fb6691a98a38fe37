"""What every baseline is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laplace_lora_fast.devices import device_of
from laplace_lora_fast.errors import DeferredChecks, InvalidBatchError
from laplace_lora_fast.evaluation.predictions import Predictions
from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.model.contexts import evaluation_mode, exclusive
from laplace_lora_fast.tasks import Task

Predict = Callable[[Loader], Predictions]


@dataclass(frozen=True)
class Case:
    """A trained model with the data that baselines may look at. Loaders are gone through more than once.

    Attributes:
        model: with its trained adapter.
        task: a classification: `Answers` or `Classes`.
        train: the training batches, with labels.
        held_out: labelled batches that were not trained on; None where there are none.
        seed: of anything random.
    """

    model: nn.Module
    task: Task
    train: Loader
    held_out: Loader | None = None
    seed: int = 0

    @property
    def known_held_out(self) -> Loader:
        """The held-out batches. Raises ValueError where there are none."""
        if self.held_out is None:
            raise ValueError("this baseline needs held-out data: pass Case(held_out=..)")
        return self.held_out


class Baseline(ABC):
    """A way to class probabilities. Derived classes are frozen dataclasses of their options.

    Attributes:
        needs_held_out: whether it looks at held-out data.
    """

    needs_held_out: bool = False

    @abstractmethod
    def fit(self, case: Case) -> Predict:
        """Prepares it, and returns what turns batches into predictions with labels."""


def logits(model: nn.Module, task: Task, loader: Loader) -> tuple[Tensor, Tensor | None]:
    """Logits [N, C] of the classes, fp64 on the CPU, and labels [N] where all batches have them.

    Raises:
        InvalidBatchError: the loader is empty, or a batch is unusable.
    """
    head, checks = task.head(model), DeferredChecks()
    parts: list[Tensor] = []
    labels: list[Tensor | None] = []
    with exclusive(model), evaluation_mode(model), torch.no_grad(), head.installed():
        for batch in loader:
            inputs = head.inputs(batch, device_of(model), checks)
            parts.append(head.u(model, head.placed(model, inputs)).double().cpu())
            labels.append(inputs.labels)
    checks.settle()
    if not parts:
        raise InvalidBatchError("the loader yielded no batch")
    known = [each for each in labels if each is not None]
    return torch.cat(parts), torch.cat(known).cpu() if len(known) == len(labels) else None


def averaged(members: Iterator[tuple[Tensor, Tensor | None]]) -> Predictions:
    """The mean of the members' probabilities, from their logits and labels."""
    probs, labels = zip(*((found.softmax(1), own) for found, own in members), strict=True)
    return Predictions(torch.stack(probs).mean(0), labels[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of one's own inside, those of the caller as they were behind it."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
