"""Thin matrices that a stream is multiplied with, side by side, so that it is read once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import laplace_kernels as lk


class Columns:
    """What a stream is multiplied with: parts [d, n], one beside the other.

    Where products with a 16-bit stream are to be of 16-bit matrices, a part that is more precise becomes two halves:
    first the high ones of all such parts, then the low ones, then the parts that are exact.

    Args:
        parts: [d, n] each.
        stream: gives dtype and device.

    Attributes:
        matrix: [d, columns].
        split: columns of all high halves.
        scales: [split] by which fp16 halves are too large, or None.
    """

    def __init__(self, parts: Sequence[Tensor], stream: Tensor) -> None:
        wide = lk.accumulation_dtype(stream.dtype)
        dtype = stream.dtype if lk.sums_in_fp32(stream) else wide
        # Omega is kept in bf16, whose numbers fp16 has too but for those too small to matter.
        parts = [part.to(dtype) if dtype == wide or part.itemsize == 2 else part for part in parts]
        exact = [part.dtype == dtype for part in parts]
        pairs = [lk.halves(part, dtype) for part, is_exact in zip(parts, exact, strict=True) if not is_exact]
        whole = [part for part, is_exact in zip(parts, exact, strict=True) if is_exact]
        sides = [*(high for high, _, _ in pairs), *(low for _, low, _ in pairs), *whole]
        # Columns of many are contiguous, as products want them; one is left as it is.
        self.matrix = sides[0] if len(sides) == 1 else torch.cat([side.mT for side in sides]).mT
        self.split = sum(high.shape[1] for high, _, _ in pairs)
        scales = [scale.expand(high.shape[1]) for high, _, scale in pairs if scale is not None]
        self.scales = torch.cat(scales).to(wide) if scales else None
        self._places, starts = [], {False: 0, True: 2 * self.split}
        for part, is_exact in zip(parts, exact, strict=True):
            start = starts[is_exact]
            starts[is_exact] += part.shape[1]
            self._places.append(slice(start, starts[is_exact]))

    def part(self, products: Tensor, index: int) -> Tensor:
        """The product with a part, [.., n], once the halves are added up."""
        return products[..., self._places[index]]


def add_halves_(products: Tensor, columns: Sequence[Columns | None]) -> None:
    """Makes the products with high halves those with the matrices themselves.

    Args:
        products: [n, S, T, columns] of n streams, changed in place.
        columns: of each stream, alike in their parts; None for a stream that has not come, whose products mean nothing.
    """
    known = next(each for each in columns if each is not None)
    if known.split:
        total = products[..., : known.split]
        total += products[..., known.split : 2 * known.split]
        if known.scales is not None:
            unit = torch.ones_like(known.scales)
            scales = [unit if each is None or each.scales is None else each.scales for each in columns]
            total /= torch.stack(scales)[:, None, None]
