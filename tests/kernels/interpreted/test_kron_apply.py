from __future__ import annotations

import pytest
import torch

import laplace_kernels as lk
from tests.kernels import inputs, oracles

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def operands(B, r, d, k, dtype):
    generator = torch.Generator().manual_seed(r + 100 * d + k)
    W = torch.randn(B, r, d, generator=generator).to(dtype)
    U, V = inputs.orthogonal(d, k, generator).float(), inputs.orthogonal(r, r, generator).float()
    core, tail = torch.rand(r, k, generator=generator) + 0.1, torch.rand(r, generator=generator) + 0.1
    return W, U, V, core, tail


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "r", "d", "k"),
    [
        (1, 1, 1, 1),
        (2, 4, 33, 5),
        (3, 8, 70, 40),
        (2, 16, 24, 24),
        (1, 64, 20, 7),
        (0, 4, 8, 2),
        (2, 4, 8, 0),
    ],
)
def test_values(arch, B, r, d, k, dtype):
    arguments = operands(B, r, d, k, dtype)
    oracles.assert_near(lk.kron_apply(*arguments), oracles.kron_apply(*arguments), 2e-6)


def test_strides(arch):
    W, U, V, core, tail = operands(3, 4, 40, 9, torch.float32)
    out = lk.kron_apply(
        W.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        U.T.contiguous().T,
        V.T.contiguous().T,
        core.T.contiguous().T,
        tail.repeat_interleave(2)[::2],
    )
    oracles.assert_near(out, oracles.kron_apply(W, U, V, core, tail), 2e-6)


def test_more_rows_than_fit_on_chip(arch):
    arguments = operands(1, 65, 8, 3, torch.float32)
    oracles.assert_near(lk.kron_apply(*arguments), oracles.kron_apply(*arguments), 2e-6)
