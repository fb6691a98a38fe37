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
            difference = first_difference("", first, other)
            if difference:
                name, one, two = difference
                raise RankError(
                    f"the ranks differ in {name}: rank 0 has {short(one)}, rank {rank} {short(two)}"
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

    def gather(self, rows: Tensor | None) -> Tensor:
        """The rows [n, ...] of all ranks, rank by rank; n may differ. None: of a rank that has none, of no shape.

        On the rank's device, or on the CPU where it had None.
        """
        if self.size == 1:
            assert rows is not None
            return rows
        shapes = self.gather_numbers(_shape_code(rows)).long().tolist()
        counts = [shape[0] for shape in shapes]
        if rows is None:
            known = [shape for shape in shapes if shape[1] >= 0]
            dtype, dim = known[0][1:3]
            rows = torch.empty(0, *known[0][3 : 3 + dim], dtype=_DTYPES[dtype])
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

    def first(self, has: bool) -> int:
        """The first rank that has something, for `from_rank`; 0 if none has."""
        return int(self.gather_numbers([has])[:, 0].argmax())

    def from_rank(self, rank: int, tensor: Tensor) -> Tensor:
        """That rank's tensor; it has the same shape and dtype on all of them."""
        if self.size == 1:
            return tensor
        carried = tensor.to(self._carrier(tensor)).contiguous()
        source = dist.get_global_rank(self._group, rank) if self._group is not None else rank
        with self._collective():
            dist.broadcast(carried, source, group=self._group)
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


_DTYPES = tuple(
    getattr(torch, name)
    for name in ["float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"]
)
_DIMENSIONS = 5


def _shape_code(rows: Tensor | None) -> list[int]:
    """Number of rows, dtype, number of further dimensions, these; a dtype of -1 for None."""
    if rows is None:
        return [0, -1, 0, *[0] * _DIMENSIONS]
    rest = list(rows.shape[1:])
    return [len(rows), _DTYPES.index(rows.dtype), len(rest), *rest, *[0] * (_DIMENSIONS - len(rest))]


def first_difference(name: str, one: Any, other: Any) -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ, and what they are there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            found = first_difference(f"{name}, {key}" if name else key, one.get(key), other.get(key))
            if found:
                return found
        return None
    return None if one == other else (name, one, other)


def short(value: Any) -> str:
    """As JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."
