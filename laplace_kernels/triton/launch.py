"""What every Triton launch has to know: architecture, size, current device, precision."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor
from triton.runtime import driver


@functools.cache
def architecture(device: torch.device) -> str:
    """Key of the configuration tables: sm_90, sm_100, gfx942, or sm_80 for every other NVIDIA GPU."""
    if triton.knobs.runtime.interpret:
        return "sm_80"
    with on(device):
        target = driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors (compute units)."""
    if triton.knobs.runtime.interpret:
        return 1
    with on(device):
        properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
    return int(properties["multiprocessor_count"])


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fp32_precision(dtype: torch.dtype) -> str:
    """How fp32 intermediates of `dtype` inputs are multiplied: in bf16 parts, as many as the inputs deserve."""
    return "bf16x6" if dtype == torch.float32 else "bf16x3"


def contiguous_rows(X: Tensor) -> Tensor:
    """X itself when its last axis is contiguous, else a copy."""
    return X if X.stride(-1) == 1 or X.shape[-1] == 1 else X.contiguous()
