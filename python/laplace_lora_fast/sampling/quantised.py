"""Forward-mode derivatives of quantised linear layers, whose kernels have none or drop them without a word."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora_fast.model.storage import quantised_linears

Map = Callable[..., Tensor]  # of x [.., d_in], to [.., d_out]


class _Linear(torch.autograd.Function):
    """A map that is linear in its input but for a bias: along dx it changes by itself at dx, without the bias."""

    @staticmethod
    def forward(x: Tensor, layer: Map, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        y = layer(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)  # kernels know two axes, or three
        return y if bias is None else y - bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.layer, _ = inputs

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        layer = ctx.layer
        return _Linear.apply(dx, layer, layer.keywords["bias"])  # type: ignore[no-any-return, no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        place = in_dims[0]
        assert place is not None
        return _Linear.apply(x.movedim(place, 0), *rest), 0  # type: ignore[no-untyped-call]


def _plain(x: Tensor, *, forward: Map, bias: Tensor | None) -> Tensor:
    return forward(x)


@contextmanager
def forward_mode_of_quantised_layers(model: nn.Module) -> Iterator[None]:
    """Inside, and in this thread, quantised linear layers have forward-mode derivatives, W dx, where autograd is off.

    With autograd they are as they were. A layer that rounds its inputs too has W of the rounded dx.
    """
    thread = threading.get_ident()

    def replaced(layer: nn.Module) -> Map:
        inner, bias = layer.forward, getattr(layer, "bias", None)
        linear = partial(_plain, forward=inner, bias=None if bias is None else bias.detach())

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or torch.is_grad_enabled() or threading.get_ident() != thread:
                found: Tensor = inner(x, *args, **kwargs)
                return found
            return _Linear.apply(x, linear, None)  # type: ignore[no-any-return, no-untyped-call]

        return forward

    with ExitStack() as stack:
        for layer in quantised_linears(model):
            former = vars(layer).get("forward")
            layer.forward = replaced(layer)  # type: ignore[method-assign]
            stack.callback(_restore, layer, former)
        yield


def _restore(layer: nn.Module, former: Any) -> None:
    if former is None:
        vars(layer).pop("forward", None)
    else:
        layer.forward = former
