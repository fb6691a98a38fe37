"""Eigenvalues of a factor: the leading ones with their vectors, and one for all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """U diag(values) U^T + tail (I - U U^T), a symmetric positive semi-definite matrix on R^d.

    Attributes:
        values: [k] fp64, descending.
        vectors: U [d, k] with orthonormal columns, in the factor's accumulation dtype.
        tail: fp64 scalar, the mean eigenvalue of what `values` leaves out; 0 when k = d or nothing is left out.
        trace: fp64 scalar, of the matrix this stands for.
    """

    values: Tensor
    vectors: Tensor
    tail: Tensor
    trace: Tensor

    @property
    def dim(self) -> int:
        return self.vectors.shape[0]

    @property
    def rank(self) -> int:
        return self.vectors.shape[1]

    @property
    def captured(self) -> float:
        """Fraction of the trace in `values` (1 for a zero matrix)."""
        return float(self.values.sum() / self.trace) if self.trace > 0 else 1.0

    def dense(self) -> Tensor:
        """The matrix [d, d]."""
        u = self.vectors.double()
        matrix = (u * (self.values - self.tail)) @ u.mT
        matrix.diagonal().add_(self.tail)
        return matrix.to(self.vectors.dtype)

    def scaled(self, factor: float | Tensor) -> Spectrum:
        """The spectrum of `factor` times the matrix."""
        return Spectrum(self.values * factor, self.vectors, self.tail * factor, self.trace * factor)


def spectrum_of_rows(rows: Tensor, rank: int | None, dtype: torch.dtype) -> Spectrum:
    """Of rows^T rows by a thin SVD in fp64; LAPACK takes half the time after an explicit QR."""
    values, vectors = left_pairs(rows.double().mT)
    if len(values):
        noise = values[0] * torch.finfo(torch.float64).eps * max(rows.shape)
        kept = int((values > noise).sum())
        values, vectors = values[:kept], vectors[:, :kept]
    return truncated(values, vectors, values.sum(), rank, dtype)


def left_pairs(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and orthonormal eigenvectors of M M^T for M [d, n]: min(d, n) of them.

    By a SVD behind a QR. On a GPU, whose SVD of a 1000 x 1000 matrix is slow, by an eigenproblem in its place: with
    M = Q R, that of R R^T. Its eigenvalues have the digits of the largest one, as what decides which of them are noise
    assumes; its vectors are orthonormal to rounding, for nothing is divided by a small value.
    """
    basis, triangle = torch.linalg.qr(tall)
    if tall.device.type == "cpu":
        vectors, sigma, _ = torch.linalg.svd(triangle, full_matrices=False)
        return sigma.square(), basis @ vectors
    return _by_eigenproblem(basis, triangle)


def right_pairs(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and right singular vectors, the rows of [n, n], of a tall M [d, n].

    On a GPU from the eigenproblem of M^T M in fp64: what is below 1e-8 of the largest has no digits then.
    """
    if tall.device.type == "cpu":
        _, sigma, right = torch.linalg.svd(tall, full_matrices=False)
        return sigma, right
    return _right_by_eigenproblem(tall)


def _right_by_eigenproblem(tall: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(tall.double().mT @ tall.double())
    return values.flip(0).clamp_min(0).sqrt().to(tall.dtype), vectors.flip(1).mT.to(tall.dtype)


def _by_eigenproblem(basis: Tensor, triangle: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(triangle @ triangle.mT)
    return values.flip(0).clamp_min(0), basis @ vectors.flip(1)


def truncated(
    values: Tensor, vectors: Tensor, trace: Tensor, rank: int | None, dtype: torch.dtype
) -> Spectrum:
    """The `rank` leading ones of these eigenpairs, descending; None for all."""
    dim = vectors.shape[0]
    rank = len(values) if rank is None else min(rank, len(values))
    values = values[:rank].contiguous()
    left_out = (trace - values.sum()).clamp_min(0)
    noise = torch.finfo(dtype).eps * trace
    tail = (
        torch.where(left_out > noise, left_out, 0) / max(dim - rank, 1)
        if rank < dim
        else torch.zeros_like(trace)
    )
    return Spectrum(values, vectors[:, :rank].to(dtype).contiguous(), tail, trace)
