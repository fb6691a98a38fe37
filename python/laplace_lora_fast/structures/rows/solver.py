"""What one prior makes of the training rows: factorisations of an R x R matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.layout import BlockDiagonal


@dataclass(frozen=True)
class Solver:
    """S (I + K)^-1 S^T and, where the mean is not the model's, J^T alpha.

    Attributes:
        weights: 1 / lambda of every part, [parts].
        basis: T [R, R] with S (I + K)^-1 S^T = T diag(1 / (1 + values)) T^T.
        values: [R].
        alpha: [R], or None where the mean is the trained model's.
        prior: whose solver this is, among several priors.
    """

    weights: Tensor
    basis: Tensor
    values: Tensor
    alpha: Tensor | None = None
    prior: int = 0

    def covariance(self, own: Tensor, cross: Tensor) -> Tensor:
        """[N, K, K] from the parts' J* J*^T [parts, N, K, K] and J* J^T [parts, N, K, R]."""
        prior = torch.einsum("p,pncd->ncd", self.weights, own)
        weighted = torch.einsum("p,pncr->ncr", self.weights, cross) @ self.basis
        return prior - (weighted / (1 + self.values)) @ weighted.mT

    def shift(self, cross: Tensor) -> Tensor:
        """J* Lambda^-1 J^T alpha [N, K]: how far the data move the functions away from the prior's."""
        assert self.alpha is not None
        return torch.einsum("p,pncr,r->nc", self.weights, cross, self.alpha)


def one_solver(
    kernels: Tensor, roots: BlockDiagonal, column: Tensor, alpha: Tensor | None = None, prior: int = 0
) -> Solver:
    """The solver of one prior, by a Cholesky factorisation.

    Args:
        kernels: J J^T of every part, [parts, R, R].
        roots: S.
        column: prior precision of every part, [parts], fp64.
        alpha: as for `Solver`.
        prior: as for `Solver`.
    """
    weights = (1 / column).to(kernels.device)
    kernel = roots.whiten(torch.einsum("p,pij->ij", weights, kernels))
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(identity + kernel), identity, upper=False)
    return Solver(weights, roots.times(inverse.mT), torch.zeros_like(inverse[0]), alpha, prior)


def shared_solvers(kernels: Tensor, roots: BlockDiagonal, precisions: Tensor) -> Iterator[Solver]:
    """A solver per column of precisions [parts, G]; neighbours that differ in the last part only share an eigenbasis.

    Args:
        kernels: J J^T of every part, [parts, R, R].
        roots: S.
        precisions: fp64.
    """
    if precisions.shape[1] == 1:
        yield one_solver(kernels, roots, precisions[:, 0])
        return
    white = [roots.whiten(kernel) for kernel in kernels]
    identity = torch.eye(kernels.shape[1], dtype=kernels.dtype, device=kernels.device)
    shared = None
    for place, column in enumerate(precisions.mT):
        *leading, last = column.tolist()
        if leading != shared:
            fixed = identity + sum(kernel / lam for kernel, lam in zip(white, leading, strict=False))
            inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(fixed), identity, upper=False)
            values, vectors = torch.linalg.eigh(inverse @ white[-1] @ inverse.mT)
            shared, values, basis = leading, values.clamp_min(0), roots.times(inverse.mT @ vectors)
        yield Solver((1 / column).to(kernels.device), basis, values / last, prior=place)
