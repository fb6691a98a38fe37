"""Laplace-LoRA: Laplace posteriors over the LoRA weights of a PEFT model."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laplace_lora_fast.errors import (
        InvalidBatchError,
        LaplaceError,
        LaplaceWarning,
        NotFittedError,
        NumericalError,
        RankError,
        StateError,
        UnsupportedAdapterError,
    )
    from laplace_lora_fast.laplace import LaplaceLoRA

__all__ = [
    "InvalidBatchError",
    "LaplaceError",
    "LaplaceLoRA",
    "LaplaceWarning",
    "NotFittedError",
    "NumericalError",
    "RankError",
    "StateError",
    "UnsupportedAdapterError",
]

if not TYPE_CHECKING:  # a type checker would take any name for defined

    def __getattr__(name: str) -> object:
        """Imports on first use: torch, transformers and peft take seconds, which `laplace-lora --help` need not."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{'laplace' if name == 'LaplaceLoRA' else 'errors'}")
        value = globals()[name] = getattr(module, name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
