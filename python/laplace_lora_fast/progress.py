"""How far a pass over data has come: a bar where somebody watches, else a line a minute in the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

LOG = logging.getLogger("laplace_lora_fast")
_SECONDS = 60.0  # between two lines of the log


def track(items: Iterable[T], what: str, show: bool) -> Iterator[T]:
    """Iterates with a bar named `what` where it is to be shown and somebody watches; both tell rate and time left."""
    hidden = not (show and watched())
    # tqdm.auto would call iter(items) twice: two sets of workers of a DataLoader, two draws of its order
    total, began = length(items), time.monotonic()
    last = began
    for done, item in enumerate(
        tqdm(iter(items), desc=what, total=total, disable=hidden, leave=False, unit=" batches"), 1
    ):
        yield item
        now = time.monotonic()
        if show and hidden and now - last >= _SECONDS:
            last = now
            LOG.info("%s", line(what, done, total, now - began))


def say(text: str, show: bool) -> None:
    """One line: on the terminal where it is to be shown and somebody watches, in the log otherwise."""
    if show and watched():
        tqdm.write(text, file=sys.stderr)
    else:
        LOG.info("%s", text)


def line(what: str, done: int, total: int | None, seconds: float) -> str:
    """How far, how fast, how long yet: "fit: 1,200 of 12,500 batches, 14.2 a second, 13 min left"."""
    rate = done / max(seconds, 1e-9)
    if total is None:
        return f"{what}: {done:,} batches, {rate:.3g} a second"
    return (
        f"{what}: {done:,} of {total:,} batches, {rate:.3g} a second, {duration((total - done) / rate)} left"
    )


def duration(seconds: float) -> str:
    """In the unit that a person would use: "40 s", "13 min", "5.2 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook: a log file would keep every refresh of a bar."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def length(items: Iterable[T]) -> int | None:
    """How many items there are; None where that is unknown, as for a DataLoader over an IterableDataset."""
    try:
        return len(items)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
