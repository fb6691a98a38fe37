"""Linear layers without LoRA: trained heads, and those of libraries whose unit is a parameter and not a layer.

lora_A and lora_B are linear layers themselves, so the code for such libraries serves a LoRA adapter, a classification
head and a network without LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from laplace_lora_fast.errors import DeferredChecks, UnsupportedAdapterError
from laplace_lora_fast.model.batches import Batch, Inputs
from laplace_lora_fast.model.heads import Head
from laplace_lora_fast.model.observer import close, size, some_tokens
from laplace_lora_fast.weights import HEAD, HeadWeights

_MOST_WEIGHTS = 2**24  # of a trained head: a language model's, of all its tokens, has more


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
    without_streams: ClassVar[bool] = False
    own_parameters: ClassVar[Sequence[nn.Parameter]] = ()

    @property
    def outer(self) -> nn.Module:
        """The layer."""
        return self.module

    def matrices_of(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """It has none."""
        raise NotImplementedError

    def seen(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x

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
class TrainedHead:
    """A linear layer that is trained beside the adapter, by `modules_to_save`.

    Attributes:
        name: the layer's name in `model.named_modules()`.
        module: the layer.
        wrapper: PEFT's module around what is saved with the adapter, of which this is a part.
        adapter: name of the active adapter.
        features: [C] indices of the output features that carry gradient, or None for all of them: of a language-model
            head with answer tokens the answers'.
        start: the weight before training, where that is not what PEFT has kept of it.
    """

    name: str
    module: nn.Linear
    wrapper: nn.Module
    adapter: str
    features: Tensor | None = None
    start: HeadWeights | None = None

    adapted: ClassVar[bool] = True
    sides: ClassVar[Sequence[str]] = (HEAD,)
    adapter_parts: ClassVar[Sequence[nn.Module]] = ()
    base: ClassVar[None] = None
    normalised: ClassVar[bool] = False
    without_streams: ClassVar[bool] = False
    scaling: ClassVar[float] = 1.0
    current_scaling: ClassVar[float] = 1.0

    @property
    def weights(self) -> HeadWeights:
        """The weight as it is now, detached, with its bias as the last column; restricted to `features`."""
        return self._of(self.module.weight, self.module.bias)

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """Weight, and bias if there is one."""
        return list(self.module.parameters(recurse=False))

    def matrices_of(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """[W | bias], restricted to `features`."""
        weight, *bias = gradients
        return [self._of(weight, bias[0] if bias else None).W]

    @property
    def parameter_names(self) -> dict[str, str]:
        """Names of weight and bias in `model.named_parameters()`."""
        return {part: f"{self.name}.{part}" for part, _ in self.module.named_parameters(recurse=False)}

    @property
    def outer(self) -> nn.Module:
        """PEFT's module, which the model has where the head was, or the layer inside it."""
        whole: nn.Module = self.wrapper.modules_to_save[self.adapter]  # type: ignore[index, assignment]
        return self.wrapper if whole is self.module else self.module

    @property
    def is_present(self) -> bool:
        """Whether the adapter still has it."""
        return self.adapter in self.wrapper.modules_to_save  # type: ignore[operator]

    def check(self) -> None:
        """Raises UnsupportedAdapterError if the adapter has been switched or disabled since."""
        if self.wrapper.disable_adapters:
            raise UnsupportedAdapterError(f"layer {self.name!r} has its adapters disabled: enable them first")
        if self.adapter not in self.wrapper.active_adapters:  # type: ignore[operator]
            raise UnsupportedAdapterError(
                f"layer {self.name!r} has adapter {self.wrapper.active_adapters!r} active, expected "
                f"{self.adapter!r}: call model.set_adapter"
            )

    def require_plain(self, x: Tensor, base: Tensor | None, output: Tensor) -> None:
        """Raises UnsupportedAdapterError unless output = W x + b with these parameters, up to rounding."""
        x, output = some_tokens(x), some_tokens(output)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.module.weight, self.module.bias))
        expected = linear(x, weight, bias)  # type: ignore[arg-type]
        if not close(output, expected, size(expected), x.dtype, output.dtype, self.module.weight.dtype):
            raise UnsupportedAdapterError(
                f"layer {self.name!r} does not compute W x + b with its parameters: remove the hook or the "
                "parametrisation on it while the posterior is used, or leave it out with layers=lambda name: .."
            )

    def seen(self, x: Tensor) -> Tensor:
        """[x | 1], so that the bias is a column of the weight; a tensor of its own, as no other layer is fed by it."""
        if self.module.bias is None:
            return x.detach()
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)

    def without_bias(self, output: Tensor) -> Tensor:
        """The output y - b."""
        return output if self.module.bias is None else output - self.module.bias.detach()

    def of_parameters(self, values: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The matrix [.., C, d] by the names of the parameters it is of, and which of those' rows (None: all)."""
        (matrix,) = values
        parts = [matrix] if self.module.bias is None else [matrix[..., :-1], matrix[..., -1]]
        names = (f"{self.name}.weight", f"{self.name}.bias")
        return {name: (part, self.features) for name, part in zip(names, parts, strict=False)}

    def steps(self, deltas: Sequence[Tensor]) -> Sequence[Tensor]:
        """The step of the weight [n, C, d] as that of all outputs."""
        (step,) = deltas
        return (whole_rows(step, self.features, self.module.out_features).to(self.module.weight),)

    def starting_from(self, means: Sequence[Tensor]) -> TrainedHead:
        """The same head with another weight before training."""
        return replace(self, start=HeadWeights(self.name, means[0]))

    def before_training(self) -> HeadWeights:
        """The weight that a refit starts from: as given, or as PEFT has kept it, or else zeros."""
        if self.start is not None:
            return self.start
        inner = self.name.partition(f".modules_to_save.{self.adapter}")[2].lstrip(".")
        original: Any = self.wrapper.original_module
        kept = original.get_submodule(inner)
        now = self.module.weight
        if type(kept) is nn.Linear and kept.weight.shape == now.shape and not kept.weight.is_meta:
            return self._of(
                kept.weight.to(now.device), None if kept.bias is None else kept.bias.to(now.device)
            )
        return HeadWeights(self.name, torch.zeros_like(self.weights.W))

    def read(self, state: Mapping[str, Tensor]) -> HeadWeights:
        """Its weight in an adapter's state; an adapter without it leaves it as `before_training` says."""
        saved = f".modules_to_save.{self.adapter}"
        if not any(
            name in state or name.replace(saved, "") in state for name in self.parameter_names.values()
        ):
            return self.before_training()
        parts = [
            in_state(state, name, name.replace(saved, ""), tuple(parameter.shape))
            for name, parameter in zip(
                self.parameter_names.values(), self.module.parameters(recurse=False), strict=True
            )
        ]
        return self._of(parts[0], parts[1] if len(parts) > 1 else None)

    def switch_off(self, is_own: Callable[[], bool]) -> RemovableHandle:
        """Makes it what it was before training, in passes of one's own, until the handle is removed."""
        start = self.before_training().W

        def untrained(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            if not is_own():
                return output
            x = args[0] if args else next(iter(kwargs.values()))
            values = linear(self.seen(x), start.to(x.device, x.dtype)).to(output.dtype)
            if self.features is None:
                return values
            features = self.features.to(output.device)
            return output.index_copy(-1, features, values)

        return self.module.register_forward_hook(untrained, with_kwargs=True)

    def _of(self, weight: Tensor, bias: Tensor | None) -> HeadWeights:
        matrix = weight.detach() if bias is None else torch.cat([weight.detach(), bias.detach()[:, None]], 1)
        return HeadWeights(
            self.name, matrix if self.features is None else matrix[self.features.to(matrix.device)]
        )


def trained_linears(
    name: str, wrapper: nn.Module, adapter: str, head: Head, uses: Mapping[int, int]
) -> Iterator[TrainedHead]:
    """The linear layers of what is saved with an adapter, but those that are too large or share a weight.

    Args:
        name: of PEFT's module in `model.named_modules()`.
        wrapper: PEFT's module.
        adapter: name of the active adapter.
        head: says whether the language-model head is restricted to answer tokens.
        uses: in how many modules of the model each parameter stands, by its id.
    """
    whole: nn.Module = wrapper.modules_to_save[adapter]  # type: ignore[index, assignment]
    for inner, module in whole.named_modules():
        if type(module) is not nn.Linear or not module.weight.is_floating_point():
            continue
        features = head.features if wrapper is head.output_layer and module is whole else None
        outputs = module.out_features if features is None else len(features)
        shared = any(uses[id(parameter)] > 1 for parameter in module.parameters(recurse=False))
        if not shared and outputs * module.in_features <= _MOST_WEIGHTS:
            place = features if features is None else features.to(module.weight.device)
            yield TrainedHead(
                f"{name}.modules_to_save.{adapter}.{inner}".rstrip("."), module, wrapper, adapter, place
            )


def whole_rows(step: Tensor, features: Tensor | None, outputs: int) -> Tensor:
    """Steps [n, C, d] of some rows of a weight as those of all of them, zero elsewhere."""
    if features is None:
        return step
    whole = step.new_zeros(len(step), outputs, step.shape[2])
    return whole.index_copy(1, features.to(step.device), step)


def in_state(state: Mapping[str, Tensor], name: str, short: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter in an adapter's state, under its own or its short name.

    Raises:
        UnsupportedAdapterError: it is missing or has another shape.
    """
    value = state.get(name, state.get(short))
    if value is None or tuple(value.shape) != shape:
        what = "no weight" if value is None else f"shape {tuple(value.shape)}"
        raise UnsupportedAdapterError(f"adapter state has {what} for {name!r}, expected {shape}")
    return value


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
