"""What one prior makes of the training rows: factorisations of an R x R matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.layout import WIDTH, BlockDiagonal, Layout


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
    weights = 1 / column
    if len(kernels) == 1:
        matrix = roots.plus_identity(kernels[0], float(weights[0]))
    else:
        matrix = roots.plus_identity(torch.einsum("p,pij->ij", weights.to(kernels.device), kernels))
    basis = _inverse_root(cholesky_(matrix), roots)
    return Solver(weights.to(kernels.device), basis, torch.zeros_like(basis[0]), alpha, prior)


def cholesky_(matrix: Tensor) -> Tensor:
    """L with L L^T the symmetric positive definite matrix [R, R], whose memory it takes."""
    factor: Tensor = torch.linalg.cholesky(matrix.mT, out=matrix.mT)
    return factor


def solved(chol: Tensor, x: Tensor) -> Tensor:
    """(L L^T)^-1 x for x [R, n]; `torch.cholesky_solve` copies L."""
    half = torch.linalg.solve_triangular(chol, x, upper=False)
    whole: Tensor = torch.linalg.solve_triangular(chol.mT, half, upper=True)
    return whole


def inverse_blocks(chol: Tensor, layout: Layout) -> list[Tensor]:
    """Diagonal blocks [N_b, K, K] of (L L^T)^-1, an example each: R^3 / 3 operations, no R x R matrix.

    Args:
        chol: L [R, R].
        layout: of its rows.
    """
    ends = layout.sizes.cumsum(0)
    found = [chol.new_zeros(*rows.shape, rows.shape[1]) for rows in layout.rows]
    start = 0
    while start < len(chol):
        first = int(torch.searchsorted(ends, start, right=True))
        last = int(torch.searchsorted(ends, start + WIDTH, right=True)) - 1
        stop = int(ends[max(first, last)])  # whole examples, one at least
        unit = torch.eye(len(chol) - start, stop - start, dtype=chol.dtype, device=chol.device)
        columns = torch.linalg.solve_triangular(chol[start:, start:], unit, upper=False)
        gram = columns.mT @ columns
        for block, rows in zip(found, layout.rows, strict=True):
            mine = ((rows[:, 0] >= start) & (rows[:, 0] < stop)).nonzero().flatten()
            place = (rows[mine] - start).to(gram.device)
            block[mine.to(gram.device)] = gram[place[:, :, None], place[:, None, :]]
        start = stop
    return found


def _inverse_root(chol: Tensor, roots: BlockDiagonal) -> Tensor:
    """S L^-T [R, R], in R^3 / 3 operations and one more matrix."""
    found = torch.zeros_like(chol)
    for start in range(0, len(chol), WIDTH):
        stop = min(start + WIDTH, len(chol))
        unit = torch.zeros(stop, stop - start, dtype=chol.dtype, device=chol.device)
        unit[start:].fill_diagonal_(1)
        found[:stop, start:stop] = torch.linalg.solve_triangular(chol[:stop, :stop].mT, unit, upper=True)
        found[:, start:stop] = roots.times(found[:, start:stop])
    return found


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
