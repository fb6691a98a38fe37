"""Compile the production launches for a GPU that is not there, and read what the compiler made of them.

A driver that claims to be some GPU lets a launcher run on CPU tensors as it would in production:
specialisation, compilation, the shared memory check. The launch itself does nothing; the binaries are kept to
be inspected.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from laplace_kernels.triton import launch
from tests.kernels import sass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
INSTRUCTIONS = ("HGMMA", "UTCHMMA", "HMMA", "MFMA", "UTMALDG", "UTMAREDG", "LDGSTS", "FFMA")


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        kernel: its name.
        arch: what it is for.
        registers: of a thread.
        spills: bytes or instructions.
        shared: bytes of shared memory of a program.
        instructions: how often each one of interest occurs.
        serialized: what ptxas says if it puts a wait behind every product.
        hazards: see `sass`.
        narrow: loads of a few bytes.
        wide: copies of 16 bytes or tiles.
    """

    kernel: str
    arch: str
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]
    serialized: str = ""
    hazards: tuple[str, ...] = ()
    narrow: tuple[str, ...] = ()
    wide: int = 0


@contextmanager
def compiling_for(arch: str) -> Iterator[list[Compiled]]:
    """Within this block, Triton launches compile for `arch`; what they compile is appended to the list."""
    compiled: list[Compiled] = []

    def loaded(module: int, function: int, name: str, files: dict[str, str], key: str) -> None:
        compiled.append(_inspect(name, arch, {Path(path).suffix: Path(path) for path in files.values()}))

    _forget_device()
    driver.set_active(_OfflineDriver(arch))
    triton.knobs.runtime.kernel_load_end_hook.add(loaded)
    try:
        yield compiled
    finally:
        triton.knobs.runtime.kernel_load_end_hook.remove(loaded)
        driver._active = None
        _forget_device()


def _forget_device() -> None:
    launch.architecture.cache_clear()
    launch.multiprocessors.cache_clear()


class _OfflineDriver:
    """The part of a Triton driver that a launch asks."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return self.arch  # Triton keeps a cache of compiled kernels per device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.arch], "multiprocessor_count": PROCESSORS[self.arch]}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *args: None


def _inspect(name: str, arch: str, files: dict[str, Path]) -> Compiled:
    metadata = json.loads(files[".json"].read_text())
    shared, found = metadata["shared"], {}
    if ".cubin" in files:
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", files[".cubin"])
        assembly = _run(triton.knobs.nvidia.nvdisasm.path, "-c", files[".cubin"])
        registers, stack = (_number(rf"{what}:(\d+)", usage) for what in ("REG", "STACK"))
        spills = max(stack, len(re.findall(r"\b(?:LDL|STL)\b", assembly)))
        code = sass.instructions(assembly)
        hazards = *sass.overwritten_operands(code), *sass.unguarded_writes(code, metadata["num_warps"])
        found = {"hazards": hazards, "narrow": tuple(sass.narrow_loads(code)), "wide": sass.wide_copies(code)}
        if "HGMMA" in assembly:
            found["serialized"] = _serialized(files[".ptx"])
    else:
        assembly = files[".amdgcn"].read_text()
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        # spilled scalar registers go into vector registers, not to memory
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    counts = {word: len(re.findall(rf"\b(?:V_)?{word}", assembly.upper())) for word in INSTRUCTIONS}
    return Compiled(name, arch, registers, spills, shared, counts, **found)


def _serialized(ptx: Path) -> str:
    """Ptxas's own words, which Triton does not pass on."""
    from triton.backends.nvidia.compiler import get_ptxas  # which of two comes with the versions of Triton

    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", ptx, "-o", os.devnull]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return "\n".join(line for line in run.stderr.splitlines() if "serialized" in line)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in {text[:2000]}"
    return int(found[1])


def _run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
