"""The Triton backend: one file per op, imported when a GPU tensor first asks for it.

None of these kernels has run on hardware yet. They are checked in Triton's interpreter and by compiling them
for each architecture, and they serve only when asked for (`use_backend("triton")`).
"""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from subprocess import CalledProcessError
from typing import Any

import torch

from laplace_kernels import ops
from laplace_kernels.dispatch import Backend, Kernel, reconsider
from laplace_kernels.op import Op


@dataclass
class Launcher:
    """The Triton kernel of one op; the op's reference once Triton has failed to compile it.

    Attributes:
        op: The op.
        module: Has the function that launches it, under the name of the op. Imported at first use.
        failure: Why it cannot serve in this process, empty as long as nothing is known.
    """

    op: Op
    module: str
    failure: str = ""

    def obstacle(self) -> str:
        """Why it cannot serve, empty when it can; imports the module."""
        if not self.failure:
            try:
                self._launch()
            except Exception as error:  # a broken installation raises anything
                self.failure = f"its kernel cannot be imported: {type(error).__name__}: {error}"
        return self.failure

    def __call__(self, *args: Any) -> Any:
        try:
            return self._launch()(*args)
        except Exception as error:
            if not _is_compile_failure(error):
                raise
            self.failure = f"its kernel does not compile: {type(error).__name__}: {error}"
            reconsider()
            warnings.warn(
                f"laplace_kernels.{self.op.name} runs on reference: triton {self.failure}", stacklevel=5
            )
            return self.op.reference(*args)

    def _launch(self) -> Kernel:
        launch: Kernel = getattr(importlib.import_module(self.module), self.op.name)
        return launch


def _obstacle(op: str, device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "it does not compute in float64"
    if device.type == "cpu" and not _interpreted():
        return "it needs a GPU"
    if device.type not in ("cpu", "cuda"):
        return f"it does not run on {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    kernel = BACKEND.kernels[op]
    failure = kernel.obstacle() if isinstance(kernel, Launcher) else ""
    if failure:
        return failure
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return "it needs compute capability 8.0"
    return ""


def _interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one program after the other, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _is_compile_failure(error: Exception) -> bool:
    """Whether Triton refused a kernel before its launch, so that nothing was changed yet."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, (CompilationError, OutOfResources, PTXASError, CalledProcessError)):
        return True  # the last: the C compiler that builds the launcher
    return any(words in str(error) for words in ("PassManager", "C compiler"))  # plain RuntimeErrors


BACKEND = Backend(
    name="triton",
    obstacle=_obstacle,
    reservation="its kernels have not yet run on hardware, they serve only when asked for",
    kernels={
        op.name: Launcher(op, f"{__name__}.{op.name.rstrip('_')}")
        for op in (
            ops.gram.OP,
            ops.gram_sketch.OP,
            ops.gram_group.OP,
            ops.kron_apply.OP,
        )
    },
)
