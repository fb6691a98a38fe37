"""A fit's checkpoint on disk: for each rank and stage a file with what changes, and files with what only grows.

Each is a safetensors file with a checksum, written whole or not at all. What has grown since the last write goes into
a file of its own, which the other then counts: a fit that is killed between the two has lost nothing. A checkpoint
belongs to one fit: it holds the facts that ranks have to agree on, and is refused where they differ.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import torch
from safetensors import safe_open
from torch import Tensor

from laplace_lora_fast.errors import StateError
from laplace_lora_fast.fitting.checkpoint import Checkpoint
from laplace_lora_fast.ranks import Ranks, first_difference, short
from laplace_lora_fast.saving import atomic, checked
from laplace_lora_fast.structures.state import State

FORMAT = "laplace-lora-fast-checkpoint/1"
_OF_THE_PRIOR = ("prior_precision", "noise")
_NAME = re.compile(r"rank-(\d+)-of-(\d+)-stage-\d+(-part-\d+)?\.safetensors")


@contextmanager
def recording(
    checkpoint: str | PathLike[str] | Checkpoint | None, facts: Mapping[str, Any], ranks: Ranks
) -> Iterator[Recorder | None]:
    """The recorder of a fit that runs inside, None without a checkpoint; what it wrote is removed if that succeeds.

    Args:
        checkpoint: a folder, or one with options.
        facts: what the fit is made of, JSON-serialisable; of the prior nothing is needed.
        ranks: of the fit.

    Raises:
        StateError: see `Recorder`.
    """
    if checkpoint is None:
        yield None
        return
    with ranks.together():
        options = {key: each for key, each in facts["options"].items() if key not in _OF_THE_PRIOR}
        own = {key: each for key, each in facts.items() if key != "the prior mean"} | {"options": options}
        chosen = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        recorder = Recorder(chosen, own, ranks)
    with recorder:
        yield recorder
        recorder.remove()


class Recorder:
    """Writes and reads the checkpoint of this rank: see `fitting.checkpoint.Recorder`. A context manager.

    Args:
        checkpoint: where, and how often.
        facts: what the fit is made of, JSON-serialisable.
        ranks: of the fit.

    Raises:
        StateError: the folder holds the checkpoint of a fit with another number of ranks, or another process uses it.
        OSError: the folder cannot be written to.
    """

    def __init__(self, checkpoint: Checkpoint, facts: Mapping[str, Any], ranks: Ranks) -> None:
        self._folder, self._seconds = Path(checkpoint.folder), checkpoint.seconds
        self._facts = checked.as_json(facts)
        self._rank = f"rank-{ranks.rank}-of-{ranks.size}"
        self._run = secrets.token_hex(8)
        self._parts: dict[int, int] = {}  # files of each stage
        self._written: dict[int, dict[str, int]] = {}  # how many of each list are in them
        self._last = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._refuse_other_ranks(ranks.size)
        self._lock = self._locked()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._last >= self._seconds

    def read(self, stage: int) -> State | None:
        """What was written of a stage last, or None.

        Raises:
            StateError: it is damaged, of another version or of another fit; says how they differ.
        """
        path = self._path(stage)
        if not path.is_file():
            return None
        header, tensors = checked.read(path, FORMAT, f"delete {self._folder} to start again")
        try:
            facts = header["facts"]
            run, parts = str(header["run"]), int(header["parts"])
            values, names = header["values"], set(header["lists"])
        except checked.MALFORMED as error:
            raise self._damaged(path, error) from error
        self._refuse_other_fit(facts)
        grown: dict[str, list[Path]] = {}
        for part in range(parts):
            own = self._path(stage, part)
            if not own.is_file():
                raise StateError(f"{own} of the checkpoint is missing: delete {self._folder} to start again")
            facts, pieces = checked.read(own, FORMAT, f"delete {self._folder} to start again")
            if facts != {"run": run, "part": part}:
                raise StateError(f"{own} is of another fit: delete {self._folder} to start again")
            for name in pieces:
                grown.setdefault(name, []).append(own)
        counts = {name: len(paths) for name, paths in grown.items()}
        self._run, self._parts[stage], self._written[stage] = run, parts, counts
        lists = {name: _Pieces(name, paths) for name, paths in grown.items()}
        return State(values, tensors, {name: lists.get(name, ()) for name in names | lists.keys()})

    def write(self, stage: int, state: State) -> None:
        """Replaces what there is of a stage. After an error, of a full disk say, what there was is still there."""
        parts, counts = self._parts.get(stage, 0), dict(self._written.get(stage, {}))
        new = {}
        for name, pieces in state.grown.items():
            if len(pieces) > counts.get(name, 0):
                new[name] = torch.cat([piece.cpu() for piece in pieces[counts.get(name, 0) :]])
                counts[name] = len(pieces)
        if new:
            checked.write(self._path(stage, parts), FORMAT, {"run": self._run, "part": parts}, new)
            parts += 1
        header = {"facts": self._facts, "run": self._run, "parts": parts, "values": state.values}
        checked.write(self._path(stage), FORMAT, header | {"lists": sorted(state.grown)}, state.tensors)
        self._parts[stage], self._written[stage] = parts, counts
        self._last = time.monotonic()

    def remove(self) -> None:
        """Removes this rank's files, and the folder if nothing else is in it: the fit has succeeded."""
        found = [path for path in self._folder.iterdir() if path.name.startswith(f"{self._rank}-")]
        for path in sorted(found, key=lambda path: "-part-" in path.name):  # what counts the parts first
            path.unlink()
        self._lock_file.unlink(missing_ok=True)
        try:
            self._folder.rmdir()
        except OSError:
            return  # other ranks' files, or the user's

    @property
    def _lock_file(self) -> Path:
        return self._folder / f".{self._rank}.lock"

    def _path(self, stage: int, part: int | None = None) -> Path:
        return self._folder / (
            f"{self._rank}-stage-{stage}" + ("" if part is None else f"-part-{part}") + ".safetensors"
        )

    def _locked(self) -> int:
        handle = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        if atomic.lock(handle) is False:
            os.close(handle)
            raise StateError(
                f"another process writes a checkpoint to {self._folder}: pass a folder of its own"
            )
        return handle

    def _refuse_other_ranks(self, size: int) -> None:
        for path in self._folder.iterdir():
            found = _NAME.fullmatch(path.name)
            if found and int(found[2]) != size:
                raise StateError(
                    f"{self._folder} holds the checkpoint of a fit by {found[2]} processes, this one is by {size}: "
                    "start as many again, or delete the folder"
                )

    def _refuse_other_fit(self, facts: Any) -> None:
        difference = first_difference("", facts, self._facts)
        if difference:
            name, then, now = difference
            raise StateError(
                f"{self._folder} holds the checkpoint of another fit, which differs in {name}: {short(then)} then, "
                f"{short(now)} now. Pass what was passed then, or delete the folder to start again"
            )

    def _damaged(self, path: Path, error: Exception) -> StateError:
        return StateError(f"{path} has a damaged header ({error}): delete {self._folder} to start again")


class _Pieces(Sequence[Tensor]):
    """One list of what has grown, a tensor a file; each is read when it is asked for."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self._name, self._paths = name, paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return _Pieces(self._name, self._paths[index])
        with safe_open(self._paths[index], framework="pt") as file:
            tensor: Tensor = file.get_tensor(self._name).clone()
            return tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
