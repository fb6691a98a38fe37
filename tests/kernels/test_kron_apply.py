from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import laplace_kernels as lk
from tests.kernels import inputs, oracles
from tests.kernels.inputs import zeros


def operator(r, d, k, generator):
    """Eigenvectors and a positive function of the eigenvalues, fp64."""
    U, V = inputs.orthogonal(d, k, generator), inputs.orthogonal(r, r, generator)
    core = torch.rand(r, k, generator=generator, dtype=torch.float64) + 0.1
    tail = torch.rand(r, generator=generator, dtype=torch.float64) + 0.1
    return U, V, core, tail


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 12), st.floats(0, 1), inputs.dtypes, inputs.seeds)
def test_equals_the_dense_operator(B, r, d, fraction, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(B, r, d, generator=generator, dtype=torch.float64).to(dtype)
    exact_operator = operator(r, d, round(fraction * d), generator)
    arguments = tuple(t if dtype == torch.float64 else t.float() for t in exact_operator)
    oracles.assert_near(lk.kron_apply(W, *arguments), oracles.kron_apply(W, *exact_operator))


def test_the_inverse_undoes_the_operator():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(4, 3, 9, generator=generator, dtype=torch.float64)
    U, V, core, tail = operator(3, 9, 5, generator)
    there = lk.kron_apply(W, U, V, core, tail)
    assert not torch.allclose(there, W)
    torch.testing.assert_close(lk.kron_apply(there, U, V, 1 / core, 1 / tail), W)


def test_a_full_basis_has_no_tail():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, 3, 6, generator=generator)
    U, V, core, tail = (t.float() for t in operator(3, 6, 6, generator))
    huge = lk.kron_apply(W, U, V, core, tail * 1e12)
    torch.testing.assert_close(huge, lk.kron_apply(W, U, V, core, tail))


def test_inputs_are_read_whatever_their_strides():
    generator = torch.Generator().manual_seed(0)
    U, V, core, tail = operator(3, 8, 4, generator)
    W = torch.randn(8, 3, 5, generator=generator, dtype=torch.float64).permute(2, 1, 0)
    transposed = U.T.contiguous().T, V.T, core.T.contiguous().T, tail.repeat_interleave(2)[::2]
    exact = oracles.kron_apply(W.contiguous(), U, V.T, core, tail)
    oracles.assert_near(lk.kron_apply(W, *transposed), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_vectors_give_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    arguments = tuple(t.to(dtype) for t in operator(2, 6, 3, generator))
    W = torch.randn(2, 2, 6, generator=generator).to(dtype)
    out = lk.kron_apply(W, *arguments)
    assert out.dtype == torch.float32
    U, V, core, tail = (
        t.double() for t in arguments
    )  # rounded, so not quite orthonormal: the formula itself
    rotated = V.T @ W.double()
    P = rotated @ U
    exact = V @ (core * P @ U.T + tail[:, None] * (rotated - P @ U.T))
    oracles.assert_near(out, exact)


REFUSED = {
    "W 2-d": (ValueError, r"W must have 3 dimensions", {"W": zeros(2, 6)}),
    "W half-precision int": (
        TypeError,
        r"W must be bfloat16",
        {"W": zeros(1, 2, 6, dtype=torch.int32)},
    ),
    "U wide": (ValueError, r"U must have orthonormal columns, at most d = 6", {"U": zeros(6, 7)}),
    "U rows": (ValueError, r"U must have shape \(6, 3\) to match W", {"U": zeros(5, 3)}),
    "V": (ValueError, r"V must have shape \(2, 2\)", {"V": zeros(3, 3)}),
    "core": (ValueError, r"core must have shape \(2, 3\)", {"core": zeros(2, 4)}),
    "tail": (ValueError, r"tail must have shape \(2,\)", {"tail": zeros(3)}),
    "tail 2-d": (ValueError, r"tail must have 1 dimensions", {"tail": zeros(2, 1)}),
    "V fp64": (TypeError, r"V and W must both be float64", {"V": zeros(2, 2, dtype=torch.float64)}),
    "core elsewhere": (
        ValueError,
        r"core must be on the device of W",
        {"core": zeros(2, 3, device="meta")},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_named(case):
    error, message, changed = REFUSED[case]
    good = {
        "W": zeros(1, 2, 6),
        "U": zeros(6, 3),
        "V": zeros(2, 2),
        "core": zeros(2, 3),
        "tail": zeros(2),
    }
    with pytest.raises(error, match=message):
        lk.kron_apply(**{**good, **changed})
