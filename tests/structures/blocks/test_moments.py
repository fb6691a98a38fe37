"""EKFAC and the diagonal against sums over explicit Jacobian rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_lora_fast import EKFAC, Classes, InvalidBatchError, LaplaceLoRA
from tests import oracle
from tests.oracle import assert_close
from tests.structures.dense import TEST, TRAIN, fisher_rows, fitted, model_of


def test_ekfac_keeps_the_trace_of_the_exact_ggn() -> None:
    model = model_of(3)
    curvature, rows = fitted(model, "ekfac").posterior.curvature, fisher_rows(model, 3, "exact")
    for key, block in zip(curvature.names, curvature.blocks, strict=True):
        values, counts = block.eigenvalues()
        assert (values * counts).sum().item() == pytest.approx(rows[key].square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("rank", [None, 3])
def test_ekfac_covariance_equals_brute_force_in_its_basis(rank: int | None) -> None:
    model = model_of(3)
    la = fitted(model, EKFAC(rank=rank), prior_precision=0.5)
    rows, expected = fisher_rows(model, 3, "exact"), 0
    test = oracle.jacobians(model, TEST, oracle.class_logits)
    for key, block in zip(la.posterior.curvature.names, la.posterior.curvature.blocks, strict=True):
        v, u = block.small_vectors, block.large.vectors
        d, k = u.shape
        rest = torch.linalg.qr(torch.cat([u, torch.eye(d, dtype=u.dtype)], 1)).Q[:, k:d]
        r = v.shape[0]

        def oriented(js: Tensor, key: tuple[str, str] = key, r: int = r, d: int = d) -> Tensor:
            return js.view(*js.shape[:-1], r, d) if key[1] == "A" else js.view(*js.shape[:-1], d, r).mT

        phi, j = v.mT @ oriented(rows[key]), v.mT @ oriented(test[key])
        core = (phi @ u).square().sum(0)
        tail = (phi @ rest).square().sum((0, 2)) / max(d - k, 1)
        kept, left = j @ u, j @ rest
        expected = expected + torch.einsum("ncjk,nejk,jk->nce", kept, kept, 1 / (core + 0.5))
        expected = expected + torch.einsum("ncjk,nejk,j->nce", left, left, 1 / (tail + 0.5))
    assert_close(la.logit_distribution(TEST)[1], expected, 1e-8)


def test_ekfac_of_one_row_is_exact_in_its_basis() -> None:
    """One example, two classes: each block's GGN has rank one. EKFAC's trace is the GGN's, KFAC's is not."""
    model = model_of(2)
    one = {k: v[:1] for k, v in TRAIN.items()} | {"labels": torch.tensor([1])}
    ekfac = LaplaceLoRA(model, Classes(), structure="ekfac").fit([one], progress=False)
    kfac = LaplaceLoRA(model, Classes(), structure="kfac").fit([one], progress=False)
    hessian = oracle.softmax_hessian(oracle.class_logits(model, one).detach())
    jacobians = oracle.jacobians(model, one, oracle.class_logits)
    for block, other, key in zip(
        ekfac.posterior.curvature.blocks,
        kfac.posterior.curvature.blocks,
        ekfac.posterior.curvature.names,
        strict=True,
    ):
        trace = torch.trace(jacobians[key][0] @ jacobians[key][0].mT @ hessian).item()
        values, counts = block.eigenvalues()
        assert (values * counts).sum().item() == pytest.approx(trace, rel=1e-9)
        values, counts = other.eigenvalues()
        assert abs((values * counts).sum().item() / trace - 1) > 1e-3


def test_ekfac_needs_a_loader_that_can_be_read_twice() -> None:
    with pytest.raises(InvalidBatchError, match="twice"):
        LaplaceLoRA(model_of(3), Classes(), structure="ekfac").fit(iter([TRAIN]), progress=False)


def test_the_diagonal_is_the_exact_diagonal() -> None:
    model = model_of(3)
    la = fitted(model, "diagonal", prior_precision=0.4)
    rows = fisher_rows(model, 3, "exact")
    test, expected = oracle.jacobians(model, TEST, oracle.class_logits), 0
    for key, phi in rows.items():
        variance = 1 / (phi.square().sum(0) + 0.4)
        expected = expected + (test[key] * variance) @ test[key].mT
        assert_close(la.posterior.covariance(*key), torch.diag(variance), 1e-9)
    assert_close(la.logit_distribution(TEST)[1], expected, 1e-9)
    with pytest.raises(ValueError, match="Kronecker"):
        _ = la.factors
