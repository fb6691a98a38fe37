"""The exceptions and the warning this package raises; each message names the layer or argument and the remedy."""

from __future__ import annotations


class LaplaceError(Exception):
    """Base class of every error raised on purpose by laplace_lora_fast."""


class UnsupportedAdapterError(LaplaceError, ValueError):
    """The model has no LoRA layer, or one this method does not cover (DoRA, Conv, Embedding, merged, ...)."""


class InvalidBatchError(LaplaceError, ValueError):
    """A batch or a loader holds something that would give a wrong number (NaN, bad labels, no rows, ...)."""


class NotFittedError(LaplaceError, RuntimeError):
    """A posterior quantity was asked for before `fit` or `load`."""


class NumericalError(LaplaceError, ArithmeticError):
    """A factor or an objective is not finite, or has no optimum."""


class StateError(LaplaceError, ValueError):
    """A saved posterior is truncated, of another version, or belongs to another model."""


class LaplaceWarning(UserWarning):
    """Something legal that is likely not what was meant; the result is still what the documentation says."""
