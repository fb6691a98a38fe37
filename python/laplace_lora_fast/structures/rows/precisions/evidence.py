"""The prior precisions that maximise the evidence, in row space.

At a maximum every group of weights has lambda ||theta - mean||^2 = gamma, its effective number of parameters (MacKay
1992). For sketched rows gamma is that of the whole rows, as their deterministic equivalent has it. Where there are
whole rows beside them, or several groups, the equivalent's factor and the precisions are found in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.kernels import RowKernels
from laplace_lora_fast.structures.rows.layout import BlockDiagonal
from laplace_lora_fast.structures.rows.precisions.equivalent import Equivalent
from laplace_lora_fast.structures.search import evidence_noise, evidence_root, gamma_root

_ROUNDS = 50  # of the equivalent's factor, which settles in about five


class KernelCurvature(Protocol):
    """What the search looks at of a curvature."""

    kernels: RowKernels

    def whitened_spectrum(self, prior_precision: Tensor) -> tuple[Tensor, Tensor]: ...

    def roots_at(self, prior_precision: Tensor) -> BlockDiagonal: ...

    def equivalent(self, prior_precision: Tensor) -> tuple[Equivalent, float]: ...

    def effective(self, prior_precision: Tensor) -> Tensor: ...


def maximise_evidence(
    curvature: KernelCurvature, keys: Sequence[str], squared_norms: Sequence[float]
) -> dict[str, float]:
    """The best prior precision of each group of weights.

    One group: the root of MacKay's condition. Several: L-BFGS on the evidence in log lambda, from that root. Kernels of
    sketches are 1 / (1 - x) times as large: their maximum at a fixed x, and x at that maximum, in turn.

    Args:
        curvature: of the rows.
        keys: for each weight the key of its group.
        squared_norms: ||theta - prior mean||^2 of each weight.

    Raises:
        NumericalError: the evidence has no maximum; names the group.
    """
    groups = list(dict.fromkeys(keys))
    distances = [
        sum(n for n, key in zip(squared_norms, keys, strict=True) if key == group) for group in groups
    ]
    name, ones = groups[0] if len(groups) == 1 else "", torch.ones(len(keys), dtype=torch.float64)
    rows = curvature.kernels
    if rows.sketched and not rows.mixed:
        equivalent, _ = curvature.equivalent(ones)
        common = gamma_root(
            equivalent.dimension_and_slope, float((equivalent.values > 0).sum()), sum(distances), name
        )
    else:
        common = evidence_root(*curvature.whitened_spectrum(ones), sum(distances), name)
    if len(groups) == 1 and not rows.mixed:
        return {groups[0]: common}
    roots = curvature.roots_at(ones)

    def kernels(counted: Sequence[bool]) -> Tensor:
        members = [
            [float(key == group and mine) for key, mine in zip(keys, counted, strict=True)]
            for group in groups
        ]
        return torch.stack([roots.whiten(rows.total(each)) for each in members]).cpu()

    fixed = (
        kernels([not own for own in rows.are_sketched])
        if rows.mixed
        else torch.zeros((), dtype=torch.float64)
    )
    scaled = kernels(rows.are_sketched if rows.mixed else [True] * len(keys))
    traces = (fixed + scaled).diagonal(dim1=1, dim2=2).sum(1)
    for group, distance, trace in zip(groups, distances, traces, strict=True):
        evidence_root(trace[None], torch.ones(1), distance, group)  # refuses a group without a maximum
    best = torch.full((len(groups),), common, dtype=torch.float64)
    place = torch.tensor([groups.index(key) for key in keys])
    for _ in range(_ROUNDS if rows.sketched else 1):
        before = best
        factor = float((curvature.effective(best[place]) / best[place]).min())
        best = _maximum(fixed + scaled / factor, distances, before)
        if float((best / before).log().abs().max()) < 1e-9:
            break
    return dict(zip(groups, best.tolist(), strict=True))


def noise_of_mixed(
    curvature: KernelCurvature, prior_precision: Tensor, residuals: float, count: int
) -> float:
    """The best noise of a regression where whole rows stand beside sketched ones: it and x in turn.

    Args:
        curvature: at unit noise.
        prior_precision: fp64 [n_weights].
        residuals: sum of squared residuals.
        count: number of scalar observations.
    """
    noise = 1.0
    roots = curvature.roots_at(prior_precision)
    for _ in range(_ROUNDS):
        factor = float((curvature.effective(prior_precision * noise**2) / prior_precision / noise**2).min())
        inverse = 1 / (prior_precision * curvature.kernels.factors(1 - factor))
        values = (
            torch.linalg.eigvalsh(roots.whiten(curvature.kernels.total(inverse.tolist()))).clamp_min(0).cpu()
        )
        found = evidence_noise(values, torch.ones_like(values), residuals, count)
        if abs(found / noise - 1) < 1e-9:
            break
        noise = found
    return noise


def _maximum(kernels: Tensor, distances: Sequence[float], start: Tensor) -> Tensor:
    """Precisions [groups] at which -(sum of lambda ||theta||^2 + logdet(I + K)) / 2 is largest.

    Args:
        kernels: whitened, of every group, [groups, R, R].
        distances: ||theta - mean||^2 of every group.
        start: precisions to begin from.
    """
    log_lambda: Tensor = start.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [log_lambda],
        max_iter=1000,
        tolerance_grad=1e-9,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )
    moved = torch.tensor(distances, dtype=torch.float64)

    def closure() -> Tensor:
        """Negative evidence and its gradient: half of lambda ||theta||^2 + logdet(I + K)."""
        weights = (-log_lambda.detach()).exp()
        identity = torch.eye(kernels.shape[1], dtype=torch.float64)
        kernel = torch.einsum("g,gij->ij", weights, kernels) + identity
        chol = torch.linalg.cholesky(kernel)
        inverse = torch.cholesky_inverse(chol)
        gamma = weights * torch.einsum("ij,gij->g", inverse, kernels)
        log_lambda.grad = 0.5 * (moved / weights - gamma)
        loss: Tensor = 0.5 * ((moved / weights).sum() + 2 * chol.diagonal().log().sum())
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return log_lambda.detach().exp()
