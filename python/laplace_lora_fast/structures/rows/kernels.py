"""Inner products of all rows with each other: what every prior weights anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.devices import brought


class RowKernels:
    """Kernels J_w J_w^T of the LoRA weights, summed with weights.

    Args:
        rows: J Omega of every weight, [R, r m].
        projections: Omega of every weight, [d, m].
    """

    def __init__(self, rows: Sequence[Tensor], projections: Sequence[Tensor]) -> None:
        self._rows, self._projections = rows, projections

    @property
    def are_sketched(self) -> list[bool]:
        """For each weight whether fewer columns than its width are kept."""
        return [projection.shape[1] < projection.shape[0] for projection in self._projections]

    @property
    def sketched(self) -> bool:
        """Whether fewer columns than a layer's width are kept anywhere."""
        return any(self.are_sketched)

    @property
    def mixed(self) -> bool:
        """Whether there are both sketched and whole rows."""
        return self.sketched and not all(self.are_sketched)

    def factors(self, shrinkage: float) -> Tensor:
        """What precisions are multiplied with, fp64 [n_weights]: 1 - x of sketched rows, 1 of whole ones."""
        return 1 - shrinkage * torch.tensor(self.are_sketched, dtype=torch.float64)

    @property
    def fewest_columns(self) -> int:
        """The smallest number of columns of a sketch."""
        sizes = [projection.shape for projection in self._projections]
        return min((columns for dim, columns in sizes if columns < dim), default=0)

    def total(self, weights: Sequence[float]) -> Tensor:
        """Weighted sum, fp64 [R, R], not to be written to; kernels of weight 0 are not touched."""
        if len(set(weights)) == 1:
            return self._plain if weights[0] == 1 else weights[0] * self._plain
        return self._sum(weights, 0, 1)

    def part(self, weights: Sequence[float], index: int, parts: int) -> Tensor:
        """The same from one of several equal parts of each sketch's columns, [R, R]: a sketch of that many columns.

        Rows that are not sketched are taken whole.
        """
        return self._sum(weights, index, parts)

    def kept(self, weights: Sequence[float]) -> float:
        """The share of columns that sketches keep, in the mean over the energy of their rows under these weights."""
        shares = [projection.shape[1] / projection.shape[0] for projection in self._projections]
        energies = [weight * each for weight, each in zip(weights, self._energies, strict=True)]
        sketched = [(share, energy) for share, energy in zip(shares, energies, strict=True) if share < 1]
        total = sum(energy for _, energy in sketched)
        return sum(share * energy for share, energy in sketched) / total if total > 0 else 1.0

    @cached_property
    def _energies(self) -> list[float]:
        return [float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2 for rows in self._rows]

    @cached_property
    def _plain(self) -> Tensor:
        """Serves every scalar prior."""
        return self._sum([1.0] * len(self._rows), 0, 1)

    def _sum(self, weights: Sequence[float], index: int, parts: int) -> Tensor:
        home, size = self._projections[0].device, len(self._rows[0])
        kernel = torch.zeros(size, size, dtype=torch.float64, device=home)
        counted = [place for place, weight in enumerate(weights) if weight != 0]
        near = brought([self._rows[place] for place in counted], [home] * len(counted))
        for place, rows in zip(counted, near, strict=True):
            (dim, columns), weight = self._projections[place].shape, weights[place]
            if parts > 1 and columns < dim:
                start, stop = index * columns // parts, (index + 1) * columns // parts
                rows = rows.view(len(rows), -1, columns)[..., start:stop].flatten(1)
                weight *= columns / (stop - start)
            lk.gram_(kernel, rows.double().mT, alpha=weight)
        return lk.mirror_(kernel)
