from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

import laplace_kernels as lk
from laplace_kernels.triton import gram, launch, triangle
from tests.kernels import inputs, oracles

LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (*LOW_PRECISION, torch.float32)
TOLERANCE = 1e-6  # the interpreter accumulates a block at a time in fp32


def check(T, d, dtype, layout="contiguous", masked=False, alpha=0.5):
    generator = torch.Generator().manual_seed(T + 1000 * d)
    X = inputs.rows(T, d, dtype, layout, generator)
    mask = inputs.poisoned_mask(X, generator) if masked else None
    C = torch.ones(d, d)
    lk.gram_(C, X, mask, alpha)
    oracles.assert_near(C.tril(), (1 + alpha * oracles.gram(X, mask)).tril(), TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "d"), [(0, 8), (1, 8), (1, 1), (70, 33), (130, 136), (257, 264), (40, 129)])
def test_values(arch, T, d, dtype):
    check(T, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "d"), [(1, 8), (70, 33), (130, 136)])
def test_not_finite_behind_the_mask(arch, T, d, dtype):
    check(T, d, dtype, masked=True)


@pytest.mark.parametrize("layout", ["padded rows", "every second row", "transposed"])
def test_strides(arch, layout):
    check(33, 40, torch.bfloat16, layout)
    check(33, 40, torch.float32, layout, masked=True)


def test_all_rows_masked(arch):
    C = torch.ones(24, 24)
    lk.gram_(C, torch.full((9, 24), torch.nan).bfloat16(), torch.zeros(9, dtype=torch.bool))
    assert torch.equal(C.tril(), torch.ones(24, 24).tril())


@pytest.mark.parametrize("masked", [False, True])
def test_accumulator_with_padded_rows_keeps_its_padding(arch, masked):
    X = torch.randn(20, 40).bfloat16()
    memory = torch.full((40, 48), 7.0)
    lk.gram_(memory[:, :40].zero_(), X, torch.ones(20, dtype=torch.bool) if masked else None)
    assert (memory[:, 40:] == 7).all()
    oracles.assert_near(memory[:, :40].tril(), oracles.gram(X).tril(), TOLERANCE)


def test_descriptors_are_used_where_promised(monkeypatch):
    """Unmasked aligned 16-bit rows on sm_90 take no pointer."""
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(gram, "_gram_pointer", None)
    check(20, 40, torch.bfloat16)
    with pytest.raises(TypeError, match="not subscriptable"):
        check(20, 40, torch.bfloat16, masked=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 300])
def test_split_tokens_add_up(arch, monkeypatch, T, masked):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 8)
    monkeypatch.setattr(gram, "_TOKENS_PER_PROGRAM", 16)
    assert gram.schedule(triangle.POINTER_TILES[arch], 24, 300, 8, 18)[1] > 1
    check(T, 24, torch.bfloat16, masked=masked)


def test_deterministic_mode_does_not_split(arch, monkeypatch):
    parts = []
    schedule = gram.schedule

    def recorded(*args):
        tile, splits = schedule(*args)
        parts.append(splits)
        return tile, splits

    monkeypatch.setattr(launch, "multiprocessors", lambda device: 8)
    monkeypatch.setattr(gram, "_TOKENS_PER_PROGRAM", 16)
    monkeypatch.setattr(gram, "schedule", recorded)
    check(300, 24, torch.bfloat16)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    check(300, 24, torch.bfloat16)
    assert parts[0] > 1
    assert parts[1] == 1


@pytest.mark.parametrize("d", [1024, 2048, 2560, 3072, 4096, 5120, 8192, 11008, 14336])
def test_a_schedule_keeps_the_multiprocessors_of_a_h100_busy(d):
    """Of the time of the waves of programs, at most an eighth is idle, where there are tokens to split."""
    for tiles in (gram.TMA_TILES["sm_90"], triangle.POINTER_TILES["sm_90"]):
        tile, splits = gram.schedule(tiles, d, 16384, 132, 32)
        programs = triangle.lower_tiles(d, tile) * splits
        assert programs / (132 * math.ceil(programs / 132)) > 7 / 8
        assert tile.rows >= 128
    assert (
        gram.schedule(gram.TMA_TILES["sm_90"], 4096, 16384, 132, 32)[1] == 1
    )  # four full waves of 128 x 128


def test_large_tile_of_two_columns_per_diagonal_block(monkeypatch):
    """256 x 128 tiles, which small matrices do not choose by themselves."""
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setitem(gram.TMA_TILES, "sm_90", gram.TMA_TILES["sm_90"][:1])
    assert gram.TMA_TILES["sm_90"][0].rows == 2 * gram.TMA_TILES["sm_90"][0].columns
    check(10, 520, torch.bfloat16)


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("first_row", [0, 110, 8000])
def test_triangular_index(ratio, first_row):
    """Every tile of a few rows on or below the diagonal, once, in order."""
    expected = [
        (row, column) for row in range(first_row, first_row + 3) for column in range((row + 1) * ratio)
    ]
    first = first_row * (first_row + 1) // 2 * ratio
    out = torch.zeros(2, len(expected), dtype=torch.int32)
    locate[(1,)](out, first, len(expected), RATIO=ratio, SIZE=triton.next_power_of_2(len(expected)))
    assert list(zip(*out.tolist(), strict=True)) == expected


@triton.jit
def locate(out, first, count, RATIO: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    row, column = triangle.lower_tile(first + index, RATIO)
    tl.store(out + index, row, mask=index < count)
    tl.store(out + count + index, column, mask=index < count)
