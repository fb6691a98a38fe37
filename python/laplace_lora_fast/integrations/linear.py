"""What the drop-ins for other Laplace libraries share: per-example Jacobians of the parameters of linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.errors import UnsupportedAdapterError
from laplace_lora_fast.model.linear import LinearLayer, Place
from laplace_lora_fast.structures.base import Listener, Step


class ParameterJacobians(Listener):
    """Listener that forms per-example Jacobians of parameters, one backward pass after the other.

    Args:
        places: the parameters.
        cotangents: [N, C, K] of a step.
        sink: receives (parameter's index, backward pass's index, Jacobian [N, p] flattened as the parameter is).
    """

    def __init__(
        self,
        places: Sequence[Place],
        cotangents: Callable[[Step], Tensor],
        sink: Callable[[int, int, Tensor], None],
    ) -> None:
        self._of_layer: dict[int, list[tuple[int, bool]]] = {}
        for index, place in enumerate(places):
            self._of_layer.setdefault(place.layer, []).append((index, place.bias))
        self._cotangents, self._sink = cotangents, sink
        self._inputs: dict[int, Tensor] = {}
        self._shared_inputs: list[int] = []
        self._pass = 0

    def start(self, step: Step) -> Tensor:
        self._shared_inputs, self._pass = step.shared_inputs, 0
        return self._cotangents(step)

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        self._inputs[group] = selected(x, mask)

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> None:
        g = selected(g, mask)
        for index, bias in self._of_layer[layer]:
            jacobian = g.sum(1) if bias else (g.mT @ self._inputs[self._shared_inputs[layer]]).flatten(1)
            self._sink(index, self._pass, jacobian)

    def finish_pass(self) -> None:
        self._pass += 1

    def forget(self) -> None:
        self._inputs.clear()


class UsesSeen(Listener):
    """Listener that passes everything on, and in a first pass compares the parameters' Jacobians with autograd.

    A weight that is used outside its layer's forward pass, as nn.MultiheadAttention uses out_proj, is seen by no hook:
    the summed Jacobians are not autograd's gradient then.

    Args:
        inner: what it passes on to.
        layers: the tapped layers.
        places: the parameters.
        parameters: themselves.
    """

    def __init__(
        self,
        inner: Listener,
        layers: Sequence[LinearLayer],
        places: Sequence[Place],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._inner, self._layers, self._places, self._parameters = inner, layers, places, parameters
        self._found: dict[int, Tensor] = {}
        self._jacobians = ParameterJacobians(places, inner.start, self._keep)
        self._first = True

    def start(self, step: Step) -> Tensor:
        return self._jacobians.start(step)

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> None:
        self._jacobians.observe_input(group, x, mask)
        self._inner.observe_input(group, x, mask)

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> None:
        if self._first:
            self._jacobians.observe_gradient(layer, g, mask)
        self._inner.observe_gradient(layer, g, mask)

    def observe_parameters(self, gradients: Sequence[Tensor | None]) -> None:
        """Raises UnsupportedAdapterError where a gradient is not the sum of the Jacobians; names the parameter."""
        if self._first:
            self._require_all_uses(gradients)
        self._first = False

    def finish_pass(self) -> None:
        self._inner.finish_pass()

    def finish(self) -> None:
        self._inner.finish()

    def forget(self) -> None:
        self._jacobians.forget()
        self._inner.forget()

    def _keep(self, index: int, _: int, jacobian: Tensor) -> None:
        self._found[index] = jacobian

    def _require_all_uses(self, gradients: Sequence[Tensor | None]) -> None:
        like = next(iter(self._found.values()), torch.zeros(1, 1))
        tolerance = max(torch.finfo(x.dtype).eps for x in (like, *self._parameters)) ** 0.5
        for index, (gradient, place) in enumerate(zip(gradients, self._places, strict=True)):
            size = place.span.stop - place.span.start
            rows = self._found.get(index, like.new_zeros(1, size)).double()
            truth = rows.new_zeros(size) if gradient is None else gradient.double().flatten()
            if (rows.sum(0) - truth).norm() > tolerance * torch.maximum(rows.norm(dim=1).sum(), truth.norm()):
                name = f"{self._layers[place.layer].name}.{'bias' if place.bias else 'weight'}"
                raise UnsupportedAdapterError(
                    f"parameter {name!r} is used outside its layer's forward pass (as nn.MultiheadAttention uses "
                    "out_proj): call requires_grad_(False) on it"
                )


def selected(x: Tensor, mask: Tensor | None) -> Tensor:
    """X [N, T, d] in the accumulation dtype, zero where the mask [N, T] is False."""
    x = x.to(lk.accumulation_dtype(x.dtype))
    return x if mask is None else x.where(mask[..., None], torch.zeros((), dtype=x.dtype, device=x.device))
