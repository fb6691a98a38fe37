"""The sizes every job is run at."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from bench import measure, models, oracle, peers


@pytest.fixture(scope="session", params=list(models.SIZES))
def setting(request: pytest.FixtureRequest) -> Iterator[models.Setting]:
    yield models.SIZES[request.param]()
    for module in (measure, oracle, peers):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Hooked copies of the model are cycles, and the next method may need the memory."""
    yield
    gc.collect()
