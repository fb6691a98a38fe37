"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str, show: bool) -> Iterator[T]:
    """Iterates with a bar named `what` where it is to be shown and somebody watches."""
    hidden = not (show and watched())
    # tqdm.auto would call iter(items) twice: two sets of workers of a DataLoader, two draws of its order
    yield from tqdm(iter(items), desc=what, total=length(items), disable=hidden, leave=False)


def watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook: a log file would keep every refresh of a bar."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def length(items: Iterable[T]) -> int | None:
    """How many items there are; None where that is unknown, as for a DataLoader over an IterableDataset."""
    try:
        return len(items)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
