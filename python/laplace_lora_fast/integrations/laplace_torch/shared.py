"""Kronecker factors that several layers share, as one tensor through all of laplace-torch's arithmetic."""

from __future__ import annotations

from laplace.utils import Kron, KronDecomposed
from laplace.utils.utils import symeig
from torch import Tensor


class SharedKron(Kron):
    """A `Kron` in which equal factors are the same tensor.

    q, k and v have one input, so one input factor: it is added up, scaled and eigendecomposed once, not three times.

    Args:
        kfacs: as laplace-torch has them.
    """

    def __add__(self, other: Kron) -> SharedKron:
        if not isinstance(other, Kron):
            raise ValueError("Can only add Kron to Kron.")
        sums: dict[tuple[int, int], Tensor] = {}

        def add(mine: Tensor, theirs: Tensor) -> Tensor:
            key = id(mine), id(theirs)
            if key not in sums:
                sums[key] = mine + theirs
            return sums[key]

        pairs = zip(self.kfacs, other.kfacs, strict=True)
        return SharedKron([[add(*each) for each in zip(*pair, strict=True)] for pair in pairs])

    def __radd__(self, other: Kron) -> Kron:
        """A fit starts from zeros, one tensor a factor: adding them would part what is shared."""
        if any(bool(factor.any()) for group in other.kfacs for factor in group):
            return Kron(other.kfacs) + Kron(self.kfacs)
        return SharedKron(self.kfacs)

    def __mul__(self, scalar: float | Tensor) -> SharedKron:
        products: dict[tuple[int, int], Tensor] = {}
        for group in self.kfacs:
            for factor in group:
                key = id(factor), len(group)
                if key not in products:
                    products[key] = pow(scalar, 1 / len(group)) * factor
        return SharedKron([[products[id(f), len(group)] for f in group] for group in self.kfacs])

    __rmul__ = __mul__

    def decompose(self, damping: bool = False) -> KronDecomposed:
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for group in self.kfacs:
            for factor in group:
                if id(factor) not in pairs:
                    pairs[id(factor)] = symeig(factor)
        values, vectors = (
            [[pairs[id(factor)][part] for factor in group] for group in self.kfacs] for part in (0, 1)
        )
        return KronDecomposed(vectors, values, damping=damping)
