"""Running factors: sums, merging, spectra, tails, sketches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast import NumericalError
from laplace_lora_fast.structures.blocks import factors
from laplace_lora_fast.structures.blocks.factors import DenseFactor, Factor, SketchFactor, flush_full
from laplace_lora_fast.structures.blocks.waiting import WaitingRows
from tests.kernels.native import sixteen_bit_products
from tests.oracle import assert_close

CPU, FP64 = torch.device("cpu"), torch.float64


def rows(n: int, d: int, seed: int, decay: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Correlated rows whose covariance has eigenvalues i^-decay."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    mix = torch.linalg.qr(
        torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    ).Q
    return (noise * torch.arange(1, d + 1) ** (-decay / 2) @ mix).to(dtype)


def dense(d: int) -> DenseFactor:
    return DenseFactor(d, torch.float64, CPU)


def sketch(
    d: int, size: int, exact: Tensor | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> SketchFactor:
    exact = torch.zeros(d, 0, dtype=dtype) if exact is None else exact
    return SketchFactor(size, exact, dtype, seed)


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 12), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), tokens=st.booleans())
def test_dense_factor_is_the_sum_of_outer_products(d: int, sizes: list[int], tokens: bool) -> None:
    """However the rows come, waiting or flushed."""
    factor, parts = dense(d), [rows(n, d, seed) for seed, n in enumerate(sizes)]
    for place, part in enumerate(parts):
        factor.add_tokens(part, None) if tokens and place % 2 else factor.add_rows(part)
    everything = torch.cat(parts)
    expected = everything.mT @ everything
    spectrum = factor.spectrum(None)
    torch.testing.assert_close(spectrum.dense(), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(spectrum.trace, expected.trace())
    basis = rows(3, d, 7).mT
    torch.testing.assert_close(factor.quadratic(basis), basis.mT @ expected @ basis, atol=1e-10, rtol=1e-10)


def test_few_tokens_wait_and_are_then_added_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked or not, in each precision; a factor that takes them at once and one that is never full among them."""
    launches: list[list[int]] = []
    gram_group_ = lk.gram_group_

    def recorded(Cs: list[Tensor], Xs: list[Tensor]) -> None:
        launches.append([len(x) for x in Xs])
        gram_group_(Cs, Xs)

    monkeypatch.setattr(lk, "gram_group_", recorded)
    monkeypatch.setattr(factors, "tokens_worth_an_update", lambda device: 7)
    low, full = torch.bfloat16, torch.float32
    made: list[tuple[Factor, torch.dtype]]
    made = [(DenseFactor(d, full, CPU), dtype) for d, dtype in ((8, full), (24, full), (24, low), (28, full))]
    made += [(DenseFactor(60, full, CPU), full), (sketch(10, 10, dtype=full), full)]
    sums = [torch.zeros(factor.dim, factor.dim, dtype=torch.float64) for factor, _ in made]
    for step in range(9):  # at most 4, 12, 12, 14, 30 and 10 rows may wait
        for (factor, dtype), total in zip(made, sums, strict=True):
            x = rows(3, factor.dim, step, dtype=dtype)
            mask = torch.tensor([step % 2 > 0, True, True])
            total += x[mask].double().mT @ x[mask].double()
            x = x.masked_fill(~mask[:, None], torch.nan)
            factor.add_tokens(x[None], None if step % 2 else mask[None])
            x.fill_(torch.inf)  # it was read, not kept
        flush_full(factor for factor, _ in made)
    assert launches == [[12, 12], [12]] * 2
    for (factor, _), total in zip(made, sums, strict=True):
        assert factor.is_finite()
        assert_close(factor.spectrum(factor.dim).dense().double(), total, 1e-5)


def test_waiting_rows_keep_their_memory_and_the_better_precision() -> None:
    waiting = WaitingRows(4, 6)
    places = []
    for _ in range(3):
        for n in (1, 2, 3):
            waiting.append(torch.full((n, 4), n, dtype=torch.bfloat16), None)
        assert waiting.room == 0
        assert waiting.rows[:, 0].tolist() == [1, 2, 2, 3, 3, 3]
        places.append(waiting.rows.data_ptr())
        waiting.clear()
    assert len(set(places)) == 1
    assert waiting.rows.untyped_storage().nbytes() == 6 * 4 * 2
    third = torch.full((1, 4), 1 / 3)
    waiting.append(third.bfloat16(), None)
    waiting.append(third, torch.ones(1, dtype=torch.bool))
    assert torch.equal(waiting.rows, torch.cat([third.bfloat16().float(), third]))


