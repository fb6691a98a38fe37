from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import laplace_kernels as lk
from laplace_kernels.ops import blocks
from tests.kernels import inputs, oracles
from tests.kernels.inputs import keep, zeros
from tests.kernels.native import sixteen_bit_products


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(0, 12),
    st.integers(1, 9),
    st.integers(1, 20),
    inputs.dtypes,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    inputs.seeds,
)
def test_sums_of_outer_products(N, T, r, d, dtype, precise, masked, emulated, seed):
    """`small` of 16 bits, or more precise than `large`; what is masked is not finite."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(N, T, r, generator=generator, dtype=torch.float64)
    small = small.to(lk.accumulation_dtype(dtype) if precise else dtype)
    large = torch.randn(N, T, d, generator=generator, dtype=torch.float64).to(dtype)
    mask = inputs.poisoned_mask(large, generator) if masked else None
    if mask is not None:
        small[~mask] = torch.nan
    with sixteen_bit_products() if emulated else nullcontext():
        found = lk.jacobian(small, large, mask)
    exact = oracles.jacobians(small[:, None], large[:, None], mask)[:, 0]
    oracles.assert_near(found, exact, 1e-5 if found.dtype == torch.float32 else None)


def test_many_examples_are_converted_block_by_block(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    small, large, mask = torch.randn(7, 5, 2), torch.randn(7, 5, 9).bfloat16(), torch.rand(7, 5) < 0.5
    exact = oracles.jacobians(small[:, None], large[:, None], mask)[:, 0]
    oracles.assert_near(lk.jacobian(small, large, mask), exact)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"large": zeros(2, 4, 3)}, ValueError, r"^large must have shape \(2, 5, 3\)"),
        ({"large": zeros(2, 5, 3, dtype=torch.float64)}, TypeError, "must both be float64 or neither"),
        ({"small": zeros(2, 5)}, ValueError, "^small must have 3 dimensions"),
        ({"mask": keep(2, 4)}, ValueError, r"^mask must have shape \(2, 5\)"),
        ({"mask": zeros(2, 5)}, TypeError, "^mask must be a bool tensor"),
    ],
)
def test_wrong_arguments_are_named(changed, error, message):
    good = {"small": zeros(2, 5, 4), "large": zeros(2, 5, 3), "mask": keep(2, 5)}
    with pytest.raises(error, match=message):
        lk.jacobian(**{**good, **changed})
