"""Laplace-LoRA: Kronecker-factored Laplace posteriors over LoRA weights."""

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
