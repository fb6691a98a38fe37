"""Full fp32 products within an op, whatever precision the process allows for its own."""

from __future__ import annotations

import threading

import torch

# Of cuBLAS (TF32) and of oneDNN on CPUs (bf16, TF32): `torch.set_float32_matmul_precision` sets both, and so does
# `torch.backends.fp32_precision`. The accessors of `torch.backends` would take longer than all the rest of a context.
_SETTINGS = (("cuda", "matmul"), ("mkldnn", "matmul"))
_get, _set = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


class _FullPrecision:
    """Context within which torch multiplies fp32 matrices in fp32; may be nested, and entered by many threads.

    torch keeps these settings per process. So the first to enter puts them to full precision and the last to leave
    puts them back: products of other threads are more precise in the meantime, never less. It costs a microsecond,
    and two more where a setting has to change. Nothing waits for a GPU: a setting counts when a product is launched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[tuple[str, str], str]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            for setting in _SETTINGS:
                precision = _get(*setting)
                if precision not in ("ieee", "none"):
                    self._before.append((setting, precision))
                    _set(*setting, "ieee")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            while self._before and not self._inside:
                setting, precision = self._before.pop()
                if _get(*setting) == "ieee":  # else someone has set it since
                    _set(*setting, "none")  # gives what `torch.backends.fp32_precision` says
                    if _get(*setting) != precision:
                        _set(*setting, precision)


FULL_PRECISION = _FullPrecision()
