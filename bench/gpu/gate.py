"""Which backends may be measured: tests/gpu says it, test by test; and compute-sanitizer on the small ones."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import laplace_kernels as lk

ROOT = Path(__file__).parents[2]
TEST_SECONDS, STUCK_SECONDS = 4 * 60, 90  # for tests/gpu; for one of its tests
WORKERS = 8  # most of the time goes into compiling kernels
SMALL = "test_gram or test_jacobian_stats or test_kron_apply or test_a_flush"
BIG = "4096 or 8192 or 11008 or 9999 or graph"
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED) (tests/gpu/[^\s]+::.*?)\s*$")


def run_tests(log: Path) -> dict[str, Any]:
    """Runs tests/gpu, several processes side by side.

    Args:
        log: file that gets what pytest prints, as it comes.

    Returns:
        How many tests passed and were skipped, which failed, and whether all came to an end in time.
    """
    stuck = [f"faulthandler_timeout={STUCK_SECONDS}", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", "-v", "tests/gpu", "-o", stuck[0], "-o", stuck[1]]
    command += ["-p", "no:cacheprovider", "-n", str(min(WORKERS, os.cpu_count() or 1))]
    finished = run(command, log, TEST_SECONDS, {}) is not None
    return outcomes(log.read_text(encoding="utf-8", errors="replace")) | {"finished": finished}


def outcomes(log: str) -> dict[str, Any]:
    """What pytest -v reports of each test, with or without xdist."""
    found = [match.groups() for line in log.splitlines() if (match := _OUTCOME.search(line))]
    named = {outcome: list(dict.fromkeys(test for kind, test in found if kind == outcome))
             for outcome in ("PASSED", "SKIPPED", "FAILED", "ERROR")}  # fmt: skip
    failed = list(dict.fromkeys(named["FAILED"] + named["ERROR"]))
    passed = [test for test in named["PASSED"] if test not in failed]
    return {"passed": len(passed), "skipped": len(named["SKIPPED"]), "failed": failed,
            "backends": {name: sum(backend_of(test) == name for test in passed) for name in lk.backends()}}  # fmt: skip


def backend_of(test: str) -> str:
    """The backend that a test in tests/gpu is about, empty where it is about none in particular."""
    if "test_cuda_kernels" in test:
        return "cuda"
    parameters = test.partition("[")[2]
    return next((name for name in lk.backends() if re.match(rf"{name}\b", parameters)), "")


def refused(tests: dict[str, Any]) -> dict[str, str]:
    """The backends that are not to be measured, and why: one that is wrong has no speed."""
    reasons = {}
    for name in lk.backends():
        failed = [test for test in tests["failed"] if backend_of(test) == name]
        if failed:
            reasons[name] = f"{len(failed)} of its tests fail, {failed[0]} for one"
        elif not tests["backends"][name]:
            reasons[name] = "none of its tests passed"
    return reasons


def sanitize(log: Path, seconds: float) -> str:
    """Runs the small tests under compute-sanitizer's memcheck, every allocation apart. Returns the verdict."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not installed"
    command = [
        tool,
        "--tool",
        "memcheck",
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "9",
        sys.executable,
    ]
    command += [
        "-m",
        "pytest",
        "-v",
        "tests/gpu",
        "-p",
        "no:cacheprovider",
        "-k",
        f"({SMALL}) and not ({BIG})",
    ]
    code = run(command, log, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    verdicts = {0: "clean", 9: "errors", None: "out of time"}
    return f"{verdicts.get(code, f'pytest exits with {code}')}: see {log.name}"


def run(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """The exit code of a command that writes to `log`; None if it had to be stopped."""
    with log.open("w") as out:
        run = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
        try:
            return run.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # the workers, too
            run.wait()
            return None
