"""Curvature of one LoRA weight: Kronecker-factored (KFAC, EKFAC) or diagonal.

In a block's eigenbasis H is diagonal, and everything a Laplace posterior is asked for is a function of its eigenvalues.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.structures.blocks.spectrum import Spectrum
from laplace_lora_fast.structures.jacobians import jacobian

_MOST_ELEMENTS = 2**24  # of Jacobians formed at a time


class Block(ABC):
    """Curvature of one LoRA weight, oriented as [r, d]: lora_A as it is, lora_B transposed.

    Attributes:
        mean: [r, d] the MAP weight.
    """

    mean: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(r, d)."""
        r, d = self.mean.shape
        return r, d

    @abstractmethod
    def scaled(self, factor: float | Tensor) -> Block:
        """The block of `factor` times H."""

    @abstractmethod
    def rotation(self) -> Tensor | None:
        """[r, r] rotation of the small side that `variances` expects, or None."""

    @abstractmethod
    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of H and their multiplicities, fp64."""

    @abstractmethod
    def variances(self, small: Tensor, large: Tensor, prior_precisions: Tensor) -> Tensor:
        """Quadratic forms J (H + lambda I)^-1 J^T of per-example Jacobians J = sum_t small (x) large.

        Args:
            small: [N, K or 1, T, r], rotated by `rotation`.
            large: [N, K or 1, T, d].
            prior_precisions: lambda [G].

        Returns:
            [G, N, K, K].
        """

    @abstractmethod
    def apply_power(self, weights: Tensor, power: float, prior_precision: float) -> Tensor:
        """(H + lambda I)^power applied to weights [B, r, d]."""

    @abstractmethod
    def is_sound(self) -> bool:
        """Whether all tensors are finite and have shapes that belong together."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What the summary shows of it."""

    def covariance(self, prior_precision: float) -> Tensor:
        """Dense (H + lambda I)^-1 [P, P] fp64 over vec of the matrix [r, d]. For small layers."""
        r, d = self.mean.shape
        unit = torch.eye(r * d, dtype=torch.float64, device=self.mean.device).view(-1, r, d)
        return self.apply_power(unit, -1.0, prior_precision).double().view(r * d, r * d)


@dataclass(frozen=True)
class KronBlock(Block):
    """H diagonal in a Kronecker eigenbasis, eigenvalues core[j, i] on v_j (x) u_i and tail[j] beyond the u_i.

    Attributes:
        mean: [r, d] the MAP weight.
        large: spectrum over the long side d: lora_A's input factor, or lora_B's gradient factor.
        small_values: [r] fp64, descending: of the other factor (with all scalings in it).
        small_vectors: V [r, r] fp64.
        core: [r, k] fp64: KFAC's products of eigenvalues, or EKFAC's measured second moments.
        tail: [r] fp64.
    """

    mean: Tensor
    large: Spectrum
    small_values: Tensor
    small_vectors: Tensor
    core: Tensor
    tail: Tensor

    @classmethod
    def kfac(cls, parts: Sequence[tuple[Spectrum, Tensor, Tensor]]) -> list[KronBlock]:
        """H = small (x) large of every weight; eigendecomposes the small factors, those of one size at once.

        Args:
            parts: for each weight `large`, `small` [r, r] fp64, and the weight's mean.
        """
        alike: dict[tuple[int, torch.device], list[int]] = {}
        for index, (_, small, _) in enumerate(parts):
            alike.setdefault((len(small), small.device), []).append(index)
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for members in alike.values():
            values, vectors = torch.linalg.eigh(torch.stack([parts[index][1] for index in members]))
            pairs.update(zip(members, zip(values, vectors, strict=True), strict=True))
        return [cls._kfac(large, *pairs[index], mean) for index, (large, _, mean) in enumerate(parts)]

    @classmethod
    def _kfac(cls, large: Spectrum, values: Tensor, vectors: Tensor, mean: Tensor) -> KronBlock:
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1).contiguous()
        # strides as `load` gives them: results are bitwise
        mean = mean.clone(memory_format=torch.contiguous_format)
        return cls(mean, large, values, vectors, values[:, None] * large.values, values * large.tail)

    def scaled(self, factor: float | Tensor) -> KronBlock:
        small, core, tail = (part * factor for part in (self.small_values, self.core, self.tail))
        return replace(self, small_values=small, core=core, tail=tail)

    def rotation(self) -> Tensor:
        return self.small_vectors

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        left_out = torch.full_like(self.tail, self.large.dim - self.large.rank)
        values, counts = torch.cat([self.core.flatten(), self.tail]), torch.ones_like(self.core).flatten()
        return values, torch.cat([counts, left_out])

    def statistics(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor | None]:
        """P [N, K, r, k] and, unless the large spectrum is complete, D [N, r, K, K] of `jacobian_stats`."""
        complete = self.large.rank == self.large.dim
        basis = self.large.vectors.to(small.dtype)  # the model may have been in another precision at the fit
        return lk.jacobian_stats(small, large, basis, row_grams=not complete)

    def variances(self, small: Tensor, large: Tensor, prior_precisions: Tensor) -> Tensor:
        projected, row_grams = self.statistics(small, large)
        weights = 1 / (self.core[..., None] + prior_precisions)  # [r, k, G]
        if row_grams is not None:  # all of J has the tail's weight, then the basis its own
            tail = 1 / (self.tail[:, None] + prior_precisions)  # [r, G]
            weights = weights - tail[:, None]
        cov = _weighted_products(projected.flatten(2), weights.flatten(0, 1).to(projected))
        if row_grams is not None:
            cov = cov + torch.einsum("nrcd,rg->gncd", row_grams, tail.to(row_grams))
        return cov

    def extremes(self) -> Tensor:
        """The largest eigenvalue and the least one beyond the basis, [2] fp64."""
        complete = self.large.rank == self.large.dim
        least = torch.full_like(self.tail[0], math.inf) if complete else self.tail.min()
        return torch.stack([torch.cat([self.core.flatten(), self.tail]).max(), least])

    def factors(self) -> tuple[Tensor, Tensor]:
        """The dense factors [r, r] and [d, d] of the short and the long side."""
        small = (self.small_vectors * self.small_values) @ self.small_vectors.mT
        return small.to(self.large.vectors.dtype), self.large.dense()

    def careful(self) -> CarefulKronBlock:
        """The same block, for priors that its eigenvalues exceed by too much."""
        return CarefulKronBlock(*(getattr(self, field.name) for field in fields(self)))

    def apply_power(self, weights: Tensor, power: float, prior_precision: float) -> Tensor:
        core, tail = (self.core + prior_precision) ** power, (self.tail + prior_precision) ** power
        parts = (weights, self.large.vectors, self.small_vectors, core, tail)
        dtype = self.large.vectors.dtype
        return lk.kron_apply(*(part.to(dtype) for part in parts))

    def is_sound(self) -> bool:
        (r, d), k, large = self.mean.shape, self.large.values.numel(), self.large
        shapes = [(large.values, (k,)), (large.vectors, (d, k)), (large.tail, ()), (large.trace, ())]
        shapes += [
            (self.small_values, (r,)),
            (self.small_vectors, (r, r)),
            (self.core, (r, k)),
            (self.tail, (r,)),
        ]
        return all(tensor.shape == shape and bool(tensor.isfinite().all()) for tensor, shape in shapes)

    def describe(self) -> dict[str, str]:
        return {"rank": str(self.large.rank), "captured": f"{self.large.captured:.3f}"}


