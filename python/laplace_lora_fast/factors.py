"""Running Kronecker factors C = sum of x x^T: accumulate, merge, and reduce to eigenvalues.

Two kinds hold the same quantity. `DenseFactor` is exact. `SketchFactor` keeps Y = C Omega with a thin Omega, for
dimensions whose d x d matrix is too large. Both are sums over the data: the order of batches does not matter, and
factors of disjoint data add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.errors import NumericalError


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


class Factor(Protocol):
    """A running C = sum of x x^T."""

    kind: str
    dim: int

    def add_tokens(self, x: Tensor, mask: Tensor | None) -> None:
        """Adds the rows of x [..., d] whose mask [...] is True; x is read now and not kept."""

    def add_rows(self, rows: Tensor) -> None:
        """Adds rows [n, d] in the accumulation dtype; takes ownership, so that few rows can wait for more."""

    def merge(self, other: Factor) -> None:
        """Adds a factor of the same kind over other data."""

    def is_finite(self) -> bool:
        """False if any row was NaN or infinite, or the sum overflowed."""

    def quadratic(self, basis: Tensor) -> Tensor:
        """basis^T C basis [r, r] in fp64, exactly, for basis [d, r]."""

    def spectrum(self, rank: int | None) -> Spectrum:
        """The `rank` leading eigenpairs and the tail; None keeps all there are."""


class DenseFactor:
    """C [d, d] itself, lower triangle.

    Rows that come a few at a time wait in a list, so that C is read and written once per many rows. While fewer rows
    than half the dimension have come, C is not even allocated: the rows are an exact factor of rank n.
    """

    kind = "dense"

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dim, self._dtype, self._device = dim, dtype, device
        self._matrix: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._n_waiting = 0
        self._capacity = max(1, dim // 2)

    def add_tokens(self, x: Tensor, mask: Tensor | None) -> None:
        rows = x.reshape(-1, self.dim)
        lk.gram_(self._allocated(), rows, None if mask is None else mask.reshape(-1))

    def add_rows(self, rows: Tensor) -> None:
        self._waiting.append(rows)
        self._n_waiting += len(rows)
        if self._n_waiting > self._capacity:
            self._flush()

    def merge(self, other: Factor) -> None:
        assert isinstance(other, DenseFactor)
        if other._matrix is not None:
            self._allocated().add_(other._matrix)
        for rows in other._waiting:
            self.add_rows(rows)

    def matrix(self) -> Tensor:
        """C [d, d], both triangles."""
        self._flush()
        return lk.mirror_(self._allocated())

    def is_finite(self) -> bool:
        parts = self._waiting if self._matrix is None else [*self._waiting, self._matrix.tril()]
        return all(bool(part.isfinite().all()) for part in parts)

    def quadratic(self, basis: Tensor) -> Tensor:
        basis = basis.double()
        if self._matrix is None:
            image = self._rows().double() @ basis
            return image.mT @ image
        return basis.mT @ (self.matrix().double() @ basis)

    def spectrum(self, rank: int | None) -> Spectrum:
        if self._matrix is None:
            return _spectrum_of_rows(self._rows(), rank)
        return _spectrum_of_matrix(self.matrix(), rank)

    def _allocated(self) -> Tensor:
        if self._matrix is None:
            self._matrix = torch.zeros(self.dim, self.dim, dtype=self._dtype, device=self._device)
        return self._matrix

    def _rows(self) -> Tensor:
        if not self._waiting:
            return torch.zeros(0, self.dim, dtype=self._dtype, device=self._device)
        if len(self._waiting) > 1:
            self._waiting = [torch.cat(self._waiting)]
        return self._waiting[0]

    def _flush(self) -> None:
        if self._waiting:
            lk.gram_(self._allocated(), self._rows())
            self._waiting, self._n_waiting = [], 0


class SketchFactor:
    """Y = C Omega [d, m], recovered by the Nystrom approximation (Tropp, Yurtsever, Udell, Cevher 2017).

    Omega = [leading directions of the first rows | random orthonormal | exact], where `exact` are columns on which
    quadratic forms must stay exact (A^T or B). Half of the rest is warm-started from the first rows that come.

    Args:
        dim: d.
        size: number of columns of Omega besides the exact ones.
        exact: [d, e].
        dtype: of Y.
        seed: of the random columns.
    """

    kind = "sketch"

    def __init__(self, dim: int, size: int, exact: Tensor, dtype: torch.dtype, seed: int) -> None:
        self.dim, self._size, self._dtype = dim, min(size, dim), dtype
        self._exact = exact.to(dtype)
        self._generator = torch.Generator().manual_seed(seed)
        self._omega: Tensor | None = None
        self._sketch: Tensor | None = None
        self._trace = torch.zeros((), dtype=torch.float64, device=exact.device)

    def add_tokens(self, x: Tensor, mask: Tensor | None) -> None:
        rows = x.reshape(-1, self.dim)
        mask = None if mask is None else mask.reshape(-1)
        if self._omega is None:
            self._start(rows, mask)
        assert self._sketch is not None and self._omega is not None
        lk.gram_sketch_(self._sketch, rows, self._omega, mask)
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=self._dtype).square()
        self._trace += (norms if mask is None else norms.where(mask, 0)).sum(dtype=torch.float64)

    def add_rows(self, rows: Tensor) -> None:
        self.add_tokens(rows, None)

    def merge(self, other: Factor) -> None:
        assert isinstance(other, SketchFactor)
        if other._sketch is None:
            return
        if self._sketch is None:
            self._omega, self._sketch = other._omega, torch.zeros_like(other._sketch)
        assert self._omega is not None and other._omega is not None
        if not torch.equal(self._omega, other._omega):
            raise NumericalError(
                "sketches of different Omega cannot be merged: start both from the same first batch"
            )
        self._sketch += other._sketch
        self._trace += other._trace

    def is_finite(self) -> bool:
        return self._sketch is None or bool(self._sketch.isfinite().all() & self._trace.isfinite())

    def quadratic(self, basis: Tensor) -> Tensor:
        if self._sketch is None:
            return torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64, device=basis.device)
        omega, sketch = self._whitened()
        basis = basis.double()
        coefficients = omega.mT @ basis  # basis lies in the span of Omega
        form = basis.mT @ (sketch @ coefficients)
        return (form + form.mT) / 2

    def spectrum(self, rank: int | None) -> Spectrum:
        """Nystrom in fp64 with the shift at the accumulation precision; `rank` defaults to a quarter of the size."""
        rank = max(1, self._size // 4) if rank is None else min(rank, self._size)
        if self._sketch is None or not self._trace > 0:
            return _spectrum_of_rows(
                torch.zeros(0, self.dim, dtype=self._dtype, device=self._exact.device), rank
            )
        omega, sketch = self._whitened()
        shift = torch.finfo(self._dtype).eps * torch.linalg.matrix_norm(sketch)
        sketch = sketch + shift * omega
        core = omega.mT @ sketch
        chol = torch.linalg.cholesky((core + core.mT) / 2)
        root = torch.linalg.solve_triangular(chol, sketch.mT, upper=False)  # C ~ root^T root
        _, sigma, vectors = torch.linalg.svd(root, full_matrices=False)
        values = (sigma.square() - shift).clamp_min(0)
        return _truncated(values, vectors.mT, self._trace, rank, self._dtype)

    def _start(self, rows: Tensor, mask: Tensor | None) -> None:
        rows = rows.to(self._dtype)
        if mask is not None:
            rows = rows.where(mask[:, None], 0)
        warm = min(self._size // 2, len(rows))
        noise = torch.randn(self.dim, self._size - warm, generator=self._generator, dtype=torch.float64)
        noise = noise.to(rows)
        if warm:
            probe = torch.randn(
                len(rows), min(len(rows), warm + 8), generator=self._generator, dtype=torch.float64
            )
            span = torch.linalg.qr(rows.mT @ (rows @ (rows.mT @ probe.to(rows)))).Q
            vectors = span @ torch.linalg.svd(rows @ span, full_matrices=False).Vh.mT
            noise = torch.cat([vectors[:, :warm], noise], 1)
        self._omega = torch.cat([torch.linalg.qr(noise).Q, self._exact], 1)
        self._sketch = torch.zeros(self.dim, self._omega.shape[1], dtype=self._dtype, device=rows.device)

    def _whitened(self) -> tuple[Tensor, Tensor]:
        """(Omega W, Y W) in fp64 with Omega W orthonormal; dependent columns (a zero B, say) drop out."""
        assert self._sketch is not None and self._omega is not None
        omega = self._omega.double()
        norms = omega.norm(dim=0).clamp_min(torch.finfo(omega.dtype).tiny)
        _, sigma, right = torch.linalg.svd(omega / norms, full_matrices=False)
        keep = sigma > 1e-6 * sigma[0]
        whitener = (right[keep] / sigma[keep, None]).mT / norms[:, None]
        return omega @ whitener, self._sketch.double() @ whitener


def _spectrum_of_rows(rows: Tensor, rank: int | None) -> Spectrum:
    """Of rows^T rows by a thin SVD in fp64."""
    _, sigma, vectors = torch.linalg.svd(rows.double(), full_matrices=False)
    values = sigma.square()
    if len(values):
        noise = values[0] * torch.finfo(torch.float64).eps * max(rows.shape)
        kept = int((values > noise).sum())
        values, vectors = values[:kept], vectors[:kept]
    return _truncated(values, vectors.mT, values.sum(), rank, rows.dtype)


def _spectrum_of_matrix(matrix: Tensor, rank: int | None) -> Spectrum:
    trace = matrix.diagonal().sum(dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix.double())
    return _truncated(values.flip(0).clamp_min(0), vectors.flip(1), trace, rank, matrix.dtype)


def _truncated(
    values: Tensor, vectors: Tensor, trace: Tensor, rank: int | None, dtype: torch.dtype
) -> Spectrum:
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
