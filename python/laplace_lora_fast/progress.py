"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str, show: bool) -> Iterator[T]:
    """Iterates with a bar named `what` where it is to be shown and somebody watches."""
    yield from tqdm(items, desc=what, disable=not (show and watched()), leave=False)


def watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook: a log file would keep every refresh of a bar."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
