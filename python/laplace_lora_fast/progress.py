"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str, show: bool) -> Iterator[T]:
    """Iterates with a bar named `what`, or without one."""
    # tqdm.auto would call iter(items) twice: two sets of workers of a DataLoader, two draws of its order
    yield from tqdm(iter(items), desc=what, total=length(items), disable=not show, leave=False)


def length(items: Iterable[T]) -> int | None:
    """How many items there are; None where that is unknown, as for a DataLoader over an IterableDataset."""
    try:
        return len(items)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
