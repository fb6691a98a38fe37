"""Triton kernels in Triton's interpreter: a process of its own, chosen before triton is imported."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

import laplace_kernels as lk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMMAND = "TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted"

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]

if INTERPRETED:
    from tests.kernels import triton_interpreter

    triton_interpreter.install()
    torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    if not INTERPRETED:
        pytest.skip(f"needs {COMMAND}")


@pytest.fixture(autouse=True)
def _use_triton() -> Iterator[None]:
    with lk.use_backend("triton"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="laplace_kernels")  # a silent fallback would prove nothing
        yield


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The configurations and code path of an architecture: pointers on sm_80, tensor descriptors on sm_90."""
    from laplace_kernels.triton import launch

    monkeypatch.setattr(launch, "architecture", lambda device: request.param)
    return request.param
