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

_CLOSE, _NEAR = 1e-4, 2e-3  # of log lambda: a step, and three places between which a parabola is exact


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
    """Where a smooth function of a positive number is largest: four values a decade, coarse to fine, then parabolas.

    Args:
        function: x -> value.
        low: where to begin.
        high: where to end.

    Raises:
        NumericalError: the largest value lies at an end.
    """
    steps = round(4 * math.log10(high / low))
    points = [math.log(low) + math.log(high / low) * i / steps for i in range(steps + 1)]
    found: dict[int, float] = {}

    def negative(place: int) -> float:
        found[place] = -function(math.exp(points[place]))
        return found[place]

    best = lowest(negative, steps + 1, stride=4)
    if best in (0, steps):
        raise NumericalError(
            f"the evidence has no maximum for a prior precision between {low:g} and {high:g}"
        )
    around = [(points[place], found[place]) for place in (best - 1, best, best + 1)]
    return math.exp(_least_of_parabolas(lambda x: -function(math.exp(x)), around))


def _least_of_parabolas(function: Callable[[float], float], around: list[tuple[float, float]]) -> float:
    """Where a smooth function is least, from three places around, (x, value) ascending in x, the middle one least.

    The vertex of the parabola through them takes the place of one; where it is as good as known, a step into the wider
    side does. The last vertex is not looked at.
    """
    for _ in range(40):
        (a, fa), (b, fb), (c, fc) = around
        left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
        curved = left - right
        x = b - 0.5 * ((b - a) * left - (b - c) * right) / curved if curved else b
        if abs(x - b) < _CLOSE and c - a < _NEAR:
            return x
        if abs(x - b) < _CLOSE or not a < x < c:
            x = b + max(_CLOSE, 0.1 * max(c - b, b - a)) * (1 if c - b > b - a else -1)
        value = function(x)
        if value < fb:
            around = [(b, fb), (x, value), (c, fc)] if x > b else [(a, fa), (x, value), (b, fb)]
        else:
            around = [(a, fa), (b, fb), (x, value)] if x > b else [(x, value), (b, fb), (c, fc)]
    return around[1][0]


def lowest(value_at: Callable[[int], float], count: int, stride: int = 8) -> int:
    """The place of 0 .. count - 1 with the least value, coarse to fine: of a smooth function, by a fifth of the values.

    Every `stride`-th place, from the last to the first, then neighbours at half the distance of the best so far until
    both next to it are known. A number that is none counts as the least, so that it is seen.

    Args:
        value_at: asked once a place; places that follow each other are close.
        count: of places.
        stride: of the coarse search.
    """
    known: dict[int, float] = {}

    def look(place: int) -> None:
        if 0 <= place < count and place not in known:
            value = value_at(place)
            known[place] = -math.inf if math.isnan(value) else value

    for place in sorted({*range(0, count, stride), count - 1}, reverse=True):
        look(place)
    distance = stride
    while True:
        distance = max(distance // 2, 1)
        best = min(sorted(known), key=known.__getitem__)
        before = len(known)
        look(best + distance)
        look(best - distance)
        if distance == 1 and len(known) == before:
            return best
