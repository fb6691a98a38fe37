"""Prior precisions that differ in their scale alone share an eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DIGITS = 9  # of a direction's logarithm; scales of a grid are rounded


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
