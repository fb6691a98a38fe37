"""Running Kronecker factors C = sum of x x^T: accumulate, merge, and reduce to eigenvalues.

Two kinds hold the same quantity. `DenseFactor` is exact. `SketchFactor` keeps Y = C Omega with a thin Omega, for
dimensions whose d x d matrix is too large. Both are sums over the data: the order of batches does not matter, and
factors of disjoint data add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.devices import to_device
from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.ranks import Ranks
from laplace_lora_fast.structures.blocks.spectrum import (
    Spectrum,
    left_pairs,
    right_pairs,
    spectrum_of_rows,
    truncated,
)
from laplace_lora_fast.structures.blocks.waiting import WaitingRows
from laplace_lora_fast.structures.state import State


def tokens_worth_an_update(device: torch.device) -> int:
    """How many tokens in one piece are added to an accumulator at once; fewer wait for others, up to its capacity.

    An update does d^2 operations a token and moves 4 d^2 bytes of C, the lower triangle read and written in fp32: it
    is bound by memory below 4 F / B tokens. On an H200 that is about 700 (780 TFLOP/s in bf16, 4.3 TB/s): an estimate,
    no timing stands behind it yet. On a CPU it was measured, at d = 1024: pieces of 31 tokens take an eighth less time
    for a fit if they wait, of 128 tokens 1 % less for a third more memory.
    """
    return 700 if device.type == "cuda" else 32


class Factor(ABC):
    """A running C = sum of x x^T.

    Rows that come a few at a time are gathered first, so that the accumulator is read and written once per many rows.
    While no more than `capacity` rows have been gathered it is not even allocated: they are an exact factor themselves.

    Args:
        dim: d.
        dtype: of the accumulator, fp32 or fp64.
        device: where it lives.
        capacity: number of rows that may wait.
    """

    kind: str

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        self.dim, self.dtype, self.device = dim, dtype, device
        self._waiting = WaitingRows(dim, capacity)
        # Pieces of half the capacity would be copied to wait for one other at best.
        self._many = min(capacity // 2, tokens_worth_an_update(device))

    def add_tokens(self, x: Tensor, mask: Tensor | None) -> None:
        """Adds the rows of x [..., d] whose mask [...] is True; x is read now and not kept."""
        if x.shape[:-1].numel() < self._many:
            self._gather(x, mask)
        else:
            self._accumulate(x.reshape(-1, self.dim), None if mask is None else mask.reshape(-1))

    def add_rows(self, rows: Tensor) -> None:
        """Adds rows [n, d], so few in all that they may make up the factor; they are read now and not kept."""
        if len(rows) <= self._waiting.capacity:
            self._gather(rows, None)
        else:
            self._accumulate(rows, None)

    def place(self, n: int, dtype: torch.dtype) -> Tensor | None:
        """Where to write n rows [n, d] of this dtype, which then belong to the factor; None if there are too many."""
        if n > self._waiting.capacity:
            return None
        if n > self._waiting.room:
            self._flush()
        return self._waiting.extend(n, dtype, self.device)

    def merge(self, other: Factor) -> None:
        """Adds a factor of the same kind over other data."""
        if type(other) is not type(self) or other.dim != self.dim:
            raise NumericalError(f"cannot merge a {other.kind} factor of dimension {other.dim} into this one")
        self._merge(other)
        if other._waiting.n:
            self.add_rows(other._waiting.rows)

    def is_finite(self) -> bool:
        """False if any row was NaN or infinite, or the sum overflowed."""
        return all(bool(part.isfinite().all()) for part in (self._rows(), *self._accumulated()))

    def quadratic(self, basis: Tensor) -> Tensor:
        """basis^T C basis [r, r] in fp64, exactly (a sketch: for the columns it was made exact on)."""
        basis = basis.double()
        if not self._accumulated():
            image = self._rows().double() @ basis
            return image.mT @ image
        self._flush()
        return self._quadratic(basis)

    def spectrum(self, rank: int | None) -> Spectrum:
        """The `rank` leading eigenpairs and the tail; None for the kind's default."""
        if not self._accumulated():
            return spectrum_of_rows(self._rows(), rank, self.dtype)
        self._flush()
        return self._spectrum(rank)

    def state(self) -> State:
        """What it holds, bit for bit."""
        rows, last = self._waiting.state()
        waiting = {} if rows is None else {"waiting": rows}
        return State({"last": last}, waiting | self._own_state())

    def restore(self, state: State) -> None:
        """Takes over what `state` gave, in a factor made with the same arguments."""
        tensors = {name: tensor.to(self.device) for name, tensor in state.tensors.items()}
        self._waiting.restore(tensors.get("waiting"), state.values["last"])
        self._restore_own(tensors)

    def _rows(self) -> Tensor:
        """What waits, [n, d]."""
        if self._waiting.n:
            return self._waiting.rows
        return torch.zeros(0, self.dim, dtype=self.dtype, device=self.device)

    def _gather(self, x: Tensor, mask: Tensor | None) -> None:
        if x.shape[:-1].numel() > self._waiting.room:
            self._flush()
        self._waiting.append(x, mask)

    def _flush(self) -> None:
        if self._waiting.n:
            self._accumulate(self._waiting.rows, None)
            self._waiting.clear()

    @abstractmethod
    def _accumulate(self, rows: Tensor, mask: Tensor | None) -> None:
        """Adds rows [T, d] to the accumulator, allocating it on first use."""

    @abstractmethod
    def _accumulated(self) -> tuple[Tensor, ...]:
        """What is finite if and only if the accumulator is; empty while that is not allocated."""

    @abstractmethod
    def _merge(self, other: Factor) -> None:
        """Adds the accumulator of another factor of this class."""

    @abstractmethod
    def _sums(self) -> tuple[Tensor, ...]:
        """What adds up over data, allocated if it is not."""

    @abstractmethod
    def _own_state(self) -> dict[str, Tensor]:
        """What there is beside the rows that wait."""

    @abstractmethod
    def _restore_own(self, tensors: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def _quadratic(self, basis: Tensor) -> Tensor: ...

    @abstractmethod
    def _spectrum(self, rank: int | None) -> Spectrum: ...


class DenseFactor(Factor):
    """C [d, d] itself, exact. By default its spectrum is complete.

    Up to d / 2 rows wait, in a quarter of C's bytes if they are of 16 bits, in half of them if they are as C is.
    """

    kind = "dense"

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        # Beyond d / 2, an SVD of the rows costs more than C.
        super().__init__(dim, dtype, device, capacity=dim // 2)
        self._lower: Tensor | None = None

    @property
    def lower(self) -> Tensor:
        """C, of which the lower triangle counts; allocated on first use."""
        if self._lower is None:
            self._lower = torch.zeros(self.dim, self.dim, dtype=self.dtype, device=self.device)
        return self._lower

    def _accumulate(self, rows: Tensor, mask: Tensor | None) -> None:
        lk.gram_(self.lower, rows, mask)

    def _accumulated(self) -> tuple[Tensor, ...]:
        # |C_ij| <= max(C_ii, C_jj) in every partial sum: the diagonal tells on all of C.
        return () if self._lower is None else (self._lower.diagonal(),)

    def _sums(self) -> tuple[Tensor, ...]:
        return (self.lower,)

    def _own_state(self) -> dict[str, Tensor]:
        return {} if self._lower is None else {"lower": self._lower}

    def _restore_own(self, tensors: dict[str, Tensor]) -> None:
        self._lower = tensors.get("lower")

    def _merge(self, other: Factor) -> None:
        assert isinstance(other, DenseFactor)
        if other._lower is not None:
            self._lower = other._lower.clone() if self._lower is None else self._lower.add_(other._lower)

    def _quadratic(self, basis: Tensor) -> Tensor:
        assert self._lower is not None
        return basis.mT @ (lk.mirror_(self._lower).double() @ basis)

    def _spectrum(self, rank: int | None) -> Spectrum:
        assert self._lower is not None
        # The lower triangle, in fp64: an eigenproblem in fp32 loses digits that the sums of a graded C do have.
        values, vectors = torch.linalg.eigh(self._lower.double())
        trace = self._lower.diagonal().sum(dtype=torch.float64)
        # Directions at the rounding of this are no eigenvectors of anything: they belong to the tail.
        noise = 8 * torch.finfo(torch.float64).eps * self.dim**0.5 * values[-1]
        kept = max(1, int((values > noise).sum()))
        rank = kept if rank is None else min(rank, kept)
        return truncated(values.flip(0).clamp_min(0), vectors.flip(1), trace, rank, self.dtype)


class SketchFactor(Factor):
    """Y = C Omega [d, m], recovered by the Nystrom approximation (Tropp, Yurtsever, Udell, Cevher 2017).

    Omega = [leading directions of the first rows | random orthonormal | exact], where `exact` are columns on which
    quadratic forms must stay exact (A^T or B). The first part is up to half of the first two.

    Beside bf16 rows Omega is in bf16: any will do, and products of bf16 matrices take half as many multiplications as
    those of a halved one. The exact columns are there as their two halves then, in the place of as many random ones.
    Not beside fp16, which has no room for X Omega.

    Args:
        size: number of columns of Omega besides the exact ones. A quarter of it is the spectrum's default rank.
        exact: [d, e].
        dtype: of Y.
        seed: of the random columns.
        omega: all of Omega, in place of one made from the first rows: factors with the same one add up.
    """

    kind = "sketch"

    def __init__(
        self, size: int, exact: Tensor, dtype: torch.dtype, seed: int, omega: Tensor | None = None
    ) -> None:
        dim = exact.shape[0]
        self._size = min(size, dim)
        super().__init__(dim, dtype, exact.device, capacity=self._size)
        self._exact, self._omega = exact.to(dtype), omega
        self._generator = torch.Generator().manual_seed(seed)
        self._sketch: Tensor | None = None  # Y
        self._trace = torch.zeros((), dtype=torch.float64, device=exact.device)

    @property
    def omega(self) -> Tensor:
        """Omega [d, m], made from what has come so far if need be."""
        if self._omega is None:
            self._omega = self._start(self._rows(), None)
        return self._omega

    def _accumulate(self, rows: Tensor, mask: Tensor | None) -> None:
        if self._omega is None:
            self._omega = self._start(rows, mask)
        sketch, trace = self._sums()
        lk.gram_sketch_(sketch, rows, self.omega, mask)
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=self.dtype).square()
        trace += (norms if mask is None else norms.where(mask, 0)).sum(dtype=torch.float64)

    def _accumulated(self) -> tuple[Tensor, ...]:
        return () if self._sketch is None else (self._sketch, self._trace)

    def _sums(self) -> tuple[Tensor, ...]:
        if self._sketch is None:
            self._sketch = torch.zeros_like(self.omega, dtype=self.dtype)
        return self._sketch, self._trace

    def _own_state(self) -> dict[str, Tensor]:
        found = {"omega": self._omega, "sketch": self._sketch, "trace": self._trace}
        made = {name: tensor for name, tensor in found.items() if tensor is not None}
        return made | {"generator": self._generator.get_state()}

    def _restore_own(self, tensors: dict[str, Tensor]) -> None:
        self._omega, self._sketch = tensors.get("omega"), tensors.get("sketch")
        self._trace = tensors["trace"]
        self._generator.set_state(tensors["generator"].cpu())

    def _merge(self, other: Factor) -> None:
        assert isinstance(other, SketchFactor)
        if other._sketch is None:
            return
        if self._omega is None:
            self._omega = other.omega
        if not torch.equal(self.omega, other.omega):
            raise NumericalError(
                "sketches with different Omega do not add up: give the others the omega of the first"
            )
        for own, more in zip(self._sums(), other._sums(), strict=True):
            own += more

    def _quadratic(self, basis: Tensor) -> Tensor:
        omega, sketch = self._whitened()
        form = basis.mT @ (sketch @ (omega.mT @ basis))  # the basis lies in the span of Omega
        return (form + form.mT) / 2

    def _spectrum(self, rank: int | None) -> Spectrum:
        omega, sketch = self._whitened()
        # Rounding makes Omega^T C Omega indefinite at the accumulation precision: shift it there, and back at the end.
        shift = torch.finfo(self.dtype).eps * torch.linalg.matrix_norm(sketch)
        sketch = sketch + shift * omega
        core = omega.mT @ sketch
        weights, basis = torch.linalg.eigh((core + core.mT) / 2)
        root = (sketch @ basis) / weights.clamp_min(shift).sqrt()  # C ~ root root^T
        if root.device.type == "cpu":
            vectors, sigma, _ = torch.linalg.svd(root, full_matrices=False)
            values = sigma.square()
        else:
            values, vectors = left_pairs(root)
        values = (values - shift).clamp_min(0)
        rank = max(1, self._size // 4) if rank is None else rank
        return truncated(values, vectors, self._trace, rank, self.dtype)

    def _start(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Omega [d, m], half of it warm-started from the first rows."""
        exact, size, kept = self._exact, self._size, self.dtype
        if rows.dtype == torch.bfloat16 and self.dtype == torch.float32:
            exact, kept = torch.cat(lk.halves(exact, rows.dtype)[:2], 1), rows.dtype
            size = max(size - self._exact.shape[1], size // 2, 1)
        rows = rows.to(self.dtype)
        if mask is not None:
            rows = rows.where(mask[:, None], 0)
        columns = self._warmed(rows, size) if len(rows) else self._noise(rows, self.dim, size)
        return torch.cat([torch.linalg.qr(columns).Q.to(kept), exact], 1)

    def _warmed(self, rows: Tensor, size: int) -> Tensor:
        """Leading directions of rows, and random ones: [d, size]."""
        rows = rows.nan_to_num(0, 0, 0)  # `is_finite` tells on them later
        rows = rows / rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)  # only directions matter here
        warm = min(size // 2, len(rows))
        probe = self._noise(rows, len(rows), min(len(rows), warm + 8))
        span = torch.linalg.qr(rows.mT @ (rows @ (rows.mT @ probe))).Q  # randomised subspace iteration
        leading = span @ right_pairs(rows @ span)[1].mT
        return torch.cat([leading[:, :warm], self._noise(rows, self.dim, size - warm)], 1)

    def _noise(self, like: Tensor, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return to_device(noise.to(like.dtype), like.device)

    def _whitened(self) -> tuple[Tensor, Tensor]:
        """(Omega W, Y W) in fp64 with Omega W orthonormal; dependent columns (a zero B, say) drop out."""
        assert self._sketch is not None
        omega, sketch = self.omega.double(), self._sketch.double()
        norms = omega.norm(dim=0).clamp_min(torch.finfo(omega.dtype).tiny)
        sigma, right = right_pairs(omega / norms)
        keep = sigma > 1e-6 * sigma[0]
        whitener = (right[keep] / sigma[keep, None]).mT / norms[:, None]
        return omega @ whitener, sketch @ whitener


def flush_full(factors: Iterable[Factor]) -> None:
    """Adds what waits wherever there is no room for as much again; the dense factors of a model in one launch."""
    groups: dict[tuple[torch.dtype, torch.device], list[DenseFactor]] = {}
    for factor in factors:
        if not factor._waiting.full:
            continue
        if isinstance(factor, DenseFactor):
            groups.setdefault((factor._waiting.rows.dtype, factor.device), []).append(factor)
        else:
            factor._flush()
    for group in groups.values():
        lk.gram_group_([factor.lower for factor in group], [factor._waiting.rows for factor in group])
        for factor in group:
            factor._waiting.clear()


def join(factors: Sequence[Factor], ranks: Ranks) -> None:
    """Adds up each factor over the ranks, which all hold the sum then; rows that may wait together still do."""
    if ranks.size == 1:
        return
    waiting = [float(factor._waiting.n) for factor in factors]
    accumulated = [float(bool(factor._accumulated())) for factor in factors]
    counts, started = ranks.gather_numbers([*waiting, *accumulated]).sum(0).view(2, -1).tolist()
    for factor, count, start in zip(factors, counts, started, strict=True):
        if start == 0 and count <= factor._waiting.capacity:
            if count:
                rows = ranks.gather(factor._rows().to(factor.dtype))  # some may have none, in no dtype
                factor._waiting.clear()
                factor.add_rows(rows)
        else:
            factor._flush()
            ranks.sum_(factor._sums())
