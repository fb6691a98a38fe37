"""Rows on their way into a running factor, gathered so that one update of it serves many of them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def zero(like: Tensor) -> Tensor:
    """A 0 to select beside a tensor; one made anew each time would be a launch each time."""
    return _zero(like.dtype, like.device)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


class WaitingRows:
    """A bounded matrix [n, d] of rows whose memory grows as they come and is then kept for the next ones.

    Masked rows are stored as zeros, which no sum of outer products sees: no row is selected by index, and whatever
    adds them up later needs no mask.

    Args:
        dim: d.
        capacity: most rows held at a time.

    Attributes:
        n: rows held.
    """

    def __init__(self, dim: int, capacity: int) -> None:
        self.dim, self.capacity, self.n = dim, capacity, 0
        self._last = 0
        self._memory: Tensor | None = None

    @property
    def room(self) -> int:
        """Rows that may still come."""
        return self.capacity - self.n

    @property
    def full(self) -> bool:
        """Whether there is no room for as many rows as came last."""
        return self._last > self.room

    @property
    def rows(self) -> Tensor:
        """[n, d], n > 0: a view, overwritten by what comes after `clear`."""
        assert self._memory is not None
        return self._memory[: self.n]

    def append(self, x: Tensor, mask: Tensor | None) -> None:
        """Copies x [..., d] of at most `room` rows, zeros where the mask [...] is False."""
        place = self.extend(x.shape[:-1].numel(), x.dtype, x.device).view(x.shape)
        if mask is None:
            place.copy_(x)
        else:
            torch.where(mask[..., None], x.to(place.dtype), zero(place), out=place)

    def extend(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """At most `room` new rows [n, d] to be written at once, in a dtype that loses nothing of this one."""
        stop, memory = self.n + n, self._memory
        if memory is not None and len(memory) >= stop and memory.dtype == dtype:
            self._last, self.n = n, stop
            return memory[stop - n : stop]
        place = self._reserve(stop, torch.empty(0, dtype=dtype, device=device))[self.n : stop]
        self._last, self.n = n, stop
        return place

    def clear(self) -> None:
        """Forgets the rows; keeps their memory."""
        self.n = 0

    def state(self) -> tuple[Tensor | None, int]:
        """The rows in the dtype of their memory, None where none ever came, and how many came last."""
        return None if self._memory is None else self._memory[: self.n], self._last

    def restore(self, rows: Tensor | None, last: int) -> None:
        """Takes over what `state` gave."""
        self.n, self._last = 0 if rows is None else len(rows), last
        self._memory = None if rows is None else rows.clone()

    def _reserve(self, size: int, like: Tensor) -> Tensor:
        """Memory of at least `size` rows in a dtype that loses nothing of `like`."""
        memory = like.new_empty(0, self.dim) if self._memory is None else self._memory
        dtype = torch.promote_types(memory.dtype, like.dtype)
        if len(memory) < size or dtype != memory.dtype:
            grown = memory.new_empty(min(self.capacity, max(size, 2 * self.n)), self.dim, dtype=dtype)
            grown[: self.n] = memory[: self.n]
            memory = self._memory = grown
        return memory
