from __future__ import annotations

import pytest
import torch

import laplace_kernels as lk
from tests.kernels import inputs, oracles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = 1e-6  # the interpreter accumulates a block at a time in fp32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [False, True])
def test_group(arch, dtype, aligned):
    generator = torch.Generator().manual_seed(0)
    sizes = (
        [(0, 16), (1, 16), (70, 80), (33, 144)] if aligned else [(0, 3), (1, 7), (70, 33), (33, 130), (5, 1)]
    )
    Xs = [inputs.rows(T, d, dtype, "contiguous", generator) for T, d in sizes]
    masks = [None, None, *(inputs.poisoned_mask(X, generator) for X in Xs[2:])]
    alphas = [0.3 - i for i in range(len(Xs))]
    Cs = [torch.ones(d, d + 16)[:, :d] for _, d in sizes]
    lk.gram_group_(Cs, Xs, masks, alphas)
    for C, X, mask, alpha in zip(Cs, Xs, masks, alphas, strict=True):
        oracles.assert_near(C.tril(), (1 + alpha * oracles.gram(X, mask)).tril(), TOLERANCE)


def test_group_of_nothing(arch):
    C = torch.ones(3, 3)
    lk.gram_group_([C], [torch.zeros(0, 3)])
    assert torch.equal(C, torch.ones(3, 3))
