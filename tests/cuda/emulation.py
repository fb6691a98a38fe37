"""The kernels of csrc on an emulated GPU (emulator/machine.h), called on CPU tensors through ctypes."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int32, c_int64, c_uint64
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]


class Gram(ctypes.Structure):
    """`lk::Gram` of csrc/updates.h."""

    _fields_ = [
        *((name, c_uint64) for name in ("c", "x", "mask")),
        *((name, c_int64) for name in ("tokens", "c_stride", "x_stride")),
        ("d", c_int32),
        ("alpha", c_float),
    ]


class Sketch(ctypes.Structure):
    """`lk::Sketch` of csrc/updates.h."""

    _fields_ = [
        *((name, c_uint64) for name in ("y", "x", "omega", "mask")),
        *((name, c_int64) for name in ("tokens", "y_stride", "x_stride", "omega_stride")),
        *((name, c_int32) for name in ("d", "m")),
        ("alpha", c_float),
        ("unused", c_int32),
    ]


class TilesPlan(ctypes.Structure):
    """`lk::TilesPlan` of csrc/plan.h."""

    _fields_ = [
        *((name, c_int64) for name in ("block_tokens", "z_plane", "y_plane")),
        *((name, c_int32) for name in ("project_parts", "accumulate_parts")),
    ]


needs_host_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled with the host compiler on first use: no CUDA takes part."""
    return build(Path(tempfile.mkdtemp(prefix="laplace-emulator-")))


def build(folder: Path, mutation: tuple[str, str, str] | None = None) -> ctypes.CDLL:
    """Compiles the emulation in `folder`; with a mutation (file of csrc, old text, new text) of the kernels."""
    csrc = ROOT / "csrc"
    if mutation is not None:
        csrc = shutil.copytree(csrc, folder / "csrc")
        file, old, new = mutation
        text = (csrc / file).read_text()
        assert text.count(old) == 1, f"{old!r} is not in {file} once"
        (csrc / file).write_text(text.replace(old, new))
    source, target = Path(__file__).parent / "emulator", folder / "emulator.so"
    optimisation = "-O0" if mutation else "-O2"  # a mutant runs little: compile it fast
    command = [
        "g++",
        "-std=c++17",
        optimisation,
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-I{csrc}",
        f"-I{source}",
    ]
    subprocess.run([*command, str(source / "emulator.cpp"), "-o", str(target)], check=True)
    lib = ctypes.CDLL(str(target))
    for name in ("emulate_sketch_cluster", "emulate_sketch_tiles", "emulate_gram_group"):
        getattr(lib, name).restype = ctypes.c_char_p
    for name in ("columns_per_rank", "table_bytes", "fill_table", "workspace_floats", "sketch_blocks"):
        getattr(lib, name).restype = c_int64
    return lib


def gram(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float) -> Gram:
    address = 0 if mask is None else mask.data_ptr()
    return Gram(C.data_ptr(), X.data_ptr(), address, X.shape[0], C.stride(0), X.stride(0), X.shape[1], alpha)


def sketch(Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None, alpha: float) -> Sketch:
    address = 0 if mask is None else mask.data_ptr()
    strides = Y.stride(0), X.stride(0), Omega.stride(0)
    return Sketch(
        Y.data_ptr(), X.data_ptr(), Omega.data_ptr(), address, X.shape[0], *strides, *Y.shape, alpha, 0
    )


def pitch(m: int) -> int:
    """Floats from row to row of a plane."""
    return -(-m // 4) * 4


def gram_sketch_cluster_(
    Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None = None, alpha: float = 1.0, *,
    tiling: int = 0, ranks: int = 1, clusters: int = 1, deterministic: bool = False, seed: int = 0,
) -> None:  # fmt: skip
    update = sketch(Y, X, Omega, mask, alpha)
    planes = torch.full((clusters * len(Y) * pitch(Y.shape[1]),), torch.nan)
    _check(
        library().emulate_sketch_cluster(
            ctypes.byref(update), X.dtype == torch.float16, tiling, ranks, clusters,
            ctypes.c_void_p(planes.data_ptr() if deterministic else None), c_uint64(seed),
        )
    )  # fmt: skip


def plan_tiles(update: Sketch, processors: int, deterministic: bool) -> TilesPlan:
    plan = TilesPlan()
    library().plan_tiles(ctypes.byref(update), processors, deterministic, ctypes.byref(plan))
    return plan


def workspace_floats(plan: TilesPlan) -> int:
    return library().workspace_floats(ctypes.byref(plan))


def gram_sketch_tiles_(
    Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None = None, alpha: float = 1.0, *,
    parts: tuple[int, int] = (1, 1), block_tokens: int = 1 << 20, deterministic: bool = False, seed: int = 0,
) -> None:  # fmt: skip
    """`parts` are of d and of a block's tokens."""
    d, m = Omega.shape
    plane = pitch(m) * d if deterministic and parts[1] > 1 else 0
    block_tokens = min(block_tokens, len(X))
    plan = TilesPlan(block_tokens, pitch(m) * block_tokens, plane, *parts)
    floats = workspace_floats(plan)
    workspace = torch.full((floats + 64,), torch.nan)
    run_tiles(sketch(Y, X, Omega, mask, alpha), plan, X.dtype == torch.float16, workspace.data_ptr(), seed)
    assert workspace[floats:].isnan().all(), "it needs a larger workspace than it asks for"


def run_tiles(update: Sketch, plan: TilesPlan, fp16: bool, workspace: int, seed: int = 0) -> None:
    """Omega starts at, and its rows are apart by, multiples of 16 bytes, as `laplace_kernels.cuda` makes it."""
    assert update.omega % 16 == 0
    assert update.omega_stride % 4 == 0
    arguments = ctypes.byref(update), ctypes.byref(plan), fp16, ctypes.c_void_p(workspace), c_uint64(seed)
    _check(library().emulate_sketch_tiles(*arguments))


def gram_group_(
    Cs: list[Tensor], Xs: list[Tensor], masks: list[Tensor | None], alphas: list[float], *,
    processors: int = 1, split: bool = True, seed: int = 0,
) -> int:  # fmt: skip
    """Returns the number of launches."""
    members = (Gram * len(Cs))(*(gram(*update) for update in zip(Cs, Xs, masks, alphas, strict=True)))
    launches = c_int32()
    _check(
        library().emulate_gram_group(
            members, c_int64(len(Cs)), Xs[0].dtype == torch.float16, processors, split, c_uint64(seed),
            ctypes.byref(launches),
        )
    )  # fmt: skip
    return launches.value


def _check(error: bytes | None) -> None:
    assert error is None, error
