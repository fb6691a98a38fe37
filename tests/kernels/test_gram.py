from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import laplace_kernels as lk
from laplace_kernels.ops import blocks, gram
from tests.kernels import inputs, oracles
from tests.kernels.inputs import keep, zeros


@settings(max_examples=60, deadline=None)
@given(inputs.token_counts, inputs.sizes, inputs.dtypes, inputs.layouts, inputs.seeds)
def test_lower_triangle_is_the_gram_matrix(T, d, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    X = inputs.rows(T, d, dtype, layout, generator)
    C = inputs.accumulator(d, dtype)
    expected = C.double().tril() - 0.5 * oracles.gram(X).tril()
    assert lk.gram_(C, X, alpha=-0.5) is C
    oracles.assert_near(C.tril(), expected)


@settings(max_examples=40, deadline=None)
@given(inputs.token_counts, inputs.sizes, inputs.dtypes, inputs.layouts, inputs.seeds)
def test_masked_rows_add_nothing_even_when_not_finite(T, d, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    X = inputs.rows(T, d, dtype, layout, generator)
    mask = inputs.poisoned_mask(X, generator)
    C = lk.gram_(inputs.accumulator(d, dtype), X, mask, alpha=2.0)
    oracles.assert_near(C.tril(), (inputs.accumulator(d, dtype).double() + 2 * oracles.gram(X, mask)).tril())


@pytest.mark.parametrize("dtype", inputs.DTYPES)
def test_all_rows_masked_leaves_the_accumulator(dtype):
    C = inputs.accumulator(5, dtype)
    lk.gram_(C, torch.full((7, 5), torch.nan, dtype=dtype), torch.zeros(7, dtype=torch.bool))
    assert torch.equal(C.tril(), inputs.accumulator(5, dtype).tril())


@pytest.mark.parametrize("d", [gram.SYRK_PANEL, gram.SYRK_PANEL + 1, 2 * gram.SYRK_PANEL + 77])
def test_panels_cover_the_lower_triangle(d):
    X = torch.randn(3, d)
    oracles.assert_near(lk.gram_(torch.zeros(d, d), X).tril(), oracles.gram(X).tril())


def test_blocks_of_rows_add_up(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 50)
    X = torch.randn(99, 7).bfloat16()
    mask = torch.arange(99) % 3 > 0
    oracles.assert_near(lk.gram_(torch.zeros(7, 7), X).tril(), oracles.gram(X).tril())
    oracles.assert_near(lk.gram_(torch.zeros(7, 7), X, mask).tril(), oracles.gram(X, mask).tril())


def test_fp32_rows_are_not_copied():
    X = torch.randn(64, 8)
    (block,) = blocks.row_blocks(X, None, torch.float32)
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


def nested(*lengths, **options):
    return torch.nested.nested_tensor([torch.zeros(n) for n in lengths], **options)


REFUSED = {
    "X not a tensor": (TypeError, r"X must be a tensor, got list", {"X": [[1.0]]}),
    "X integer": (
        TypeError,
        r"X must be bfloat16, .*, got torch.int64",
        {"X": zeros(5, 3, dtype=torch.int64)},
    ),
    "X 3-d": (ValueError, r"X must have 2 dimensions, got shape \(2, 5, 3\)", {"X": zeros(2, 5, 3)}),
    "C not a tensor": (TypeError, r"C must be a tensor, got NoneType", {"C": None}),
    "C 1-d": (ValueError, r"C must have 2 dimensions", {"C": zeros(3)}),
    "C wrong size": (
        ValueError,
        r"C must have shape \(3, 3\) to match X \(5, 3\), got \(4, 4\)",
        {"C": zeros(4, 4)},
    ),
    "C fp64": (
        TypeError,
        r"C must be torch.float32 for X in torch.float32",
        {"C": zeros(3, 3, dtype=torch.float64)},
    ),
    "C fp32 for fp64": (TypeError, r"C must be torch.float64 for X", {"X": zeros(5, 3, dtype=torch.float64)}),
    "C bf16": (
        TypeError,
        r"C must be torch.float32",
        {"X": zeros(5, 3, dtype=torch.bfloat16), "C": zeros(3, 3, dtype=torch.bfloat16)},
    ),
    "C transposed": (ValueError, r"C must have contiguous rows", {"C": zeros(3, 3).T}),
    "C expanded": (ValueError, r"C must have rows that do not overlap", {"C": zeros(1, 3).expand(3, 3)}),
    "C elsewhere": (
        ValueError,
        r"C must be on the device of X, cpu, got meta",
        {"C": zeros(3, 3, device="meta")},
    ),
    "mask float": (TypeError, r"mask must be a bool tensor.*got torch.float32", {"mask": zeros(5)}),
    "mask list": (TypeError, r"mask must be a bool tensor.*got list", {"mask": [True] * 5}),
    "mask shape": (ValueError, r"mask must have shape \(5,\), got \(4,\)", {"mask": keep(4)}),
    "mask elsewhere": (ValueError, r"mask must be on cpu, got meta", {"mask": keep(5, device="meta")}),
    "alpha tensor": (TypeError, r"alpha must be a Python number, got Tensor", {"alpha": torch.tensor(1.0)}),
    "alpha text": (TypeError, r"alpha must be a Python number, got str", {"alpha": "2"}),
    "alpha complex": (TypeError, r"alpha must be a Python number, got complex", {"alpha": 1j}),
    "alpha huge": (ValueError, r"alpha must be a float or fit into 64 bits", {"alpha": 10**30}),
    "X sparse": (ValueError, r"X must be a dense .*, got a sparse_coo one", {"X": zeros(5, 3).to_sparse()}),
    "X nested": (ValueError, r"X must be a dense .*, got a nested one", {"X": nested(3, 2)}),
    "X jagged": (
        ValueError,
        r"X must be a dense .*, got a nested one",
        {"X": nested(3, 2, layout=torch.jagged)},
    ),
    "mask sparse": (
        ValueError,
        r"mask must be a dense .*, got a sparse_coo one",
        {"mask": keep(5).to_sparse()},
    ),
    "C is X": (ValueError, r"C must not share memory with X", dict.fromkeys("CX", zeros(3, 3))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_named(case):
    error, message, changed = REFUSED[case]
    with pytest.raises(error, match=message):
        lk.gram_(**{"C": zeros(3, 3), "X": zeros(5, 3), **changed})
