"""Eigenpairs of few rows, by the way of a CPU and by that of a GPU."""

from __future__ import annotations

import pytest
import torch

from laplace_lora_fast.structures.blocks import spectrum
from tests.oracle import assert_close


@pytest.mark.parametrize("condition", [1.0, 1e5])
@pytest.mark.parametrize(("d", "n"), [(30, 7), (7, 7), (5, 9), (6, 1)])
def test_both_ways_give_the_spectrum_of_the_gram_matrix(d: int, n: int, condition: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -float(torch.tensor(condition).log10()), n, dtype=torch.float64)
    tall = torch.randn(d, n, generator=generator, dtype=torch.float64) * scales
    exact = torch.linalg.eigvalsh(tall @ tall.mT).flip(0)[: min(d, n)]
    for values, vectors in (spectrum.left_pairs(tall), spectrum._by_eigenproblem(*torch.linalg.qr(tall))):
        assert_close(values, exact, 1e-13)
        unit = torch.eye(len(values), dtype=torch.float64)
        assert (vectors.mT @ vectors - unit).abs().max() < 1e-13
        assert_close((vectors * values) @ vectors.mT, tall @ tall.mT, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "n"), [(30, 7), (7, 7), (6, 1)])
def test_both_ways_give_right_singular_vectors(d: int, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, n, dtype=torch.float64)
    tall = (torch.randn(d, n, generator=generator, dtype=torch.float64) * scales).to(dtype)
    eps = 1e-6 if dtype == torch.float32 else 1e-12
    expected = torch.linalg.svdvals(tall.double())
    for sigma, right in (spectrum.right_pairs(tall), spectrum._right_by_eigenproblem(tall)):
        assert sigma.dtype == right.dtype == dtype
        assert_close(sigma.double(), expected, eps)
        unit = torch.eye(n, dtype=dtype)
        assert (right.mT @ right - unit).abs().max() < eps
        image = (tall @ right.mT).double()
        assert_close(image.norm(dim=0), expected, 10 * eps)
