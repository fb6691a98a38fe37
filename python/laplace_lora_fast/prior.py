"""The Gaussian prior N(mean, 1 / lambda) on the LoRA weights: which blocks share a lambda, and what was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor

import laplace_kernels as lk
from laplace_lora_fast.curvature import BlockName

PriorPrecision = float | Mapping[str, float]


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


def require_representable(prior_precision: float, dtype: torch.dtype) -> None:
    """Raises ValueError for a prior precision, positive, whose variance overflows where predictions are computed."""
    smallest = torch.finfo(lk.accumulation_dtype(dtype)).tiny
    if prior_precision < smallest:
        raise ValueError(
            f"prior_precision must be at least {smallest:.3g} for a model in {dtype}, got {prior_precision:g}"
        )
