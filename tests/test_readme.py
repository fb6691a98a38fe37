"""The README's code runs, its figures are those of the results, and it stays short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from bench.docs import rendered

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)

# What stands for the reader's model and data before the block that has none of its own.
GIVEN = """
import sys; sys.path.insert(0, {examples!r})
import toy
token_ids, train_loader, val_loader = toy.ANSWERS, toy.texts(64, 0), toy.texts(32, 1)
model, batch = toy.train(toy.causal_model(), train_loader, toy.answer_logits), val_loader[0]
"""


def run(code: str, folder: Path) -> str:
    """Runs code in a process of its own, offline, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_five_lines_run(tmp_path: Path) -> None:
    given = GIVEN.format(examples=str(README.parent / "examples"))
    load = "print(LaplaceLoRA.load('posterior/', model).predict(batch).equal(probs))"
    assert run(given + BLOCKS[0] + load, tmp_path) == "True\n"


def test_the_script_runs_as_it_is(tmp_path: Path) -> None:
    assert run(BLOCKS[1], tmp_path).startswith("tensor([[0.")
    assert len(BLOCKS) == 2


def test_figures_are_those_of_the_results() -> None:
    assert README.read_text(encoding="utf-8") == rendered("README.md"), "run python -m bench.docs"


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 1500
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
