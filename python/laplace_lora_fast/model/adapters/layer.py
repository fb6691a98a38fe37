"""A LoRA layer with its active adapter: its weights, by side and as parameters, and what it is without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from laplace_lora_fast.model.adapters.computes import require_plain
from laplace_lora_fast.model.linear import in_state, whole_rows
from laplace_lora_fast.model.observer import Handle
from laplace_lora_fast.weights import SIDES, LoraWeights, RowNorm, stored

if TYPE_CHECKING:  # of Python's own from 3.11
    from typing_extensions import Self


@dataclass(frozen=True)
class AdapterLayer:
    """One LoRA layer with its active adapter, as far as that needs no PEFT.

    Attributes:
        name: the layer's name in `model.named_modules()`.
        module: the LoRA layer.
        adapter: name of the active adapter.
        scaling: s, alpha / r (or alpha / sqrt(r) for rsLoRA).
        sides: those of its weights that are under the posterior.
        features: [C] indices of the output features that carry gradient, or None for all of them. Set for an adapted
            language-model head with answer tokens: only the answers' rows of lora_B see the data.
    """

    name: str
    module: nn.Module
    adapter: str
    scaling: float
    features: Tensor | None = None
    sides: Sequence[str] = SIDES

    @property
    def weights(self) -> LoraWeights:
        """The weights as they are now, detached; lora_B restricted to `features`."""
        a, b = (self._side(side).weight.detach() for side in SIDES)  # type: ignore[operator]
        b = b if self.features is None else b[self.features.to(b.device)]
        return LoraWeights(self.name, a, b, self.scaling, self._norm(a, b), self.sides)

    @property
    def parameter_names(self) -> dict[str, str]:
        """Names of the weights under the posterior in `model.named_parameters()`, by side."""
        return {side: self._parameter_name(side) for side in self.sides}

    def shape(self, side: str) -> torch.Size:
        """Of the parameter."""
        shape: torch.Size = self._side(side).weight.shape  # type: ignore[assignment]
        return shape

    adapted: ClassVar[bool] = True
    without_streams: ClassVar[bool] = False

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """The weights under the posterior."""
        return [self._side(side).weight for side in self.sides]  # type: ignore[misc]

    def matrices_of(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Of lora_A as it is, of lora_B transposed and restricted to `features`."""
        found = []
        for side, gradient in zip(self.sides, gradients, strict=True):
            if side == SIDES[1] and self.features is not None:
                gradient = gradient[self.features.to(gradient.device)]
            found.append(stored(side, gradient))
        return found

    @property
    def outer(self) -> nn.Module:
        """The layer."""
        return self.module

    @property
    def is_present(self) -> bool:
        """Whether the layer still has the adapter."""
        return self.adapter in self.module.scaling  # type: ignore[operator]

    @property
    def current_scaling(self) -> float:
        """The adapter's scaling as it is now."""
        return float(self.module.scaling[self.adapter])  # type: ignore[index, operator]

    def of_parameters(self, values: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Matrices [.., r, d] by the names of the parameters they are of, and which of those' rows (None: all)."""
        rows = dict(zip(SIDES, (None, self.features), strict=True))
        pairs = zip(self.sides, values, strict=True)
        return {self._parameter_name(side): (stored(side, value), rows[side]) for side, value in pairs}

    def steps(self, deltas: Sequence[Tensor]) -> Sequence[Tensor]:
        """Steps of its weights [n, r, d] as those of both parameters: dA [n, r, d_in], dB [n, d_out, r]."""
        own, given = self.weights, dict(zip(self.sides, deltas, strict=True))
        still = {
            side: deltas[0].new_zeros(len(deltas[0]), *each.shape) for side, each in self._both(own).items()
        }
        a, b = (given.get(side, still[side]) for side in SIDES)
        b = whole_rows(b.mT, self.features, self.shape(SIDES[1])[0])
        return a.to(own.A), b.to(own.B).contiguous()

    def starting_from(self, means: Sequence[Tensor]) -> Self:
        """Itself: without its adapter it starts from zero."""
        return self

    def before_training(self) -> LoraWeights:
        """Zeros: all that matters of a start is that B A is."""
        now = self.weights
        return replace(now, A=torch.zeros_like(now.A), B=torch.zeros_like(now.B), norm=None)

    def seen(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x

    def read(self, state: Mapping[str, Tensor]) -> LoraWeights:
        """Its weights in an adapter's state. Raises UnsupportedAdapterError for one that is missing or does not fit."""
        a, b = (
            in_state(state, name, name.replace(f".{self.adapter}.weight", ".weight"), tuple(self.shape(side)))
            for side, name in ((side, self._parameter_name(side)) for side in SIDES)
        )
        b = b if self.features is None else b[self.features.to(b.device)]
        return LoraWeights(self.name, a, b, self.scaling, sides=self.sides)

    @property
    def adapter_parts(self) -> Sequence[nn.Module]:
        """lora_A and lora_B."""
        return [self._side(side) for side in SIDES]

    @property
    def base(self) -> nn.Module | None:
        """The layer below the adapter."""
        base: nn.Module = self.module.get_base_layer()  # type: ignore[operator]
        return base

    @property
    def normalised(self) -> bool:
        """Whether the adapter is DoRA."""
        return bool(self.module.use_dora.get(self.adapter, False))  # type: ignore[union-attr, operator]

    def _norm(self, a: Tensor, b: Tensor) -> RowNorm | None:
        if not self.normalised:
            return None
        parts: nn.ModuleDict = self.module.lora_magnitude_vector  # type: ignore[assignment]
        magnitude: Tensor = parts[self.adapter].weight.detach()  # type: ignore[operator, assignment]
        return RowNorm(a, b, self.scaling, magnitude, self._dense_base)

    def _dense_base(self) -> Tensor:
        """W0 [d_out, d_in], whatever holds it."""
        raise NotImplementedError

    def without_bias(self, output: Tensor) -> Tensor:
        """The output y - b."""
        bias = getattr(self.base, "bias", None)
        return output if bias is None else output - bias.detach()

    def require_plain(self, x: Tensor, base: Tensor | None, output: Tensor) -> None:
        """Raises UnsupportedAdapterError unless output = base + s B A x: see `computes`."""
        require_plain(self, x, base, output)

    def switch_off(self, is_own: Callable[[], bool]) -> Handle:
        """Makes B A zero until the handle is removed; a bias of lora_B, which is left alone, stays."""

        def zero(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (torch.zeros_like(args[0]), *args[1:]) if is_own() else args

        return self._side(SIDES[1]).register_forward_pre_hook(zero)

    def _parameter_name(self, side: str) -> str:
        return f"{self.name}.lora_{side}.{self.adapter}.weight"

    @staticmethod
    def _both(own: LoraWeights) -> dict[str, Tensor]:
        return dict(zip(SIDES, (own.A, own.B.mT), strict=True))

    def _side(self, side: str) -> nn.Module:
        layers: nn.ModuleDict = getattr(self.module, f"lora_{side}")
        return layers[self.adapter]


class ParametersAdapted:
    """LoRA on a parameter of a module (PEFT's `target_parameters`), the experts of a mixture for example.

    lora_A [E r, d_in] and lora_B [d_out, E r] of E experts are two matrices here as anywhere. They are no layers that
    run: PEFT adds their product to the parameter while the module does.
    """

    name: str
    module: nn.Module
    adapter: str

    without_streams: ClassVar[bool] = True
    normalised: ClassVar[bool] = False

    @property
    def base(self) -> None:
        """None that would run beside them."""

    def require_plain(self, x: Tensor, base: Tensor | None, output: Tensor) -> None:
        """Autograd sees what the module computes, whatever that is."""

    def switch_off(self, is_own: Callable[[], bool]) -> Handle:
        """Leaves the parameter as it is, in passes of one's own, until the handle is removed."""
        before = self.module._activate_lora

        def activate(adapters: Sequence[str]) -> AbstractContextManager[None]:
            return nullcontext() if is_own() else before(adapters)  # type: ignore[operator, no-any-return]

        return Override(self.module, {"_activate_lora": activate})

    def moved(self, step: Callable[[], tuple[Tensor, Tensor] | None]) -> Handle:
        """Adds a step (dA, dB) to both weights wherever `step` gives one, until the handle is removed.

        Not by PEFT's parametrisation, which writes to what forward-mode derivatives may only read.
        """
        module: Any = self.module
        before = module._activate_lora

        @contextmanager
        def activate(adapters: Sequence[str]) -> Iterator[None]:
            taken = step()
            if taken is None:
                with before(adapters):
                    yield
                return
            base, name = module.get_base_layer(), module.parameter_name
            moved = _Moved(module, self.adapter, taken)
            change = type(module).get_delta_weight(moved, self.adapter)
            stands_in = Override(base, {name: getattr(base, name).detach() + change})
            try:
                yield
            finally:
                stands_in.remove()

        return Override(module, {"_activate_lora": activate})


class Override:
    """Attributes of one object in place of its class's, until removed."""

    def __init__(self, owner: nn.Module, attributes: Mapping[str, Any]) -> None:
        self._owner, self._names = owner, list(attributes)
        vars(owner).update(attributes)

    def remove(self) -> None:
        """The class's hold again."""
        for name in self._names:
            vars(self._owner).pop(name, None)


class _Moved:
    """A LoRA layer with other weights, for methods that only look."""

    def __init__(self, module: nn.Module, adapter: str, steps: tuple[Tensor, Tensor]) -> None:
        self._module = module
        for side, step in zip(SIDES, steps, strict=True):
            weight = getattr(module, f"lora_{side}")[adapter].weight.detach() + step
            setattr(self, f"lora_{side}", {adapter: _Weight(weight)})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(frozen=True)
class _Weight:
    weight: Tensor
