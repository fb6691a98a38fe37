"""The Triton backend: one file per op, imported when a GPU tensor first asks for it.

None of these kernels has run on hardware yet. They are checked in Triton's interpreter and by compiling them
for each architecture, and they serve only when asked for (`use_backend("triton")`).
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from subprocess import CalledProcessError
from types import ModuleType
from typing import Any

import torch

from laplace_kernels import dispatch, reference

_failures: dict[str, str] = {}  # op -> why its kernel could not be compiled in this process


def obstacle(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why Triton cannot serve `op` on `device` for `dtype`, empty when it can."""
    if dtype == torch.float64:
        return "it does not compute in float64"
    if device.type == "cpu" and not _interpreted():
        return "it needs a GPU"
    if device.type not in ("cpu", "cuda"):
        return f"it does not run on {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    if _import_error():
        return f"triton cannot be imported: {_import_error()}"
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return "it needs compute capability 8.0"
    return _failures.get(op, "")


def _interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one program after the other, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _import_error() -> str:
    try:
        for op in dispatch.OPS:
            _module(op)
    except Exception as error:  # a broken installation raises anything
        return f"{type(error).__name__}: {error}"
    return ""


def _module(op: str) -> ModuleType:
    return importlib.import_module(f"laplace_kernels.triton.{op.rstrip('_')}")


def _kernel(op: str) -> dispatch.Kernel:
    """The op's launcher; the reference once Triton has failed to compile its kernel."""

    def launch(*args: Any) -> Any:
        try:
            return getattr(_module(op), op)(*args)
        except Exception as error:
            if not _is_compile_failure(error):
                raise
            _failures[op] = f"its kernel does not compile: {type(error).__name__}: {error}"
            dispatch.reconsider()
            warnings.warn(f"laplace_kernels.{op} runs on reference: triton {_failures[op]}", stacklevel=4)
            return getattr(reference, op)(*args)

    return launch


def _is_compile_failure(error: Exception) -> bool:
    """Whether Triton refused a kernel before its launch, so that nothing was changed yet."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, (CompilationError, OutOfResources, PTXASError, CalledProcessError)):
        return True  # the last: the C compiler that builds the launcher
    return any(words in str(error) for words in ("PassManager", "C compiler"))  # plain RuntimeErrors


BACKEND = dispatch.Backend(
    name="triton",
    kernels={op: _kernel(op) for op in dispatch.OPS},
    obstacle=obstacle,
    reservation="its kernels have not yet run on hardware, they serve only when asked for",
)
