from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import laplace_kernels as lk
from laplace_kernels.ops import blocks
from tests.kernels import inputs, oracles
from tests.kernels.inputs import keep, zeros
from tests.kernels.native import sixteen_bit_products

shared = st.sampled_from(("small", "large", "neither"))


def operands(shared, N, C, T, r, d, dtype, generator):
    Cs, Cl = (1 if shared == "small" else C), (1 if shared == "large" else C)
    small = torch.randn(N, Cs, T, r, generator=generator, dtype=torch.float64).to(dtype)
    large = torch.randn(N, T, Cl, d, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
    return small, large


@settings(max_examples=80, deadline=None)
@given(
    shared,
    st.integers(0, 4),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(0, 20),
    inputs.dtypes,
    st.booleans(),
    inputs.seeds,
)
def test_projection_and_row_grams(shared, N, C, T, r, d, k, dtype, row_grams, seed):
    generator = torch.Generator().manual_seed(seed)
    small, large = operands(shared, N, C, T, r, d, dtype, generator)
    basis = torch.randn(d, k, generator=generator, dtype=torch.float64).to(dtype)
    P, D = lk.jacobian_stats(small, large, basis, row_grams=row_grams)
    exact_P, exact_D = oracles.jacobian_stats(small, large, basis)
    oracles.assert_near(P, exact_P)
    if row_grams:
        oracles.assert_near(D, exact_D)
    else:
        assert D is None


@settings(max_examples=40, deadline=None)
@given(shared, st.sampled_from(("small", "large", "both")), inputs.dtypes, st.integers(1, 30), inputs.seeds)
def test_not_finite_behind_the_mask_in_either_operand(shared, poisoned, dtype, k, seed):
    generator = torch.Generator().manual_seed(seed)
    small, large = operands(shared, 3, 2, 7, 4, 10, dtype, generator)
    basis = torch.randn(10, k, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(3, 7, generator=generator) < 0.6
    mask[1] = False
    dropped = ~mask[:, None, :, None]
    if poisoned != "large":
        small.masked_fill_(dropped, torch.nan)
    if poisoned != "small":
        large.masked_fill_(dropped, torch.inf)
    P, D = lk.jacobian_stats(small, large, basis, mask)
    exact_P, exact_D = oracles.jacobian_stats(small, large, basis, mask)
    oracles.assert_near(P, exact_P)
    oracles.assert_near(D, exact_D)
    only_P, _ = lk.jacobian_stats(small, large, basis, mask, row_grams=False)
    oracles.assert_near(only_P, exact_P)


@pytest.mark.parametrize(("T", "k"), [(1, 2), (40, 30)])
@pytest.mark.parametrize("row_grams", [True, False])
def test_both_orders_of_contraction_agree(T, k, row_grams):
    """T = 1 projects `large` first, long sequences form the Jacobian first."""
    generator = torch.Generator().manual_seed(0)
    small, large = operands("large", 3, 5, T, 8, 30, torch.float32, generator)
    basis = torch.randn(30, k, generator=generator)
    P, _ = lk.jacobian_stats(small, large, basis, row_grams=row_grams)
    oracles.assert_near(P, oracles.jacobian_stats(small, large, basis)[0])


def test_examples_in_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 150)
    generator = torch.Generator().manual_seed(0)
    small, large = operands("small", 5, 2, 3, 2, 10, torch.bfloat16, generator)
    basis = torch.randn(10, 4, generator=generator)
    mask = torch.rand(5, 3, generator=generator) < 0.6
    P, D = lk.jacobian_stats(small, large, basis, mask)
    exact_P, exact_D = oracles.jacobian_stats(small, large, basis, mask)
    oracles.assert_near(P, exact_P)
    oracles.assert_near(D, exact_D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", ["small", "large", "neither"])
@pytest.mark.parametrize("row_grams", [True, False])
def test_sixteen_bit_products(shared, dtype, row_grams):
    """As on a GPU, a more precise `small` beside 16-bit `large`."""
    generator = torch.Generator().manual_seed(0)
    small, large = operands(shared, 3, 2, 7, 4, 10, dtype, generator)
    small = small + 1e-3 * torch.randn(small.shape, generator=generator)
    basis, mask = torch.randn(10, 5, generator=generator), torch.rand(3, 7, generator=generator) < 0.6
    large[~mask[:, None].expand(large.shape[:3])] = torch.nan
    with sixteen_bit_products():
        P, D = lk.jacobian_stats(small, large, basis, mask, row_grams=row_grams)
    exact_P, exact_D = oracles.jacobian_stats(small, large, basis, mask)
    oracles.assert_near(P, exact_P, 1e-5)
    if row_grams:
        oracles.assert_near(D, exact_D, 2e-5)


def test_without_row_grams_the_fake_agrees():
    small, large = operands("small", 2, 3, 5, 4, 6, torch.float32, torch.Generator().manual_seed(0))
    arguments = (small, large, torch.randn(6, 2), None, False)
    torch.library.opcheck(torch.ops.laplace_kernels.jacobian_stats.default, arguments)


REFUSED = {
    "small 3-d": (ValueError, r"small must have 4 dimensions", {"small": zeros(2, 5, 4)}),
    "large 3-d": (ValueError, r"large must have 4 dimensions", {"large": zeros(2, 5, 6)}),
    "basis 1-d": (ValueError, r"basis must have 2 dimensions", {"basis": zeros(6)}),
    "classes": (
        ValueError,
        r"same number of classes, or 1, got 3 and 2",
        {"large": zeros(2, 2, 5, 6)},
    ),
    "no classes": (
        ValueError,
        r"same number of classes, or 1, got 0 and 1",
        {"small": zeros(2, 0, 5, 4)},
    ),
    "tokens": (
        ValueError,
        r"large must have shape \(2, 1, 5, 6\) to match small",
        {"large": zeros(2, 1, 4, 6)},
    ),
    "examples": (ValueError, r"large must have shape", {"large": zeros(1, 1, 5, 6)}),
    "large fp64": (
        TypeError,
        r"large and small must both",
        {"large": zeros(2, 1, 5, 6, dtype=torch.float64)},
    ),
    "large elsewhere": (
        ValueError,
        r"large must be on the device",
        {"large": zeros(2, 1, 5, 6, device="meta")},
    ),
    "basis rows": (
        ValueError,
        r"basis must have shape \(6, 2\) to match large",
        {"basis": zeros(5, 2)},
    ),
    "basis fp64": (
        TypeError,
        r"basis and large must both",
        {"basis": zeros(6, 2, dtype=torch.float64)},
    ),
    "mask shape": (ValueError, r"mask must have shape \(2, 5\)", {"mask": keep(5)}),
    "row_grams tensor": (TypeError, r"row_grams must be True or False", {"row_grams": torch.tensor(True)}),
    "mask int": (TypeError, r"mask must be a bool tensor", {"mask": zeros(2, 5, dtype=torch.int64)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_named(case):
    error, message, changed = REFUSED[case]
    good = {"small": zeros(2, 3, 5, 4), "large": zeros(2, 1, 5, 6), "basis": zeros(6, 2)}
    with pytest.raises(error, match=message):
        lk.jacobian_stats(**{**good, **changed})