def test_masked_tokens_are_selected_away() -> None:
    x = rows(12, 5, 0)
    mask = torch.arange(12) % 3 > 0
    poisoned = x.masked_fill(~mask[:, None], float("nan"))
    for factor in (dense(5), sketch(5, 5)):
        factor.add_tokens(poisoned.view(3, 4, 5), mask.view(3, 4))
        assert factor.is_finite()
        assert_close(factor.spectrum(5).dense(), x[mask].mT @ x[mask], 1e-7)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("n", [3, 40])
def test_tail_keeps_the_trace(rank: int, n: int) -> None:
    """U S U^T + tau (I - U U^T): leading eigenpairs of C and its trace; from rows and from the matrix."""
    x = rows(n, 7, 0)
    factor = dense(7)
    factor.add_rows(x)
    spectrum = factor.spectrum(rank)
    c = x.mT @ x
    values = torch.linalg.eigvalsh(c).flip(0)
    kept = min(rank, n)
    torch.testing.assert_close(spectrum.values, values[:kept])
    torch.testing.assert_close(spectrum.dense().trace(), c.trace())
    torch.testing.assert_close(
        spectrum.tail, values[kept:].clamp_min(0).sum() / (7 - kept), atol=1e-12, rtol=1e-9
    )
    assert spectrum.captured == pytest.approx(float(values[:kept].sum() / values.sum()))


def test_sketch_keeps_quadratic_forms_of_its_exact_columns() -> None:
    """Also with a zero and a repeated column among them, as an untrained lora_B gives."""
    x = rows(300, 40, 0, decay=1)
    exact = torch.cat([rows(3, 40, 1).mT, torch.zeros(40, 1, dtype=torch.float64), rows(1, 40, 1).mT], 1)
    factor = sketch(40, 8, exact)
    for part in x.split(100):
        factor.add_tokens(part, None)
    assert_close(factor.quadratic(exact[:, :3]), exact[:, :3].mT @ x.mT @ x @ exact[:, :3], 1e-10)
    assert factor.quadratic(exact[:, 3:4]).abs().max() == 0


@pytest.mark.parametrize("products", [nullcontext, sixteen_bit_products], ids=["CPU", "GPU"])
def test_bf16_rows_have_a_bf16_omega_of_as_many_columns(products: Callable[[], Any]) -> None:
    """What it costs, against fp64 on the same rows: less than 2^-17 of a form, and what X Omega in bf16 does to it."""
    d, ranks = 200, (3, 4)
    stream = [rows(400, d, seed, decay=1.5, dtype=torch.bfloat16) for seed in range(6)]
    exact = torch.cat([rows(rank, d, 50 + rank, dtype=torch.float32).mT for rank in ranks], 1)
    factor, wide, whole = (
        sketch(d, size, columns, dtype)
        for size, columns, dtype in [
            (57, exact, torch.float32),
            (57, exact, torch.float32),
            (d, exact[:, :0], FP64),
        ]
    )
    with products():
        for part in stream:
            factor.add_tokens(part, None)
            wide.add_tokens(part.float(), None)
            whole.add_tokens(part.double(), None)
    assert factor.omega.dtype == torch.bfloat16
    assert factor.omega.shape == wide.omega.shape == (d, 64)
    assert wide.omega.dtype == torch.float32
    x = torch.cat(stream).double()
    form = exact.double().mT @ x.mT @ x @ exact.double()
    scale = (form.diagonal()[:, None] * form.diagonal()).sqrt()
    bound = 2e-4 if products is sixteen_bit_products else 1e-5
    assert ((factor.quadratic(exact) - form).abs() / scale).max() < bound
    values = whole.spectrum(10).values
    for each in (factor, wide):  # as good as the other
        assert ((each.spectrum(10).values - values).abs() / values).max() < 0.01


