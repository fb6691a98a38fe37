from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import laplace_kernels as lk
from tests.kernels import inputs, oracles
from tests.kernels.inputs import zeros


@settings(max_examples=20, deadline=None)
@given(inputs.dtypes, inputs.seeds)
def test_group_equals_one_call_each(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    Xs = [inputs.rows(T, d, dtype, "padded rows", generator) for T, d in ((0, 3), (9, 1), (17, 12), (5, 33))]
    masks = [None, *(inputs.poisoned_mask(X, generator) for X in Xs[1:])]
    alphas = [1.0, -2.0, 0.25, 3.0]
    Cs = [inputs.accumulator(X.shape[1], dtype) for X in Xs]
    assert lk.gram_group_(Cs, Xs, masks, alphas) is None
    for C, X, mask, alpha in zip(Cs, Xs, masks, alphas, strict=True):
        expected = inputs.accumulator(X.shape[1], dtype).double() + alpha * oracles.gram(X, mask)
        oracles.assert_near(C.tril(), expected.tril())


def test_group_defaults_and_empty_group():
    X = torch.randn(4, 3)
    C = torch.zeros(3, 3)
    lk.gram_group_([C], [X])
    oracles.assert_near(C.tril(), oracles.gram(X).tril())
    lk.gram_group_([], [])


TWICE = {"Cs": [zeros(3, 3)] * 2, "Xs": [zeros(5, 3)] * 2}
REFUSED = {
    "no Cs": (TypeError, r"Cs must be a sequence, got NoneType", {"Cs": None}),
    "no members": (ValueError, r"Xs must have as many members as Cs \(0\), got 2", {"Cs": []}),
    "C twice": (ValueError, r"Cs\[0\] must not share memory with Cs\[1\]", TWICE),
    "Xs short": (
        ValueError,
        r"Xs must have as many members as Cs \(2\), got 1",
        {"Xs": [zeros(5, 3)]},
    ),
    "masks long": (ValueError, r"masks must have as many", {"masks": [None] * 3}),
    "alphas short": (ValueError, r"alphas must have as many", {"alphas": [1.0]}),
    "member X": (
        ValueError,
        r"Xs\[1\] must have 2 dimensions",
        {"Xs": [zeros(5, 3), zeros(3)]},
    ),
    "member C": (ValueError, r"Cs\[1\] must have shape", {"Cs": [zeros(3, 3), zeros(3, 3)]}),
    "member mask": (TypeError, r"masks\[1\] must be a bool tensor", {"masks": [None, zeros(1)]}),
    "member alpha": (TypeError, r"alphas\[0\] must be a Python", {"alphas": [torch.tensor(1.0), 1.0]}),
    "mixed dtypes": (
        ValueError,
        r"Xs\[1\] must have the dtype",
        {"Xs": [zeros(5, 3), zeros(1, 2, dtype=torch.bfloat16)]},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_named(case):
    error, message, changed = REFUSED[case]
    good = {"Cs": [zeros(3, 3), zeros(2, 2)], "Xs": [zeros(5, 3), zeros(1, 2)]}
    with pytest.raises(error, match=message):
        lk.gram_group_(**{**good, **changed})
