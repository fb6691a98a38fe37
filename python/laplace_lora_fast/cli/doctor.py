"""What `laplace-lora doctor` prints: versions, devices, and for each kernel the backend that serves it, and why."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from laplace_kernels import OPS, explain
from laplace_lora_fast.evaluation.provenance import cpu_name, versions

REQUIRED = ("laplace-lora-fast", "torch", "peft", "transformers")
OPTIONAL = ("triton", "matplotlib", "accelerate", "gguf", "laplace-torch", "bayesian-lora")
_DTYPES = (torch.float32, torch.bfloat16)


def report(console: Console) -> None:
    """Prints it all."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    console.print(_table("Versions", _versions()))
    console.print(_table("Devices", {str(device): _describe(device) for device in devices}))
    for device in devices:
        columns = [Column(name, overflow="fold") for name in ("backend", "serves", "ops", "inputs", "why")]
        table = Table(*columns, title=f"Kernels on {device}")
        for row in kernel_rows(device, explain):
            table.add_row(*row)
        console.print(table)


def kernel_rows(device: torch.device, explain: Callable[..., Any]) -> list[tuple[str, ...]]:
    """Backend, whether it serves, ops, dtypes and reason: ops and dtypes of one verdict and reason together."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for op in OPS:
        for dtype in _DTYPES:
            choice = explain(op, device, dtype)
            verdicts = {(choice.backend, "yes"): choice.reason}
            verdicts |= {(backend, "no"): reason for backend, reason in choice.others.items()}
            for (backend, serves), reason in verdicts.items():
                key = (backend, serves, reason.replace(op, "such op"))
                found.setdefault(key, {}).setdefault(op, []).append(str(dtype).removeprefix("torch."))
    rows: dict[tuple[str, ...], list[str]] = {}
    for (backend, serves, reason), dtypes_of in found.items():
        for op, dtypes in dtypes_of.items():
            rows.setdefault((backend, serves, ", ".join(dtypes), reason), []).append(op)
    ordered = sorted(rows.items(), key=lambda row: row[0][1] == "no")  # what serves comes first
    return [
        (backend, serves, ", ".join(ops), inputs, reason)
        for (backend, serves, inputs, reason), ops in ordered
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()} | versions((*REQUIRED, *OPTIONAL))
    return found | {name: "not installed" for name in REQUIRED if name not in found}


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{cpu_name()}, threads: {torch.get_num_threads()}"
    properties = torch.cuda.get_device_properties(device)
    capability = f"sm_{properties.major}{properties.minor}"
    return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    for cells in rows.items():
        table.add_row(*cells)
    return table
