"""The numbers of the code before its present interface, bit for bit.

`frozen.safetensors` holds what commit e189476 gave for `cases` and `integrations`, called by the names of today. Other
numbers are a change of what the package computes: it has to be meant. On another processor, or with other libraries
than they were frozen with (`frozen.arithmetic`), last bits differ for no reason of ours: the bound is `ELSEWHERE`.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from torch import Tensor

from laplace_lora_fast.structures.rows.kernels import RowKernels
from tests.replay import cases, frozen, integrations

# Quantities (patterns of case/quantity) that may differ: by how much of the largest entry, and why.
_SEARCH = "the same maximum by another search, to its own tolerance"
_FACTORS = "the same factors, made in place and a block at a time"
CLOSE: dict[str, tuple[float, str]] = {
    "*-refit*/tuned-evidence": (1e-6, _SEARCH),
    "*-refit*/*": (1e-13, _FACTORS),
    "*-rows*/*": (1e-13, _FACTORS),
    "*-auto/*": (1e-13, _FACTORS),
}

# Cases of sketched rows that were frozen before sketches took another precision than the prior's in its place
# (structures/rows/precisions/equivalent.py): the numbers are those at the prior's own.
AT_THE_PRIORS_PRECISION = (
    "decoder-rows-columns",
    "decoder-rows-empirical",
    "decoder-rows-seed",
    "*-refit-columns",
    "regression-refit",
)

ELSEWHERE = 1e-4  # base weights are drawn in fp32, whose last bit is the processor's
SIGNS = ("*/samples", "*/*-mc")  # noise in an eigenbasis: the vectors' signs are one machine's


def complaint(key: str, found: Tensor, expected: Tensor) -> str | None:
    """What is wrong with a quantity, if anything is."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return f"{key}: {found.dtype} {list(found.shape)}, was {expected.dtype} {list(expected.shape)}"
    if torch.equal(found, expected):
        return None
    deviation = float((found - expected).abs().max() / expected.abs().max())
    allowed = max([0.0, *(bound for pattern, (bound, _) in CLOSE.items() if fnmatch(key, pattern))])
    if not frozen.same_arithmetic():
        if any(fnmatch(key, pattern) for pattern in SIGNS):
            return None
        allowed = ELSEWHERE
    return None if deviation <= allowed else f"{key}: deviates by {deviation:.1e}, allowed {allowed:.0e}"


def compare(name: str, found: cases.Quantities) -> None:
    expected = frozen.numbers()[name]
    assert found.keys() == expected.keys()
    complaints = (complaint(f"{name}/{key}", found[key].detach(), expected[key]) for key in expected)
    wrong = [text for text in complaints if text is not None]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(expected)} quantities differ:", *wrong])


@pytest.mark.filterwarnings("ignore::laplace_lora_fast.errors.LaplaceWarning")  # of a grid's edges
@pytest.mark.parametrize("name", cases.FITS)
def test_fits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(fnmatch(name, pattern) for pattern in AT_THE_PRIORS_PRECISION):
        monkeypatch.setattr(RowKernels, "are_sketched", property(lambda self: [False] * len(self._rows)))
    compare(name, cases.quantities(cases.FITS[name], tmp_path))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", integrations.INTEGRATIONS)
def test_integrations(name: str) -> None:
    if name.startswith("laplace-torch"):
        pytest.importorskip("laplace", reason="needs laplace-torch")
    compare(name, integrations.INTEGRATIONS[name]())


def test_every_frozen_case_is_replayed() -> None:
    assert frozen.numbers().keys() == cases.FITS.keys() | integrations.INTEGRATIONS.keys()
