from __future__ import annotations

import pytest
import torch

import laplace_kernels as lk
from laplace_kernels.triton import jacobian_stats, launch
from tests.kernels import oracles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = 1e-6


def operands(shared, N, C, T, r, d, k, dtype):
    generator = torch.Generator().manual_seed(T + 100 * d + r)
    Cs, Cl = (1 if shared == "small" else C), (1 if shared == "large" else C)
    small = torch.randn(N, Cs, T, r, generator=generator).to(dtype)
    large = torch.randn(N, T, Cl, d, generator=generator).to(dtype).transpose(1, 2)
    return small, large, torch.randn(d, k, generator=generator), generator


def check(shared, N, C, T, r, d, k, dtype, masked=False, row_grams=True):
    small, large, basis, generator = operands(shared, N, C, T, r, d, k, dtype)
    mask = None
    if masked:
        mask = torch.rand(N, T, generator=generator) < 0.6
        mask[0] = False
        small.masked_fill_(~mask[:, None, :, None], torch.nan)
        large.masked_fill_(~mask[:, None, :, None], torch.inf)
    P, D = lk.jacobian_stats(small, large, basis, mask, row_grams)
    exact_P, exact_D = oracles.jacobian_stats(small, large, basis, mask)
    oracles.assert_near(P, exact_P, TOLERANCE)
    if row_grams:
        oracles.assert_near(D, exact_D, TOLERANCE)
    else:
        assert D is None


@pytest.mark.parametrize("shared", ["small", "large", "neither"])
@pytest.mark.parametrize("C", [1, 2, 3, 4, 5])
def test_classes(arch, shared, C):
    check(shared, 2, C, 7, 8, 40, 5, torch.bfloat16)


@pytest.mark.parametrize("r", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("C", [1, 5])
def test_ranks(arch, r, C):
    check("large", 1, C, 9, r, 33, 16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_grams", [True, False])
@pytest.mark.parametrize(("T", "d", "k"), [(0, 8, 4), (1, 1, 1), (1, 33, 3), (70, 130, 20), (150, 64, 128)])
def test_shapes(arch, T, d, k, row_grams, dtype):
    check("large", 2, 3, T, 4, d, k, dtype, row_grams=row_grams)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", ["small", "large"])
def test_not_finite_behind_the_mask(arch, shared, dtype):
    check(shared, 2, 3, 70, 8, 40, 6, dtype, masked=True)


@pytest.mark.parametrize(("processors", "d"), [(64, 200), (5, 200), (3, 64)])
def test_partial_sums_over_columns_add_up(arch, monkeypatch, processors, d):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: processors)
    check("small", 2, 2, 5, 8, d, 6, torch.bfloat16)


@pytest.mark.parametrize(("large_dtype", "tolerance"), [(torch.bfloat16, 1e-5), (torch.float16, TOLERANCE)])
@pytest.mark.parametrize(("C", "shared"), [(1, "large"), (3, "large"), (3, "small")])
def test_a_small_side_in_fp32_and_a_transposed_basis(arch, C, shared, large_dtype, tolerance):
    """What a prediction asks for. Beside bf16 the small side has 16 bits."""
    small, large, basis, generator = operands(shared, 2, C, 70, 8, 40, 6, large_dtype)
    small = small.float() * 1.001
    mask = torch.rand(2, 70, generator=generator) < 0.6
    small.masked_fill_(~mask[:, None, :, None], torch.inf)
    large.masked_fill_(~mask[:, None, :, None], torch.nan)
    P, D = lk.jacobian_stats(small, large, basis.T.contiguous().T, mask)
    exact_P, exact_D = oracles.jacobian_stats(small, large, basis, mask)
    oracles.assert_near(P, exact_P, tolerance)
    oracles.assert_near(D, exact_D, tolerance)


def test_last_axis_with_a_stride(arch):
    small, large, basis, _ = operands("large", 2, 3, 9, 8, 40, 6, torch.bfloat16)
    strided = torch.stack((large, large * torch.nan), dim=-1)[..., 0]
    P, _ = lk.jacobian_stats(small, strided, basis)
    oracles.assert_near(P, oracles.jacobian_stats(small, large, basis)[0], TOLERANCE)


@pytest.mark.parametrize(("C", "k"), [(33, 4), (2, 129)])
def test_what_does_not_fit_on_chip_goes_to_the_reference(arch, monkeypatch, C, k):
    calls = []
    monkeypatch.setattr(jacobian_stats, "reference", lambda *args: calls.append(args) or (None, None))
    small, large, basis, _ = operands("large", 1, C, 2, 2, 130, k, torch.bfloat16)
    lk.jacobian_stats(small, large, basis)
    assert len(calls) == 1
