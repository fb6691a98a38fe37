"""A Nystrom approximation of the GGN in the features of sketched rows, as a few rows of its own.

With Phi all weighted and sketched Jacobian rows, any number of them, and H = Phi^T Phi in their features, one pass
keeps

    Y = H Omega' = sum over batches of Phi_b^T (Phi_b Omega')        [features, k]

which batches and ranks add to. The Nystrom approximation H ~ Y (Omega'^T Y)^-1 Y^T = B B^T never exceeds H (Tropp,
Yurtsever, Udell and Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data",
algorithm 3): variances are those of H or larger. The k columns of B are rows like any others, so that all that is asked
of a posterior is asked of k rows, and nothing depends on the number of examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.algebra import RowCurvature
from laplace_lora_fast.structures.rows.layout import BlockDiagonal, Layout
from laplace_lora_fast.structures.rows.sketches.sketch import in_16_bits
from laplace_lora_fast.weights import WeightName

BLOCK = 4096  # features at a time


class LowRankCurvature(RowCurvature):
    """H ~ B B^T.

    Args:
        rows: B^T, with roots of 1.
        traces: of B B^T and of H in the sketched features, [2] fp64.
        n_seen: how many rows H is the sum of.
    """

    def __init__(self, rows: RowCurvature, traces: Tensor, n_seen: int) -> None:
        super().__init__(rows.names, rows.means, rows.rows, rows.projections, rows.roots, rows.kernels)
        self.traces, self.n_seen = traces, n_seen

    def scaled(self, factor: float) -> LowRankCurvature:
        return LowRankCurvature(super().scaled(factor), self.traces, self.n_seen)

    def notes(self, prior_precision: Tensor) -> list[str]:
        kept, total = self.traces.tolist()
        share = 100 * kept / total if total > 0 else 100.0
        line = f"rank {self.n_rows} keeps {share:.2f} % of the trace of {self.n_seen} rows"
        return [f"{line}; variances are larger for the rest", *super().notes(prior_precision)]

    def damaged(self) -> list[int]:
        sound = self.traces.shape == (2,) and bool(self.traces.isfinite().all())
        return super().damaged() if sound else self._all()

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"traces": self.traces, "n_seen": torch.tensor([self.n_seen])}

    @classmethod
    def low_rank_from(cls, rows: RowCurvature, tensors: dict[str, Tensor]) -> LowRankCurvature:
        """Of the rows and what `tensors` gave. Raises KeyError for a missing tensor."""
        return cls(rows, tensors["traces"], int(tensors["n_seen"]))


def nystrom(sketch: Tensor, omega: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows B^T [rank, features] with B B^T the Nystrom approximation of H, orthogonal, in descending order.

    Args:
        sketch: Y = H Omega' [features, k]; overwritten.
        omega: Omega' [features, k].
        dtype: of what is returned.

    Returns:
        No more rows than the arithmetic tells from zero; one of zeros for H = 0.
    """
    norm = float(torch.linalg.vector_norm(sketch, dtype=torch.float64))
    if norm == 0:
        return sketch.new_zeros(1, len(sketch), dtype=dtype)
    shift = 2 * torch.finfo(sketch.dtype).eps * norm / float(torch.linalg.vector_norm(omega))
    sketch.add_(omega, alpha=shift)
    core = _product(omega, sketch)
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    sound = values > values[-1] * torch.finfo(sketch.dtype).eps
    whitening = vectors[:, sound] * values[sound].rsqrt()
    gram = whitening.mT @ _product(sketch, sketch) @ whitening  # B^T B
    energies, turn = torch.linalg.eigh((gram + gram.mT) / 2)
    energies, turn = energies.flip(0), turn.flip(1)
    kept = energies > 10 * shift
    shrunk = ((energies[kept] - shift) / energies[kept]).sqrt()
    if not len(shrunk):
        return sketch.new_zeros(1, len(sketch), dtype=dtype)
    back = (whitening @ turn[:, kept] * shrunk).to(sketch.dtype)
    rows = sketch.new_empty(back.shape[1], len(sketch), dtype=dtype)
    for place in range(0, len(sketch), BLOCK):
        rows[:, place : place + BLOCK] = (sketch[place : place + BLOCK] @ back).mT
    return rows


def _product(one: Tensor, other: Tensor) -> Tensor:
    """One^T other in fp64, block by block of their rows."""
    total = torch.zeros(one.shape[1], other.shape[1], dtype=torch.float64, device=one.device)
    for a, b in zip(one.split(BLOCK), other.split(BLOCK), strict=True):
        total.addmm_(a.double().mT, b.double())
    return total


def as_curvature(
    names: list[WeightName],
    means: list[Tensor],
    projections: list[Tensor],
    rows: Tensor,
    traces_total: float,
    n_seen: int,
) -> LowRankCurvature:
    """The curvature of B^T [rank, features of all weights].

    Args:
        names: of the weights.
        means: their MAP values [r, d].
        projections: Omega of every weight, [d, m].
        rows: B^T.
        traces_total: the trace of H.
        n_seen: rows that H is the sum of.
    """
    widths = [mean.shape[0] * omega.shape[1] for mean, omega in zip(means, projections, strict=True)]
    parts = [part.to(mean.device, copy=True) for part, mean in zip(rows.split(widths, 1), means, strict=True)]
    kept = float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
    parts = in_16_bits(parts, projections)
    units = rows.new_ones(len(rows), 1, 1)
    layout = Layout(torch.ones(len(rows)))
    curvature = RowCurvature(names, means, parts, projections, BlockDiagonal(layout, [units]))
    return LowRankCurvature(curvature, torch.tensor([kept, traces_total], dtype=torch.float64), n_seen)


def test_matrix(features: int, rank: int, seed: int, device: torch.device) -> Tensor:
    """Omega' [features, rank], fp64: normal numbers, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(features, rank, generator=generator, dtype=torch.float64).to(device)
