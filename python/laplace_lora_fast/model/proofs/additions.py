"""What others have hung on a model's modules, in words that mean the same in another process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from laplace_lora_fast.model.contexts import unwrapped

# These hang on modules what places weights and collects outputs, one time and not another.
_MAKERS = frozenset(("torch", "transformers", "accelerate", "peft"))


def additions(model: nn.Module) -> list[str]:
    """Forward hooks, and forwards that are not the class's own, as "module: what it is and where it was written".

    What it does is not looked at: two of one name are the same here.
    """
    return sorted({f"{name or 'the model'}: {what}" for name, what in _found(unwrapped(model))})


def difference(before: list[str], now: list[str]) -> str:
    """What has come and gone, or ""."""
    come, gone = (sorted(set(one) - set(other)) for one, other in ((now, before), (before, now)))
    parts = (f"{what} {_listed(each)}" for what, each in (("has", come), ("lacks", gone)) if each)
    return " and ".join(parts)


def _found(model: nn.Module) -> Iterator[tuple[str, str]]:
    kinds: dict[type[nn.Module], str] = {}
    for name, module in model.named_modules():
        kinds.setdefault(type(module), name)
        for when, hooks in (("pre-hook", module._forward_pre_hooks), ("hook", module._forward_hooks)):
            for hook in hooks.values():
                if _maker(hook) not in _MAKERS:
                    yield name, f"forward {when} {_name(hook)}"
        own = vars(module).get("forward")
        if own is not None and _maker(own) not in _MAKERS:
            yield name, f"forward {_name(own)}"
    for kind, name in kinds.items():
        if _maker(kind.forward) not in {
            *_MAKERS,
            *(base.__module__.partition(".")[0] for base in kind.__mro__),
        }:
            yield name, f"forward of {kind.__qualname__} {_name(kind.forward)}"


def _written(function: Any) -> Any:
    """Inside partials and bound methods; the class of an object that can be called."""
    while True:
        inner = getattr(function, "func", None) or getattr(function, "__func__", None)
        if inner is None:
            return function if hasattr(function, "__qualname__") else type(function)
        function = inner


def _maker(function: Any) -> str:
    return str(getattr(_written(function), "__module__", "")).partition(".")[0]


def _name(function: Any) -> str:
    written = _written(function)
    return f"{getattr(written, '__module__', '?')}.{written.__qualname__}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
