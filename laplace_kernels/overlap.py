"""What an op writes may share memory with nothing else that it writes or reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor


def refuse_overlap(tensors: Iterable[tuple[str, Tensor, bool]]) -> None:
    """Raise where a tensor that is written shares memory with another one.

    Compares addresses, about a microsecond a tensor, and does not wait for the device. What has no memory of its own
    (meta and fake tensors, those within vmap) overlaps nothing.

    Args:
        tensors: Name, tensor, and whether it is written.

    Raises:
        ValueError: Two tensors overlap; the message names both.
    """
    named = list(tensors)
    if _are_apart([tensor for _, tensor, _ in named]):
        return
    spans = sorted((*_span(tensor), i) for i, (_, tensor, _) in enumerate(named))
    if all(after[0] >= before[1] for before, after in pairwise(spans)):
        return
    reached: list[tuple[int, int, int]] = []  # spans that may go on where the next one starts
    for span in spans:
        reached = [other for other in reached if other[1] > span[0]]
        for other in reached:
            (first, a, a_written), (second, b, b_written) = (named[i] for i in sorted((other[2], span[2])))
            if (a_written or b_written) and not _side_by_side(a, b):
                first, second = (first, second) if a_written else (second, first)
                raise ValueError(f"{first} must not share memory with {second}")
        reached.append(span)


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no memory that is behind one is behind another: told by whole allocations, in less time than by spans."""
    try:
        storages = [tensor.untyped_storage() for tensor in tensors]
        starts = sorted((storage.data_ptr(), storage.nbytes()) for storage in storages)
    except (NotImplementedError, RuntimeError):  # within vmap, or without memory
        return False
    return all(first + size <= second for (first, size), (second, _) in pairwise(starts))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one behind the last; (0, 0) for nothing."""
    try:
        elsewhere = tensor.untyped_storage().device.type == "meta"
    except NotImplementedError:  # within vmap
        elsewhere = True
    if elsewhere or tensor.numel() == 0:
        return 0, 0
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def _side_by_side(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share no byte although their spans overlap: columns of one buffer, say.

    Both repeat with a common pitch; within it, neither begins before the other's run of bytes has ended.
    """
    pitch = math.gcd(*_pitches(a), *_pitches(b))
    distance = b.data_ptr() - a.data_ptr()
    return pitch > 0 and distance % pitch >= _run(a) and -distance % pitch >= _run(b)


def _pitches(tensor: Tensor) -> list[int]:
    """Bytes between elements that are not neighbours, along each axis that has any."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride * tensor.itemsize for size, stride in axes if size > 1 and stride > 1]


def _run(tensor: Tensor) -> int:
    """Bytes of elements that are neighbours."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * (1 + sum(size - 1 for size, stride in axes if stride == 1))
