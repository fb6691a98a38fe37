from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import laplace_kernels as lk
from laplace_kernels.ops import blocks
from tests.kernels import inputs, oracles
from tests.kernels.inputs import zeros
from tests.kernels.native import sixteen_bit_products


@settings(max_examples=60, deadline=None)
@given(
    inputs.token_counts,
    inputs.sizes,
    inputs.sizes,
    inputs.dtypes,
    inputs.layouts,
    st.booleans(),
    inputs.seeds,
)
def test_the_product(T, d, n, dtype, layout, emulated, seed):
    generator = torch.Generator().manual_seed(seed)
    X = inputs.rows(T, d, dtype, layout, generator)
    W = torch.randn(n, d, generator=generator, dtype=torch.float64).to(lk.accumulation_dtype(dtype)).mT
    Z = torch.full((T, n), torch.nan, dtype=lk.accumulation_dtype(dtype))
    if emulated:
        with sixteen_bit_products():
            assert lk.project_(Z, X, W) is Z
    else:
        lk.project_(Z, X, W)
    oracles.assert_near(Z, X.double() @ W.double(), 1e-5 if Z.dtype == torch.float32 else None)


def test_long_streams_are_converted_block_by_block(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 40)
    X, W = torch.randn(23, 8).bfloat16(), torch.randn(8, 3)
    oracles.assert_near(lk.project_(torch.empty(23, 3), X, W), X.double() @ W.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_halves_add_up(dtype, scale):
    matrix = scale * torch.randn(50, 40, dtype=torch.float64)
    high, low, factor = lk.halves(matrix, dtype)
    assert high.dtype == low.dtype == dtype
    assert (factor is None) == (dtype == torch.bfloat16)
    total = (high.double() + low.double()) / (1 if factor is None else factor)
    bound = 2.0**-17 if dtype == torch.bfloat16 else 2.0**-21
    assert (total - matrix).abs().max() <= bound * matrix.abs().max()


def test_halves_of_nothing():
    assert all(not part.any() for part in lk.halves(torch.zeros(3, 2), torch.float16)[:2])
    assert lk.halves(torch.zeros(0, 2), torch.float16)[0].shape == (0, 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"Z": zeros(5, 4, dtype=torch.bfloat16)}, TypeError, r"^Z must be torch\.float32"),
        ({"Z": zeros(4, 5).mT}, ValueError, "^Z must have contiguous rows"),
        ({"Z": zeros(6, 4)}, ValueError, r"^Z must have shape \(5, 4\)"),
        ({"W": zeros(4, 4)}, ValueError, r"^W must have shape \(3, 4\)"),
        ({"W": zeros(3, 4, dtype=torch.float64)}, TypeError, "^W and X must both be float64 or neither"),
    ],
)
def test_wrong_arguments_are_named(changed, error, message):
    good = {"Z": zeros(5, 4), "X": zeros(5, 3, dtype=torch.bfloat16), "W": zeros(3, 4)}
    with pytest.raises(error, match=message):
        lk.project_(**{**good, **changed})
