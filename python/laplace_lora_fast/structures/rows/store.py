"""Where the Jacobian rows of a fit live: on the device, in CPU memory, or in a memory-mapped file."""

from __future__ import annotations

import tempfile
import weakref
from enum import Enum
from pathlib import Path
from shutil import rmtree

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
    times the budget is exceeded to memory-mapped files in a temporary folder, which goes away with the store. There
    they stay: a kernel or a prediction reads one block at a time.

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
        self._folder: Path | None = None

    def append(self, block: int, rows: Tensor) -> None:
        """Adds rows [n, features] below the block's others."""
        self._devices[block] = rows.device
        self._bytes += rows.numel() * rows.element_size()
        wanted = self._place_for(self._bytes)
        if wanted is not self.place:
            self.place = wanted
            for index, chunks in enumerate(self._chunks):
                self._chunks[index] = [self._stored(index, chunk, n) for n, chunk in enumerate(chunks)]
        self._chunks[block].append(self._stored(block, rows, len(self._chunks[block])))

    def matrices(self) -> list[Tensor]:
        """[R, features] of every block, where its rows live; chunks are let go block by block."""
        return [self._matrix(block) for block in range(len(self._chunks))]

    def gathered(self, ranks: Ranks) -> RowStore:
        """A store of the rows of all ranks, rank by rank; this one is emptied."""
        whole = RowStore(len(self._chunks), self._budget)
        for block, device in enumerate(self._devices):
            whole.append(block, ranks.gather(self._matrix(block)).to(device))
        return whole

    def _matrix(self, block: int) -> Tensor:
        chunks, self._chunks[block] = self._chunks[block], []
        if self.place is not Place.DISK:
            return torch.cat(chunks)
        rows = sum(len(chunk) for chunk in chunks)
        matrix = self._mapped(str(block), torch.Size([rows, chunks[0].shape[1]]), chunks[0].dtype)
        return torch.cat(chunks, out=matrix)

    def _place_for(self, used: int) -> Place:
        if used <= self._budget:
            return Place.DEVICE
        on_cpu = all(device.type == "cpu" for device in self._devices)
        if used <= 4 * self._budget and not on_cpu:
            return Place.CPU
        return Place.DISK

    def _stored(self, block: int, rows: Tensor, number: int) -> Tensor:
        if self.place is Place.DEVICE:
            return rows
        rows = rows.cpu()
        if self.place is Place.CPU:
            return rows
        return self._mapped(f"{block}-{number}", rows.shape, rows.dtype).copy_(rows)

    def _mapped(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor in a file; what is mapped stays readable after the folder has gone."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="laplace-rows-"))
            weakref.finalize(self, rmtree, self._folder, ignore_errors=True)
        path = self._folder / name
        return torch.from_file(str(path), shared=True, size=shape.numel(), dtype=dtype).view(shape)
