"""`mirror_`: the lower triangle copied to the upper one. A copy in plain PyTorch, which no backend replaces."""

from __future__ import annotations

from torch import Tensor

from laplace_kernels.ops.checks import check_float

_PANEL = 256  # rows at a time


def check(C: Tensor) -> None:
    """A square matrix."""
    check_float("C", C, 2)
    if C.shape[0] != C.shape[1]:
        raise ValueError(f"C must be square, got {tuple(C.shape)}")


def reference(C: Tensor) -> None:
    """Copy the lower triangle of C to the upper one, in place, a row panel at a time."""
    for start in range(0, C.shape[0], _PANEL):
        panel = slice(start, start + _PANEL)
        diagonal = C[panel, panel]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)
        C[:start, panel].copy_(C[panel, :start].mT)
