"""Predictions from Jacobian rows: the covariance and, for a refitted model, the mean at new inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.heads import Inputs
from laplace_lora_fast.jacobians import JacobianObserver
from laplace_lora_fast.taps import Site, Tap


@dataclass(frozen=True)
class Solver:
    """What one prior makes of the training rows: S (I + K)^-1 S^T and, where the mean is not the model's, J^T alpha.

    Attributes:
        weights: 1 / lambda of every part, [parts].
        basis: T [R, R] with S (I + K)^-1 S^T = T diag(1 / (1 + values)) T^T.
        values: [R].
        alpha: [R], or None where the mean is the trained model's.
    """

    weights: Tensor
    basis: Tensor
    values: Tensor
    alpha: Tensor | None = None

    def covariance(self, own: Tensor, cross: Tensor) -> Tensor:
        """[N, K, K] from the parts' J* J*^T [parts, N, K, K] and J* J^T [parts, N, K, R]."""
        prior = torch.einsum("p,pncd->ncd", self.weights, own)
        weighted = torch.einsum("p,pncr->ncr", self.weights, cross) @ self.basis
        return prior - (weighted / (1 + self.values)) @ weighted.mT

    def shift(self, cross: Tensor) -> Tensor:
        """J* Lambda^-1 J^T alpha [N, K]: how far the data move the outputs away from the prior's."""
        assert self.alpha is not None
        return torch.einsum("p,pncr,r->nc", self.weights, cross, self.alpha)


@dataclass(frozen=True)
class Products:
    """Inner products of a batch's Jacobian rows with each other and with the training rows, fp64.

    Attributes:
        own: J* J*^T of every part, [parts, N, K, K].
        cross: J* J^T of every part, [parts, N, K, R].
        mean: [N, K] of the model that the linearised one is an expansion of.
    """

    own: Tensor
    cross: Tensor
    mean: Tensor


