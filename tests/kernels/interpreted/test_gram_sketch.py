from __future__ import annotations

import pytest
import torch

import laplace_kernels as lk
from laplace_kernels.triton import gram_sketch, launch
from tests.kernels import inputs, oracles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(T, d, m, dtype, layout="contiguous", masked=False, transposed=False):
    generator = torch.Generator().manual_seed(T + 1000 * d + m)
    X = inputs.rows(T, d, dtype, layout, generator)
    mask = inputs.poisoned_mask(X, generator) if masked else None
    Omega = torch.randn(d, m, generator=generator)
    Omega = Omega.T.contiguous().T if transposed else Omega
    Y = torch.ones(d, m + 3)[:, :m]
    lk.gram_sketch_(Y, X, Omega, mask, alpha=0.5)
    two_parts = 1e-5 if dtype == torch.bfloat16 else 1e-6
    oracles.assert_near(Y, 1 + 0.5 * oracles.gram_sketch(X, Omega, mask), two_parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "d", "m"), [(0, 8, 4), (1, 8, 4), (1, 1, 1), (70, 33, 16), (130, 136, 20), (65, 200, 70), (9, 9, 0)]
)
def test_values(arch, T, d, m, dtype):
    check(T, d, m, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_behind_the_mask(arch, dtype):
    check(70, 40, 16, dtype, masked=True)


@pytest.mark.parametrize("layout", ["padded rows", "every second row", "transposed"])
def test_strides(arch, layout):
    check(33, 40, 9, torch.bfloat16, layout, masked=True, transposed=True)


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_and_splits_of_tokens_add_up(arch, monkeypatch, masked):
    monkeypatch.setattr(gram_sketch, "_CACHED_BYTES", 1)  # blocks of 256 tokens
    monkeypatch.setattr(gram_sketch, "_TOKENS_PER_PROGRAM", 64)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 8)
    check(300, 16, 8, torch.bfloat16, masked=masked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_columns_are_split_where_tokens_are_few(arch, monkeypatch, dtype, masked):
    """Into 3 ranges of 64 columns, the last one cut short, and 2 blocks of tokens."""
    monkeypatch.setattr(gram_sketch, "_COLUMNS_PER_PROGRAM", 32)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 6)
    launches = []
    add_up = gram_sketch._add_up
    monkeypatch.setattr(gram_sketch, "_add_up", _Counted(add_up, launches))
    check(70, 150, 5, dtype, masked=masked)
    assert launches == [3]


class _Counted:
    """A kernel that notes the number of splits it adds up."""

    def __init__(self, kernel, launches):
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid):
        def run(found, *args, **options):
            self._launches.append(len(found))
            self._kernel[grid](found, *args, **options)

        return run


def test_a_bf16_omega_costs_the_precision_of_bf16(arch):
    """At most twice the error of the same two products in torch, in bf16."""
    generator = torch.Generator().manual_seed(0)
    X, Omega = (torch.randn(size, generator=generator).bfloat16() for size in ((100, 24), (24, 8)))
    exact = oracles.gram_sketch(X, Omega)
    in_torch = (X.T @ (X @ Omega)).double()
    error = (lk.gram_sketch_(torch.zeros(24, 8), X, Omega) - exact).abs().max()
    assert error <= 2 * (in_torch - exact).abs().max() + 1e-6


def test_all_rows_masked(arch):
    Y = lk.gram_sketch_(
        torch.ones(8, 4), torch.full((9, 8), torch.nan), torch.randn(8, 4), torch.zeros(9, dtype=torch.bool)
    )
    assert torch.equal(Y, torch.ones(8, 4))