class CarefulKronBlock(KronBlock):
    """A block whose Jacobians are split into their part in the basis and the residual, which is then squared.

    D - P P^T is a small difference of large numbers where a Jacobian lies in the basis almost, and what is left of it,
    rounding, is divided by the tail: beside eigenvalues of 1 / eps times the tail's that would be all of the variance.
    """

    def statistics(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        """P [N, K, r, k] and the row Grams [N, r, K, K] of the residual Jt - P U^T."""
        basis = self.large.vectors.to(small.dtype)
        size = max(1, _MOST_ELEMENTS // (max(small.shape[1], large.shape[1]) * self.mean.numel()))
        parts = [
            _split(jacobian(s, x), basis) for s, x in zip(small.split(size), large.split(size), strict=True)
        ]
        projected, residual_grams = zip(*parts, strict=True)
        return torch.cat(projected), torch.cat(residual_grams)

    def variances(self, small: Tensor, large: Tensor, prior_precisions: Tensor) -> Tensor:
        projected, residual_grams = self.statistics(small, large)
        weights = (1 / (self.core[..., None] + prior_precisions)).flatten(0, 1)  # [r k, G]
        tail = 1 / (self.tail[:, None] + prior_precisions)  # [r, G]
        cov = _weighted_products(projected.flatten(2), weights.to(projected))
        return cov + torch.einsum("nrcd,rg->gncd", residual_grams, tail.to(residual_grams))


def _split(jacobians: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """P = J U and the row Grams of J - P U^T, for J [N, K, r, d], which is overwritten."""
    projected = jacobians @ basis
    jacobians.flatten(0, 2).addmm_(projected.flatten(0, 2), basis.mT, alpha=-1)
    rows = jacobians.transpose(1, 2).contiguous()  # batched products want it so
    return projected, rows @ rows.mT


@dataclass(frozen=True)
class DiagBlock(Block):
    """H diagonal in the weights themselves.

    Attributes:
        mean: [r, d] the MAP weight.
        values: [r, d], the diagonal of H.
    """

    mean: Tensor
    values: Tensor

    def scaled(self, factor: float | Tensor) -> DiagBlock:
        return replace(self, values=self.values * factor)

    def rotation(self) -> None:
        return None

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        values = self.values.double().flatten()
        return values, torch.ones_like(values)

    def variances(self, small: Tensor, large: Tensor, prior_precisions: Tensor) -> Tensor:
        flat = jacobian(small, large).flatten(2)
        values = self.values.flatten().to(flat)  # the fit may have been in another precision
        covs = [(flat / (values + lam)) @ flat.mT for lam in prior_precisions.to(flat)]
        return torch.stack(covs)

    def apply_power(self, weights: Tensor, power: float, prior_precision: float) -> Tensor:
        return weights.to(self.values.dtype) * (self.values + prior_precision) ** power

    def is_sound(self) -> bool:
        return self.values.shape == self.mean.shape and bool(self.values.isfinite().all())

    def describe(self) -> dict[str, str]:
        return {}


def _weighted_products(rows: Tensor, weights: Tensor) -> Tensor:
    """Sum over x of rows[n, c, x] weights[x, g] rows[n, e, x]: [N, K, X], [X, G] -> [G, N, K, K]."""
    if weights.shape[1] == 1:
        return ((rows * weights[:, 0]) @ rows.mT)[None]
    columns = [(row[:, None] * rows) @ weights for row in rows.unbind(1)]  # [N, K, G] each
    return torch.stack(columns, 1).permute(3, 0, 1, 2)
