from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import laplace_kernels as lk
from laplace_kernels.ops import blocks, gram_sketch
from tests.kernels import inputs, oracles
from tests.kernels.inputs import keep, zeros
from tests.kernels.native import sixteen_bit_products


@settings(max_examples=60, deadline=None)
@given(inputs.token_counts, inputs.sizes, st.integers(0, 9), inputs.dtypes, inputs.layouts, inputs.seeds)
def test_adds_the_sketched_gram_matrix(T, d, m, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    X = inputs.rows(T, d, dtype, layout, generator)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    Omega = torch.randn(d, m, generator=generator, dtype=accumulate)
    Y = torch.ones(d, m, dtype=accumulate)
    assert lk.gram_sketch_(Y, X, Omega, alpha=0.5) is Y
    oracles.assert_near(Y, 1 + 0.5 * oracles.gram_sketch(X, Omega))


@settings(max_examples=40, deadline=None)
@given(inputs.token_counts, inputs.sizes, inputs.dtypes, inputs.layouts, inputs.seeds)
def test_masked_rows_add_nothing_even_when_not_finite(T, d, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    X = inputs.rows(T, d, dtype, layout, generator)
    mask = inputs.poisoned_mask(X, generator)
    Omega = torch.randn(d, 4, generator=generator).to(dtype)
    Y = torch.zeros(d, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    oracles.assert_near(lk.gram_sketch_(Y, X, Omega, mask), oracles.gram_sketch(X, Omega, mask))


def test_the_sketch_keeps_the_precision_of_omega():
    """Derived factors are exact only if a fp32 Omega is not rounded to the dtype of X."""
    X = torch.randn(50, 16).bfloat16()
    Omega = torch.randn(16, 3)
    Y = lk.gram_sketch_(torch.zeros(16, 3), X, Omega)
    exact = oracles.gram_sketch(X, Omega)
    rounded = oracles.gram_sketch(X, Omega.bfloat16())
    assert (Y - exact).abs().max() < 1e-2 * (rounded - exact).abs().max()


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_rows_add_up(monkeypatch, masked):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 50)
    X, Omega = torch.randn(99, 7).bfloat16(), torch.randn(7, 2)
    mask = torch.arange(99) % 3 > 0 if masked else None
    Y = lk.gram_sketch_(torch.zeros(7, 2), X, Omega, mask)
    oracles.assert_near(Y, oracles.gram_sketch(X, Omega, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precise", [True, False])
def test_sixteen_bit_products(dtype, precise, monkeypatch):
    """As on a GPU: as precise as Omega is, in blocks of rows, and nothing of what is masked."""
    monkeypatch.setattr(gram_sketch, "_CACHED_BYTES", 400)
    X, Omega = torch.randn(99, 7).to(dtype), torch.randn(7, 3)
    Omega = Omega if precise else Omega.to(dtype)
    mask = torch.arange(99) % 3 > 0
    X[~mask] = torch.nan
    with sixteen_bit_products():
        Y = lk.gram_sketch_(torch.ones(7, 3), X, Omega, mask, alpha=0.5)
    exact = 1 + 0.5 * oracles.gram_sketch(X, Omega, mask)
    eps = torch.finfo(dtype).eps
    oracles.assert_near(Y, exact, 2e-5 if precise else eps)


REFUSED = {
    "X": (ValueError, r"X must have 2 dimensions", {"X": zeros(5)}),
    "Omega 1-d": (ValueError, r"Omega must have 2 dimensions", {"Omega": zeros(3)}),
    "Omega rows": (ValueError, r"Omega must have shape \(3, 2\) to match X", {"Omega": zeros(4, 2)}),
    "Omega fp64": (
        TypeError,
        r"Omega and X must both be float64 or neither",
        {"Omega": zeros(3, 2, dtype=torch.float64)},
    ),
    "Omega elsewhere": (
        ValueError,
        r"Omega must be on the device of X",
        {"Omega": zeros(3, 2, device="meta")},
    ),
    "Y shape": (ValueError, r"Y must have shape \(3, 2\)", {"Y": zeros(3, 3)}),
    "Y dtype": (TypeError, r"Y must be torch.float32", {"Y": zeros(3, 2, dtype=torch.bfloat16)}),
    "mask": (ValueError, r"mask must have shape \(5,\)", {"mask": keep(3)}),
    "alpha": (TypeError, r"alpha must be a Python number", {"alpha": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_named(case):
    error, message, changed = REFUSED[case]
    with pytest.raises(error, match=message):
        lk.gram_sketch_(**{"Y": zeros(3, 2), "X": zeros(5, 3), "Omega": zeros(3, 2), **changed})
