"""Rows in files: an error where the disk is full, and nothing left however the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from laplace_lora_fast.structures.rows import store
from laplace_lora_fast.structures.rows.store import Place, RowStore


def on_disk(rows, blocks=2):
    """All rows of every block are in files."""
    found = RowStore(blocks, memory_budget=8)
    for index in range(blocks):
        for chunk in rows.split(3):
            found.append(index, chunk)
    assert found.place is Place.DISK
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_come_back_from_files(dtype):
    rows = torch.randn(10, 4).to(dtype)
    for matrix in on_disk(rows).matrices():
        assert torch.equal(matrix, rows)
    empty = RowStore(1, memory_budget=8)
    empty.append(0, rows)
    empty.append(0, rows[:0])
    assert torch.equal(empty.matrices()[0], rows)
    kept = empty.kept(rows + 1)  # in a file as well
    assert torch.equal(kept, rows + 1)
    assert kept.data_ptr() != rows.data_ptr()


def test_no_name_is_ever_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    matrices = on_disk(torch.randn(300, 4)).matrices()
    assert list(tmp_path.iterdir()) == []
    assert before is None or len(os.listdir("/proc/self/fd")) <= before + 2
    assert all(matrix.isfinite().all() for matrix in matrices)


def far_store(monkeypatch, budget, free=None):
    """As if rows were on a GPU with so much room: they leave it for CPU memory."""
    monkeypatch.setattr(store, "room", lambda devices: free)
    found = RowStore(3, budget)
    monkeypatch.setattr(type(found), "_can_leave", staticmethod(lambda devices: True))
    return found


@pytest.mark.parametrize(("budget", "free"), [(100, None), (10**6, 100)])
def test_rows_that_leave_the_device_are_the_same_in_one_piece(budget, free, monkeypatch):
    """Beyond the budget, or what is free: batch by batch in one piece of memory, in which each block is a view."""
    batches = [[torch.randn(2, width) for width in (3, 4, 5)] for _ in range(3)]
    found = far_store(monkeypatch, budget, free)
    places = []
    for batch in batches:
        found.extend(batch)
        places.append(found.place)
    assert places == [Place.DEVICE, Place.CPU, Place.CPU]
    assert len({chunk.untyped_storage().data_ptr() for chunk in (chunks[-1] for chunks in found.chunks)}) == 1
    assert [[len(chunk) for chunk in chunks] for chunks in found.chunks] == [
        [2, 2, 2]
    ] * 3  # as they were added
    expected = [torch.cat(block) for block in zip(*batches, strict=True)]
    for mine, theirs in zip(found.matrices(), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert found.kept(expected[0]) is not expected[0]


PROGRAM = """
import resource
import torch
from laplace_lora_fast.structures.rows.store import RowStore
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
store = RowStore(1, memory_budget=8)
try:
    for _ in range(10):
        store.append(0, torch.ones(30, 30))
    store.matrices()
except OSError as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_is_an_error(tmp_path):
    """A process of its own: what the error stands in for is a bus error."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "OSError" in run.stdout
    assert f"no room for 36,000 more bytes of Jacobian rows in '{tmp_path}'" in run.stdout
    assert "set TMPDIR" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_room_is_taken_where_the_system_cannot_reserve_it(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with tempfile.TemporaryFile() as file:
        store._allocate(file.fileno(), 2**20 + 5)
        assert os.fstat(file.fileno()).st_size == 2**20 + 5
