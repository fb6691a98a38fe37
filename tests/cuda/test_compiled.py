"""The compiled library: what the compiler made of the kernels for each architecture, and life without a GPU."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import laplace_kernels as lk
from laplace_kernels import cuda
from tests.gpu import test_cuda_kernels

ROOT = Path(__file__).parents[2]
TILINGS = 3
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


def disassembler() -> str | None:
    """The CUDA toolkit's cuobjdump, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ROOT
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
needs_disassembler = pytest.mark.skipif(disassembler() is None, reason="cuobjdump is not installed")


@dataclass
class Kernel:
    """One kernel on one architecture: its instructions without their predicates, and how many there are of each."""

    registers: int = 0
    stack: int = 0
    code: list[str] = field(default_factory=list)

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        return Counter(re.match(r"\w+", instruction)[0] for instruction in self.code)


def installed() -> Path | None:
    """The library in the source tree, if it is newer than what it is made of."""
    found = [ROOT / f"laplace_kernels/_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    newest = max(source.stat().st_mtime for source in (ROOT / "csrc").iterdir() if source.suffix != ".md")
    return next((path for path in found if path.exists() and path.stat().st_mtime > newest), None)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """Path of an up-to-date library, built now if need be."""
    folder = tmp_path_factory.mktemp("build")
    path = installed()
    if path is None:
        build(folder, LAPLACE_KERNELS_BUILD_CUDA="1")
        (path,) = folder.glob("lib/laplace_kernels/_cuda*.so")
    return path


def build(folder: Path, prelude: str = "pass", fails: bool = False, **environment: str) -> str:
    """Runs setup.py's build of the extension; returns what it printed."""
    arguments = ["setup.py", "-q", "build_ext", f"--build-lib={folder}/lib", f"--build-temp={folder}/temp"]
    code = f"import runpy, shutil, sys; sys.argv = {arguments!r}; {prelude}; runpy.run_path('setup.py')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode != 0) == fails, run.stdout + run.stderr
    return run.stdout + run.stderr


@functools.cache
def kernels(path: Path) -> dict[tuple[str, str], Kernel]:
    """(architecture, kernel with its template arguments) -> resources and instructions."""
    found: dict[tuple[str, str], Kernel] = {}
    arch = kernel = ""
    for line in dump("--dump-resource-usage", path).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\w+):", line):
            kernel = short_name(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[arch, kernel] = Kernel(int(match[1]), int(match[2]) + int(match[3]))
    for line in dump("-sass", path).splitlines():
        if match := re.match(r"arch = (\w+)", line):  # "code for" lacks the a of sm_90a before CUDA 13
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            kernel = short_name(match[1])
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", line):
            found[arch, kernel].code.append(match[1])
    return found


def dump(option: str, path: Path) -> str:
    return subprocess.run(
        [str(disassembler()), option, str(path)], capture_output=True, text=True, check=True
    ).stdout


def short_name(mangled: str) -> str:
    match = re.search(r"(gram_group|gram_sketch_tiles|gram_sketch_cluster|add_planes)_kernel(\w+)", mangled)
    assert match, mangled
    arguments = re.findall(r"Bf16|Fp16|(?<=L[ib])\d+", match[2])  # types and numbers
    return " ".join([match[1], *arguments])


@needs_nvcc
@needs_disassembler
def test_every_kernel_is_there_for_every_architecture(library):
    built = {arch for arch, _ in kernels(library)}
    known = subprocess.run(
        [str(nvcc()), "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert built == {arch for arch in ARCHITECTURES if arch.rstrip("a") in known} >= {"sm_80", "sm_90a"}
    names = {name for _, name in kernels(library)}
    counts = Counter(name.split()[0] for name in names)
    assert counts == {
        "gram_group": 2,
        "gram_sketch_tiles": 4,
        "gram_sketch_cluster": 2 * TILINGS,
        "add_planes": 1,
    }
    assert len(kernels(library)) == len(names) * len(built)


@needs_nvcc
@needs_disassembler
def test_nothing_spills(library):
    for (arch, name), kernel in kernels(library).items():
        where = f"{name} on {arch}"
        assert kernel.stack == 0, where
        assert kernel.instructions["LDL"] == kernel.instructions["STL"] == 0, where
        # 64 K registers for one block of 256 threads, for three of 128
        assert kernel.registers <= (255 if "cluster" in name else 168), where


@needs_nvcc
@needs_disassembler
def test_portable_kernels_use_tensor_cores_and_asynchronous_copies(library):
    for (arch, name), kernel in kernels(library).items():
        if name.startswith(("gram_group", "gram_sketch_tiles")):
            for instruction in ("HMMA", "LDSM", "LDGSTS"):
                assert kernel.instructions[instruction] > 0, f"{name} on {arch}: no {instruction}"


@needs_nvcc
@needs_disassembler
def test_the_cluster_kernel_uses_what_hopper_has(library):
    for (arch, name), kernel in kernels(library).items():
        if "cluster" in name and arch == "sm_90a":
            counts = kernel.instructions
            for instruction in ("HGMMA", "LDGSTS", "UCGABAR_ARV", "UCGABAR_WAIT", "FENCE"):
                assert counts[instruction] > 0, f"{name}: no {instruction}"
            # two parts of Z, panels and blocks of a warpgroup, 16 tokens at a time: each issued once
            blocks, panels, tokens, _ = tiling(name)
            transposed = sum(".tnspB" in instruction for instruction in kernel.code)
            assert transposed == 2 * blocks * panels // 2 * tokens // 16, name
            # products stay in flight: the compiler serialises them when it cannot prove registers untouched
            assert counts["HGMMA"] > 4 * counts["WARPGROUP"], f"{name}: {counts}"
        elif "cluster" in name:
            assert kernel.instructions["HGMMA"] == 0


def tiling(name):
    return [int(number) for number in name.split()[2:]]


def registers(instruction):
    """Numbers of the registers that an instruction reads or writes: at least those."""
    opcode, _, operands = instruction.partition(" ")
    width = 4 if ".128" in opcode else 2 if re.search(r"\.64|\.WIDE|CS2R", opcode) else 1
    found = set()
    for operand in operands.split(","):
        for number, pair in re.findall(r"\bR(\d+)(\.64)?", operand):
            count = 2 if pair else 1 if "[" in operand else width
            found.update(range(int(number), int(number) + count))
    return found


def disturbances(code):
    """Instructions that touch accumulators or left operands of products between their issue and the wait for them."""
    in_flight, found = set(), []
    for instruction in code:
        if match := re.match(r"HGMMA\.64x(\d+)x16\.\S+ R(\d+), (?:R(\d+), )?gdesc", instruction):
            columns, accumulator, left = (int(number or -1) for number in match.groups())
            in_flight.update(range(accumulator, accumulator + columns // 2))
            in_flight.update(range(left, left + 4) if left >= 0 else ())
        elif instruction.startswith("HGMMA"):
            raise AssertionError(f"not understood: {instruction}")
        elif instruction.startswith("WARPGROUP.DEPBAR"):
            in_flight.clear()
        elif in_flight & registers(instruction):
            found.append(instruction)
    return found


def test_disturbances_are_found():
    product = ["HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56, gsb0"]
    wait = ["WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    bad = ["FADD R1, R87, R2", "LDS.128 R54, [R3+0x10]", "MOV R27, RZ", "LDG.E R1, desc[UR2][R86.64]"]
    fine = ["FADD R1, R88, R2", "LDS.128 R20, [R23]", "LDG.E R1, desc[UR2][R22.64]", "UMOV UR24, URZ"]
    assert disturbances([*product, *bad, *fine, *wait]) == bad
    assert disturbances([*product, *wait, *bad]) == []


@needs_nvcc
@needs_disassembler
def test_products_in_flight_are_left_alone(library):
    for (arch, name), kernel in kernels(library).items():
        if "cluster" in name and arch == "sm_90a":
            assert disturbances(kernel.code) == [], name


@needs_nvcc
@needs_disassembler
def test_reads_of_the_mask_overlap(library):
    """A thread reads its bytes of a step's mask with no branch in between, which would wait for the byte before."""
    for (arch, name), kernel in kernels(library).items():
        wanted = 4  # copies of a thread
        if "cluster" in name:
            _, panels, tokens, _ = tiling(name)
            wanted = panels * 8 * tokens // 256
        runs = [0]
        for instruction in kernel.code:
            if instruction.startswith("LDG.E.U8"):
                runs[-1] += 1
            elif re.match("BRA|BSYNC|CALL|RET|EXIT", instruction):
                runs.append(0)
        assert all(run in (0, wanted) for run in runs), f"{name} on {arch}: {runs}"
        assert any(runs) or "add_planes" in name or ("cluster" in name and arch != "sm_90a")


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_imports_and_fails_cleanly(library):
    loader = importlib.machinery.ExtensionFileLoader("laplace_kernels._cuda", str(library))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    assert module.architectures.startswith("sm_80, sm_90a")
    for call in (
        module.refusal,
        lambda: module.cluster(768, 64, False),
        lambda: module.workspace_floats(bytes(80), False, True),
        lambda: module.flush(bytes(56), b"", False, 0, False, 0),
    ):
        with pytest.raises(RuntimeError, match=r"^cudaGetDevice: .* \(cudaError\w+\)$"):
            call()
    with pytest.raises(ValueError, match="grams must be a whole number of 56-byte updates, got 55 bytes"):
        module.flush(bytes(55), b"", False, 0, False, 0)
    assert cuda._GRAM.size == 56


def test_a_build_that_asks_for_cuda_kernels_needs_nvcc(tmp_path):
    without = "shutil.which = lambda *args, **kwargs: None"
    output = build(tmp_path, prelude=without, fails=True, LAPLACE_KERNELS_BUILD_CUDA="1")
    assert "LAPLACE_KERNELS_BUILD_CUDA=1, but nvcc was not found" in output


@pytest.mark.parametrize("setting", ["", "0"])
def test_without_being_asked_for_cuda_kernels_are_not_built(tmp_path, setting):
    output = build(tmp_path, LAPLACE_KERNELS_BUILD_CUDA=setting)
    assert "laplace_kernels: without CUDA kernels (LAPLACE_KERNELS_BUILD_CUDA=1 builds them)" in output
    assert not list(tmp_path.glob("**/*.so"))


BROKEN = {
    "it fails": "#!/bin/sh\nexit 1\n",
    "no script": "",
    "says nothing": "#!/bin/sh\n",
    "fails later": (
        "#!/bin/sh\ncase $1 in --version) echo release 13.0;; --list-gpu-code) echo sm_80;; *) exit 1;; esac\n"
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_nvcc_is_an_error(tmp_path, case):
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin/nvcc").write_text(BROKEN[case])
    (home / "bin/nvcc").chmod(0o755)
    build(tmp_path, CUDA_HOME=str(home), LAPLACE_KERNELS_BUILD_CUDA="1", fails=True)


def test_a_missing_library_is_explained(monkeypatch):
    def missing():
        raise ImportError("No module named 'laplace_kernels._cuda'")

    monkeypatch.setattr(cuda, "_library", missing)
    with lk.use_backend("cuda"):
        reason = lk.explain("gram_sketch_", "cuda:0", torch.bfloat16).reason
    assert reason.startswith("cuda was asked for, but laplace_kernels._cuda is not there")


@pytest.mark.parametrize(
    ("setting", "nvcc", "outcome"),
    [
        ("1", None, pytest.fail.Exception),
        ("", "/bin/nvcc", pytest.skip.Exception),
        ("", None, pytest.skip.Exception),
    ],
)
def test_a_run_on_a_gpu_fails_without_the_library_where_it_is_asked_for(monkeypatch, setting, nvcc, outcome):
    monkeypatch.setenv("LAPLACE_KERNELS_BUILD_CUDA", setting)
    monkeypatch.setattr(shutil, "which", lambda name: nvcc)
    with pytest.raises(outcome, match="it is not there"):
        test_cuda_kernels.missing("it is not there")
