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
    from laplace_lora_fast.fitting.checkpoint import Checkpoint
    from laplace_lora_fast.laplace import LaplaceLoRA
    from laplace_lora_fast.likelihoods import MonteCarlo
    from laplace_lora_fast.prior import CrossFit, Evidence, HeldOut, LeaveOneOut
    from laplace_lora_fast.structures import EKFAC, KFAC, Diagonal, LowRank, Rows
    from laplace_lora_fast.tasks import (
        Answers,
        AnyOf,
        Classes,
        DirectPreference,
        MultiLabel,
        Options,
        Outputs,
        Preference,
        Regression,
        Tokens,
    )

_MODULES = {
    "laplace": ("LaplaceLoRA",),
    "tasks": (
        "Answers",
        "AnyOf",
        "Classes",
        "DirectPreference",
        "MultiLabel",
        "Options",
        "Outputs",
        "Preference",
        "Regression",
        "Tokens",
    ),
    "structures": ("Diagonal", "EKFAC", "KFAC", "LowRank", "Rows"),
    "likelihoods": ("MonteCarlo",),
    "prior": ("CrossFit", "Evidence", "HeldOut", "LeaveOneOut"),
    "fitting.checkpoint": ("Checkpoint",),
    "errors": (
        "InvalidBatchError",
        "LaplaceError",
        "LaplaceWarning",
        "NotFittedError",
        "NumericalError",
        "RankError",
        "StateError",
        "UnsupportedAdapterError",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "EKFAC",
    "KFAC",
    "Answers",
    "AnyOf",
    "Checkpoint",
    "Classes",
    "CrossFit",
    "Diagonal",
    "DirectPreference",
    "Evidence",
    "HeldOut",
    "InvalidBatchError",
    "LaplaceError",
    "LaplaceLoRA",
    "LaplaceWarning",
    "LeaveOneOut",
    "LowRank",
    "MonteCarlo",
    "MultiLabel",
    "NotFittedError",
    "NumericalError",
    "Options",
    "Outputs",
    "Preference",
    "RankError",
    "Regression",
    "Rows",
    "StateError",
    "Tokens",
    "UnsupportedAdapterError",
]

if not TYPE_CHECKING:  # a type checker would take any name for defined

    def __getattr__(name: str) -> object:
        """Imports on first use: torch, transformers and peft take seconds, which `laplace-lora --help` need not."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
