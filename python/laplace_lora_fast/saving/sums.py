"""What stands for a tensor: exact sums over its bits, and a few rounded sums for what may differ by rounding.

The bits are read as words of 8 bytes, and summed modulo 2^64 with odd weights: small tensors word by word, large ones
in runs of 64 words, along and across. So a change of any number of bits within one word is always noticed, on any
device and in any order of summation; other changes, exchanged rows or columns for example, unless two sums modulo
2^64 happen to stay. A CPU core reads some 5 GB a second so.

The rounded sums, the norm and four sums with pseudo-random weights, compare tensors held in different dtypes, and those
that merging and unmerging an adapter has rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_RUN, _ACROSS = 64, 512  # words
_RUNS, _SIGNS = 1024, 4  # runs of numbers in a block, sums over them
_SMALL = _RUN * _ACROSS
_EPS = {
    name: torch.finfo(getattr(torch, name)).eps
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
}


class Sums(NamedTuple):
    """What stands for a tensor.

    Attributes:
        dtype: without "torch.".
        shape: its shape.
        exact: two sums over its bits, modulo 2^64.
        rounded: norm and weighted sums; None for integers.
    """

    dtype: str
    shape: list[int]
    exact: list[int]
    rounded: list[float] | None

    @classmethod
    def from_json(cls, data: Any) -> Sums:
        """What JSON makes of it. Raises ValueError or TypeError for anything else."""
        dtype, shape, exact, rounded = data
        return cls(
            str(dtype),
            [int(n) for n in shape],
            [int(n) for n in exact],
            None if rounded is None else [float(n) for n in rounded],
        )

    def agrees(self, other: Sums, rounding: bool) -> bool:
        """Whether the tensors are the same.

        Args:
            other: the other.
            rounding: allow what merging and unmerging an adapter leaves; always where the dtypes differ.
        """
        if self.shape != other.shape:
            return False
        if self.dtype == other.dtype and self.exact == other.exact:
            return True
        if self.rounded is None or other.rounded is None or not {self.dtype, other.dtype} <= set(_EPS):
            return False
        if self.dtype == other.dtype and not rounding:
            return False
        tolerance = 2 * max(_EPS[self.dtype], _EPS[other.dtype]) * self.rounded[0]
        return all(abs(a - b) <= tolerance for a, b in zip(self.rounded, other.rounded, strict=True))


def sums(tensors: Mapping[str, Tensor]) -> dict[str, Sums | None]:
    """Of every tensor, each read once and waited for once; None for one that is on no device."""
    exact: dict[int, Tensor] = {}
    rounded: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in exact and not tensor.is_meta:
            exact[id(tensor)] = _exact(tensor)
            if tensor.is_floating_point() or tensor.is_complex():
                rounded[id(tensor)] = _rounded(tensor)
    integers, floats = _read(exact), _read(rounded)
    return {
        name: Sums(
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            integers[id(tensor)],
            floats.get(id(tensor)),
        )
        if id(tensor) in integers
        else None
        for name, tensor in tensors.items()
    }


def plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of: itself, or the parts of a quantised one.

    A name with "#" is of a part beside the packed weight: scales, codes.
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None and type(tensor) not in (Tensor, torch.nn.Parameter):
        for part in flatten()[0]:
            yield from plain_parts(f"{name}#{part}", getattr(tensor, part))
        return
    state = getattr(tensor, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return  # bitsandbytes has packed it again for this CPU: other bits, the same weight
    yield name, tensor.detach().as_subclass(Tensor)
    for key, value in vars(tensor).items():
        if not key.startswith("_"):
            yield from _parts_beside(f"{name}#{key}", value)


def _parts_beside(name: str, value: Any, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif depth and type(value).__name__ == "QuantState":
        for key, part in vars(value).items():
            yield from _parts_beside(f"{name}.{key}", part, depth - 1)


def _read(found: Mapping[int, Tensor]) -> dict[int, list[Any]]:
    """The values of all tensors [n]; each device is waited for once."""
    values: dict[int, list[Any]] = {}
    for device in {tensor.device for tensor in found.values()}:
        own = {key: tensor for key, tensor in found.items() if tensor.device == device}
        values |= zip(own, torch.stack(list(own.values())).tolist(), strict=True)
    return values


def _exact(tensor: Tensor) -> Tensor:
    """Both sums [2], int64, which wraps around as integers modulo 2^64 do."""
    words = _words(tensor)
    large = len(words) // _SMALL * _SMALL
    rest = _mixed(words[large:])
    first, second = ((rest * _weights(len(rest), seed, rest.device)).sum() for seed in (1, 2))
    if large:
        along, across = [], []
        for chunk in words[:large].split(_SMALL if words.device.type == "cpu" else 2**10 * _SMALL):
            mixed = _mixed(chunk)
            along.append(mixed.view(-1, _RUN).sum(1))
            across.append(mixed.view(-1, _RUN, _ACROSS).sum(1).flatten())
        n = large // _RUN
        first = first + (torch.cat(along) * _weights(n, 3, words.device)).sum()
        second = second + (torch.cat(across) * _weights(n, 4, words.device)).sum()
    return torch.stack([first, second])


def _mixed(words: Tensor) -> Tensor:
    """The words, one to one, spread over all bits: signs, which are upper bits, would count modulo 2 only."""
    words = words * -0x61C8864680B583EB
    return words ^ (words >> 32 & 0xFFFFFFFF)


def _words(tensor: Tensor) -> Tensor:
    """The bits as int64, the last word filled up with zeros."""
    flat = tensor.contiguous()
    raw = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)  # one element may have any stride
    if raw.numel() % 8 or raw.storage_offset() % 8 or raw.data_ptr() % 8:
        raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8)).clone()
    return raw.view(torch.int64)


def _weights(n: int, seed: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers [n], int64; the same everywhere, as integer arithmetic alone makes them."""
    return _odd(_SMALL, seed, device)[:n] if n <= _SMALL else _odd.__wrapped__(n, seed, device)


@lru_cache(maxsize=16)
def _odd(n: int, seed: int, device: torch.device) -> Tensor:
    x = (torch.arange(n, device=device) + (seed << 40)) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor
    return (x ^ (x >> 31)) | 1


def _rounded(tensor: Tensor) -> Tensor:
    """Norm and four weighted sums [5], fp64; numbers of 16 bits and fewer are summed in fp32, run by run.

    A run of 64 numbers has a sign in each of the four, a block of 1,024 runs a weight: the same however many blocks
    are taken at a time.
    """
    flat = torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor.reshape(-1)
    wide = torch.float32 if flat.itemsize < 4 else torch.float64
    block = _RUN * _RUNS
    bits = torch.arange(32, 32 + _SIGNS, device=flat.device)
    signs = (1 - 2 * (_weights(_RUNS, 5, flat.device)[:, None] >> bits & 1)).to(wide)
    squares, weighted = [], []
    for chunk in flat.split(block if flat.device.type == "cpu" else 2**10 * block):
        numbers = chunk.to(wide)
        squares.append(torch.dot(numbers, numbers).double())
        blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % block)).view(-1, _RUNS, _RUN)
        weighted.append((blocks.sum(2) @ signs).double())
    by_block = torch.cat(weighted)
    factors = 0.5 + _weights(len(by_block), 6, flat.device).double() / 2.0**64
    return torch.cat([torch.stack(squares).sum().sqrt()[None], factors @ by_block])
