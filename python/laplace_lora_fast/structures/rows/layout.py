"""Which rows are whose: R rows, K_n for each example, in blocks of examples with the same K. Nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 512  # columns of an R x R matrix that are worked on at a time


class Layout:
    """The rows of examples one after the other.

    Args:
        sizes: K_n of every example, in the order of their rows.

    Attributes:
        sizes: int64 [N], on the CPU.
        block_sizes: the different K, ascending: a block for each.
        examples: for each block its examples [N_b].
        rows: for each block its rows [N_b, K].
    """

    def __init__(self, sizes: Tensor) -> None:
        self.sizes = sizes.long().cpu()
        starts = self.sizes.cumsum(0) - self.sizes
        self.block_sizes: list[int] = self.sizes.unique().tolist()
        self.examples = [(self.sizes == size).nonzero().flatten() for size in self.block_sizes]
        self.rows = [
            starts[examples][:, None] + torch.arange(size)
            for examples, size in zip(self.examples, self.block_sizes, strict=True)
        ]

    @classmethod
    def of_batch(cls, examples: Sequence[Tensor], block_sizes: Sequence[int]) -> Layout:
        """Of a batch whose blocks hold these examples."""
        sizes = torch.zeros(sum(len(each) for each in examples), dtype=torch.long)
        for each, size in zip(examples, block_sizes, strict=True):
            sizes[each] = size
        return cls(sizes)

    @property
    def n_rows(self) -> int:
        """R."""
        return int(self.sizes.sum())

    @property
    def uniform(self) -> bool:
        """Whether all examples have the same number of rows: then everything is a view."""
        return len(self.block_sizes) == 1

    def split(self, x: Tensor) -> list[Tensor]:
        """Rows x [R, ..] as blocks [N_b, K, ..]."""
        if self.uniform:
            return [x.reshape(len(self.sizes), self.block_sizes[0], *x.shape[1:])]
        return [x[rows.to(x.device)] for rows in self.rows]

    def join(self, blocks: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if self.uniform:
            return blocks[0].flatten(0, 1)
        x = blocks[0].new_empty(self.n_rows, *blocks[0].shape[2:])
        for rows, block in zip(self.rows, blocks, strict=True):
            x[rows.to(x.device)] = block
        return x


@dataclass(frozen=True)
class BlockDiagonal:
    """A block-diagonal matrix S [R, R] with a block [K, K] an example.

    Attributes:
        layout: of the rows.
        blocks: [N_b, K, K] for each block of the layout.
    """

    layout: Layout
    blocks: Sequence[Tensor]

    def to(self, like: Tensor) -> BlockDiagonal:
        """In fp64 beside a tensor."""
        return BlockDiagonal(self.layout, [block.to(like.device, torch.float64) for block in self.blocks])

    def scaled(self, factor: float) -> BlockDiagonal:
        return BlockDiagonal(self.layout, [block * factor for block in self.blocks])

    def times(self, x: Tensor) -> Tensor:
        """S x for x [R, n]."""
        parts = zip(self.blocks, self.layout.split(x), strict=True)
        return self.layout.join(
            [block @ part if block.shape[1] > 1 else block * part for block, part in parts]
        )

    def transposed_times(self, x: Tensor) -> Tensor:
        """S^T x for x [R, n]."""
        return BlockDiagonal(self.layout, [block.mT for block in self.blocks]).times(x)

    def whiten(self, kernel: Tensor) -> Tensor:
        """S^T K S [R, R] for a symmetric K."""
        return self.transposed_times(self.transposed_times(kernel).mT)

    def plus_identity(self, kernel: Tensor, weight: float = 1.0) -> Tensor:
        """I + w S^T K S [R, R] for a symmetric K, in the memory of one such matrix."""
        found = torch.empty_like(kernel)
        for start in range(0, len(kernel), WIDTH):
            some = slice(start, start + WIDTH)
            found[some] = self.transposed_times(kernel[some].mT).mT
        for start in range(0, len(kernel), WIDTH):
            some = slice(start, start + WIDTH)
            found[:, some] = self.transposed_times(found[:, some])
        found *= weight
        found.diagonal().add_(1)
        return found
