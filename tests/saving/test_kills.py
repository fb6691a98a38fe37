"""A process that is killed while it writes: what was there stays whole, and the next writer clears up."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import peft
import pytest
import torch

from laplace_lora_fast import LaplaceLoRA
from laplace_lora_fast.cli.main import _write
from laplace_lora_fast.saving.atomic import new_folder, replacing
from tests import tiny
from tests.model.taps import ANSWERS

PROGRAM = """
import sys, itertools, shutil
from pathlib import Path
import torch
from laplace_lora_fast import LaplaceLoRA
from laplace_lora_fast.cli.main import _write
from tests import tiny
from tests.model.taps import ANSWERS

torch.set_num_threads(1)
la = LaplaceLoRA(tiny.tiny_llama(torch.float32), ANSWERS, structure="rows").fit([tiny.batch(20)], progress=False)
what, folder = sys.argv[1:]
print("ready", flush=True)
for index in itertools.count():
    if what == "save":
        la.save(folder)
    elif what == "predict":  # as predict --out writes
        _write(Path(folder) / "probs.jsonl", f'{{"written": {index % 7}}}\\n' * 200_000)
    else:
        la.sample_adapters(f"{folder}/{index % 3}", 3, force=True)
        shutil.rmtree(f"{folder}/{index % 3}")
"""
TIMES = [1, pytest.param(50, marks=pytest.mark.slow)]


def kill_while(what, folder, draw):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "python")])}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05 + 0.1 * draw.random())
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("times", TIMES)
def test_save(times, tmp_path):
    model = tiny.tiny_llama(torch.float32)
    la = LaplaceLoRA(model, ANSWERS, structure="rows").fit([tiny.batch(20)], progress=False)
    la.save(tmp_path)
    expected, draw = la.predict(tiny.batch(2)), random.Random(0)
    for _ in range(times):
        kill_while("save", tmp_path, draw)
        assert torch.equal(LaplaceLoRA.load(tmp_path, model).predict(tiny.batch(2)), expected)
    la.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["posterior.safetensors"]


@pytest.mark.parametrize("times", TIMES)
def test_predictions(times, tmp_path):
    file, draw = tmp_path / "probs.jsonl", random.Random(0)
    for _ in range(times):
        kill_while("predict", tmp_path, draw)
        if file.exists():
            lines = file.read_text().splitlines()
            assert len(lines) == 200_000
            assert len(set(lines)) == 1
            assert json.loads(lines[0])["written"] in range(7)
    _write(file, "{}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["probs.jsonl"]


@pytest.mark.parametrize("times", TIMES)
def test_samples(times, tmp_path):
    draw = random.Random(0)
    base = tiny.tiny_llama(torch.float32).unload()
    for _ in range(times):
        kill_while("sample", tmp_path, draw)
        for folder in tmp_path.glob("[0-9]"):
            found = sorted(path.name for path in folder.iterdir())
            if found == ["sample-000", "sample-001", "sample-002"]:
                base = peft.PeftModel.from_pretrained(base, folder / "sample-002").unload()
    la = LaplaceLoRA(tiny.tiny_llama(torch.float32), ANSWERS).fit([tiny.batch(4)], progress=False)
    for index in range(3):
        for path in (tmp_path / str(index)).glob("*"):
            assert path.is_dir()
        la.sample_adapters(tmp_path / f"new-{index}", 1, force=True)
    assert all(len(list(path.iterdir())) <= 3 for path in tmp_path.glob("[0-9]"))


@pytest.mark.parametrize("kind", [replacing, new_folder])
def test_what_a_killed_writer_left_is_cleared_away(kind, tmp_path):
    """And what another one is writing is not, nor what is of another target."""
    code = (
        f"import os, signal; from laplace_lora_fast.saving.atomic import {kind.__name__} as kind\n"
        f"with kind({str(tmp_path / 'x')!r}) as partial:\n"
        "    (partial / 'file' if partial.is_dir() else partial).write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".partial-")
    (tmp_path / ".partial-12345678-y").mkdir()  # of another target
    with kind(tmp_path / "x") as outer:
        assert not left.exists()
        if kind is replacing:
            outer.write_text("outer")
            with kind(tmp_path / "x") as inner:
                assert outer.exists()
                inner.write_text("inner")
        else:
            (outer / "file").write_text("outer")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-12345678-y", "x"]
    content = tmp_path / "x" / "file" if kind is new_folder else tmp_path / "x"
    assert content.read_text() == "outer"


def test_threads_that_save_at_once(tmp_path):
    """What they write is replaced by the library that writes it, which no lock on it outlives."""
    la = LaplaceLoRA(tiny.tiny_llama(), ANSWERS).fit([tiny.batch(4)], progress=False)
    errors = []

    def save():
        try:
            for _ in range(15):
                la.save(tmp_path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in tmp_path.iterdir()] == ["posterior.safetensors"]
    assert LaplaceLoRA.load(tmp_path, la.model).predict(tiny.batch(2)).isfinite().all()
