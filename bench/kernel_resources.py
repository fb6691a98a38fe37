"""Registers and shared memory of every Triton kernel, compiled offline: `python -m bench.kernel_resources`.

Writes bench/results/triton_resources-<version of Triton>.md. It runs no kernel, so it needs no GPU.
"""

from __future__ import annotations

from pathlib import Path

import triton

from tests.kernels.triton_launches import launches
from tests.kernels.triton_offline import INSTRUCTIONS, SHARED_MEMORY, TARGETS, Compiled, compiling_for

VERSION = ".".join(triton.__version__.split(".")[:2])
RESULT = Path(__file__).parent / "results" / f"triton_resources-{VERSION}.md"


def main() -> None:
    """Compile everything and write the table."""
    sections = "\n".join(section(arch) for arch in TARGETS)
    RESULT.write_text(
        "# Resources of the Triton kernels\n\n"
        f"Compiled with Triton {triton.__version__} on a machine without a GPU by `python -m bench.kernel_resources`.\n"
        "Nothing here was run. Registers per thread, bytes spilled, bytes of shared memory per program, copies of 16\n"
        "bytes (or whole tiles) and loads of fewer than 8, and how often instructions of interest stand in the code.\n"
        'No product waits for another one (ptxas\'s "serialized") and no known hazard was found where not said so.\n\n'
        + sections
    )
    print(f"wrote {RESULT}")


def section(arch: str) -> str:
    """The table of one architecture."""
    lines = [
        f"## {arch} ({SHARED_MEMORY[arch]} bytes of shared memory)\n",
        "| launch | kernel | registers | spills | shared memory | wide | narrow | instructions |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for launch in launches(arch):
        with compiling_for(arch) as compiled:
            launch.run()
        lines += [row(launch.label, kernel) for kernel in compiled]
    return "\n".join(lines) + "\n"


def row(label: str, kernel: Compiled) -> str:
    """One line of a table."""
    found = ", ".join(
        f"{kernel.instructions[name]} {name}" for name in INSTRUCTIONS if kernel.instructions[name]
    )
    wrong = [
        word for word, is_so in (("serialized", kernel.serialized), ("hazards", kernel.hazards)) if is_so
    ]
    return (
        f"| {label} | {kernel.kernel} | {kernel.registers} | {kernel.spills} | {kernel.shared} | {kernel.wide} "
        f"| {len(kernel.narrow)} | {', '.join([found, *wrong])} |"
    )


if __name__ == "__main__":
    main()
