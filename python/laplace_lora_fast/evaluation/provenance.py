"""Where results come from: machine, versions, commit, date."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def provenance(packages: Iterable[str]) -> dict[str, Any]:
    """What a file of results says about its origin.

    Args:
        packages: Distributions whose versions belong to the results.
    """
    import torch

    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(packages),
    }


def commit() -> str | None:
    """The commit of the checkout this package runs from, or None for an installed copy."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", here.name
        )  # an installed copy may lie in somebody else's repository
        # bench/results and the README are what a run writes
        changed = git("status", "--porcelain", "--", ":/*.py", ":/csrc")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """The processor's name as its maker gives it, where the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
        if package == "torch":
            import torch

            found[package] = torch.__version__  # names its build, which its metadata need not
    return found
