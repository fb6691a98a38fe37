"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A file to write inside, which becomes `path` on leaving, and is removed after an error: `path` stays as it was.

    It stands beside `path`, with the same suffix and a name of its own, so that several writers do not meet. What is
    no file, a device or a pipe, is written to itself; a symbolic link stays, its target is replaced.

    Args:
        path: in a folder that exists.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        yield target
        return
    target = Path(os.path.realpath(target))
    partial = target.with_name(f".partial-{secrets.token_hex(4)}-{target.name}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
