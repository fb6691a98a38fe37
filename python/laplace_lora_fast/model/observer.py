"""The two streams of a layer, input x and output gradient g: who has them, who listens, which tokens are real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import laplace_kernels as lk
from laplace_lora_fast.errors import InvalidBatchError, UnsupportedAdapterError
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.structures.pads import PadImage

_COMPARED = 64  # tokens of a first batch

Stream = tuple[Tensor, Tensor | None]  # [S, T, d] and its mask [S, T]
Layers = str | Sequence[str] | Callable[[str], bool] | None


class Handle(Protocol):
    """Of something that holds until it is removed."""

    def remove(self) -> None:
        """It holds no longer."""


class Tapped(Protocol):
    """A layer whose streams can be tapped: `LoraLayer`, `TrainedHead`, or another linear layer."""

    @property
    def name(self) -> str:
        """The layer's name in `model.named_modules()`."""

    @property
    def module(self) -> nn.Module:
        """The layer: its first argument is x, its output is y."""

    @property
    def outer(self) -> nn.Module:
        """What the model has in the layer's place: the layer, or PEFT's module around it."""

    @property
    def features(self) -> Tensor | None:
        """Indices of the output features that carry gradient, or None for all of them."""

    @property
    def normalised(self) -> bool:
        """Whether the rows of its weight are normalised (DoRA): its output is needed too."""

    @property
    def without_streams(self) -> bool:
        """Whether its streams are no rows of sequences in any batch: see `alone`."""

    @property
    def own_parameters(self) -> Sequence[nn.Parameter]:
        """The parameters under the posterior; none of a layer that has no Jacobian but by its streams."""

    def matrices_of(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of these parameters as matrices [r, d], in the order of the layer's weights."""

    def check(self) -> None:
        """Raises UnsupportedAdapterError if the layer cannot be tapped any more."""

    @property
    def adapted(self) -> bool:
        """Whether it has weights of an adapter, so that it has to run in every pass."""

    @property
    def adapter_parts(self) -> Sequence[nn.Module]:
        """lora_A and lora_B; nothing without LoRA."""

    @property
    def base(self) -> nn.Module | None:
        """The layer below the adapter."""

    def require_plain(self, x: Tensor, base: Tensor | None, output: Tensor) -> None:
        """Raises UnsupportedAdapterError unless input, output and the base layer's output fit what it should do."""

    def seen(self, x: Tensor) -> Tensor:
        """What an observer is shown of the input x [.., d]: of a layer with a trained bias, [x | 1]."""

    def without_bias(self, output: Tensor) -> Tensor:
        """The output y - b of a normalised layer."""

    def switch_off(self, is_own: Callable[[], bool]) -> Handle | None:
        """Makes the layer what it was before training, in passes of one's own, until the handle is removed."""


class Observer(Protocol):
    """What listens to a tap. Called without autograd and autocast; `mask` is None where every token is real."""

    def observe_input(self, group: int, x: Tensor, mask: Tensor | None) -> PadImage | None:
        """Input x [S, T, d_in] of every layer in `group` (layers fed by one tensor), with its mask [S, T].

        Returns:
            What is known of its pads, or None: then the tap looks at them.
        """

    def observe_gradient(self, layer: int, g: Tensor, mask: Tensor | None) -> PadImage | None:
        """Gradient g [S, T, d_out] at the output of a layer, with its mask [S, T]. Returns likewise."""

    def observe_alignment(self, layer: int, aligned: Tensor) -> None:
        """Of a layer with DoRA, before its gradient: sum_t g_t * (y_t - b), feature by feature, [S, d_out]."""

    def observe_jacobians(self, layer: int, jacobians: Sequence[Tensor]) -> None:
        """Instead of streams: of every weight of a layer the Jacobian of each sequence, [S, r, d]."""


def tokens_and_mask(x: Tensor, inputs: Inputs, layer: str) -> tuple[Tensor, Tensor | None]:
    """Views a stream as [S, T, d] and finds its mask [S, T], None where every token is real.

    Args:
        x: input or output gradient of a layer.
        inputs: the batch behind it.
        layer: its name, for errors.

    Raises:
        InvalidBatchError: its tokens cannot be matched with the batch's.
    """
    n, length = inputs.n_sequences, inputs.length
    if x.dim() == 3 and x.shape[0] == n and x.shape[1] == length:  # as nearly all are
        return x, inputs.mask
    if n == 1 and inputs.mask is None and x.dim() > 1:  # whatever flows is this sequence's
        return x.reshape(1, -1, x.shape[-1]), None
    if x.dim() == 2 and x.shape[0] == n:  # pooled: one row a sequence
        return x[:, None], None
    if x.dim() == 2 and length is not None and x.shape[0] == n * length:
        x = x.view(n, length, -1)
    between = x.shape[1:-1]
    if length is not None and len(between) > 1 and length in between and between.numel() == length:
        x = x.flatten(1, -2)  # axes of size 1 beside the tokens
    if x.dim() >= 3 and x.shape[0] == n:
        if length is None:
            return x.flatten(1, -2), None
        if x.dim() == 3 and x.shape[1] == length:
            return x, inputs.mask
    decoder = inputs.model.get("decoder_input_ids")
    if isinstance(decoder, Tensor) and x.shape[:-1] == decoder.shape:
        raise InvalidBatchError(
            f"layer {layer!r} sees {decoder.shape[1]} tokens of the decoder, attention_mask is of the encoder's "
            f"{length}: select layers of the encoder only with `layers`"
        )
    raise InvalidBatchError(
        f"layer {layer!r} sees a tensor of shape {tuple(x.shape)} in a batch of {n} sequences of length "
        f"{length}: its tokens cannot be matched with the attention mask; pass batches of one sequence without "
        "padding, or leave the layer out with layers=lambda name: .."
    )


def aligned(g: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over real tokens of g * y, [S, d], in the accumulation dtype."""
    dtype = lk.accumulation_dtype(g.dtype)
    products = g.to(dtype) * y.to(dtype)
    return (products if mask is None else products.where(mask[..., None], 0)).sum(1)


@contextmanager
def switched_off(layers: Sequence[Tapped], is_own: Callable[[], bool]) -> Iterator[None]:
    """Every layer as it was before training, in passes that `is_own` tells."""
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.switch_off(is_own)
            if handle is not None:
                stack.callback(handle.remove)
        yield


class GraphStart(torch.autograd.Function):
    """Identity that starts the autograd graph at its input: nothing before it takes part in the backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.clone()  # a fresh tensor, so that in-place operations behind it stay legal

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def selected(model: nn.Module, names: Sequence[str], layers: Layers) -> list[str]:
    """The names of the layers that `layers` selects, in their order.

    Args:
        model: the model.
        names: of all its LoRA layers and trained heads, in the order of `model.named_modules()`.
        layers: None for all; "last" for the trained or adapted output head, or else the last numbered layer; names; a
            predicate.

    Raises:
        UnsupportedAdapterError: nothing is selected, or a layer without weights under the posterior.
        ValueError: another string than "last".
    """
    if layers is None:
        return list(names)
    if layers == "last":
        stem = _numbered_layer(model, names[-1])
        return [name for name in names if name.startswith(stem)] if stem else [names[-1]]
    if isinstance(layers, str):
        raise ValueError(f"layers must be None, 'last', a list of names or a predicate, got {layers!r}")
    wanted = layers if callable(layers) else set(layers).__contains__
    chosen = [name for name in names if wanted(name)]
    unknown = [] if callable(layers) else sorted(set(layers) - set(names))
    if unknown or not chosen:
        raise UnsupportedAdapterError(
            f"layers selects {unknown or 'nothing'}, which is no LoRA layer and no trained head; "
            f"{names[0]!r} is one, for example"
        )
    return chosen


def _numbered_layer(model: nn.Module, name: str) -> str:
    """The prefix of the numbered layer that `name` is in, "" if in none: "model.layers.3." of a decoder.

    A layer's own parts may be numbered too (attention and MLP in T5, experts): the outermost list of layers counts.
    In a model without a list, `nn.Sequential` may hold anything: there the innermost number counts.
    """
    parts = name.split(".")
    stems = [parts[:i] for i in range(1, len(parts)) if parts[i - 1].isdigit()]
    lists = [stem for stem in stems if isinstance(model.get_submodule(".".join(stem[:-1])), nn.ModuleList)]
    stem = lists[0] if lists else stems[-1] if stems else []
    return ".".join([*stem, ""]) if stem else ""


def some_tokens(x: Tensor) -> Tensor:
    """At most 64 tokens of a stream [.., d], from all over it: what holds for them holds for all."""
    flat = x.reshape(-1, x.shape[-1])
    return flat[:: max(1, -(-len(flat) // _COMPARED))]


def close(found: Tensor, expected: Tensor, scale: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether two results of the same computation agree up to rounding in the coarsest dtype on the way.

    What is not finite (at pads, say) only has to be so in both.
    """
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    error = (found.double() - expected.double()).where(found.isfinite() & expected.isfinite(), 0).norm()
    same = bool((found.isfinite() == expected.isfinite()).all())
    return same and bool(error <= 16 * eps * scale.double() + 1e-30)


def size(x: Tensor) -> Tensor:
    """Norm of what is finite, fp64."""
    norm: Tensor = x.double().where(x.isfinite(), 0).norm()
    return norm
