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

import laplace_kernels as lk
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


def add_rows_(sketch: Tensor, omega: Tensor, rows: Tensor) -> None:
    """Y += X^T (X Omega') for rows X [n, features], fp64; Omega' is widened a block of features at a time."""
    seen = rows.new_zeros(len(rows), omega.shape[1])
    for part, block in zip(rows.split(BLOCK, 1), omega.split(BLOCK), strict=True):
        seen.addmm_(part, block.to(rows.dtype))
    sketch.addmm_(rows.mT, seen)


def nystrom(sketch: Tensor, omega: Tensor) -> Tensor:
    """C [k, rank] with B = Y C and B B^T the Nystrom approximation of H, B's columns orthogonal, in descending order.

    Args:
        sketch: Y = H Omega' [features, k], fp64; changed to that of a slightly shifted H, which C is for.
        omega: Omega' [features, k].

    Returns:
        No more columns than the arithmetic tells from zero; one of zeros for H = 0.
    """
    none = sketch.new_zeros(sketch.shape[1], 1)
    norm = float(torch.linalg.vector_norm(sketch, dtype=torch.float64))
    if norm == 0:
        return none
    shift = (
        2 * torch.finfo(sketch.dtype).eps * norm / float(torch.linalg.vector_norm(omega, dtype=torch.float64))
    )
    for own, block in zip(sketch.split(BLOCK), omega.split(BLOCK), strict=True):
        own.add_(block.to(own.dtype), alpha=shift)
    values, whitening = _eigen(_core(sketch, omega))
    sound = values > values[-1] * torch.finfo(sketch.dtype).eps
    whitening = whitening[:, sound].mul_(values[sound].rsqrt())
    energies, turn = _eigen(_gram(sketch, whitening))  # of B^T B
    kept = energies > 10 * shift
    if not kept.any():
        return none
    shrunk = ((energies[kept] - shift) / energies[kept]).sqrt()
    return (whitening @ turn[:, kept].mul_(shrunk).flip(1)).to(sketch.dtype)


def _core(sketch: Tensor, omega: Tensor) -> Tensor:
    """Omega'^T Y [k, k]."""
    core = sketch.new_zeros(sketch.shape[1], sketch.shape[1])
    for block, own in zip(omega.split(BLOCK), sketch.split(BLOCK), strict=True):
        core.addmm_(block.to(own.dtype).mT, own)
    return core


def _gram(sketch: Tensor, whitening: Tensor) -> Tensor:
    """Of the whitened sketch Y W, W^T (Y^T Y) W."""
    squares = lk.mirror_(lk.gram_(sketch.new_zeros(sketch.shape[1], sketch.shape[1]), sketch))
    half = whitening.mT @ squares
    del squares
    return half @ whitening


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of the symmetric part."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT).mul_(0.5))
    return values, vectors


def as_rows(sketch: Tensor, back: Tensor, dtype: torch.dtype) -> Tensor:
    """Some columns of B^T = (Y C)^T [rank, n], from those rows Y [n, k]."""
    rows = sketch.new_empty(back.shape[1], len(sketch), dtype=dtype)
    for place in range(0, len(sketch), BLOCK):
        rows[:, place : place + BLOCK] = (sketch[place : place + BLOCK] @ back).mT
    return rows


def as_curvature(
    names: list[WeightName],
    means: list[Tensor],
    projections: list[Tensor],
    rows: list[Tensor],
    traces_total: float,
    n_seen: int,
) -> LowRankCurvature:
    """The curvature of B^T.

    Args:
        names: of the weights.
        means: their MAP values [r, d].
        projections: Omega of every weight, [d, m].
        rows: B^T of every weight, [rank, r m]; emptied one by one.
        traces_total: the trace of H.
        n_seen: rows that H is the sum of.
    """
    kept = sum(float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2 for each in rows)
    units = rows[0].new_ones(len(rows[0]), 1, 1)
    layout = Layout(torch.ones(len(units)))
    parts = in_16_bits(rows, projections)
    curvature = RowCurvature(names, means, parts, projections, BlockDiagonal(layout, [units]))
    return LowRankCurvature(curvature, torch.tensor([kept, traces_total], dtype=torch.float64), n_seen)


def test_matrix(features: int, rank: int, seed: int, device: torch.device) -> Tensor:
    """Omega' [features, rank], fp16: normal numbers, the same on every rank. Any will do, if it is always the same."""
    generator, omega = torch.Generator().manual_seed(seed), torch.empty(features, rank, dtype=torch.float16)
    for block in omega.split(BLOCK):
        block.copy_(torch.randn(block.shape, generator=generator))
    return omega.to(device)
