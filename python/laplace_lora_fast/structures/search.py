"""The marginal likelihood and where it is largest.

    log p(D | lambda) = log p(D | theta)
                        - 1/2 [ sum_blocks lambda ||theta - mean||^2 + logdet(H + Lambda) - logdet Lambda ]

With the eigenvalues h of H known, this is a function of a few numbers: no model pass. In the log of one lambda it has
one maximum, lambda ||theta - mean||^2 = gamma(lambda), where gamma, the effective number of parameters, falls while the
left side grows (MacKay 1992).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from laplace_lora_fast.errors import NumericalError


def evidence_root(values: Tensor, counts: Tensor, distance: float, group: str) -> float:
    """The prior precision lambda at which lambda ||theta - mean||^2 = gamma(lambda), the maximum of the evidence.

    Args:
        values: eigenvalues of H in the group's weights, fp64.
        counts: their multiplicities.
        distance: ||theta - mean||^2.
        group: named in errors.

    Raises:
        NumericalError: there is no maximum.
    """

    def determined(lam: float) -> tuple[float, float]:
        share = values / (values + lam)
        return float((counts * share).sum()), -float((counts * share * (1 - share)).sum())

    return gamma_root(determined, float((counts * (values > 0)).sum()), distance, group)


def gamma_root(
    determined: Callable[[float], tuple[float, float]], most: float, distance: float, group: str
) -> float:
    """The prior precision lambda at which lambda ||theta - mean||^2 = gamma(lambda).

    Args:
        determined: lambda -> (gamma, its derivative in log lambda).
        most: the largest that gamma can be.
        distance: ||theta - mean||^2.
        group: named in errors.

    Raises:
        NumericalError: there is no maximum.
    """
    where = f" of group {group!r}" if group else ""
    if not distance > 0:
        raise NumericalError(
            f"the LoRA weights{where} equal the prior mean: the evidence has no maximum; train first"
        )
    if not most > 0:
        raise NumericalError(f"the curvature{where} is zero: the evidence has no maximum")

    def gap(log_lambda: float) -> tuple[float, float]:
        lam = math.exp(log_lambda)
        gamma, slope = determined(lam)
        return lam * distance - gamma, lam * distance - slope

    return math.exp(increasing_root(gap, math.log(most / distance)))


def evidence_noise(values: Tensor, counts: Tensor, residuals: float, count: int) -> float:
    """The noise standard deviation that maximises the evidence at a given prior.

    Args:
        values: eigenvalues of Lambda^-1/2 H Lambda^-1/2 at unit noise, fp64.
        counts: their multiplicities.
        residuals: sum of squared residuals.
        count: number of scalar observations.
    """

    def determined(variance: float) -> tuple[float, float]:
        share = 1 / (1 + variance / values)
        return float((counts * share).sum()), -float((counts * share * (1 - share)).sum())

    return noise_root(determined, residuals, count)


def noise_root(determined: Callable[[float], tuple[float, float]], residuals: float, count: int) -> float:
    """Root of residuals / sigma^2 = count - gamma(sigma^2), which has exactly one: a noise standard deviation.

    Args:
        determined: noise variance -> (gamma, its derivative in the variance's logarithm).
        residuals: sum of squared residuals.
        count: number of scalar observations.
    """

    def gap(log_variance: float) -> tuple[float, float]:
        gamma, slope = determined(math.exp(log_variance))
        misfit = residuals * math.exp(-log_variance)
        return count - gamma - misfit, misfit - slope

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


def maximum_on_log_axis(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of a positive number is largest: four values a decade, then golden-section search.

    Args:
        function: x -> value.
        low: where to begin.
        high: where to end.

    Raises:
        NumericalError: the largest value lies at an end.
    """
    steps = round(4 * math.log10(high / low))
    points = [math.log(low) + math.log(high / low) * i / steps for i in range(steps + 1)]
    best = max(range(steps, -1, -1), key=lambda i: function(math.exp(points[i])))
    if best in (0, steps):
        raise NumericalError(
            f"the evidence has no maximum for a prior precision between {low:g} and {high:g}"
        )
    left, right = points[best - 1], points[best + 1]
    share = (math.sqrt(5) - 1) / 2
    a, b = right - share * (right - left), left + share * (right - left)
    at_a, at_b = function(math.exp(a)), function(math.exp(b))
    while right - left > 1e-7:
        if at_a > at_b:
            right, b, at_b = b, a, at_a
            a = right - share * (right - left)
            at_a = function(math.exp(a))
        else:
            left, a, at_a = a, b, at_b
            b = left + share * (right - left)
            at_b = function(math.exp(b))
    return math.exp((left + right) / 2)
