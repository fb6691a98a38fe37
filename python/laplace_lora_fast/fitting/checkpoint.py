"""Passes over data that can be interrupted: what a rank has taken in so far, and whether a loader still begins so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_lora_fast.errors import StateError
from laplace_lora_fast.fitting.passes import Loader
from laplace_lora_fast.model.batches import Batch
from laplace_lora_fast.structures.base import Accumulator
from laplace_lora_fast.structures.state import State

_OF_ACCUMULATOR = "accumulator."


@dataclass(frozen=True)
class Checkpoint:
    """Where a fit writes how far it has come, so that one that was killed goes on from there, bit for bit.

    Args:
        folder: created if missing; of one fit. Its files are removed when the fit has succeeded.
        seconds: between two writes, at least; 0 writes after every batch.

    Raises:
        ValueError: `seconds` is negative or not a number.
    """

    folder: str | PathLike[str]
    seconds: float = 300.0

    def __post_init__(self) -> None:
        seconds = self.seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
            raise ValueError(f"seconds must be a number, at least 0, got {seconds!r}")


class Recorder(Protocol):
    """Keeps the states of a fit's stages, somewhere that outlives the process."""

    def due(self) -> bool:
        """Whether it is time to write."""

    def read(self, stage: int) -> State | None:
        """What was written of a stage last, or None. Raises StateError if it is damaged or of another fit."""

    def write(self, stage: int, state: State) -> None:
        """Replaces what there is of a stage. Raises OSError, and leaves what there was, where there is no room."""


class Course:
    """How far this rank has come with one stage.

    Args:
        recorder: None: nothing is written.
        stage: which one.
        accumulator: an empty one.
        generator: of sampled labels.

    Attributes:
        batches: that were taken from the loader, in this process and before.
        tally: what was counted of them, as it was written; None where nothing was.
    """

    def __init__(
        self, recorder: Recorder | None, stage: int, accumulator: Accumulator, generator: torch.Generator
    ) -> None:
        self._recorder, self._stage = recorder, stage
        self._accumulator, self._generator = accumulator, generator
        self.batches, self._digest, self._complete = 0, "", False
        self.tally: dict[str, Any] | None = None
        if recorder is None:
            return
        saved = recorder.read(stage)
        if saved is None:
            accumulator.state()  # refuses now, not after an hour, if it has none
        else:
            self._restore(saved)

    def remaining(self, loader: Loader) -> Iterator[Batch]:
        """The batches that have not been taken in yet. The others are compared with those that were.

        Raises:
            StateError: the loader gives others.
        """
        if self._recorder is None:
            for self.batches, batch in enumerate(loader, 1):
                yield batch
            return
        passed, digest, index = self.batches, "", 0
        for index, batch in enumerate(loader, 1):
            if index > passed and self._complete:
                raise self._other_loader(f"has more than {passed} batches")
            digest = chained(digest, batch)
            if index == passed and digest != self._digest:
                raise self._other_loader(f"differs in its first {passed} batches")
            if index > passed:
                self.batches, self._digest = index, digest
                yield batch
        if index < passed:
            raise self._other_loader(f"has {index} batches, of which {passed} were taken in")
        self._complete = True

    def write_if_due(self, tally: Callable[[], dict[str, Any]], settle: Callable[[], None]) -> None:
        """After a batch, or the last one.

        Args:
            tally: gives what was counted, JSON-serialisable.
            settle: raises what was found wrong on the device in the meantime: that must not be written.
        """
        if self._recorder is None or not self._recorder.due():
            return
        settle()
        own = self._accumulator.state()
        tensors = {f"{_OF_ACCUMULATOR}{name}": tensor for name, tensor in own.tensors.items()}
        tensors["generator"] = self._generator.get_state()
        values = {
            "accumulator": own.values,
            "batches": self.batches,
            "digest": self._digest,
            "complete": self._complete,
            "tally": tally(),
        }
        self._recorder.write(self._stage, State(values, tensors, own.grown))

    def _restore(self, saved: State) -> None:
        values = saved.values
        tensors = {
            name.removeprefix(_OF_ACCUMULATOR): tensor
            for name, tensor in saved.tensors.items()
            if name.startswith(_OF_ACCUMULATOR)
        }
        self._accumulator.restore(State(values["accumulator"], tensors, saved.grown))
        self._generator.set_state(saved.tensors["generator"])
        self.batches, self._digest, self._complete = values["batches"], values["digest"], values["complete"]
        self.tally = values["tally"]

    def _other_loader(self, how: str) -> StateError:
        return StateError(
            f"the checkpoint is of a fit on other data: train_loader {how}. Pass the same batches in the same order "
            "(a DataLoader that shuffles needs a generator with a seed of its own), or delete the checkpoint's folder"
        )


def chained(digest: str, batch: Batch) -> str:
    """Stands for a batch and all before it."""
    found = hashlib.sha256(digest.encode())
    pairs = (
        sorted(batch.items(), key=lambda pair: str(pair[0])) if isinstance(batch, Mapping) else [("", batch)]
    )
    for key, value in pairs:
        found.update(f"\n{key} ".encode("utf-8", "surrogatepass"))
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            found.update(f"{plain.dtype} {list(plain.shape)} ".encode())
            found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update(repr(value).encode("utf-8", "surrogatepass"))
    return found.hexdigest()
