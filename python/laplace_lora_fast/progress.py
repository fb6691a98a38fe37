"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str, show: bool) -> Iterator[T]:
    """Iterates with a bar named `what`, or without one."""
    yield from tqdm(items, desc=what, disable=not show, leave=False)
