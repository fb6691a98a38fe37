"""Processes of their own for tests, each forked off one that has imported what takes seconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import runpy
import sys
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed", "transformers.trainer", "laplace_lora_fast", "tests.tiny"]
)


def run_script(path: Path) -> str:
    """Runs a file as a script. Returns the traceback of what it raised, or nothing."""
    log = path.with_suffix(".log")
    process = CONTEXT.Process(target=_run, args=(str(path), str(log)))
    process.start()
    process.join()
    assert log.exists(), f"the process ended with {process.exitcode}"
    return log.read_text(encoding="utf-8")


def _run(path: str, log: str) -> None:
    found = ""
    sys.argv = [path]
    with contextlib.suppress(SystemExit):
        try:
            runpy.run_path(path, run_name="__main__")
        except Exception:
            found = traceback.format_exc()
    Path(log).write_text(found, encoding="utf-8")
