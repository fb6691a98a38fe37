"""Blocks of unequal size against one dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout

RAGGED, UNIFORM = [2, 3, 1, 3, 2, 2], [2, 2, 2]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example_blocks(sizes: list[int]) -> list[Tensor]:
    """A matrix [K, K] for each example."""
    return [noise(size, size, seed=n) for n, size in enumerate(sizes)]


def block_diagonal(sizes: list[int]) -> tuple[BlockDiagonal, Tensor]:
    """The same matrix in blocks of equal size, and dense."""
    each, layout = example_blocks(sizes), Layout(torch.tensor(sizes))
    blocks = [torch.stack([each[n] for n in examples]) for examples in layout.examples]
    return BlockDiagonal(layout, blocks), torch.block_diag(*each)


def test_rows_of_a_ragged_layout() -> None:
    layout = Layout(torch.tensor(RAGGED))
    assert (layout.n_rows, layout.uniform, layout.block_sizes) == (13, False, [1, 2, 3])
    assert [each.tolist() for each in layout.examples] == [[2], [0, 4, 5], [1, 3]]
    assert [each.tolist() for each in layout.rows] == [
        [[5]],
        [[0, 1], [9, 10], [11, 12]],
        [[2, 3, 4], [6, 7, 8]],
    ]


@pytest.mark.parametrize("sizes", [RAGGED, UNIFORM, [3]])
def test_split_and_join_are_inverses(sizes: list[int]) -> None:
    layout, x = Layout(torch.tensor(sizes)), noise(sum(sizes), 4)
    blocks = layout.split(x)
    parts = x.split(sizes)
    for examples, block in zip(layout.examples, blocks, strict=True):
        assert torch.equal(block, torch.stack([parts[n] for n in examples]))
    assert torch.equal(layout.join(blocks), x)
    assert torch.equal(layout.join(layout.split(x[:, 0])), x[:, 0])


def test_the_layout_of_a_batch_is_that_of_its_examples() -> None:
    examples = [torch.tensor([2]), torch.tensor([0, 4, 5]), torch.tensor([1, 3])]
    assert Layout.of_batch(examples, [1, 2, 3]).sizes.tolist() == RAGGED
    assert Layout.of_batch([torch.arange(3)], [2]).sizes.tolist() == UNIFORM


@pytest.mark.parametrize("sizes", [RAGGED, UNIFORM])
def test_products_equal_those_of_the_dense_matrix(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laplace_lora_fast.structures.rows.layout.WIDTH", 4)
    blocks, dense = block_diagonal(sizes)
    x, root = noise(len(dense), 5), noise(len(dense), len(dense), seed=9)
    kernel = root @ root.mT
    torch.testing.assert_close(blocks.times(x), dense @ x)
    torch.testing.assert_close(blocks.transposed_times(x), dense.mT @ x)
    torch.testing.assert_close(blocks.whiten(kernel), dense.mT @ kernel @ dense)
    whole = torch.eye(len(dense)) + 0.3 * dense.mT @ kernel @ dense
    torch.testing.assert_close(blocks.plus_identity(kernel, 0.3), whole)
    torch.testing.assert_close(blocks.scaled(0.3).times(x), 0.3 * dense @ x)
    low = BlockDiagonal(blocks.layout, [block.float() for block in blocks.blocks]).to(x)
    assert {block.dtype for block in low.blocks} == {torch.float64}
