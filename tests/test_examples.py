"""The examples run as they are: they are the pages of the guide."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "toy")


# With hosts of their own, or their own processes: in one of their own, and not in each run of CI.
APART = [
    "comparing",
    "lm_eval_task",
    "lm_polygraph_scores",
    "serving",
    "several_processes",
    "trl_reward",
    "trl_sft",
]
APART += ["vllm_samples"]


@pytest.mark.filterwarnings("default")  # as a script has it
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in APART])
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported what takes most of an example's time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_example_apart(name: str, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_are_short_and_in_the_guide(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60
    pages = (EXAMPLES.parent / "docs" / "guide").glob("*.md")
    assert any(f'--8<-- "examples/{name}.py"' in page.read_text(encoding="utf-8") for page in pages)
