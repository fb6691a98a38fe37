"""What a LoRA layer computes, compared with what it should: W0 x + s B A x, DoRA's norm around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from laplace_lora_fast.errors import UnsupportedAdapterError
from laplace_lora_fast.model.observer import close, size, some_tokens
from laplace_lora_fast.weights import LoraWeights


class AdaptedLayer(Protocol):
    """A LoRA layer: see `lora.LoraLayer`."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def adapter(self) -> str: ...
    @property
    def scaling(self) -> float: ...
    @property
    def adapter_parts(self) -> Sequence[nn.Module]: ...
    @property
    def weights(self) -> LoraWeights: ...
    def without_bias(self, output: Tensor) -> Tensor: ...


def require_plain(layer: AdaptedLayer, x: Tensor, base: Tensor | None, output: Tensor) -> None:
    """Raises UnsupportedAdapterError unless output = base + s B A x, with these parameters A and B.

    Up to rounding in the coarsest dtype on the way. lora_A and lora_B are run once more, so that what hooks or
    parametrisations make of them shows; a bias of lora_B is part of it.
    """
    a, b = layer.adapter_parts
    x, output = some_tokens(x), some_tokens(output)
    inner = x.to(a.weight.dtype)  # type: ignore[arg-type]
    z = a(inner)
    plain_z = nn.functional.linear(inner, a.weight)  # type: ignore[arg-type]  # without a bias
    delta = b(z)
    plain_delta = nn.functional.linear(z, b.weight, b.bias)  # type: ignore[arg-type]
    dtypes = (x.dtype, output.dtype, z.dtype)
    dropped = layer.module.lora_dropout[layer.adapter](inner)  # type: ignore[index, operator]
    for what, found, expected in (
        ("lora_dropout", dropped, inner),
        ("lora_A", z, plain_z),
        ("lora_B", delta, plain_delta),
    ):
        if not close(found, expected, size(expected), *dtypes):
            raise UnsupportedAdapterError(
                f"layer {layer.name!r}: a hook, a parametrisation or a replaced module changes what its {what} "
                "gives: remove it while the posterior is used, or leave the layer out with `layers`"
            )
    if base is None:
        return  # the base layer's forward was called past its hooks
    base = some_tokens(base)
    change = output.double() - base.double()
    expected = layer.scaling * plain_delta.double()
    norm = layer.weights.norm
    if norm is not None:  # y - b = gain * (W0 x + s B A x)
        expected = (
            norm.gain * (layer.without_bias(base).double() + expected) - layer.without_bias(base).double()
        )
    scale = size(base) + size(output) + size(delta) * abs(layer.scaling)
    if not close(change, expected, scale, *dtypes):
        raise UnsupportedAdapterError(
            f"layer {layer.name!r} does not compute W0 x + s B A x with the weights of adapter {layer.adapter!r}: "
            "its forward has been replaced, or it is a variant of LoRA that this version does not know. Leave it "
            "out with `layers`"
        )