def test_fp16_has_no_room_for_products_with_omega() -> None:
    factor = sketch(20, 8, dtype=torch.float32)
    factor.add_tokens(rows(30, 20, 0, dtype=torch.float16), None)
    assert factor.omega.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sketch_recovers_the_leading_directions(dtype: torch.dtype) -> None:
    """Rank k from m = 4k columns, half warm-started: within a few per cent of the best rank k, on a drifting stream."""
    d, k = 120, 8
    stream = [rows(60, d, seed, decay=1.5, dtype=dtype) * (1 + 0.2 * seed) for seed in range(8)]
    factor = sketch(d, 4 * k, dtype=dtype)
    for part in stream:
        factor.add_tokens(part, None)
    x = torch.cat(stream).double()
    c = x.mT @ x
    spectrum = factor.spectrum(None)
    assert spectrum.rank == k
    assert float(spectrum.trace) == pytest.approx(float(c.trace()), rel=1e-5)
    values, vectors = torch.linalg.eigh(c)
    best = (vectors[:, -k:] * values[-k:]) @ vectors[:, -k:].mT
    u = spectrum.vectors.double()
    found = (u * spectrum.values) @ u.mT
    assert (c - found).norm() <= 1.03 * (c - best).norm()
    torch.testing.assert_close(u.mT @ u, torch.eye(k, dtype=torch.float64), atol=1e-5, rtol=0)


def test_sketch_of_few_rows_is_exact() -> None:
    x = rows(6, 30, 0)
    factor = sketch(30, 8)
    factor.add_rows(x[:2])
    factor.add_rows(x[2:])
    assert_close(factor.spectrum(None).dense(), x.mT @ x, 1e-12)


@pytest.mark.parametrize("make", [lambda: dense(9), lambda: sketch(9, 9)])
@pytest.mark.parametrize("first", [0, 2, 30])
@pytest.mark.parametrize("second", [0, 2, 30])
def test_merge_adds_the_data(make: object, first: int, second: int) -> None:
    """Whether either side holds waiting rows, an accumulator, or nothing."""
    x, y = rows(first, 9, 0), rows(second, 9, 1)
    left, right = make(), make()  # type: ignore[operator]
    left.add_rows(x)
    right.add_rows(y)
    if first == second == 30 and left.kind == "sketch":
        with pytest.raises(NumericalError, match="Omega"):
            left.merge(right)
        return
    left.merge(right)
    both = torch.cat([x, y])
    torch.testing.assert_close(left.spectrum(9).dense(), both.mT @ both, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("make", [lambda: dense(9), lambda: sketch(9, 9)])
def test_merging_into_an_empty_factor_leaves_the_other_alone(make: object) -> None:
    left, right = make(), make()  # type: ignore[operator]
    right.add_rows(rows(30, 9, 1))
    before = right.spectrum(9).dense()
    left.merge(right)
    left.add_rows(rows(30, 9, 2))
    assert left.spectrum(9).trace > before.trace()
    torch.testing.assert_close(right.spectrum(9).dense(), before)


def test_merge_refuses_another_kind() -> None:
    with pytest.raises(NumericalError, match="sketch"):
        dense(4).merge(sketch(4, 2))


@pytest.mark.parametrize("factor", [dense(4), sketch(4, 2)])
def test_non_finite_rows_are_noticed(factor: Factor) -> None:
    factor.add_rows(torch.full((1, 4), float("inf"), dtype=torch.float64))
    assert not factor.is_finite()
    factor.add_rows(rows(10, 4, 0))
    assert not factor.is_finite()


def test_fp32_accumulation_of_low_precision_rows_does_not_drift() -> None:
    """Peers that accumulate in bf16 lose 14 % of the trace after 500 updates."""
    x = rows(2, 6, 0, dtype=torch.bfloat16)
    factor = DenseFactor(6, torch.float32, CPU)
    updates = 2000
    for _ in range(updates):
        factor.add_tokens(x, None)
    expected = updates * (x.double().mT @ x.double())
    half_an_ulp = torch.finfo(torch.float32).eps / 2  # equal updates can all round the same way
    assert_close(factor.spectrum(None).dense().double(), expected, updates * half_an_ulp)


@pytest.mark.parametrize("factor", [1.0, 300.0, 3000.0])
def test_a_channel_far_above_the_others_costs_no_digits(factor):
    """Accumulated in fp32: small eigenvalues and their directions are those of the same sum in fp64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 24, generator=generator, dtype=torch.float64)
    x[:, 3] *= factor
    found = []
    for dtype in (torch.float32, torch.float64):
        running = DenseFactor(24, dtype, torch.device("cpu"))
        for rows in x.to(dtype).split(100):
            running.add_tokens(rows, None)
        spectrum = running.spectrum(None)
        u, values = spectrum.vectors.double(), spectrum.values
        found.append((u / (values + 1.0)) @ u.mT)  # the inverse under a prior precision of 1
    error = (found[0] - found[1]).abs().max() / found[1].abs().max()
    assert error < 1e-4
