"""Sums over the real tokens of 16-bit streams with pads, one product each: the way of a GPU.

    W x = [sum over real tokens | weighted sum over pads]        W [2, T] of each sequence: 1 at its real tokens, 0 at
                                                                 pads, and random weights of pads below

The stream is read once; to select its real tokens and add them up would read it twice and write it once. The second
row is zero where the pads are, so that no check of them has to look at them again.

A product multiplies pads by 0, which gives NaN where they are not finite. So the first batch with pads is summed by
selection, and its pads are looked at: only where they are finite, as in every model that mixes tokens, later batches
go this way. Should the pads of a later one not be, then neither are the sums, nor the factors, and the fit ends with
an error that names the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.devices import to_device
from laplace_lora_fast.structures.blocks.factors import Factor
from laplace_lora_fast.structures.pads import PadImage


class PaddedTokens:
    """Which tokens of a batch count, as a matrix; and whether pads may be multiplied with 0 at all.

    Attributes:
        finite: whether pads are; None until a batch with pads has ended.
    """

    def __init__(self) -> None:
        self.finite: bool | None = None
        self._seen: list[Tensor] = []
        self._constants: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
        self._of_masks: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._counts: dict[int, Tensor] = {}

    def are_multiplied(self, mask: Tensor | None, x: Tensor) -> TypeGuard[Tensor]:
        """Whether a stream [S, T, d] goes this way; where that is not known yet, it is looked at."""
        if mask is None or not lk.sums_in_fp32(x):
            return False
        if self.finite is None:
            self._seen.append(x.where(~mask[..., None], 0).isfinite().all())
        return bool(self.finite)

    def finish(self) -> None:
        """A batch is over; the first with pads is waited for."""
        if self._seen:
            self.finite = all(bool(each) for each in self._seen)
            self._seen.clear()

    def forget(self) -> None:
        """All of a batch."""
        for held in (self._seen, self._of_masks, self._counts):
            held.clear()

    def weights(self, mask: Tensor, x: Tensor) -> Tensor:
        """W [S, 2, T] in the dtype of a stream, which holds it exactly."""
        key = id(mask), x.dtype
        if key not in self._of_masks:
            real, pad = self._rows(mask.shape[1], x)
            self._of_masks[key] = torch.where(mask[:, None], real, pad), mask  # which lives as long as its id
        return self._of_masks[key][0]

    def count(self, mask: Tensor) -> Tensor:
        """Real tokens [S, 1]; a sequence without any is refused before."""
        if id(mask) not in self._counts:
            self._counts[id(mask)] = mask.sum(1, keepdim=True)
        return self._counts[id(mask)]

    def _rows(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of W: [2, 1] at a real token and [2, T] at pads.

        Weights of pads are drawn, so that gradients which are each other's opposite do not add up to zero: in 16 bits
        they take 128 or more values, and two pads have the same one rarely, not never.
        """
        key = like.dtype, like.device
        if key not in self._constants or self._constants[key][1].shape[1] < length:
            pad = torch.zeros(2, length)
            pad[1] = 1 + torch.rand(length, generator=torch.Generator().manual_seed(0))
            both = torch.tensor([[1.0], [0.0]]), pad
            real, pad = (to_device(each.to(like.dtype), like.device) for each in both)
            self._constants[key] = real, pad
        real, pad = self._constants[key]
        return real, pad[:, :length]


class TokenSums:
    """Takes streams with pads of many factors and hands each its sums, those of one pass together.

    Args:
        factors: by the numbers that their streams come with.
        tokens: which of them count.
        mean: whether sums are divided by the number of tokens.
    """

    def __init__(self, factors: Mapping[int, Factor], tokens: PaddedTokens, mean: bool) -> None:
        self._factors, self._tokens, self._mean = factors, tokens, mean
        self._places: dict[int, int] = {}  # of a factor among those of its width
        self._numbers: dict[int, int] = {}  # of factors of a width
        for index, factor in factors.items():
            self._places[index] = self._numbers.setdefault(factor.dim, 0)
            self._numbers[factor.dim] += 1
        self._kinds: dict[tuple[int, int], _Kind] = {}

    def take(self, index: int, x: Tensor, mask: Tensor) -> PadImage:
        """A stream [S, T, d] for a factor; it is read now and not kept."""
        key, place = (x.shape[2], id(mask)), self._places[index]
        if key not in self._kinds:
            size = self._numbers[x.shape[2]], 2, x.shape[0], x.shape[2]
            sums = x.new_empty(size, dtype=lk.accumulation_dtype(x.dtype))
            self._kinds[key] = _Kind(
                self._tokens.weights(mask, x), mask, sums[:, 0], sums[:, 1], sums.transpose(1, 2)
            )
        kind = self._kinds[key]
        kind.taken.append(index)
        torch.bmm(kind.weights, x, out_dtype=kind.both.dtype, out=kind.both[place])
        return PadImage(kind.of_pads, place)

    def finish(self) -> None:
        """A backward pass is over: factors are handed what was taken."""
        for kind in self._kinds.values():
            if kind.taken and self._mean:
                kind.sums /= self._tokens.count(kind.mask)
            rows = [kind.sums[self._places[index]] for index in kind.taken]
            _hand_over([self._factors[index] for index in kind.taken], rows)
            kind.taken.clear()

    def forget(self) -> None:
        """All of a batch."""
        self._kinds.clear()


@dataclass
class _Kind:
    """Streams of one width and mask. The sums [n, S, d] of the tokens that count, and of pads; `both` [n, S, 2, d]."""

    weights: Tensor
    mask: Tensor
    sums: Tensor
    of_pads: Tensor
    both: Tensor
    taken: list[int] = field(default_factory=list)


def _hand_over(factors: Sequence[Factor], sums: Sequence[Tensor]) -> None:
    """Sums [S, d] to their factors: in one launch, where they may wait there."""
    places, sources = [], []
    for factor, rows in zip(factors, sums, strict=True):
        place = factor.place(len(rows), rows.dtype)
        if place is None:
            factor.add_rows(rows)
        else:
            places.append(place)
            sources.append(rows)
    if places:
        torch._foreach_copy_(places, sources)
