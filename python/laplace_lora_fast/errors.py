"""The exceptions and the warning this package raises; each message names the layer or argument and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


class RankError(LaplaceError, RuntimeError):
    """Another process of a joint fit failed, or the processes do not belong together."""


class LaplaceWarning(UserWarning):
    """Something legal that is likely not what was meant; the result is still what the documentation says."""


class DeferredChecks:
    """Conditions on batches that live on a device: read together later, so that no batch waits for the device.

    A condition on the CPU costs nothing to read and raises at once. Those of one message become one.
    """

    def __init__(self) -> None:
        self._pending: dict[tuple[type[LaplaceError], str], Tensor] = {}
        self._places: dict[tuple[type[LaplaceError], str], Tensor] = {}
        self._pending_each: dict[tuple[str, ...], Tensor] = {}

    def require(self, ok: Tensor, message: str, error: type[LaplaceError] = InvalidBatchError) -> None:
        """Raises `error` with `message`, now or in `settle`, unless the boolean scalar `ok` is true."""
        if ok.device.type != "cpu":
            self._pend(ok, message, error)
        elif not ok:
            raise error(message)

    def require_at(
        self, ok: Tensor, index: int, message: str, error: type[LaplaceError] = InvalidBatchError
    ) -> None:
        """`require` in batch `index`; "{index}" in the message becomes that of the first batch where it fails."""
        if ok.device.type == "cpu":
            if not ok:
                raise error(message.replace("{index}", str(index)))
            return
        first = self._places.get((error, message))
        first = ok.new_full((), -1, dtype=torch.long) if first is None else first
        self._places[error, message] = first.where(ok | (first >= 0), index)

    def require_each(self, ok: Tensor, messages: Sequence[str]) -> None:
        """As `require` for each of the conditions ok [n], with its own message."""
        if ok.device.type == "cpu":
            for holds, message in zip(ok.tolist(), messages, strict=True):
                if not holds:
                    self.require(torch.tensor(False), message)
        else:
            earlier = self._pending_each.get(tuple(messages))
            self._pending_each[tuple(messages)] = ok if earlier is None else earlier & ok

    def settle(self) -> None:
        """Reads all pending conditions.

        Raises:
            LaplaceError: the first that does not hold.
        """
        pending, self._pending = self._pending, {}
        for (error, message), ok in pending.items():
            if not ok:
                raise error(message)
        each, self._pending_each = self._pending_each, {}
        for messages, conditions in each.items():
            self.require_each(conditions.cpu(), messages)
        places, self._places = self._places, {}
        for (error, message), first in places.items():
            if first >= 0:
                raise error(message.replace("{index}", str(int(first))))

    def _pend(self, ok: Tensor, message: str, error: type[LaplaceError] = InvalidBatchError) -> None:
        earlier = self._pending.get((error, message))
        self._pending[error, message] = ok if earlier is None else earlier & ok
