"""Triton kernels compiled for GPUs that are not there: minutes, so only when this folder is asked for by name."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("a process that interprets kernels cannot compile them")
    if not any("compiled" in argument for argument in item.config.args):
        pytest.skip("needs python -m pytest tests/kernels/compiled")
