"""The sizes every job is run at."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator

import pytest

from bench import measure, models, oracle, peers

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST = -1, -3, 32 * 2**20  # of malloc.h; the largest that glibc takes


@pytest.fixture(scope="session", autouse=True)
def _no_page_faults() -> None:
    """Lets glibc's allocator keep freed memory, for the floor and every method alike.

    By default it returns the top of the heap to the kernel whenever it can, and whether it can is an accident of what
    lies there: the same call then takes 0 or 9000 page faults, which at hidden 256 is a twentieth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        assert mallopt(_TRIM_THRESHOLD, -1) == mallopt(_MMAP_THRESHOLD, _LARGEST) == 1


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
