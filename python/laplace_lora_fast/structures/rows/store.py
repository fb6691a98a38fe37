"""Where the Jacobian rows of a fit live: on the device, in CPU memory, or in a memory-mapped file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from laplace_lora_fast.devices import room
from laplace_lora_fast.ranks import Ranks


class Place(str, Enum):
    """Storage of rows, in the order they are tried."""

    DEVICE = "device"
    CPU = "cpu"
    DISK = "disk"


class RowStore:
    """One growing matrix [R, features] per block.

    Rows stay on the device until all blocks together exceed `memory_budget`, or half of what a GPU had free when the
    first ones came, then move to CPU memory, and once four times the budget is exceeded to memory-mapped files in the
    temporary folder (TMPDIR). There they stay: a kernel or a prediction reads one block at a time. From a GPU they go
    to pinned memory, those of a batch together, and nothing waits for them until they are read. The files have no
    names, so that nothing is left of them however the process ends.

    Args:
        n_blocks: number of matrices.
        memory_budget: bytes.
    """

    def __init__(self, n_blocks: int, memory_budget: int) -> None:
        self.place = Place.DEVICE
        self._budget = memory_budget
        self._chunks: list[list[Tensor]] = [[] for _ in range(n_blocks)]
        self._devices: list[torch.device] = [torch.device("cpu")] * n_blocks
        self._room: int | None = None  # bytes, once there are any
        self._bytes = 0
        self._copying: set[torch.device] = set()  # GPUs from which copies may be under way

    def append(self, block: int, rows: Tensor) -> None:
        """Adds rows [n, features] below the block's others. Raises OSError where they do not fit on the disk."""
        self._devices[block] = rows.device
        self._move_for(rows.nbytes)
        self._chunks[block] += self._stored([rows])

    def extend(self, rows: Sequence[Tensor]) -> None:
        """Adds rows to every block; see `append`."""
        self._devices = [each.device for each in rows]
        self._move_for(sum(each.nbytes for each in rows))
        for chunks, each in zip(self._chunks, self._stored(rows), strict=True):
            chunks.append(each)

    def matrices(self) -> list[Tensor]:
        """[R, features] of every block, where its rows live; chunks are let go block by block."""
        return [self._matrix(block) for block in range(len(self._chunks))]

    def kept(self, matrix: Tensor) -> Tensor:
        """A matrix made of one of `matrices`, where those live."""
        return self._stored([matrix])[0]

    @property
    def chunks(self) -> list[list[Tensor]]:
        """For each block what has been appended, where it lives."""
        self._settle()
        return self._chunks

    def gathered(self, ranks: Ranks, devices: Sequence[torch.device]) -> RowStore:
        """A store of the rows of all ranks, rank by rank, for each block on its device; this one is emptied."""
        whole = RowStore(len(self._chunks), self._budget)
        for block, device in enumerate(devices):
            mine = self._matrix(block) if self._chunks[block] else None
            whole.append(block, ranks.gather(mine).to(device))
        return whole

    def _matrix(self, block: int) -> Tensor:
        self._settle()
        chunks, self._chunks[block] = self._chunks[block], []
        if self.place is Place.DEVICE:
            return torch.cat(chunks)
        shape = torch.Size([sum(len(chunk) for chunk in chunks), *chunks[0].shape[1:]])
        return torch.cat(chunks, out=self._memory(shape, chunks[0].dtype))

    def _move_for(self, n_bytes: int) -> None:
        """Moves all that is there where so many bytes more do not fit."""
        if self._room is None:
            self._room = room(self._devices)
        self._bytes += n_bytes
        wanted = self._place_for(self._bytes)
        if wanted is not self.place:
            self.place = wanted
            for index, chunks in enumerate(self._chunks):
                self._chunks[index] = self._stored(chunks)

    def _place_for(self, used: int) -> Place:
        if used <= self._budget and (self._room is None or used <= self._room):
            return Place.DEVICE
        return Place.CPU if used <= 4 * self._budget and self._can_leave(self._devices) else Place.DISK

    @staticmethod
    def _can_leave(devices: Sequence[torch.device]) -> bool:
        """Whether CPU memory is another place than these."""
        return any(device.type != "cpu" for device in devices)

    def _stored(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of one dtype where rows are to live: in one piece of pinned memory, or each in a file."""
        if self.place is Place.DEVICE or not tensors:
            return list(tensors)
        if self.place is Place.DISK:
            return [_mapped(each.shape, each.dtype).copy_(each) for each in tensors]
        sizes = [each.numel() for each in tensors]
        parts = self._memory(torch.Size([sum(sizes)]), tensors[0].dtype).split(sizes)
        self._copying |= {each.device for each in tensors if each.is_cuda}
        return [
            part.view(each.shape).copy_(each, non_blocking=True)
            for part, each in zip(parts, tensors, strict=True)
        ]

    def _memory(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Where rows that have left the device live."""
        if self.place is Place.DISK:
            return _mapped(shape, dtype)
        return torch.empty(shape, dtype=dtype, pin_memory=any(each.type == "cuda" for each in self._devices))

    def _settle(self) -> None:
        """Waits for copies: before they are read by the host."""
        for device in self._copying:
            torch.cuda.synchronize(device)
        self._copying.clear()


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
