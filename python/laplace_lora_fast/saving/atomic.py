"""Files and folders that are written whole or not at all.

What is being written stands in a folder beside the target, with a name of its own, which its writer has locked. A
writer that was killed leaves it behind, without the lock: the next one to the same target clears it away. (The folder
is locked, as libraries replace the files that they are told to write.)
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

try:
    import fcntl
except ImportError:  # no Unix: nothing is cleared away
    fcntl = None  # type: ignore[assignment]


_STREAMS = (("dev",), ("proc",))  # folders of what a process has open, which a new file would cut off


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A file to write inside, which becomes `path` on leaving, and is removed after an error: `path` stays as it was.

    It has the same name, in a folder of its own beside `path`, so that several writers do not meet. What is no file, a
    device or a pipe, is written to itself, as is /dev/stdout wherever that leads; a symbolic link stays, its target is
    replaced.

    Args:
        path: in a folder that exists.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    target = Path(path)
    if target.exists() and (not target.is_file() or Path(os.path.abspath(path)).parts[1:2] in _STREAMS):
        yield target
        return
    target = Path(os.path.realpath(target))
    with _naming(path), _partial(target) as folder:
        partial = folder / target.name
        yield partial
        _to_disk(partial)
        os.replace(partial, target)


@contextmanager
def new_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """A folder to fill inside, which becomes `path` on leaving, and is removed after an error.

    Args:
        path: does not exist, or is an empty folder.

    Raises:
        FileExistsError: there is something at `path`.
        OSError: it cannot be written; names `path`.
    """
    target = Path(os.path.realpath(path))
    with _naming(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _partial(target) as partial:
            require_new_folder(path)
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _to_disk(file)
            require_new_folder(path)
            os.replace(partial, target)


def require_new_folder(path: str | PathLike[str]) -> None:
    """Raises FileExistsError unless there is nothing at `path`, or an empty folder."""
    target = Path(path)
    if target.is_dir():
        found = next(target.iterdir(), None)
        if found is not None:
            raise FileExistsError(f"folder {str(path)!r} holds {found.name}: pass a new or an empty one")
    elif target.exists():
        raise FileExistsError(f"{str(path)!r} is a file: pass a folder")


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A folder beside the target, made and locked; removed on leaving if it is still there."""
    _clear(target)
    handle = None
    while handle is None:
        partial = target.with_name(f".partial-{secrets.token_hex(4)}-{target.name}")
        partial.mkdir()
        handle = _opened(partial)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


def _opened(partial: Path) -> int | None:
    """A handle that has the lock, or None if another writer has cleared the folder away before it was taken."""
    try:
        handle = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if lock(handle) is not False and partial.exists():
        return handle
    os.close(handle)
    return None


def _clear(target: Path) -> None:
    """Removes what killed writers to this target have left."""
    for found in target.parent.glob(".partial-????????-*"):
        if found.name[len(".partial-????????-") :] != target.name:
            continue
        with suppress(OSError):
            handle = os.open(found, os.O_RDONLY)
            try:
                if lock(handle):
                    shutil.rmtree(found, ignore_errors=True)
            finally:
                os.close(handle)


def lock(handle: int) -> bool | None:
    """Takes the lock, which goes with the handle or the process: False if another has it, None if there are none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _naming(path: str | PathLike[str]) -> Iterator[None]:
    """Makes errors of the system name `path`, not what stands beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
