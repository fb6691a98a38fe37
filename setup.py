"""Builds laplace_kernels._cuda where LAPLACE_KERNELS_BUILD_CUDA=1 asks for it; all else is declared in pyproject.toml.

It takes an nvcc. Not asked for, the package is pure Python, whatever is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SOURCES = ["csrc/launch.cu", "csrc/bind.cpp"]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
OLDEST = (12, 1)  # the first with more than 4 KB of kernel parameters
ASKED = os.environ.get("LAPLACE_KERNELS_BUILD_CUDA") == "1"


def find_nvcc() -> str | None:
    """Path of nvcc, or None where the CUDA kernels are not asked for; ends the process where they cannot be built."""
    if not ASKED:
        print(
            "laplace_kernels: without CUDA kernels (LAPLACE_KERNELS_BUILD_CUDA=1 builds them)",
            file=sys.stderr,
        )
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home) / "bin") for home in (*homes, "/usr/local/cuda")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))
    if nvcc is None:
        obstacle = "nvcc was not found"
    elif (found := release(nvcc)) is None:
        obstacle = f"{nvcc} --version fails or says nothing"
    elif found < OLDEST:
        obstacle = f"{nvcc} is older than CUDA {OLDEST[0]}.{OLDEST[1]}"
    else:
        return nvcc
    raise SystemExit(f"laplace_kernels: LAPLACE_KERNELS_BUILD_CUDA=1, but {obstacle}")


def release(nvcc: str) -> tuple[int, int] | None:
    """Major and minor version of the CUDA toolkit; None where nvcc does not run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def ninja_file(nvcc: str, target: Path) -> str:
    """The build of the extension module, for ninja."""
    import pybind11  # present at build time, declared in pyproject.toml

    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    # a plain sm_90 in the list stands for sm_90a
    architectures = [arch for arch in ARCHITECTURES if arch.rstrip("a") in known]
    codes = " ".join(f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in architectures)
    names = ", ".join(architectures)
    print(f"laplace_kernels: building CUDA kernels for {names} with {nvcc}", file=sys.stderr)
    includes = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    common = f"-O3 -std=c++17 -DLK_ARCHITECTURES='\"{names}\"'"
    return f"""\
rule cuda
  command = {nvcc} {common} {codes} --threads 2 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -MD -MF $out.d -c $in -o $out
  depfile = $out.d
rule cxx
  command = c++ {common} -fPIC -fvisibility=hidden -Wall {includes} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = {nvcc} {codes} -shared -cudart static -o $out $in
build launch.o: cuda {escaped(ROOT / "csrc/launch.cu")}
build bind.o: cxx {escaped(ROOT / "csrc/bind.cpp")}
build {escaped(target)}: link launch.o bind.o
"""


def escaped(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


class BuildCuda(build_ext):
    """Builds the one extension with nvcc and ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links `ext` to where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja") or "ninja"
        try:
            (folder / "build.ninja").write_text(ninja_file(NVCC, target))
            subprocess.run([ninja, "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(str(error)) from error


NVCC = find_nvcc()
setup(
    ext_modules=[Extension("laplace_kernels._cuda", SOURCES)] if NVCC else [],
    cmdclass={"build_ext": BuildCuda},
)
