"""The frozen numbers, and where they came from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import peft
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

FILE = Path(__file__).with_name("frozen.safetensors")


def arithmetic() -> dict[str, str]:
    """What decides the last bits of a result besides this package."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""),
    }


@cache
def numbers() -> dict[str, dict[str, Tensor]]:
    """For each case its quantities."""
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(FILE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            case, _, quantity = key.partition("/")
            found.setdefault(case, {})[quantity] = file.get_tensor(key)
    return found


@cache
def same_arithmetic() -> bool:
    """Whether this machine and these libraries are those of the frozen numbers."""
    with safe_open(FILE, framework="pt") as file:
        origin = json.loads(file.metadata()["origin"])
    return arithmetic().items() <= origin.items()
