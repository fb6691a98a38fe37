"""The Gaussian prior N(mean, 1 / lambda) on the LoRA weights: which blocks share a lambda, and which lambda.

    log p(D | lambda) = log p(D | theta)
                        - 1/2 sum_blocks [ lambda ||theta - mean||^2 + logdet(H + lambda I) - P log lambda ]

With the eigenvalues h of H known, this is a function of a few numbers. Blocks that share a lambda are independent of
the others, and in log lambda each group has one maximum: lambda ||theta - mean||^2 = gamma(lambda), where gamma, the
effective number of parameters, falls while the left side grows (MacKay 1992). No model pass, no grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor

from laplace_lora_fast.errors import NumericalError
from laplace_lora_fast.posterior import KronBlock

PriorPrecision = float | Mapping[str, float]
BlockName = tuple[str, str]  # layer, side


class PriorStructure(str, Enum):
    """Which blocks share a prior precision."""

    SCALAR = "scalar"  # one for all
    AB = "ab"  # one for all lora_A, one for all lora_B
    LAYERWISE = "layerwise"  # one per LoRA layer


def group_keys(structure: PriorStructure, names: Sequence[BlockName]) -> list[str]:
    """For each block the key of its group: "", "A" / "B", or the layer's name."""
    if structure is PriorStructure.SCALAR:
        return ["" for _ in names]
    return [side if structure is PriorStructure.AB else layer for layer, side in names]


def resolve(prior_precision: PriorPrecision, names: Sequence[BlockName]) -> Tensor:
    """Spreads a scalar, {"A": .., "B": ..} or {layer: ..} over the blocks.

    Returns:
        fp64 [n_blocks], on the CPU.

    Raises:
        ValueError: a value is not positive and finite, or the keys do not cover the blocks exactly.
    """
    if isinstance(prior_precision, Mapping):
        structure = PriorStructure.AB if set(prior_precision) <= {"A", "B"} else PriorStructure.LAYERWISE
        keys = group_keys(structure, names)
        missing, unknown = sorted(set(keys) - set(prior_precision)), sorted(set(prior_precision) - set(keys))
        if missing or unknown:
            raise ValueError(f"prior_precision: no value for {missing[:3]}, unknown keys {unknown[:3]}")
        given = [prior_precision[key] for key in keys]
    else:
        given = [prior_precision] * len(names)
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"prior_precision must be a number or a dict of numbers, got {prior_precision!r}"
        ) from error
    bad = [value for value in values if not (math.isfinite(value) and value > 0)]
    if bad:
        raise ValueError(f"prior_precision must be positive and finite, got {bad[0]}")
    return torch.tensor(values, dtype=torch.float64)


def maximise_evidence(
    structure: PriorStructure, blocks: Sequence[KronBlock], squared_norms: Sequence[float]
) -> PriorPrecision:
    """The prior precisions that maximise the marginal likelihood.

    Args:
        structure: which blocks share a value.
        blocks: the curvature.
        squared_norms: ||theta - prior mean||^2 of each block.

    Raises:
        NumericalError: the evidence has no maximum, because a group's weights equal the prior mean or it has no
            curvature; names the group.
    """
    keys = group_keys(structure, [block.name for block in blocks])
    best = {}
    for key in dict.fromkeys(keys):
        members = [index for index, other in enumerate(keys) if other == key]
        pairs = [blocks[index].eigenvalues() for index in members]
        values, counts = (torch.cat([p.cpu() for p in part]) for part in zip(*pairs, strict=True))
        distance = sum(squared_norms[index] for index in members)
        best[key] = _evidence_root(values, counts, distance, key)
    return best[""] if structure is PriorStructure.SCALAR else best


def _evidence_root(values: Tensor, counts: Tensor, distance: float, key: str) -> float:
    where = f" of group {key!r}" if key else ""
    if not distance > 0:
        raise NumericalError(
            f"the LoRA weights{where} equal the prior mean: the evidence has no maximum; train first"
        )
    determined = float((counts * (values > 0)).sum())
    if not determined > 0:
        raise NumericalError(f"the curvature{where} is zero: the evidence has no maximum")

    def gap(log_lambda: float) -> tuple[float, float]:
        lam = math.exp(log_lambda)
        share = values / (values + lam)
        gamma = float((counts * share).sum())
        slope = float((counts * share * (1 - share)).sum())
        return lam * distance - gamma, lam * distance + slope

    return math.exp(increasing_root(gap, math.log(determined / distance)))


def evidence_noise(blocks: Sequence[KronBlock], precisions: Tensor, residuals: float, count: int) -> float:
    """The noise standard deviation that maximises the evidence at given prior precisions.

    Root of residuals / sigma^2 = count - gamma(sigma), which has exactly one.

    Args:
        blocks: the curvature at unit noise.
        precisions: lambda of each block.
        residuals: sum of squared residuals.
        count: number of scalar observations.
    """
    pairs = [block.eigenvalues() for block in blocks]
    scaled = torch.cat(
        [values.cpu() / lam for (values, _), lam in zip(pairs, precisions.tolist(), strict=True)]
    )
    counts = torch.cat([counts.cpu() for _, counts in pairs])

    def gap(log_variance: float) -> tuple[float, float]:
        share = 1 / (1 + math.exp(log_variance) / scaled)
        gamma, slope = float((counts * share).sum()), float((counts * share * (1 - share)).sum())
        misfit = residuals * math.exp(-log_variance)
        return count - gamma - misfit, slope + misfit

    return math.exp(increasing_root(gap, math.log(residuals / count)) / 2)


def increasing_root(function: Callable[[float], tuple[float, float]], start: float) -> float:
    """Root of an increasing function given with its derivative: Newton, kept inside a bracket.

    Args:
        function: x -> (value, derivative).
        start: where to begin.

    Raises:
        NumericalError: there is no root within 200 of `start`.
    """
    low, high, x = -math.inf, math.inf, start
    for _ in range(200):
        value, slope = function(x)
        low, high = (x, high) if value < 0 else (low, x)
        step = min(max(-value / slope, -5.0), 5.0) if slope > 0 else math.copysign(5.0, -value)
        following = x + step
        if not low < following < high:
            following = (low + high) / 2 if math.isfinite(low + high) else x + step
        if abs(following - x) <= 1e-14 * max(1.0, abs(x)) or following in (low, high) or value == 0:
            return x
        if abs(following - start) > 200:
            raise NumericalError("the evidence has no maximum for a prior precision between 1e-86 and 1e86")
        x = following
    return x
