"""Where the Jacobian rows of a fit live: on the device, in CPU memory, or in a memory-mapped file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from laplace_lora_fast.ranks import Ranks


class Place(str, Enum):
    """Storage of rows, in the order they are tried."""

    DEVICE = "device"
    CPU = "cpu"
    DISK = "disk"


class RowStore:
    """One growing matrix [R, features] per block.

    Rows stay on the device until all blocks together exceed `memory_budget`, then move to CPU memory, and once four
    times the budget is exceeded to memory-mapped files in the temporary folder (TMPDIR). There they stay: a kernel or
    a prediction reads one block at a time. The files have no names, so that nothing is left of them however the
    process ends.

    Args:
        n_blocks: number of matrices.
        memory_budget: bytes.
    """

    def __init__(self, n_blocks: int, memory_budget: int) -> None:
        self.place = Place.DEVICE
        self._budget = memory_budget
        self._chunks: list[list[Tensor]] = [[] for _ in range(n_blocks)]
        self._devices: list[torch.device] = [torch.device("cpu")] * n_blocks
        self._bytes = 0

    def append(self, block: int, rows: Tensor) -> None:
        """Adds rows [n, features] below the block's others. Raises OSError where they do not fit on the disk."""
        self._devices[block] = rows.device
        self._bytes += rows.numel() * rows.element_size()
        wanted = self._place_for(self._bytes)
        if wanted is not self.place:
            self.place = wanted
            for index, chunks in enumerate(self._chunks):
                self._chunks[index] = [self._stored(chunk) for chunk in chunks]
        self._chunks[block].append(self._stored(rows))

    def matrices(self) -> list[Tensor]:
        """[R, features] of every block, where its rows live; chunks are let go block by block."""
        return [self._matrix(block) for block in range(len(self._chunks))]

    @property
    def chunks(self) -> list[list[Tensor]]:
        """For each block what has been appended, where it lives."""
        return self._chunks

    def gathered(self, ranks: Ranks, devices: Sequence[torch.device]) -> RowStore:
        """A store of the rows of all ranks, rank by rank, for each block on its device; this one is emptied."""
        whole = RowStore(len(self._chunks), self._budget)
        for block, device in enumerate(devices):
            mine = self._matrix(block) if self._chunks[block] else None
            whole.append(block, ranks.gather(mine).to(device))
        return whole

    def _matrix(self, block: int) -> Tensor:
        chunks, self._chunks[block] = self._chunks[block], []
        if self.place is not Place.DISK:
            return torch.cat(chunks)
        rows = sum(len(chunk) for chunk in chunks)
        matrix = _mapped(torch.Size([rows, chunks[0].shape[1]]), chunks[0].dtype)
        return torch.cat(chunks, out=matrix)

    def _place_for(self, used: int) -> Place:
        if used <= self._budget:
            return Place.DEVICE
        on_cpu = all(device.type == "cpu" for device in self._devices)
        if used <= 4 * self._budget and not on_cpu:
            return Place.CPU
        return Place.DISK

    def _stored(self, rows: Tensor) -> Tensor:
        if self.place is Place.DEVICE:
            return rows
        rows = rows.cpu()
        if self.place is Place.CPU:
            return rows
        return _mapped(rows.shape, rows.dtype).copy_(rows)


def _mapped(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor in a file without a name, whose room on the disk is taken at once: writing to it cannot fail later."""
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    n_bytes = shape.numel() * dtype.itemsize
    try:
        with tempfile.TemporaryFile(prefix="laplace-rows-") as file:
            _allocate(file.fileno(), n_bytes)
            path = f"/dev/fd/{file.fileno()}"
            return torch.from_file(path, shared=True, size=shape.numel(), dtype=dtype).view(shape)
    except OSError as error:
        raise OSError(
            error.errno,
            f"no room for {n_bytes:,} more bytes of Jacobian rows in {tempfile.gettempdir()!r} ({error.strerror}): set "
            "TMPDIR to a larger disk, pass a larger budget, or keep fewer columns with Rows(columns=..)",
        ) from error


def _allocate(file: int, n_bytes: int) -> None:
    """Takes room on the disk. Raises OSError if there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, n_bytes)
        return
    block = bytes(min(n_bytes, 2**20))
    for start in range(0, n_bytes, len(block)):
        os.write(file, block[: n_bytes - start])
