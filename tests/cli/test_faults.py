"""Full disks, outputs that are inputs, and files that would run code: one line, exit code 2, and nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests import words
from tests.cli.run import invoke, refused


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def place(files, posterior, tmp_path: Path) -> tuple[Path, list[str], list[str]]:
    """A folder of one's own with a posterior and data; arguments of every command, and those of a posterior."""
    folder, common = files
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(folder / name, tmp_path)
    shutil.copytree(posterior, tmp_path / "post")
    rest = ["--data", str(tmp_path / "test.jsonl"), "--posterior", str(tmp_path / "post")]
    return tmp_path, common, rest


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_full_disk_leaves_the_old_probabilities(place):
    folder, common, rest = place
    out = folder / "out.jsonl"
    out.write_text("OLD")
    before = contents(folder)
    with full_disk(400):
        complaint = refused("predict", *common, *rest, "--out", out)
    assert f"File too large: '{out}'" in complaint
    assert contents(folder) == before


def test_a_full_disk_leaves_the_old_scores(place):
    folder, common, rest = place
    out = folder / "scores.json"
    out.write_text("OLD")
    before = contents(folder)
    with full_disk(100):
        complaint = refused("evaluate", *common, *rest, "--json", out)
    assert f"File too large: '{out}'" in complaint
    assert contents(folder) == before


def test_a_full_disk_leaves_the_old_posterior(place):
    folder, common, rest = place
    before = contents(folder)
    data = ["--data", folder / "train.jsonl", "--out", folder / "post"]
    with full_disk(3000):
        complaint = refused("fit", *common, *data, "--prior", "2")
    assert "posterior.safetensors" in complaint
    assert "File too large" in complaint
    assert contents(folder) == before
    assert invoke("evaluate", *common, *rest).exit_code == 0


@pytest.mark.parametrize("link", ["same", "symbolic", "hard"])
def test_an_output_that_is_an_input_is_refused(place, no_work, link):
    folder, common, rest = place
    inputs = [folder / "test.jsonl", folder / "post" / "posterior.safetensors"]
    inputs.append(Path(common[3]) / "adapter_config.json")
    before = contents(folder)
    for path in inputs:
        out = {"same": path, "symbolic": folder / "soft", "hard": folder / "hard"}[link]
        if link == "symbolic":
            out.symlink_to(path)
        elif link == "hard":
            os.link(path, out)
        assert "would overwrite what is read" in refused("predict", *common, *rest, "--out", out)
        assert "would overwrite what is read" in refused("evaluate", *common, *rest, "--json", out)
        if link != "same":
            out.unlink()
    assert contents(folder) == before
    rows = shutil.copy(folder / "train.jsonl", folder / "post" / "posterior.safetensors")
    assert "would overwrite what is read" in refused("fit", *common, "--data", rows, "--out", folder / "post")


def test_an_output_that_is_a_folder_is_refused_first(place, no_work):
    folder, common, rest = place
    assert "is a folder" in refused("predict", *common, *rest, "--out", folder / "post")


def test_a_bad_row_costs_no_old_output(place):
    folder, common, _ = place
    rows = words.rows(3)
    data = words.write_rows(folder / "half.jsonl", [*rows, rows[0] | {"prompt": "good \ud800 film"}])
    (folder / "out.jsonl").write_text("OLD")
    before = contents(folder)
    arguments = ["--data", data, "--posterior", folder / "post", "--out", folder / "out.jsonl"]
    assert "line 4: field 'prompt'" in refused("predict", *common, *arguments)
    assert contents(folder) == before


def test_a_damaged_posterior_is_refused(place):
    folder, common, rest = place
    file = folder / "post" / "posterior.safetensors"
    whole = file.read_bytes()
    for damaged in (whole.replace(b'"F32"', b'"FXX"', 1), whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        assert "posterior.safetensors" in refused("evaluate", *common, *rest)


class Evil:
    """Unpickled, it makes the file that its name is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickled_adapter_runs_no_code(files, tmp_path):
    folder, common = files
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    arguments = [*common, "--adapter", adapter, "--data", folder / "train.jsonl", "--out", tmp_path / "out"]
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    assert "its pickle holds more than tensors" in refused("fit", *arguments)
    torch.save({"x": Evil(tmp_path / "ran")}, adapter / "adapter_model.bin")
    assert "its pickle holds more than tensors" in refused("fit", *arguments)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_names_no_module_to_import(files, tmp_path, monkeypatch):
    folder, common = files
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"megatron_config": {}, "megatron_core": "module_of_an_adapter"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "module_of_an_adapter.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [*common, "--adapter", adapter, "--data", folder / "train.jsonl", "--out", tmp_path / "out"]
    assert "Megatron" in refused("fit", *arguments)
    assert not (tmp_path / "ran").exists()
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused("fit", *arguments)
