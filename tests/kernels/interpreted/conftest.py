"""Triton kernels in Triton's interpreter: a process of its own, chosen before triton is imported."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

import laplace_kernels as lk
from laplace_kernels.triton import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMMAND = "TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted"

if INTERPRETED:
    from tests.kernels import triton_interpreter

    triton_interpreter.install()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _use_triton() -> Iterator[None]:
    if not INTERPRETED:
        pytest.skip(f"needs {COMMAND}")
    with lk.use_backend("triton"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="laplace_kernels")  # a silent fallback would prove nothing
        yield


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The configurations and code path of an architecture: pointers on sm_80, tensor descriptors on sm_90."""
    monkeypatch.setattr(launch, "architecture", lambda device: request.param)
    return request.param
