"""Whether a model still computes what it did: what has been hung on its modules, and a sequence to ask it again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laplace_lora_fast.errors import DeferredChecks, NotFittedError, UnsupportedAdapterError
from laplace_lora_fast.model.batches import Inputs

Code = tuple[Any, ...]

_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}  # of one computation done twice; of 16 bits:
_ROUNDING_IN_16_BITS = 0.05
_OF_ANOTHER_BATCH = 0.05, 0.2  # likewise where kernels see another number of sequences


@dataclass(frozen=True)
class Sample:
    """A sequence and what the model gave for it.

    Attributes:
        inputs: the sequence alone.
        u: [1, U].
        autocast: whether it was computed in other dtypes than the model's.
    """

    inputs: Inputs
    u: Tensor
    autocast: bool

    def require_same(self, u: Tensor, autocast: bool) -> None:
        """Raises NotFittedError where the model gives another u [1, U] now."""
        coarse = _ROUNDING_IN_16_BITS
        exact = not (autocast or self.autocast)
        rounding = max(_ROUNDING.get(each.dtype, coarse) for each in (u, self.u)) if exact else coarse
        if _distance(u, self.u.to(u.device), u.new_zeros((), dtype=torch.float64)) > rounding:
            raise NotFittedError(
                "the model computes something else than when the posterior was fitted: a hook, a forward or a tensor "
                "that one of its modules holds has been added, replaced or removed. Undo that, or fit again"
            )


def require_alone(u: Tensor, alone: Tensor, checks: DeferredChecks) -> None:
    """UnsupportedAdapterError unless the first sequence of u [S, U] gives about the same alone, [1, U].

    Relative to the largest of the batch: outputs near zero are differences of larger numbers.
    """
    full = all(each.dtype in _ROUNDING for each in (u, alone))
    scale = u.detach().double().nan_to_num(0, 0, 0).norm(dim=1).amax()
    checks.require(
        _distance(u[:1].detach(), alone, scale) <= _OF_ANOTHER_BATCH[0 if full else 1],
        "the outputs of a sequence depend on other sequences of its batch: alone they are others (a statistic, a "
        "capacity or a scale of the batch). Switch that off, or pass batches of one sequence",
        UnsupportedAdapterError,
    )


def is_alike(u: Tensor, other: Tensor) -> bool:
    """Whether u [S, U] and another, computed in other dtypes, are of one function."""
    scale = u.double().nan_to_num(0, 0, 0).norm()
    return bool(_distance(u, other, scale) <= _OF_ANOTHER_BATCH[1])


def _distance(u: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """Of what is finite, relative to `scale` or the norm of the larger of both."""
    u, other = u.double().nan_to_num(0, 0, 0), other.double().nan_to_num(0, 0, 0)
    scale = torch.stack([scale, u.norm(), other.norm()]).amax()
    distance: Tensor = (u - other).norm() / scale.clamp_min(1e-300)
    return distance


def code_of(model: nn.Module) -> Code:
    """What runs beside the modules' own code, and what they hold beside parameters and buffers.

    Two that differ need not compute anything else: a hook may only look on.
    """
    of_torch = nn.modules.module
    found: list[Any] = [tuple(of_torch._global_forward_pre_hooks), tuple(of_torch._global_forward_hooks)]
    kinds: set[type[nn.Module]] = set()
    seen: set[int] = set()
    for module in model.modules():
        kinds.add(type(module))
        own = vars(module)
        if any(own[kind] for kind in _HOOKS):
            found.append((id(module), *[tuple(own[kind]) for kind in _HOOKS]))
        for key, value in own.items():
            if type(value) in _CONSTANT or key in _OF_ALL_MODULES or id(value) in seen:
                continue
            seen.add(id(value))
            found.append((id(module), key, id(value), _content(value)))
    return (*found, frozenset((kind, kind.forward) for kind in kinds))


_HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_CONSTANT = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size))


def _content(value: Any) -> Any:
    """Of what can change in place: a tensor, a container, an object with plain values."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, list | tuple | set):
        return tuple(map(_same, value))
    if callable(value):
        return None
    values = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    return tuple([(key, _same(each)) for key, each in values.items()]) if values else None


def _same(value: Any) -> Any:
    """The value, or who it is."""
    return value if type(value) in _CONSTANT else id(value)


def random_states(device: torch.device) -> Code:
    """Where the generators of random numbers are that a model may draw from."""
    numpy = np.random.get_state()  # noqa: NPY002  (others draw from it)
    found = [torch.get_rng_state().numpy().tobytes(), numpy[1].tobytes(), numpy[2], random.getstate()]  # type: ignore[union-attr, index]
    if device.type == "cuda":
        found.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return tuple(found)
