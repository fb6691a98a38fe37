"""Leave-one-out predictions under one prior precision after another, each found from the nearest before.

A Newton step takes an R x R factorisation; from a mode close by, one or two of them are enough. Where the likelihood is
Gaussian there is no search at all: one eigendecomposition of the kernel serves every precision (Rasmussen and Williams
2006, section 5.4.2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.refit import (
    LeftOut,
    Mode,
    RefittedCurvature,
    equivalent_mode,
    leave_one_out,
    newton,
)

_TOLERANCE = 1e-5  # of a mode: what is left is about its square


class LeaveOneOutPath:
    """Leave-one-out predictions of a refitted curvature along scalar prior precisions.

    Args:
        curvature: refitted.
    """

    def __init__(self, curvature: RefittedCurvature) -> None:
        self._observed, ones = curvature.observed, torch.ones(len(curvature.names), dtype=torch.float64)
        self._curvature, self._ones = curvature, ones
        self._sketch, self._whole = curvature.kernels_apart(ones)
        self._found: dict[float, Mode] = {}  # by the logarithm of the precision
        one_basis = self._observed.likelihood.is_unit and not curvature.kernels.mixed
        self._spectrum = torch.linalg.eigh(self._whole + self._sketch) if one_basis else None

    def at(self, prior_precision: float) -> list[LeftOut]:
        """For every block its examples, their mean [N_b, K] and covariance [N_b, K, K] without each, and targets."""
        layout = self._observed.layout
        if self._spectrum is None:
            mode = self._mode(prior_precision)
            kernel = (self._whole + self._sketch / (1 - mode.shrinkage)) / prior_precision
            blocks = leave_one_out(kernel, self._observed, mode)
        else:
            blocks = self._of_gaussian(prior_precision)
        return [
            (examples, *gaussian, targets)
            for examples, gaussian, targets in zip(
                layout.examples, blocks, self._observed.targets, strict=True
            )
        ]

    def _mode(self, prior_precision: float) -> Mode:
        place, start = math.log(prior_precision), None
        if self._found:
            near = min(self._found, key=lambda each: abs(each - place))
            # K alpha stays as it is: a guess of the same functions
            start = self._found[near].alpha * math.exp(place - near)
        sketch, whole = self._sketch / prior_precision, self._whole / prior_precision
        if self._curvature.kernels.sketched:
            equivalent, _ = self._curvature.equivalent(prior_precision * self._ones)
            mode = equivalent_mode(sketch, whole, self._observed, equivalent, start, _TOLERANCE)
        else:
            mode = newton(whole, self._observed, start, tolerance=_TOLERANCE)
        self._found[place] = mode
        return mode

    def _of_gaussian(self, prior_precision: float) -> list[tuple[Tensor, Tensor]]:
        """Mean y - D alpha and covariance D - s^2 with D the inverse of an example's block of (K + s^2)^-1."""
        assert self._spectrum is not None
        (values, vectors), observed = self._spectrum, self._observed
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
            equivalent, _ = self._curvature.equivalent(self._ones)
            wanted = equivalent.shrinkage_at(float((inner / (inner + variance)).sum()))
            if abs(wanted - x) < 1e-9:
                return wanted
            x = wanted
        return x
