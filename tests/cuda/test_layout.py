"""The index arithmetic of csrc/layout.h, compiled for the host, against brute force."""

from __future__ import annotations

import ctypes
import itertools
import random
from ctypes import byref, c_int, c_int64

import pytest
import torch

from tests.cuda import emulation

pytestmark = emulation.needs_host_compiler
SEED = random.Random(0)


@pytest.fixture(scope="module")
def lib():
    return emulation.library()


def test_a_swizzled_panel_holds_every_chunk_once(lib):
    places = [lib.swizzled(row, 16 * chunk) for row in range(64) for chunk in range(8)]
    assert sorted(places) == list(range(0, 64 * 128, 16))
    assert all(lib.swizzled(row, byte) // 128 == row for row in range(64) for byte in range(0, 128, 2))


def test_a_swizzled_panel_is_read_without_bank_conflicts(lib):
    """Eight 16-byte reads, down a column or along a row, touch all 32 banks."""
    for chunk, row0 in itertools.product(range(8), range(0, 64, 8)):
        down = {lib.swizzled(row0 + i, 16 * chunk) % 128 for i in range(8)}
        along = {lib.swizzled(row0 + chunk, 16 * i) % 128 for i in range(8)}
        assert len(down) == len(along) == 8


@pytest.mark.parametrize("size", [2, 4])
def test_a_chunk_ends_where_the_columns_end(lib, size):
    for column, last in itertools.product(range(0, 40, 16 // size), range(40)):
        wanted = max(0, min(16, (last - column) * size))
        assert lib.chunk_bytes(c_int64(column), c_int64(last), size) == wanted
    far = 1 << 40
    assert lib.chunk_bytes(c_int64(0), c_int64(far), size) == 16
    assert lib.chunk_bytes(c_int64(far), c_int64(0), size) == 0


def test_a_fragment_holds_every_element_once(lib):
    for threads, rows, columns in ((128, 64, 64), (128, 64, 16), (32, 16, 8)):
        held = [
            (lib.fragment_row(t, i), lib.fragment_column(t, i))
            for t in range(threads)
            for i in range(rows * columns // threads)
        ]
        assert sorted(held) == sorted(itertools.product(range(rows), range(columns)))


def test_an_accumulator_is_a_left_operand(lib):
    """Packed registers 2i, 2i + 1 of 16 columns are word i of the PTX manual's fragment of A."""
    for t, k0 in itertools.product(range(128), range(0, 64, 16)):
        for element in range(8):
            index = k0 // 2 + element
            word, half = divmod(element, 2)
            group, quad = t % 32 // 4, t % 4
            row = t // 32 * 16 + group + (8 if word in (1, 3) else 0)
            column = k0 + 2 * quad + half + (8 if word in (2, 3) else 0)
            assert (lib.fragment_row(t, index), lib.fragment_column(t, index)) == (row, column)


@pytest.mark.parametrize("d", [1, 63, 64, 65, 1000, 2304, 4095, 4096, 16384, 2**31 - 1])
def test_a_cluster_holds_every_column_once(lib, d):
    for ranks in (1, 2, 4, 8, 16):
        each = lib.columns_per_rank(c_int64(d), ranks)
        assert each % 64 == 0
        assert each * ranks >= d
        assert each - 64 < -(-d // ranks)  # no more than a panel too many


def test_a_tiling_serves_what_fits_and_nothing_else(lib):
    assert lib.cluster_tilings() == 3
    for tiling in range(3):
        m, columns, shared = c_int64(), c_int64(), c_int64()
        lib.tiling_shape(tiling, byref(m), byref(columns), byref(shared))
        assert shared.value <= 232448
        for d in (1, 64, columns.value, columns.value + 1, columns.value * 16, columns.value * 16 + 1):
            ranks = lib.tiling_ranks(tiling, c_int64(d), m)
            wanted = next((r for r in (1, 2, 4, 8, 16) if r * columns.value >= d), 0)
            assert ranks == wanted, (tiling, d)
        assert lib.tiling_ranks(tiling, c_int64(64), c_int64(m.value + 1)) == 0
    assert [lib.tiling_ranks(t, c_int64(4096), c_int64(64)) for t in range(3)] == [16, 8, 16]


def choose_cluster(lib, d, m, clusters_at_once):
    tiling, ranks, clusters = c_int(), c_int(), c_int()
    callback = ctypes.CFUNCTYPE(c_int, c_int, c_int)(clusters_at_once)
    lib.choose_cluster(c_int64(d), c_int64(m), callback, byref(tiling), byref(ranks), byref(clusters))
    return tiling.value, ranks.value, clusters.value


def test_the_cluster_that_keeps_most_processors_busy_is_chosen(lib):
    def gpcs(*processors):
        return lambda tiling, ranks: sum(count // ranks for count in processors)

    full, cut = gpcs(*[16] * 6, 18, 18), gpcs(*[16] * 5, 18, 18, 14)
    assert choose_cluster(lib, 4096, 64, full) == (0, 16, 8)
    assert choose_cluster(lib, 4096, 64, cut) == (0, 16, 7)  # 16 of 8 would use 120, not an eighth more
    assert choose_cluster(lib, 4096, 64, gpcs(*[14] * 9)) == (1, 8, 9)  # no cluster of 16 fits
    assert choose_cluster(lib, 4096, 64, gpcs(16, *[14] * 8)) == (1, 8, 10)
    assert choose_cluster(lib, 768, 64, full) == (0, 4, 32)  # 66 of 2 would use 132, not an eighth more
    assert choose_cluster(lib, 4096, 128, full) == (2, 16, 8)
    assert choose_cluster(lib, 4096, 64, lambda tiling, ranks: 0)[2] == 0
    assert choose_cluster(lib, 16384, 64, full)[2] == 0


@pytest.mark.parametrize("tokens", [1, 100, 4096, 100_000])
@pytest.mark.parametrize("d", [64, 801, 4096, 11008, 14336, 1 << 20])
@pytest.mark.parametrize("m", [4, 64, 200])
def test_the_portable_sketch_fills_the_processors(lib, tokens, d, m):
    sketch = emulation.Sketch(tokens=tokens, d=d, m=m)
    plan = emulation.plan_tiles(sketch, 132, False)
    assert plan.block_tokens == min(tokens, max(256, (24 << 20) // (2 * d)))
    for rows, inner, parts in (
        (plan.block_tokens, d, plan.project_parts),
        (d, plan.block_tokens, plan.accumulate_parts),
    ):
        blocks = lib.sketch_blocks(c_int64(rows), c_int64(m), c_int64(parts))
        assert parts == 1 or lib.sketch_blocks(c_int64(rows), c_int64(m), c_int64(parts - 1)) < 132
        assert blocks >= 132 or parts == -(-inner // 512)


def test_every_unit_of_z_has_one_owner_and_one_slot(lib):
    for threads, tokens, ranks in itertools.product((128, 256), (32, 64), (1, 2, 4, 8, 16)):
        units = threads * tokens // 8
        numbers = [
            lib.unit_of(quad, thread, threads) for quad in range(tokens // 8) for thread in range(threads)
        ]
        assert numbers == list(range(units))
        places = [(lib.unit_owner(u, units, ranks), lib.unit_slot(u, units, ranks)) for u in numbers]
        assert places == list(itertools.product(range(ranks), range(units // ranks)))


def lower_tile(lib, index):
    row, column = c_int(), c_int()
    lib.lower_tile(c_int64(index), byref(row), byref(column))
    return row.value, column.value


def test_lower_tiles_count_the_triangle(lib):
    tiles = [(i, j) for i in range(80) for j in range(i + 1)]
    assert [lower_tile(lib, p) for p in range(len(tiles))] == tiles


def test_lower_tiles_stay_exact_where_fp32_is_not(lib):
    for n in (4095, 4096, 5793, 23170, 46340):
        first = n * (n + 1) // 2
        assert lower_tile(lib, first - 1) == (n - 1, n - 1)
        assert lower_tile(lib, first) == (n, 0)
        assert lower_tile(lib, first + n) == (n, n)


def test_parts_cover_the_tokens_once(lib):
    for _ in range(500):
        tokens, parts, step = SEED.randrange(5000), SEED.randrange(1, 40), 64
        covered = []
        for part in range(parts):
            first, last = c_int64(), c_int64()
            lib.part_of(c_int64(tokens), part, parts, step, byref(first), byref(last))
            assert first.value % step == 0 or first.value >= tokens
            covered += range(first.value, last.value)
        assert covered == list(range(tokens))


class Member(ctypes.Structure):
    _fields_ = [("gram", emulation.Gram), ("parts", c_int), ("first_tile", c_int)]


class Table(ctypes.Structure):
    _fields_ = [("count", c_int), ("tiles", c_int), ("members", Member * 500)]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("count", [1, 7, 500, 501, 1203])
def test_tables_hold_every_tile_of_every_member_once(lib, count, split):
    assert ctypes.sizeof(Table) == lib.table_bytes() <= 32764
    sizes = [
        (SEED.choice((0, 1, 64, 65, 200, 700)), SEED.choice((0, 1, 511, 513, 5000))) for _ in range(count)
    ]
    grams = (emulation.Gram * count)(
        *(emulation.Gram(i, 0, 0, tokens, d, d, d, 1.0) for i, (d, tokens) in enumerate(sizes))
    )
    seen, start, table = [], 0, Table()
    while start < count:
        start = lib.fill_table(byref(table), grams, c_int64(start), c_int64(count), 132, split)
        assert table.count <= 500
        for index in range(table.tiles):
            member = table.members[lib.find_member(byref(table), c_int64(index))]
            tile, part = divmod(index - member.first_tile, member.parts)
            seen.append((member.gram.c, lower_tile(lib, tile), part, member.parts))
            assert split or member.parts == 1
    wanted = {(i, *tile) for i, (d, T) in enumerate(sizes) if T for tile in triangle(d)}
    assert len(set(seen)) == len(seen)
    assert {(c, tile) for c, tile, *_ in seen} == {(i, (row, column)) for i, row, column in wanted}
    per_tile = {(c, tile): parts for c, tile, _, parts in seen}
    assert len(seen) == sum(per_tile.values())
    for i, (_, tokens) in enumerate(sizes):
        assert all(parts <= -(-tokens // 512) for (c, _), parts in per_tile.items() if c == i)


def triangle(d):
    n = -(-d // 64)
    return [(i, j) for i in range(n) for j in range(i + 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(lib, dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, 65504, 65519, 65520, 6e-8, 3e-8, 2.9e-8, -6.1e-5]
    )
    values = torch.cat([bits.view(torch.float32), torch.randn(50_000, generator=generator), special])
    values = torch.cat([values, torch.arange(2**16).to(torch.int16).view(dtype).float()])
    values = values[~values.isnan()].contiguous()
    rounded = torch.empty(len(values), dtype=torch.int16)
    back, low = torch.empty_like(values), torch.empty_like(values)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (values, rounded, back, low)]
    lib.round_floats(pointers[0], c_int64(len(values)), dtype == torch.float16, *pointers[1:])
    assert torch.equal(rounded.view(dtype), values.to(dtype))
    assert torch.equal(back, values.to(dtype).float())
    finite = back.isfinite()
    assert torch.equal(low[finite], (values - back).to(dtype).float()[finite])
