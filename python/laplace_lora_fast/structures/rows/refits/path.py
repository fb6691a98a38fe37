"""The modes of a refit under one prior precision after another, each found from the nearest before.

A Newton step takes an R x R factorisation; from a mode close by, one or two of them are enough. Where the likelihood is
Gaussian, leaving examples out takes no search at all: one eigendecomposition of the kernel serves every precision
(Rasmussen and Williams 2006, section 5.4.2).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.kernels import RowKernels
from laplace_lora_fast.structures.rows.precisions.equivalent import Equivalent
from laplace_lora_fast.structures.rows.refits.left_out import LeftOut, leave_one_out
from laplace_lora_fast.structures.rows.refits.mode import Mode, Observations, equivalent_mode, newton
from laplace_lora_fast.weights import WeightName

_TOLERANCE = 1e-5  # of a mode whose examples are left out: what is left is about its square


class Refitted(Protocol):
    """What a path looks at of a curvature."""

    names: list[WeightName]
    kernels: RowKernels
    observed: Observations

    def kernels_apart(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]: ...

    def equivalent(self, prior_precision: Tensor) -> tuple[Equivalent, float]: ...


class ModePath:
    """Modes along scalar prior precisions.

    Args:
        curvature: refitted.
        tolerance: as for `newton`.
    """

    def __init__(self, curvature: Refitted, tolerance: float = 1e-9) -> None:
        self.observed, self._ones = (
            curvature.observed,
            torch.ones(len(curvature.names), dtype=torch.float64),
        )
        self._curvature, self._tolerance = curvature, tolerance
        self.sketch, self.whole = curvature.kernels_apart(self._ones)  # at precision 1
        self._found: dict[float, Mode] = {}  # by the logarithm of the precision

    def mode(self, prior_precision: float) -> Mode:
        place, near = math.log(prior_precision), None
        if self._found:
            nearest = min(self._found, key=lambda each: abs(each - place))
            near = self._found[nearest]
            # K alpha stays as it is: a guess of the same functions
            near = replace(near, alpha=near.alpha * math.exp(place - nearest))
        rest = self._tolerance, 1 / prior_precision
        if self._curvature.kernels.sketched:
            equivalent, _ = self._curvature.equivalent(prior_precision * self._ones)
            mode = equivalent_mode(self.sketch, self.whole, self.observed, equivalent, near, *rest)
        else:
            mode = newton(self.whole, self.observed, None if near is None else near.alpha, None, *rest)
        self._found[place] = mode
        return mode


class LeaveOneOutPath:
    """Leave-one-out predictions of a refitted curvature along scalar prior precisions.

    Args:
        curvature: refitted.
    """

    def __init__(self, curvature: Refitted) -> None:
        self._curvature, self._path = curvature, ModePath(curvature, _TOLERANCE)
        one_basis = curvature.observed.likelihood.is_unit and not curvature.kernels.mixed
        self._spectrum = torch.linalg.eigh(self._path.whole + self._path.sketch) if one_basis else None

    def at(self, prior_precision: float) -> list[LeftOut]:
        """For every block its examples, their mean [N_b, K] and covariance [N_b, K, K] without each, and targets."""
        observed = self._curvature.observed
        blocks = (
            self._of_mode(prior_precision) if self._spectrum is None else self._of_gaussian(prior_precision)
        )
        return [
            (examples, *gaussian, targets)
            for examples, gaussian, targets in zip(
                observed.layout.examples, blocks, observed.targets, strict=True
            )
        ]

    def _of_mode(self, prior_precision: float) -> list[tuple[Tensor, Tensor]]:
        path, mode = self._path, self._path.mode(prior_precision)
        kernel, weight = path.whole, 1 / prior_precision
        if not path.whole.dim():
            kernel, weight = path.sketch, weight / (1 - mode.shrinkage)
        elif path.sketch.dim():
            kernel = path.whole + path.sketch / (1 - mode.shrinkage)
        return leave_one_out(kernel, path.observed, mode, weight)

    def _of_gaussian(self, prior_precision: float) -> list[tuple[Tensor, Tensor]]:
        """Mean y - D alpha and covariance D - s^2 with D the inverse of an example's block of (K + s^2)^-1."""
        assert self._spectrum is not None
        (values, vectors), observed = self._spectrum, self._curvature.observed
        layout, variance = observed.layout, 1 / observed.precision
        values = values.clamp_min(0) / prior_precision
        values = values / (1 - self._shrinkage_of_gaussian(values, variance))
        gains = 1 / (values + variance)
        targets, prior = layout.join(observed.targets), layout.join(observed.prior)
        alpha = vectors @ (gains * (vectors.mT @ (targets - prior)))
        results = []
        for rows, goal, own in zip(layout.rows, layout.split(targets), layout.split(alpha), strict=True):
            block = vectors[rows.to(vectors.device)]  # [N, K, R]
            inverse = torch.linalg.inv((block * gains) @ block.mT)
            unit = torch.eye(inverse.shape[1], dtype=inverse.dtype, device=inverse.device)
            mean = goal - (inverse @ own[..., None]).squeeze(-1)
            results.append((mean, inverse - variance * unit))
        return results

    def _shrinkage_of_gaussian(self, values: Tensor, variance: float) -> float:
        """The x that the dimension there asks for."""
        x = 0.0
        while self._curvature.kernels.sketched:
            inner = values / (1 - x)
            ones = torch.ones(len(self._curvature.names), dtype=torch.float64)
            equivalent, _ = self._curvature.equivalent(ones)
            wanted = equivalent.shrinkage_at(float((inner / (inner + variance)).sum()))
            if abs(wanted - x) < 1e-9:
                return wanted
            x = wanted
        return x
