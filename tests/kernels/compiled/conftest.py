"""Triton kernels compiled for GPUs that are not there; not in the process that interprets them."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compiles: needs TRITON_INTERPRET unset")
    pytest.importorskip("triton")
