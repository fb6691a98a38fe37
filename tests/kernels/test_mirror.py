from __future__ import annotations

import pytest
import torch

import laplace_kernels as lk
from tests.kernels.inputs import zeros


@pytest.mark.parametrize("d", [1, 2, 511, 512, 1100])
def test_mirror_reads_only_the_lower_triangle(d):
    lower = torch.randn(d, d).tril()
    C = lower + torch.full((d, d), torch.nan).triu(1)
    C[torch.ones(d, d).tril().bool()] = lower[torch.ones(d, d).tril().bool()]
    assert lk.mirror_(C) is C
    assert torch.equal(C, lower + lower.tril(-1).T)


def test_a_parameter_is_mirrored():
    C = torch.nn.Parameter(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    assert lk.mirror_(C).tolist() == [[1.0, 2.0], [2.0, 3.0]]


@pytest.mark.parametrize(
    ("C", "error", "message"),
    [
        (zeros(3, 4), ValueError, r"C must be square, got \(3, 4\)"),
        (zeros(3), ValueError, r"C must have 2 dimensions"),
        (zeros(3, 3, dtype=torch.int64), TypeError, r"C must be bfloat16"),
    ],
)
def test_arguments_that_do_not_fit_are_named(C, error, message):
    with pytest.raises(error, match=message):
        lk.mirror_(C)
