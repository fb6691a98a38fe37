"""Sums over ranks: each process fits its own share of the data, and all leave with the posterior of the whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from laplace_lora_fast.errors import RankError


class Ranks:
    """The processes that fit one posterior together; one process alone without a group.

    Every rank calls the same methods in the same order. What can fail on one of them runs inside `together`, so that
    no rank waits for one that has given up. One that has died or hangs is waited for as long as the process group's
    timeout says (`init_process_group(timeout=..)`, 30 minutes if not set) where the connection does not end at once:
    then the others raise RankError. With NCCL, which reports no error to Python, its watchdog ends the processes.

    Args:
        group: a process group of torch.distributed, or None.

    Attributes:
        size: number of ranks.
        rank: this one, from 0.

    Raises:
        ValueError: this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("group: this process is not one of its ranks")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises on every rank if one raises inside.

        Raises:
            RankError: another rank failed.
        """
        try:
            yield
        except Exception:
            with suppress(RankError):  # the others' trouble, which is not the first
                self._failures(1)
            raise
        except BaseException:
            self._leave()
            raise
        failures = self._failures(0)
        if failures:
            raise RankError(f"fit failed on {failures} of the other ranks: see their errors")

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises RankError on every rank unless these facts are the same on all of them; names what differs.

        Args:
            facts: JSON-serialisable; of the same keys on all ranks.
        """
        if self.size == 1:
            return
        text = json.dumps(facts, sort_keys=True).encode()
        digest = hashlib.sha256(text).digest()
        digests = self.gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None])
        if bool((digests == digests[0]).all()):
            return
        lengths = self.gather_numbers([len(text)])[:, 0].long().tolist()
        everywhere = self.gather(torch.frombuffer(bytearray(text), dtype=torch.uint8)).split(lengths)
        first, *others = (json.loads(bytes(each.tolist())) for each in everywhere)
        for rank, other in enumerate(others, start=1):
            difference = _difference("", first, other)
            if difference:
                name, one, two = difference
                raise RankError(
                    f"the ranks differ in {name}: rank 0 has {_short(one)}, rank {rank} {_short(two)}"
                )
        raise RankError("the ranks differ")  # in what JSON takes for the same

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, bitwise the same on all of them."""
        if self.size == 1:
            return
        for tensor in tensors:
            carried = tensor.to(self._carrier(tensor))
            with self._collective():
                dist.all_reduce(carried, group=self._group)
            if carried is not tensor:
                tensor.copy_(carried)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all ranks, rank by rank; n may differ."""
        if self.size == 1:
            return rows
        counts = self.gather_numbers([len(rows)])[:, 0].long().tolist()
        mine = rows.to(self._carrier(rows))
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in counts]
        with self._collective():
            dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(rows.device)

    def gather_numbers(self, numbers: Sequence[float]) -> Tensor:
        """The numbers of every rank, fp64 [size, n] on the CPU; n is the same on all of them."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return mine[None]
        mine = mine.to(self._carrier(mine))
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with self._collective():
            dist.all_gather(parts, mine, group=self._group)
        return torch.stack(parts).cpu()

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor; it has the same shape and dtype on all of them."""
        if self.size == 1:
            return tensor
        carried = tensor.to(self._carrier(tensor)).contiguous()
        first = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        with self._collective():
            dist.broadcast(carried, first, group=self._group)
        return carried.to(tensor.device)

    def require_same(self, numbers: Sequence[float], what: str) -> None:
        """Raises RankError on every rank unless the numbers are the same on all of them, up to rounding in fp64."""
        everywhere = self.gather_numbers(numbers)
        if not torch.allclose(everywhere, everywhere[:1].expand_as(everywhere), rtol=1e-12, atol=0):
            raise RankError(f"the ranks differ in {what}")

    def _failures(self, mine: int) -> int:
        return int(self.gather_numbers([mine]).sum())

    def _leave(self) -> None:
        """Tells the others that this rank gives up, without waiting for them: it has been interrupted."""
        if self.size == 1:
            return
        mine = torch.ones(1, dtype=torch.float64)
        mine = mine.to(self._carrier(mine))
        self._last = [torch.empty_like(mine) for _ in range(self.size)]
        with suppress(RuntimeError):
            dist.all_gather(self._last, mine, group=self._group, async_op=True)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Raises RankError where the other ranks cannot be reached."""
        try:
            yield
        except RuntimeError as error:  # torch.distributed's, which has no narrower one for gloo
            raise RankError(
                "another rank died, hangs, or is later than the process group's timeout allows "
                f"(init_process_group(timeout=..)): {str(error).splitlines()[0]}"
            ) from error

    def _carrier(self, tensor: Tensor) -> torch.device:
        """Where the group can carry a tensor: NCCL knows GPUs only, gloo is at home on the CPU."""
        if "nccl" not in str(dist.get_backend(self._group)):
            return torch.device("cpu")
        return tensor.device if tensor.is_cuda else torch.device("cuda", torch.cuda.current_device())


def _difference(name: str, one: Any, other: Any) -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ, and what they are there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            found = _difference(f"{name}, {key}" if name else key, one.get(key), other.get(key))
            if found:
                return found
        return None
    return None if one == other else (name, one, other)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."
