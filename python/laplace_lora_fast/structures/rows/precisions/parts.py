"""Which part of the rows is a sketch, and what stands beside it whole.

A trained head's rows, and those of weights no wider than the sketch, are whole: there is nothing to make up for, and
they keep the prior's precision. With K_w of what is whole and K_s of the sketch, both at the prior's precision,

    I + K_w + K_s = L (I + L^-1 K_s L^-T) L^T        L L^T = I + K_w

so that in the coordinates that L whitens there is a sketch alone, and its equivalent (equivalent.py) is found there: it
corrects what the sketch has to explain beside the whole part. K_w fixes these coordinates for one prior precision;
where everything is sketched, they are the same for all precisions in one direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.kernels import RowKernels
from laplace_lora_fast.structures.rows.layout import BlockDiagonal
from laplace_lora_fast.structures.rows.precisions.equivalent import Equivalent


class SketchedPart:
    """The kernel of the sketched weights, in coordinates where it stands alone.

    Args:
        kernels: of all rows; some are sketched.
        roots: S, fp64.
        precisions: one a weight, fp64: a prior's, or where all weights are sketched its direction.

    Attributes:
        log_det: logdet(I + K_w), 0 where all is sketched.
    """

    def __init__(self, kernels: RowKernels, roots: BlockDiagonal, precisions: Tensor) -> None:
        self._kernels, self._roots = kernels, roots
        inverse = (1 / precisions).tolist()
        self._weights = [
            weight * sketched for weight, sketched in zip(inverse, kernels.are_sketched, strict=True)
        ]
        self._root: Tensor | None = None
        self.log_det = torch.zeros((), dtype=torch.float64)
        if kernels.mixed:
            rest = [weight - own for weight, own in zip(inverse, self._weights, strict=True)]
            whole = roots.whiten(kernels.total(rest))
            self._root = torch.linalg.cholesky(whole + torch.eye(len(whole)).to(whole))
            self.log_det = 2 * self._root.diagonal().log().sum().cpu()

    @property
    def kept(self) -> float:
        """The share of the columns that the sketch keeps."""
        return self._kernels.kept(self._weights)

    def kernel(self, index: int = 0, parts: int = 1) -> Tensor:
        """[R, R] fp64, of one of several equal parts of the columns."""
        kernel = self._roots.whiten(self._kernels.part(self._weights, index, parts))
        if self._root is None:
            return kernel
        half = torch.linalg.solve_triangular(self._root, kernel, upper=False)
        whitened: Tensor = torch.linalg.solve_triangular(self._root, half.mT, upper=False)
        return whitened

    def equivalent(self, values: Tensor | None = None) -> Equivalent:
        """Of all columns by their two halves.

        Args:
            values: eigenvalues of `kernel()` where they are known.
        """
        if values is None:
            values = torch.linalg.eigvalsh(self.kernel()).clamp_min(0)
        return Equivalent.of_halves(values, [self.kernel(index, 2) for index in range(2)], self.kept)

    def smaller(self) -> Equivalent:
        """Of the first half of the columns, by its own two halves."""
        values = torch.linalg.eigvalsh(self.kernel(0, 2)).clamp_min(0)
        return Equivalent.of_halves(values, [self.kernel(index, 4) for index in range(2)], self.kept / 2)
