"""What the ranks of a joint fit have to agree on before its first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from laplace_lora_fast.model.lora import Treated
from laplace_lora_fast.saving.sums import sums
from laplace_lora_fast.saving.surroundings import Prints, Surroundings


def facts(
    options: Mapping[str, Any],
    layers: Sequence[Treated],
    surroundings: Surroundings,
    prior_mean: Sequence[Tensor] | None,
) -> dict[str, Any]:
    """What is equal on all ranks, JSON-serialisable, for `Ranks.agree`.

    Args:
        options: of the `LaplaceLoRA`, by name.
        layers: the LoRA layers; their weights are compared by sums over the bits.
        surroundings: of the adapter.
        prior_mean: of each weight, or None for zero.
    """
    weights: dict[str, Tensor] = {}
    for layer in layers:
        for name, (value, _) in layer.of_parameters(layer.weights.matrices).items():
            weights[name] = value
    means = {str(index): mean for index, mean in enumerate(prior_mean or ())}
    return {
        "options": dict(options),
        "the scalings of the LoRA layers": {layer.name: layer.scaling for layer in layers},
        "the adapter's weights": _exact(sums(weights)),
        "the prior mean": _exact(sums(means)),
        "the model's parameters": _exact(surroundings.tensors),
        "the model's settings": surroundings.settings,
    }


def _exact(prints: Prints) -> dict[str, Any]:
    """Without the rounded sums, in which the order of summation shows."""
    return {name: None if each is None else list(each)[:3] for name, each in prints.items()}
