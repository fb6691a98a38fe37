"""Files are replaced whole, or stay as they were."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from laplace_lora_fast.saving.atomic import replacing


def test_a_file_is_replaced_on_leaving(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.suffix == ".txt"
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("x.txt", "new")]
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (28, str(path))
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("x", "old")]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/x"), replacing(tmp_path / "none" / "x") as partial:
        partial.write_text("new")


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with replacing(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with replacing(pipe) as partial:
        partial.write_text("new")
    reader.join(10)
    assert read == ["new"]
    assert [f.name for f in tmp_path.iterdir()] == ["pipe"]


def test_writers_do_not_meet(tmp_path: Path) -> None:
    """Each writes slowly: a file is one writer's from end to end."""
    path, texts = tmp_path / "x", [letter * 2000 for letter in "abcd"]
    path.write_text(texts[0])
    seen = set()

    def write(text: str) -> None:
        for _ in range(20):
            with replacing(path) as partial, partial.open("w") as file:
                for character in text:
                    file.write(character)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_text())
    assert seen <= set(texts)
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
