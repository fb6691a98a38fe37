from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import laplace_kernels as lk
from laplace_kernels import reference
from tests.kernels import inputs, oracles


def accumulator(d: int, dtype: torch.dtype) -> torch.Tensor:
    """A [d, d] accumulator that is not zero, with padded rows."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.linspace(-1, 1, d * (d + 2), dtype=accumulate).view(d, d + 2)[:, :d]


@settings(max_examples=60, deadline=None)
@given(inputs.token_counts, inputs.sizes, inputs.dtypes, inputs.layouts, inputs.seeds)
def test_lower_triangle_is_the_gram_matrix(T, d, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    X = inputs.rows(T, d, dtype, layout, generator)
    C = accumulator(d, dtype)
    expected = C.double().tril() - 0.5 * oracles.gram(X).tril()
    assert lk.gram_(C, X, alpha=-0.5) is C
    oracles.assert_near(C.tril(), expected)


@settings(max_examples=40, deadline=None)
@given(inputs.token_counts, inputs.sizes, inputs.dtypes, inputs.layouts, inputs.seeds)
def test_masked_rows_add_nothing_even_when_not_finite(T, d, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    X = inputs.rows(T, d, dtype, layout, generator)
    mask = inputs.poisoned_mask(X, generator)
    C = lk.gram_(accumulator(d, dtype), X, mask, alpha=2.0)
    oracles.assert_near(C.tril(), (accumulator(d, dtype).double() + 2 * oracles.gram(X, mask)).tril())


@pytest.mark.parametrize("dtype", inputs.DTYPES)
def test_all_rows_masked_leaves_the_accumulator(dtype):
    C = accumulator(5, dtype)
    lk.gram_(C, torch.full((7, 5), torch.nan, dtype=dtype), torch.zeros(7, dtype=torch.bool))
    assert torch.equal(C.tril(), accumulator(5, dtype).tril())


@pytest.mark.parametrize(
    "d", [reference._SYRK_PANEL, reference._SYRK_PANEL + 1, 2 * reference._SYRK_PANEL + 77]
)
def test_panels_cover_the_lower_triangle(d):
    X = torch.randn(3, d)
    oracles.assert_near(lk.gram_(torch.zeros(d, d), X).tril(), oracles.gram(X).tril())


def test_blocks_of_rows_add_up(monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 50)
    X = torch.randn(99, 7).bfloat16()
    mask = torch.arange(99) % 3 > 0
    oracles.assert_near(lk.gram_(torch.zeros(7, 7), X).tril(), oracles.gram(X).tril())
    oracles.assert_near(lk.gram_(torch.zeros(7, 7), X, mask).tril(), oracles.gram(X, mask).tril())


def test_fp32_rows_are_not_copied():
    X = torch.randn(64, 8)
    (block,) = reference._row_blocks(X, None, torch.float32)
    assert block is X


def test_products_accumulate_in_fp32():
    X = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)  # bf16 sums stop at 256
    X[0] = 64.0
    assert lk.gram_(torch.zeros(1, 1), X).item() == 64.0**2 + 4095


def test_rows_more_than_2_to_the_31_elements_apart():
    memory = torch.empty(2**31 + 4, dtype=torch.bfloat16)  # untouched pages take no memory
    X = memory.as_strided((3, 4), (2**30, 1)).copy_(torch.randn(3, 4))
    oracles.assert_near(lk.gram_(torch.zeros(4, 4), X).tril(), oracles.gram(X).tril())


def test_inputs_that_require_grad_are_read_as_values():
    X = torch.randn(5, 3, requires_grad=True)
    C = lk.gram_(torch.zeros(3, 3), X * 2)
    assert not C.requires_grad
    oracles.assert_near(C.tril(), 4 * oracles.gram(X.detach()).tril())


@settings(max_examples=20, deadline=None)
@given(inputs.dtypes, inputs.seeds)
def test_group_equals_one_call_each(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    Xs = [inputs.rows(T, d, dtype, "padded rows", generator) for T, d in ((0, 3), (9, 1), (17, 12), (5, 33))]
    masks = [None, *(inputs.poisoned_mask(X, generator) for X in Xs[1:])]
    alphas = [1.0, -2.0, 0.25, 3.0]
    Cs = [accumulator(X.shape[1], dtype) for X in Xs]
    assert lk.gram_group_(Cs, Xs, masks, alphas) is None
    for C, X, mask, alpha in zip(Cs, Xs, masks, alphas, strict=True):
        expected = accumulator(X.shape[1], dtype).double() + alpha * oracles.gram(X, mask)
        oracles.assert_near(C.tril(), expected.tril())


def test_group_defaults_and_empty_group():
    X = torch.randn(4, 3)
    C = torch.zeros(3, 3)
    lk.gram_group_([C], [X])
    oracles.assert_near(C.tril(), oracles.gram(X).tril())
    lk.gram_group_([], [])


@pytest.mark.parametrize("d", [1, 2, 511, 512, 1100])
def test_mirror_reads_only_the_lower_triangle(d):
    lower = torch.randn(d, d).tril()
    C = lower + torch.full((d, d), torch.nan).triu(1)
    C[torch.ones(d, d).tril().bool()] = lower[torch.ones(d, d).tril().bool()]
    assert lk.mirror_(C) is C
    assert torch.equal(C, lower + lower.tril(-1).T)
