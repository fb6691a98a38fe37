"""Passes of a model in fp64, whatever its dtype and autocast: the same modules, weights and code, without a copy.

Rounding hides a difference quotient, that to 16 bits altogether. Here every operation is shown its floating tensors as
fp64, one operation at a time, and what would be rounded is not: `x.to(torch.bfloat16)` gives fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_kernels.precision import FULL_PRECISION
from laplace_lora_fast.errors import LaplaceError, UnsupportedAdapterError
from laplace_lora_fast.model.batches import Inputs
from laplace_lora_fast.model.gradients import leaves_of, send_back
from laplace_lora_fast.model.proofs.behaviour import is_alike
from laplace_lora_fast.model.proofs.leaks import first_sequence
from laplace_lora_fast.model.proofs.slopes import Slopes

_FLOATING = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Compute capabilities; on others fp64 takes up to 64 times as long.
_FAST_FP64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


@dataclass(frozen=True)
class _Rule:
    """Of an operation: whether it gives a view, and which arguments it writes to."""

    is_view: bool
    places: tuple[int, ...]
    names: tuple[str, ...]

    @staticmethod
    def of(func: Any) -> _Rule:
        returns, arguments = func._schema.returns, func._schema.arguments
        aliases = [each.alias_info for each in returns]
        is_view = bool(aliases) and all(each is not None and not each.is_write for each in aliases)
        written = [
            n for n, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write
        ]
        return _Rule(is_view, tuple(written), tuple(arguments[n].name for n in written))

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        found = [args[n] for n in self.places if n < len(args)]
        return found + [kwargs[name] for name in self.names if name in kwargs]


_RULES: dict[Any, _Rule] = {}


class Widened(TorchDispatchMode):
    """Inside, nothing is rounded to less than a dtype, in backward passes as well.

    Args:
        dtype: fp64 or fp32.

    Attributes:
        rounded: name of an operation that did so all the same; None as long as there is none.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rounded: str | None = None
        self._dtype = dtype
        self._narrow = tuple(each for each in _FLOATING if each.itemsize < dtype.itemsize)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func) or _RULES.setdefault(func, _Rule.of(func))
        if rule.is_view:  # of weights, as a rule: what reads it sees it widened
            return func(*args, **kwargs)
        if func is torch.ops.aten.embedding.default:  # not the whole table
            return self.widened(func(*args, **kwargs))
        if any(map(self._is_narrow, rule.written(args, kwargs))):
            self.rounded = self.rounded or str(func)
            return func(*args, **kwargs)
        wide = (
            [self.widened(each) for each in args],
            {key: self.widened(each) for key, each in kwargs.items()},
        )
        found = func(*wide[0], **wide[1])
        if self._any_narrow(found) and any(map(self._is_wide, wide[0])):
            self.rounded = self.rounded or str(func)
        return found

    def widened(self, value: Any) -> Any:
        """A tensor or a dtype, or several."""
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.dtype in self._narrow else value
        if isinstance(value, torch.dtype):
            return self._dtype if value in self._narrow else value
        return [self.widened(each) for each in value] if isinstance(value, list | tuple) else value

    def _any_narrow(self, found: Any) -> bool:
        return any(map(self._is_narrow, found if isinstance(found, list | tuple) else (found,)))

    def _is_narrow(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype in self._narrow

    def _is_wide(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == self._dtype


@contextmanager
def widening(dtype: torch.dtype) -> Iterator[Widened]:
    """The mode, without TF32."""
    with FULL_PRECISION, Widened(dtype) as mode:
        yield mode


def compare(
    slopes: Slopes, u: Tensor, run: Callable[[Inputs], Tensor], reentrant: bool, inputs: Inputs
) -> UnsupportedAdapterError | str | None:
    """What is wrong with the gradients, found in passes of these inputs in fp64, or why that cannot be told.

    In fp32 where the device is slow in fp64 or an operator does not know it.

    Args:
        slopes: listens to the passes.
        u: [S, U] as the model gives it.
        run: gives u of inputs without autocast; with a graph where gradients are enabled.
        reentrant: whether there are reentrant checkpoints.
        inputs: the sequences of u, or the first of them alone.
    """
    found: UnsupportedAdapterError | str | None = None
    for dtype in _dtypes(u):
        try:
            found = _compare(dtype, slopes, u, run, reentrant, inputs)
        except LaplaceError:
            raise
        except Exception as error:  # whatever an operator raises that does not take another dtype
            found = f"{type(error).__name__}: {error}".splitlines()[0]
        if found is None or (dtype is not None and not isinstance(found, str)):
            break
    return found


def _compare(
    dtype: torch.dtype | None,
    slopes: Slopes,
    u: Tensor,
    run: Callable[[Inputs], Tensor],
    reentrant: bool,
    inputs: Inputs,
) -> UnsupportedAdapterError | str | None:
    """In passes widened to a dtype; None: as they are, in fp64."""
    with nullcontext() if dtype is None else widening(dtype) as mode, slopes.listening():
        own = inputs
        if mode is not None:
            own = replace(
                inputs, model=_each(mode.widened, inputs.model), own=_each(mode.widened, inputs.own)
            )
        seen: dict[str, Tensor] = {}  # of the first pass, where nothing is moved

        def own_u() -> Tensor:
            found = run(own).to(dtype or torch.float64)
            seen.setdefault("u", found.detach())
            return found

        wrong = slopes.compare(own_u, first_sequence, partial(_send_back_first, reentrant=reentrant))
    if wrong is None or isinstance(wrong, str):
        return wrong
    if mode is not None and mode.rounded is not None:
        return f"{mode.rounded} computes in fewer bits all the same"
    alike = is_alike(u[: len(seen["u"])].detach(), seen["u"])
    return wrong if alike else "it computes something else there"


def _each(function: Callable[[Any], Any], of: Mapping[str, Any]) -> dict[str, Any]:
    return {key: function(value) for key, value in of.items()}


def _dtypes(u: Tensor) -> list[torch.dtype | None]:
    """What to try in turn."""
    plain = [None] if u.dtype == torch.float64 else []  # nothing need be rounded, and to see to it takes time
    slow = u.is_cuda and torch.cuda.get_device_capability(u.device) not in _FAST_FP64
    return [*plain, torch.float32] if slow else [*plain, torch.float64, torch.float32]


def _send_back_first(u: Tensor, reentrant: bool) -> None:
    leaves, found_reentrant = leaves_of(u)
    leaves = [
        leaf for leaf in leaves if not isinstance(leaf, nn.Parameter)
    ]  # of another dtype than their gradients
    send_back(u, first_sequence(u), leaves, False, reentrant or found_reentrant)