class DualPredictor(JacobianObserver):
    """Covariances J* Lambda^-1 J*^T - K*R (I + K)^-1 KR* under G priors.

    Rows of blocks in one part, which share their prior precision under each of the priors, are summed on the way; rows
    are read once a backward pass.

    Args:
        sites: the tapped layers.
        rows: of every block, [R, r m].
        projections: Omega of every block.
        parts: for each block its part.
        solvers: one a prior; gone through once a call of `gaussians`, and not kept.
        n_cotangents: K.
        refitted: whether the solvers move the mean, from the outputs with the adapter switched off.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        rows: Sequence[Tensor],
        projections: Sequence[Tensor],
        parts: Sequence[int],
        solvers: Iterable[Solver],
        n_cotangents: int,
        refitted: bool,
    ) -> None:
        super().__init__(sites, [None] * len(rows))
        self._rows, self._projections, self._parts, self._solvers = rows, projections, parts, solvers
        self._n_cotangents, self._refitted = n_cotangents, refitted
        self._features: dict[int, list[Tensor]] = {}
        self._cross: Tensor | None = None  # [parts, N, K, R]
        self._own: Tensor | None = None  # [parts, N, K, K]

    def run(self, tap: Tap, inputs: Inputs, cotangents: Tensor) -> tuple[Tensor, Products]:
        """See `Predictor`."""
        n, k, home = inputs.batch_size, self._n_cotangents, self._rows[0].device
        sizes = 1 + max(self._parts), n, k
        self._cross = torch.zeros(*sizes, len(self._rows[0]), dtype=torch.float64, device=home)
        self._own = torch.zeros(*sizes, k, dtype=torch.float64, device=home)
        logits = self.sweep(tap, inputs, cotangents)
        outputs = tap.prior_logits(inputs) if self._refitted else logits
        return logits, Products(self._own, self._cross, outputs @ cotangents.to(outputs))

    def gaussians(self, batches: Sequence[Products]) -> tuple[Tensor, Tensor]:
        """Priors are solved for one after the other: no more than one solution is held."""
        own, cross = (torch.cat([getattr(b, part) for b in batches], 1) for part in ("own", "cross"))
        mean = torch.cat([b.mean for b in batches])
        shifts, covs = [], []
        for solver in self._solvers:
            covs.append(solver.covariance(own, cross).to(mean))
            if self._refitted:
                shifts.append(solver.shift(cross).to(mean))
        return (mean + torch.stack(shifts) if self._refitted else mean), torch.stack(covs)

    def observe_jacobian(self, block: int, small: Tensor, large: Tensor) -> None:
        waiting = self._features.setdefault(block, [])
        waiting.append(sketched(small, large, self._projections[block]))
        if len(waiting) < self._n_cotangents:
            return
        features = torch.stack(self._features.pop(block), 1).double()  # [N, K, r m]
        assert self._cross is not None
        assert self._own is not None
        part = self._parts[block]
        self._own[part] += (features @ features.mT).to(self._own.device)
        self._cross[part] += (features @ self._rows[block].to(features).mT).to(self._cross.device)

    def forget(self) -> None:
        super().forget()
        self._features.clear()


def sketched(small: Tensor, large: Tensor, projection: Tensor) -> Tensor:
    """J Omega of one output of every example, [N, r m]."""
    projected, _ = lk.jacobian_stats(small, large, projection.to(small.dtype), row_grams=False)
    return projected.flatten(1)


def times_root(roots: Tensor, x: Tensor) -> Tensor:
    """S x for a block-diagonal S with blocks [N, K, K] and x [N K, n]."""
    return (roots @ x.reshape(*roots.shape[:2], -1)).view(x.shape)


def times_transposed_root(roots: Tensor, x: Tensor) -> Tensor:
    """S^T x, as `times_root`."""
    return times_root(roots.mT, x)


def whitened(kernel: Tensor, roots: Tensor) -> Tensor:
    """S^T K S [R, R] for a symmetric K."""
    return times_transposed_root(roots, times_transposed_root(roots, kernel).mT)


def one_solver(kernels: Tensor, roots: Tensor, column: Tensor, alpha: Tensor | None = None) -> Solver:
    """The solver of one prior, by a Cholesky factorisation.

    Args:
        kernels: J J^T of every part, [parts, R, R].
        roots: the blocks of S, [N, K, K].
        column: prior precision of every part, [parts], fp64.
        alpha: as for `Solver`.
    """
    weights = (1 / column).to(kernels.device)
    kernel = whitened(torch.einsum("p,pij->ij", weights, kernels), roots)
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(identity + kernel), identity, upper=False)
    return Solver(weights, times_root(roots, inverse.mT), torch.zeros_like(inverse[0]), alpha)


def shared_solvers(kernels: Tensor, roots: Tensor, precisions: Tensor) -> Iterator[Solver]:
    """A solver per column of precisions [parts, G]; neighbours that differ in the last part only share an eigenbasis.

    Args:
        kernels: J J^T of every part, [parts, R, R].
        roots: the blocks of S, [N, K, K].
        precisions: fp64.
    """
    if precisions.shape[1] == 1:
        yield one_solver(kernels, roots, precisions[:, 0])
        return
    white = [whitened(kernel, roots) for kernel in kernels]
    identity = torch.eye(kernels.shape[1], dtype=kernels.dtype, device=kernels.device)
    shared = None
    for column in precisions.mT:
        *leading, last = column.tolist()
        if leading != shared:
            fixed = identity + sum(kernel / lam for kernel, lam in zip(white, leading, strict=False))
            inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(fixed), identity, upper=False)
            values, vectors = torch.linalg.eigh(inverse @ white[-1] @ inverse.mT)
            shared, values, basis = leading, values.clamp_min(0), times_root(roots, inverse.mT @ vectors)
        yield Solver((1 / column).to(kernels.device), basis, values / last)
