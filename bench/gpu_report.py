"""Test and measure everything on a GPU with one command: `python -m bench.gpu_report`.

Nothing need be installed but what the packages depend on: this tree's are used. Parts come in the order of what one
wants to know first; results are written after every measurement, so that a run that is cut short leaves what it had:

smoke      every op by every backend, once, at one shape of a 7B model, against its definition in fp64. A backend that
           is wrong is not measured: it has no speed
fits       rows and KFAC on Llama-2-7B with LoRA on q and v: GPU and host time, kernels and busy time of a batch, the
           end of a fit, peak memory, beside the model's own passes
ops        each op against what a user would write with the library's products, over d and T
tests      tests/gpu; what pytest printed is in tests.txt
profile    five launches under ncu, where it is
models     every structure, fit and predict, on more models
sanitize   the small tests once more under compute-sanitizer; only if asked for

The result is one JSON with the commit, GPU and versions, Markdown tables made from it, and a plot. Measurements run in
a process of their own: what fails, crashes or hangs is recorded as such, and the rest goes on.

All but `sanitize` is meant to fit into nine minutes, `--quick` (smoke and fits) into two. Where less time is at hand,
take the parts one by one:

    python -m bench.gpu_report --quick --output first
    python -m bench.gpu_report --parts ops tests --output second --extend first/gpu_report.json

`--dry` runs all of it on the CPU at toy sizes, to see that the script works; its numbers mean nothing and stay out of
bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu import tree  # isort: split

import torch

from bench.gpu import fits, gate, models, ops, profiled, smoke
from bench.gpu.isolated import run_cases
from bench.gpu.output import markdown, plot

ROOT = tree.ROOT
WIDTHS, TOKENS = (4096, 14336), (2048, 16384)
SECONDS = 8.5 * 60  # for everything; what is not begun by then is left out
SMOKE_SECONDS, OP_SECONDS, MODEL_SECONDS = 40.0, 60.0, 120.0  # for one record; longer is a hang
PROFILE_SECONDS = 60.0
PARTS = ("smoke", "fits", "ops", "tests", "profile", "models", "sanitize")
QUICK = PARTS[:2]


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS[:-1], help="default: all but sanitize"
    )
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"time for all of it; default {SECONDS:.0f}"
    )
    parser.add_argument("--extend", type=Path, help="a report of the same commit and machine to add to")
    parser.add_argument("--output", type=Path, help="folder to write to; default bench/results/<GPU>")
    parser.add_argument("--commit", help="to be recorded where the sources are no git checkout")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU; no measurement")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("needs a GPU; --dry runs without one")
    tree.require()
    deadline = time.monotonic() + options.seconds
    folder = options.output or default_folder(options.dry)
    folder.mkdir(parents=True, exist_ok=True)
    report = begin(options.dry, options.commit, options.extend)
    if not options.dry and "build" not in report:
        report["build"] = tree.build()
    for part in PARTS:
        if part in (QUICK if options.quick else options.parts):
            for _ in run_part(part, report, folder, deadline):
                write(report, folder)
    plot(report, folder / "gpu_report.png")
    print(f"wrote {folder}")


def begin(dry: bool, commit: str | None, earlier: Path | None) -> dict[str, Any]:
    """An empty report, or an earlier one of the same commit, machine and versions.

    Raises:
        SystemExit: The earlier report is of others.
    """
    about = environment(torch.device("cpu" if dry else "cuda"), commit)
    if earlier is None:
        return {"dry": dry, "environment": about}
    report: dict[str, Any] = json.loads(earlier.read_text(encoding="utf-8"))
    differing = [key for key in about if key != "date" and report["environment"].get(key) != about[key]]
    if differing or report["dry"] != dry:
        raise SystemExit(
            f"{earlier} differs in {', '.join(differing) or 'being dry'}: make a report of its own"
        )
    return report


def run_part(part: str, report: dict[str, Any], folder: Path, deadline: float) -> Iterator[None]:
    """Adds a part to the report, step by step."""
    dry = report["dry"]
    device, rounds = ("cpu", 2) if dry else ("cuda", 20)
    left = max(30.0, deadline - time.monotonic())
    if part == "tests":
        report[part] = gate.run_tests(folder / "tests.txt")
        yield
        return
    if part in ("sanitize", "profile"):
        log = folder / f"{part}.txt"
        report[part] = (
            gate.sanitize(log, left) if part == "sanitize" else profiled.profile(log, PROFILE_SECONDS)
        )
        yield
        return
    report["refused"] = {} if dry else wrong_backends(report)
    if part == "smoke":
        measure, cases = partial(smoke.measure, device=device), smoke.cases(dry)
        records = run_cases(cases, smoke.describe, measure, SMOKE_SECONDS, deadline)
    elif part == "fits":
        measure = partial(fits.measure, device=device, dry=dry)
        records = run_cases(fits.cases(dry), fits.describe, measure, MODEL_SECONDS, deadline)
    elif part == "ops":
        widths, tokens = ((64, 96), (16, 32)) if dry else (WIDTHS, TOKENS)
        measure = partial(ops.measure_op, device=device, rounds=rounds, refused=report["refused"])
        records = run_cases(ops.cases(widths, tokens), ops.describe, measure, OP_SECONDS, deadline)
    else:
        measure = partial(models.measure_model, device=device, dry=dry, refused=report["refused"])
        records = run_cases(models.cases(dry), models.describe, measure, MODEL_SECONDS, deadline)
    report[part] = []
    for record in records:
        report[part].append(record)
        yield


def wrong_backends(report: dict[str, Any]) -> dict[str, str]:
    """Those that are not to be measured, and why."""
    tests = gate.refused(report["tests"]) if "tests" in report else {}
    return tests | smoke.refused(report.get("smoke", []))


def write(report: dict[str, Any], folder: Path) -> None:
    """The JSON, and the tables made from it."""
    (folder / "gpu_report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu_report.md").write_text(markdown(report), encoding="utf-8")


def environment(device: torch.device, commit: str | None) -> dict[str, str]:
    """Where the numbers come from."""
    commit = commit or output_of("git", "describe", "--always", "--dirty")
    found = {"commit": commit, "date": datetime.date.today().isoformat(), "python": platform.python_version()}
    found["torch"] = torch.__version__
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
        found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def output_of(*command: str) -> str:
    """What a command prints, "unknown" where it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def default_folder(dry: bool) -> Path:
    """bench/results/<GPU>, but never for a dry run."""
    if dry:
        return Path(tempfile.mkdtemp(prefix="gpu_report_dry_"))
    return ROOT / "bench" / "results" / torch.cuda.get_device_name().replace(" ", "-")


if __name__ == "__main__":
    main()
