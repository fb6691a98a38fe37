"""What the sums over a tensor notice, and what they forgive."""

from __future__ import annotations

import json

import pytest
import torch

from laplace_lora_fast.saving.sums import Sums, sums

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
SHAPES = [(3,), (1,), (7, 5), (300, 257), (2048, 1031)]  # the last two are summed in runs


def of(tensor):
    return sums({"x": tensor})["x"]


def drawn(shape, dtype, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.02
    return x.to(dtype) if dtype.is_floating_point else (x * 1000).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_changed_bit_is_always_noticed(dtype, shape):
    x = drawn(shape, dtype)
    before = of(x)
    assert of(x.clone()) == before
    raw = x.view(torch.uint8).view(-1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        index = int(torch.randint(len(raw), (), generator=generator))
        bit = 1 if dtype is torch.bool else 1 << int(torch.randint(8, (), generator=generator))
        raw[index] ^= bit
        assert not before.agrees(of(x), rounding=False)
        raw[index] ^= bit
    assert before.agrees(of(x), rounding=False)


@pytest.mark.parametrize("shape", [(64, 16), (600, 1024), (1024, 600)], ids=str)
def test_exchanged_rows_and_columns_are_noticed(shape):
    x = drawn(shape, torch.bfloat16)
    before = of(x)
    for i, j in ((0, 1), (0, 2), (3, 11), (0, shape[0] // 2), (0, shape[0] - 1)):
        rows = x.clone()
        rows[[i, j]] = rows[[j, i]]
        assert not before.agrees(of(rows), rounding=False)
    for i, j in ((0, 1), (0, 4), (3, 11), (0, shape[1] // 2), (0, shape[1] - 1)):
        columns = x.clone()
        columns[:, [i, j]] = columns[:, [j, i]]
        assert not before.agrees(of(columns), rounding=False)


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_signs_are_noticed(dtype, shape):
    """The sign is the top bit of a word, which even numbers of them would leave."""
    x = drawn(shape, dtype)
    before = of(x)
    assert not before.agrees(of(-x), rounding=False)
    for n in (1, 2, 4, 64):
        if n <= x.numel():
            changed = x.clone()
            changed.view(-1)[:n] *= -1
            assert not before.agrees(of(changed), rounding=False)


def test_where_and_how_the_numbers_lie_does_not_matter():
    x = drawn((600, 1031), torch.bfloat16)
    apart = torch.empty(600, 2062, dtype=x.dtype)[:, ::2].copy_(x)
    shifted = torch.empty(x.numel() + 3, dtype=x.dtype)[3:].view_as(x).copy_(x)
    assert of(x) == of(apart) == of(shifted) == of(x.mT.contiguous().mT)
    assert of(x) != of(x.mT)


def test_another_dtype_is_forgiven_and_another_draw_is_not():
    x, other = drawn((600, 1031), torch.float32), drawn((600, 1031), torch.float32, seed=1)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        assert of(x).agrees(of(x.to(dtype)), rounding=False)
        assert not of(x).agrees(of(other.to(dtype)), rounding=False)
        assert not of(x).agrees(of(x.mT.to(dtype)), rounding=False)
        assert not of(x).agrees(of(torch.roll(x, 300, 0).to(dtype)), rounding=False)
    assert not of(x).agrees(of((x * 1000).to(torch.int32)), rounding=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_merging_leaves_is_forgiven_where_that_is_asked_for(dtype):
    x, delta = drawn((600, 1031), dtype), 0.3 * drawn((600, 1031), dtype, seed=2)
    again = (x + delta) - delta
    assert not torch.equal(x, again)
    assert of(x).agrees(of(again), rounding=True)
    assert not of(x).agrees(of(again), rounding=False)
    assert not of(x).agrees(of(x + delta), rounding=True)


def test_json_gives_them_back():
    for x in (
        drawn((7, 5), torch.float32),
        torch.arange(4),
        torch.empty(0),
        torch.tensor(3.0),
        torch.ones(3).cfloat(),
    ):
        assert Sums.from_json(json.loads(json.dumps(of(x)))) == of(x)
    assert of(torch.empty(3, device="meta")) is None


def test_one_element_may_have_any_stride() -> None:
    """A column of a one-row matrix is contiguous for torch, whatever its stride: the bias of a head of one output."""
    matrix = torch.arange(33.0)[None]
    column = matrix[:, -1]
    assert column.is_contiguous()
    assert column.stride() == (33,)
    assert sums({"w": column}) == sums({"w": torch.tensor([32.0])})
