"""The Gaussian prior N(mean, 1 / lambda) on the weights: which weights share a lambda, and what was asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.options import check_choice
from laplace_lora_fast.weights import HEAD, SIDES, WeightName

PriorPrecision = float | Mapping[str, float]
PriorPrecisions = PriorPrecision | Sequence[PriorPrecision]


PER = ("all", "side", "layer", HEAD)  # which weights share a prior precision
LORA = "lora"  # what is no trained head
_MOST_CHOICES = 20_000  # priors in one pass over held-out data


def group_keys(per: str, names: Sequence[WeightName]) -> list[str]:
    """For each weight the key of its group.

    "" for all; "A", "B" or "head" for the sides; the layer's name; or "lora" or "head".
    """
    check_choice("per", per, PER)
    if per == "all":
        return ["" for _ in names]
    if per == HEAD:
        return [HEAD if side == HEAD else LORA for _, side in names]
    return [side if per == "side" else layer for layer, side in names]


def from_groups(best: Mapping[str, float]) -> PriorPrecision:
    """A prior precision of values by the keys of `group_keys`."""
    return best[""] if set(best) == {""} else dict(best)


def grouped_grid(keys: Sequence[str], grid: Sequence[float], per: str) -> tuple[list[str], Tensor, Tensor]:
    """All combinations of a grid's values over groups of weights.

    Returns:
        The groups, the combinations fp64 [G, groups], and as precisions of every weight [n_weights, G].

    Raises:
        ValueError: they are too many.
    """
    groups = list(dict.fromkeys(keys))
    if len(grid) ** len(groups) > _MOST_CHOICES:
        most = int(_MOST_CHOICES ** (1 / len(groups)))
        raise ValueError(
            f"per={per!r} tries {len(grid)}^{len(groups)} prior precisions: pass a grid of at most {most} values, or "
            f"per={HEAD!r}"
        )
    choices = torch.tensor(list(itertools.product(grid, repeat=len(groups))), dtype=torch.float64)
    return groups, choices, choices.mT[[groups.index(key) for key in keys]]


def resolve(prior_precision: PriorPrecision, names: Sequence[WeightName]) -> Tensor:
    """Spreads a scalar, {"A": .., "B": .., "head": ..}, {"lora": .., "head": ..} or {layer: ..} over the weights.

    Returns:
        fp64 [n_weights], on the CPU.

    Raises:
        ValueError: a value is not positive and finite, or the keys do not cover the weights exactly.
    """
    if isinstance(prior_precision, Mapping):
        given_keys = set(prior_precision)
        by_side, by_kind = given_keys <= {*SIDES, HEAD}, given_keys <= {LORA, HEAD}
        keys = group_keys(HEAD if by_kind else "side" if by_side else "layer", names)
        missing, unknown = sorted(set(keys) - set(prior_precision)), sorted(set(prior_precision) - set(keys))
        if missing or unknown:
            odd = [f"no value for {missing[:3]}"] * bool(missing)
            odd += [f"unknown keys {unknown[:3]}, of which no weight is under the posterior"] * bool(unknown)
            raise ValueError(
                f"prior_precision: {', '.join(odd)}; the keys are {list(dict.fromkeys(keys))[:4]}"
            )
        given = [prior_precision[key] for key in keys]
    else:
        given = [prior_precision] * len(names)
    try:
        if any(isinstance(value, str) for value in given):
            raise TypeError("a string")
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"prior_precision must be a number or a dict of numbers, got {prior_precision!r}"
        ) from error
    bad = [value for value in values if not (math.isfinite(value) and value > 0)]
    if bad:
        raise ValueError(f"prior_precision must be positive and finite, got {bad[0]}")
    return torch.tensor(values, dtype=torch.float64)


def resolve_several(
    values: PriorPrecision | Sequence[PriorPrecision], names: Sequence[WeightName], dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """One prior precision or a list of G.

    Returns:
        fp64 [n_weights, G], on the CPU, and whether it was a list.

    Raises:
        ValueError: as `resolve` and `require_representable`, or the list is empty.
    """
    several = isinstance(values, Sequence) and not isinstance(values, str)
    tried: Sequence[PriorPrecision] = values if several else [values]  # type: ignore[assignment, list-item]
    if not tried:
        raise ValueError("prior_precision is an empty list")
    columns = [resolve(value, names) for value in tried]
    for column in columns:
        require_representable(float(column.min()), dtype)
    return torch.stack(columns, 1), several


def require_representable(prior_precision: float, dtype: torch.dtype) -> None:
    """Raises ValueError for a prior precision, positive, whose variance overflows where predictions are computed."""
    smallest = torch.finfo(lk.accumulation_dtype(dtype)).tiny
    if prior_precision < smallest:
        raise ValueError(
            f"prior_precision must be at least {smallest:.3g} for a model in {dtype}, got {prior_precision:g}"
        )
