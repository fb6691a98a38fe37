"""The precision that a sketch takes in the place of the prior's, so that it is not over-confident.

R sketched rows explain away a share of every test row that the whole rows would not. A sketch at a precision lambda'
behaves as the whole rows at a larger one, its deterministic equivalent (LeJeune, Patil, Javadi, Baraniuk and
Tibshirani 2022, "Asymptotics of the sketched pseudoinverse"; here for an orthonormal sketch, with the S-transform
(1 + z) / (1 + z / rho) of a scaled projection that keeps a share rho of the columns):

    lambda' = lambda (1 - y) / (1 - rho y) = lambda (1 - x)        y = tr[K (K + lambda)^-1] / q

So the whole rows' answer at lambda is the sketch's at lambda (1 - x): still one Gaussian, at no cost in a prediction.
q, the effective size of the sketch, depends on how the energy is spread over the weights. But half of the columns are a
sketch of half the size, of 2 y and rho / 2, so that both have to agree on the effective dimension determines y, from
the training rows alone:

    d(lambda (1 - y) / (1 - rho y)) = mean over the two halves of d_half(lambda (1 - 2 y) / (1 - rho y))

where d and d_half are effective dimensions of the sketches' kernels, which their eigenvalues give. Several precisions,
one a weight, are scaled together: along a direction of precisions, lambda is their scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_MOST = 0.5  # of y: a half of the columns has nothing left there
_BISECTIONS = 50
_NODES = 128  # of Gauss-Legendre quadrature
_TABLE = 361  # scales, twenty a decade
_FAR = 1e6  # in units of the kernel's trace: effective dimensions from there on are trace / lambda


@dataclass(frozen=True)
class Equivalent:
    """Effective dimensions of a sketch and its two halves along one direction of precisions.

    Attributes:
        values: eigenvalues [R] of the sketch's kernel at scale 1, fp64.
        halves: those of the halves' kernels, [2, R].
        kept: rho, the share of the columns that the sketch keeps.
    """

    values: Tensor
    halves: Tensor
    kept: float

    @classmethod
    def of_halves(cls, values: Tensor, halves: Sequence[Tensor], kept: float) -> Equivalent:
        """From eigenvalues [R] of a sketch's whitened kernel, and the kernels [R, R] of half of its columns each."""
        spectra = [torch.linalg.eigvalsh(each).clamp_min(0) for each in halves]
        return cls(values, torch.stack(spectra), kept)

    def shrinkage(self, scales: Tensor) -> Tensor:
        """What x is [G] at scales [G] of the precisions, fp64 beside the spectra; 0 where the halves see no bias."""
        y = self._ratio(scales.to(self.values))
        return (1 - self.kept) * y / (1 - self.kept * y)

    def _ratio(self, scales: Tensor) -> Tensor:
        """What y is [G]: by bisection, as the halves' dimension rises with it."""
        low, high = torch.zeros_like(scales), torch.full_like(scales, _MOST)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            unit = scales / (1 - self.kept * middle)
            whole = _dimension(self.values, unit * (1 - middle))
            half = sum(_dimension(values, unit * (1 - 2 * middle)) for values in self.halves) / 2
            too_small = half < whole
            low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
        return low

    def dimension(self, scales: Tensor) -> Tensor:
        """The whole rows' effective dimension [G], as the sketch estimates it."""
        scales = scales.to(self.values)
        return _dimension(self.values, scales * (1 - self.shrinkage(scales)))

    def dimension_and_slope(self, scale: float) -> tuple[float, float]:
        """The whole rows' effective dimension and its derivative in the scale's logarithm."""
        step = 1e-4
        scales = scale * torch.tensor([-step, 0.0, step], dtype=torch.float64).exp()
        below, here, above = self.dimension(scales).tolist()
        return here, min((above - below) / (2 * step), 0.0)

    def shrinkage_at(self, dimension: float) -> float:
        """What x is where the sketch's effective dimension is this one, in kernels that differ in their roots alone.

        Between tabulated scales, linear in the dimension; 0 for a kernel without curvature.
        """
        dimensions = self._table[0]
        above = min(max(int(torch.searchsorted(dimensions, dimension)), 1), len(dimensions) - 1)
        (d0, x0), (d1, x1) = ((float(each[place]) for each in self._table) for place in (above - 1, above))
        share = 0.0 if d1 <= d0 else min(max((dimension - d0) / (d1 - d0), 0.0), 1.0)
        return x0 + share * (x1 - x0)

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """Effective dimensions, ascending, and x."""
        trace = self.values.sum()
        scales = trace * torch.logspace(6, -12, _TABLE, dtype=torch.float64).to(self.values)
        shrinkages = self.shrinkage(scales)
        dimensions = _dimension(self.values, scales * (1 - shrinkages))
        return dimensions.cummax(0).values.cpu(), shrinkages.cpu()

    def log_det(self, scale: float) -> Tensor:
        """logdet(I + K / scale) of the whole rows: their effective dimension integrated over the log of the scale."""
        trace = float(self.values.sum())
        far = max(_FAR * trace, 10 * scale)
        nodes, weights = _gauss_legendre(self.values)
        half = (math.log(far) - math.log(scale)) / 2
        points = torch.exp(math.log(scale) + half * (1 + nodes))
        return (half * (weights * self.dimension(points)).sum() + trace / far).cpu()


def _dimension(values: Tensor, scales: Tensor) -> Tensor:
    """tr[K (K + lambda)^-1] for every lambda of [G]."""
    return (
        (values / (values + scales[:, None])).nan_to_num(0.0).sum(1)
    )  # 0 / 0 is a direction without curvature


def _gauss_legendre(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], from the eigenproblem of the Jacobi matrix (Golub and Welsch 1969)."""
    k = torch.arange(1, _NODES, dtype=torch.float64)
    beta = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return nodes.to(like), (2 * vectors[0].square()).to(like)
