"""This tree's packages, installed or not: to be imported before them, here and in every child process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = [str(ROOT), str(ROOT / "python")]
_BUILD_SECONDS = 180

sys.path[:0] = _FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOLDERS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def require() -> None:
    """Raises SystemExit if another tree's packages would be measured."""
    import laplace_kernels
    import laplace_lora_fast

    for package in (laplace_kernels, laplace_lora_fast):
        if ROOT not in Path(str(package.__file__)).resolve().parents:
            raise SystemExit(f"{package.__file__} is not of {ROOT}: unset PYTHONPATH")


def build() -> str:
    """Builds the CUDA library in place where nvcc is. Returns what came of it."""
    if shutil.which("nvcc") is None:
        return "no nvcc: the CUDA kernels are left out"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "LAPLACE_KERNELS_BUILD_CUDA": "1"}
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_BUILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"the CUDA library was not built in {_BUILD_SECONDS} s"
    return "the CUDA library was built" if run.returncode == 0 else f"failed: {run.stderr[-500:]}"
