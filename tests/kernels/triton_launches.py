"""One launch for every Triton kernel and every configuration in the tables, to be compiled offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from laplace_kernels.triton import gram, gram_group, gram_sketch, kron_apply, triangle

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}


@dataclass(frozen=True)
class Launch:
    """A call to be compiled, and the instructions that its binary is promised to contain."""

    label: str
    run: Callable[[], Any]
    promised: tuple[str, ...]

    @property
    def reads_wide(self) -> bool:
        """Whether its large operand is of 16 bits, aligned, and so to be read 16 bytes at a time."""
        return "fp32" not in self.label.split(",")[0] and "odd d" not in self.label


def launches(arch: str) -> Iterator[Launch]:
    """All launches for an architecture; operands are uninitialised, nothing is computed."""
    yield from _gram(arch)
    yield from _gram_group(arch)
    yield from _gram_sketch(arch)
    yield from _kron_apply(arch)


def _name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


def _keep(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _gram(arch: str) -> Iterator[Launch]:
    def case(
        tile: triangle.Tile, dtype: torch.dtype, masked: bool, d: int, promised: tuple[str, ...]
    ) -> Launch:
        def run() -> None:
            with mock.patch.object(gram, "schedule", return_value=(tile, 1)):
                gram.gram_(
                    torch.empty(d, d), torch.empty(1000, d, dtype=dtype), _keep(1000) if masked else None, 1.0
                )

        size = f"{tile.rows}x{tile.columns}x{tile.tokens}, {tile.stages} stages, {tile.warps} warps"
        layout = "" if d % 16 == 0 else ", odd d"
        return Launch(f"gram_ {_name(dtype)}{', mask' if masked else ''}{layout}, {size}", run, promised)

    for tile in gram.TMA_TILES.get(arch, ()):
        yield case(tile, BF16, False, 512, (TENSOR_CORE[arch], "UTMALDG", "UTMAREDG"))
    for tile in triangle.POINTER_TILES[arch]:
        yield case(tile, BF16, True, 512, (TENSOR_CORE[arch],))
        yield case(tile, FP16, False, 512, (TENSOR_CORE[arch],))
    yield case(triangle.POINTER_TILES[arch][-1], BF16, True, 511, (TENSOR_CORE[arch],))
    for tile in triangle.FP32_TILES[arch]:
        yield case(tile, FP32, True, 512, (TENSOR_CORE[arch],))
        yield case(tile, FP32, False, 512, (TENSOR_CORE[arch],))
    yield case(triangle.FP32_TILES[arch][-1], FP32, True, 511, (TENSOR_CORE[arch],))


def _gram_group(arch: str) -> Iterator[Launch]:
    def case(dtype: torch.dtype, tile: triangle.Tile, d: int = 256) -> Launch:
        def run() -> None:
            Xs = [torch.empty(1000, d, dtype=dtype), torch.empty(10, 512, dtype=dtype)]
            Cs = [torch.empty(X.shape[1], X.shape[1]) for X in Xs]
            with mock.patch.object(gram_group, "_choose_tile", return_value=tile):
                gram_group.gram_group_(Cs, Xs, [None, _keep(10)], [1.0, 0.5])

        layout = "" if d % 16 == 0 else ", odd d"
        size = f"{tile.rows}x{tile.columns}x{tile.tokens}"
        return Launch(f"gram_group_ {_name(dtype)}{layout}, {size}", run, (TENSOR_CORE[arch],))

    for tile in triangle.POINTER_TILES[arch]:
        yield case(BF16, tile)
    yield case(BF16, triangle.POINTER_TILES[arch][-1], d=255)
    for tile in triangle.FP32_TILES[arch]:
        yield case(FP32, tile)


def _gram_sketch(arch: str) -> Iterator[Launch]:
    def case(dtype: torch.dtype, omega_dtype: torch.dtype, masked: bool, d: int = 512, m: int = 64) -> Launch:
        def run() -> None:
            X, Omega = torch.empty(1000, d, dtype=dtype), torch.empty(d, m, dtype=omega_dtype)
            mask = _keep(1000) if masked else None
            gram_sketch.gram_sketch_(torch.empty(d, m), X, Omega, mask, 1.0)

        label = (
            f"gram_sketch_ {_name(dtype)}, Omega {_name(omega_dtype)} [{d}, {m}]{', mask' if masked else ''}"
        )
        return Launch(label, run, (TENSOR_CORE[arch],))

    yield case(BF16, FP32, True)
    yield case(BF16, BF16, False)
    yield case(FP16, FP32, False)
    yield case(FP32, FP32, True)
    yield case(BF16, FP32, True, d=4096, m=128)  # whose columns are split, too
    yield case(BF16, FP32, False, d=4096, m=64)
    yield case(FP32, FP32, False, d=4096, m=64)


def _kron_apply(arch: str) -> Iterator[Launch]:
    def case(dtype: torch.dtype, r: int, k: int) -> Launch:
        def run() -> None:
            W = torch.empty(4, r, 512, dtype=dtype)
            kron_apply.kron_apply(
                W, torch.empty(512, k), torch.empty(r, r), torch.empty(r, k), torch.empty(r)
            )

        promised = TENSOR_CORE[arch] if r == 64 or arch == "gfx942" else "HMMA"
        return Launch(f"kron_apply {_name(dtype)}, r {r}, k {k}", run, (promised,))

    for r, k in ((8, 64), (8, 512), (64, 64)):
        yield case(FP32, r, k)
    yield case(BF16, 16, 64)
