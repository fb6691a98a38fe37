"""Prior precisions that differ in their scale alone share an eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGITS = 9  # of a direction's logarithm; scales of a grid are rounded
_FEW = 8  # values of a smooth function, each found by itself
_A_DECADE = 3  # places where it is found for more of them


@dataclass(frozen=True)
class Line:
    """Priors in one direction.

    Attributes:
        direction: [parts], fp64.
        scales: [n], fp64.
        places: of these priors among all.
    """

    direction: Tensor
    scales: Tensor
    places: list[int]


def on_a_line(precisions: Tensor) -> tuple[Tensor, float]:
    """Direction and scale of precisions: the direction of equal ones is 1, else its geometric mean is."""
    if bool((precisions == precisions[0]).all()):
        return torch.ones_like(precisions), float(precisions[0])
    scale = float(precisions.log().mean().exp())
    return precisions / scale, scale


def lines(precisions: Tensor) -> list[Line]:
    """Columns of precisions [parts, G] by their direction, in the order of their first members."""
    members: dict[tuple[float, ...], list[tuple[int, Tensor, float]]] = {}
    for place, column in enumerate(precisions.mT):
        direction, scale = on_a_line(column)
        key = tuple(round(value, _DIGITS) for value in direction.log().tolist())
        members.setdefault(key, []).append((place, direction, scale))
    return [
        Line(
            some[0][1],
            torch.tensor([scale for _, _, scale in some], dtype=torch.float64),
            [place for place, _, _ in some],
        )
        for some in members.values()
    ]


def along(scales: Tensor, function: Callable[[float], float]) -> Tensor:
    """A function that changes slowly with the logarithm of a scale: at a few places on the way, and lines between.

    Args:
        scales: [n], fp64.
        function: of a scale.

    Returns:
        [n], fp64.
    """
    if len(scales) <= _FEW:
        return torch.tensor([function(scale) for scale in scales.tolist()], dtype=torch.float64)
    logs = scales.log10()
    low, high = float(logs.min()), float(logs.max())
    places = torch.linspace(low, high, 2 + math.floor(_A_DECADE * (high - low)), dtype=torch.float64)
    values = torch.tensor([function(10**place) for place in places.tolist()], dtype=torch.float64)
    above = torch.searchsorted(places, logs).clamp(1, len(places) - 1)
    share = (logs - places[above - 1]) / (places[above] - places[above - 1])
    return values[above - 1] + share * (values[above] - values[above - 1])
