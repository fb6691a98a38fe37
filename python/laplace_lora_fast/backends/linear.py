"""Taps on plain linear layers, for libraries whose unit is a parameter and not a LoRA layer.

lora_A and lora_B are linear layers themselves, so the same code serves a LoRA adapter, a classification head and a
network without LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.errors import DeferredChecks, UnsupportedAdapterError
from laplace_lora_fast.heads import Head, Inputs
from laplace_lora_fast.likelihoods import Categorical, Gaussian, Likelihood
from laplace_lora_fast.modes import evaluation_mode
from laplace_lora_fast.taps import Tap


@dataclass(frozen=True)
class LinearSite:
    """One linear layer.

    Attributes:
        name: the layer's name in `model.named_modules()`.
        module: the layer.
        rows: None: every output feature carries gradient.
    """

    name: str
    module: nn.Linear
    rows: Tensor | None = None

    def check(self) -> None:
        """A plain layer is always ready."""


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the flat vector of all of them.

    Attributes:
        site: index of its layer.
        bias: it is the layer's bias, not its weight.
        span: its entries in the vector.
    """

    site: int
    bias: bool
    span: slice


def locate(model: nn.Module, parameters: Sequence[nn.Parameter]) -> tuple[list[LinearSite], list[Place]]:
    """Finds the linear layers that hold `parameters`.

    Returns:
        The layers in the order of `model.named_modules()`, and for each parameter its place.

    Raises:
        UnsupportedAdapterError: a parameter is no weight or bias of exactly one nn.Linear; names it.
    """
    wanted = {id(parameter) for parameter in parameters}
    sites: list[LinearSite] = []
    owners: dict[int, tuple[int, bool]] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        held = {kind: id(p) for kind, p in own.items() if id(p) in wanted}
        if isinstance(module, nn.Linear) and held:
            repeated = [kind for kind, key in held.items() if key in owners]
            if repeated:
                raise UnsupportedAdapterError(f"parameter {name + '.' + repeated[0]!r} is shared: freeze it")
            owners |= {key: (len(sites), kind == "bias") for kind, key in held.items()}
            sites.append(LinearSite(name, module))
        elif held:
            raise UnsupportedAdapterError(
                f"parameter {name + '.' + next(iter(held))!r} belongs to a {type(module).__name__}: only nn.Linear is "
                "supported; call requires_grad_(False) on it"
            )
    places, start = [], 0
    for parameter in parameters:
        site, bias = owners[id(parameter)]
        places.append(Place(site, bias, slice(start, start + parameter.numel())))
        start += parameter.numel()
    return sites, places


class BatchHead(Head):
    """Logits of a model that takes a whole batch: model(x) is [N, C].

    A batch of this package is then {"x": what the model takes, "y": targets or None}.
    """

    def inputs(self, batch: Mapping[str, Any], device: torch.device, checks: DeferredChecks) -> Inputs:
        x, y = batch["x"], batch["y"]
        return replace(super().inputs(named_fields(x), device, checks), model={"x": x}, labels=y)

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        logits: Tensor = model(inputs.model["x"])
        return logits


def likelihood_of(name: str) -> Likelihood:
    """This package's likelihood for laplace-torch's name."""
    return Gaussian() if name == "regression" else Categorical()


def named_fields(x: Tensor | Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model is given, by name: a lone tensor of integers [N, T] is token ids."""
    if not isinstance(x, Tensor):
        return x
    return {"input_ids" if x.dim() == 2 and not x.is_floating_point() else "inputs": x}


class JacobianObserver:
    """Observer that forms per-example Jacobians of parameters, one backward pass after the other.

    Args:
        places: the parameters.
        sink: receives (parameter's index, backward pass's index, Jacobian [N, p] flattened as the parameter is).
    """

    def __init__(self, places: Sequence[Place], sink: Callable[[int, int, Tensor], None]) -> None:
        self._of_site: dict[int, list[tuple[int, bool]]] = {}
        for index, place in enumerate(places):
            self._of_site.setdefault(place.site, []).append((index, place.bias))
        self._sink = sink
        self._inputs: dict[int, Tensor] = {}
        self._groups: list[int] = []
        self._pass = 0

    def run(self, tap: Tap, logits: Tensor, cotangents: Tensor) -> None:
        """Backward passes with every column of `cotangents` [N, C, K] from `logits` [N, C], which `tap` made."""
        assert tap.groups is not None
        self._groups = tap.groups
        for self._pass in range(cotangents.shape[2]):
            tap.backward(logits, cotangents[:, :, self._pass], last=self._pass == cotangents.shape[2] - 1)
        self._inputs.clear()

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        self._inputs[group] = selected(x, mask)

    def observe_gradient(self, site: int, g: Tensor, mask: Tensor | None) -> None:
        g = selected(g, mask)
        for index, bias in self._of_site[site]:
            jacobian = g.sum(1) if bias else (g.mT @ self._inputs[self._groups[site]]).flatten(1)
            self._sink(index, self._pass, jacobian)


def require_all_uses_seen(
    model: nn.Module,
    head: Head,
    inputs: Inputs,
    sites: Sequence[LinearSite],
    places: Sequence[Place],
    parameters: Sequence[nn.Parameter],
) -> None:
    """Refuses a model that uses a weight outside its layer's forward pass, as nn.MultiheadAttention does.

    No tap sees such a use: in one random direction the summed Jacobians are not autograd's gradient then.

    Raises:
        UnsupportedAdapterError: names the parameter, or a layer whose rows are not the examples.
    """
    with (
        evaluation_mode(model, []),  # no checkpointing: reentrantly it knows no gradient of a parameter
        head.installed(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        logits = head.logits(model, inputs)
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        expected = torch.autograd.grad(logits, list(parameters), direction, allow_unused=True)
    found: dict[int, Tensor] = {}
    observer = JacobianObserver(places, lambda index, _, jacobian: found.update({index: jacobian}))
    with Tap(model, head, list(sites), observer) as tap:
        logits = tap.forward(inputs)
        tap.check_rows(logits)
        observer.run(tap, logits, direction[..., None])
    tolerance = max(torch.finfo(x.dtype).eps for x in (logits, *parameters)) ** 0.5
    for index, (gradient, place) in enumerate(zip(expected, places, strict=True)):
        size = place.span.stop - place.span.start
        rows = found.get(index, direction.new_zeros(1, size)).double()
        truth = rows.new_zeros(size) if gradient is None else gradient.double().flatten()
        if (rows.sum(0) - truth).norm() > tolerance * torch.maximum(rows.norm(dim=1).sum(), truth.norm()):
            name = f"{sites[place.site].name}.{'bias' if place.bias else 'weight'}"
            raise UnsupportedAdapterError(
                f"parameter {name!r} is used outside its layer's forward pass (as nn.MultiheadAttention uses "
                "out_proj): call requires_grad_(False) on it"
            )


def selected(x: Tensor, mask: Tensor | None) -> Tensor:
    """X [N, T, d] in the accumulation dtype, zero where the mask [N, T] is False."""
    x = x.to(lk.accumulation_dtype(x.dtype))
    return x if mask is None else x.where(mask[..., None], torch.zeros((), dtype=x.dtype, device=x.device))
