"""Plain linear layers, for libraries whose unit is a parameter and not a LoRA layer.

lora_A and lora_B are linear layers themselves, so the same code serves a LoRA adapter, a classification head and a
network without LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import DeferredChecks, UnsupportedAdapterError
from laplace_lora_fast.model.batches import Batch, Inputs
from laplace_lora_fast.model.heads import Head


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer.

    Attributes:
        name: the layer's name in `model.named_modules()`.
        module: the layer.
        features: None: every output feature carries gradient.
    """

    name: str
    module: nn.Linear
    features: Tensor | None = None

    adapted: ClassVar[bool] = False
    normalised: ClassVar[bool] = False
    adapter_parts: ClassVar[Sequence[nn.Module]] = ()
    base: ClassVar[None] = None

    def check(self) -> None:
        """A plain layer is always ready."""

    def require_plain(self, x: Tensor, base: Tensor | None, output: Tensor) -> None:
        """A plain layer is W x + b by definition."""

    def without_bias(self, output: Tensor) -> Tensor:
        """It is not normalised: nobody asks."""
        raise NotImplementedError

    def switch_off(self, is_own: Callable[[], bool]) -> None:
        """There is no adapter."""


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the flat vector of all of them.

    Attributes:
        layer: index of its layer.
        bias: it is the layer's bias, not its weight.
        span: its entries in the vector.
    """

    layer: int
    bias: bool
    span: slice


def locate(model: nn.Module, parameters: Sequence[nn.Parameter]) -> tuple[list[LinearLayer], list[Place]]:
    """Finds the linear layers that hold `parameters`.

    Returns:
        The layers in the order of `model.named_modules()`, and for each parameter its place.

    Raises:
        UnsupportedAdapterError: a parameter is no weight or bias of exactly one nn.Linear; names it.
    """
    wanted = {id(parameter) for parameter in parameters}
    layers: list[LinearLayer] = []
    owners: dict[int, tuple[int, bool]] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        held = {kind: id(p) for kind, p in own.items() if id(p) in wanted}
        if isinstance(module, nn.Linear) and held:
            repeated = [kind for kind, key in held.items() if key in owners]
            if repeated:
                raise UnsupportedAdapterError(f"parameter {name + '.' + repeated[0]!r} is shared: freeze it")
            owners |= {key: (len(layers), kind == "bias") for kind, key in held.items()}
            layers.append(LinearLayer(name, module))
        elif held:
            raise UnsupportedAdapterError(
                f"parameter {name + '.' + next(iter(held))!r} belongs to a {type(module).__name__}: only nn.Linear is "
                "supported; call requires_grad_(False) on it"
            )
    places, start = [], 0
    for parameter in parameters:
        layer, bias = owners[id(parameter)]
        places.append(Place(layer, bias, slice(start, start + parameter.numel())))
        start += parameter.numel()
    return layers, places


class BatchHead(Head):
    """Outputs of a model that takes a whole batch: model(x) is [N, C].

    A batch of this package is then {"x": what the model takes, "y": targets or None}.
    """

    def inputs(self, batch: Batch, device: torch.device, checks: DeferredChecks) -> Inputs:
        x, y = batch["x"], batch["y"]
        return replace(super().inputs(named_fields(x), device, checks), model={"x": x}, labels=y)

    def u(self, model: nn.Module, inputs: Inputs) -> Tensor:
        u: Tensor = model(inputs.model["x"])
        return u


def named_fields(x: Tensor | Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model is given, by name: a lone tensor of integers [N, T] is token ids."""
    if not isinstance(x, Tensor):
        return x
    return {"input_ids" if x.dim() == 2 and not x.is_floating_point() else "inputs": x}
