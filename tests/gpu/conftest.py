"""Tests that need a GPU; without one they are skipped, visibly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

import laplace_kernels as lk

# cuBLAS is deterministic only with a fixed workspace
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_runtest_setup() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _gpu_still_answers() -> Iterator[None]:
    """After a fault in a kernel every later call in the process fails: leave it, xdist starts another."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU does not answer any more: {error}", returncode=1)


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op by every backend; a kernel that does not compile is an error, the reference proves nothing for it."""
    with lk.use_backend(request.param), warnings.catch_warnings():
        warnings.filterwarnings("error", message="laplace_kernels.*does not compile")
        yield request.param


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms; torch.empty is then filled with NaN, so reading what was not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
