"""Test and measure everything on a GPU with one command: `python -m bench.gpu_report`.

1. tests/gpu has to pass, or nothing is measured; what it printed is in tests.txt either way
   (`--sanitize` runs it once more under compute-sanitizer);
2. each op against its baseline, over d and T;
3. fit and predict on Llama-shaped models against bare passes;
4. one JSON with the commit, GPU and versions, Markdown tables made from it, and a plot.

JSON and tables are written after every measurement, so that a run that is cut short leaves what it had. What fails is
recorded as failed, and the rest goes on.

`--dry` runs all of it on the CPU at toy sizes, to see that the script works; its numbers mean nothing and stay out of
bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu.models import measure_models
from bench.gpu.ops import measure_ops
from bench.gpu.output import markdown, plot
from bench.gpu.timing import Variant, measure

ROOT = Path(__file__).parent.parent
WIDTHS, TOKENS = (1024, 2048, 4096, 5120, 8192, 14336), (512, 2048, 8192, 16384)
SECONDS = 8.5 * 60  # for everything; what is not begun by then is left out
TEST_SECONDS, STUCK_SECONDS = 5 * 60, 120  # for tests/gpu; for one of its tests
WORKERS = 8  # that tests/gpu runs on: most of its time goes into compiling kernels


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU; no measurement")
    parser.add_argument("--sanitize", action="store_true", help="run tests/gpu under compute-sanitizer too")
    parser.add_argument("--output", type=Path, help="folder to write to; default bench/results/<GPU>")
    parser.add_argument("--commit", help="to be recorded where the sources are no git checkout")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("needs a GPU; --dry runs without one")
    deadline = time.monotonic() + SECONDS
    folder = options.output or default_folder(options.dry)
    folder.mkdir(parents=True, exist_ok=True)
    run_tests(folder, options.sanitize)
    report = make_report(folder, options.dry, options.commit, deadline)
    plot(report, folder / "gpu_report.png")
    print(f"wrote {folder}")


def run_tests(folder: Path, sanitize: bool) -> None:
    """Stop unless tests/gpu passes; what pytest says goes to tests.txt as it comes."""
    stuck = [f"faulthandler_timeout={STUCK_SECONDS}", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", "-v", "tests/gpu", "-o", stuck[0], "-o", stuck[1]]
    commands = [[*command, "-n", str(min(WORKERS, os.cpu_count() or 1))]]
    if sanitize:
        commands.append(["compute-sanitizer", "--error-exitcode", "1", *command])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (folder / "tests.txt").open("w") as log:
        for each in commands:
            run = subprocess.Popen(
                each, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                passed = run.wait(TEST_SECONDS) == 0
            except subprocess.TimeoutExpired:
                passed = False
                os.killpg(run.pid, signal.SIGKILL)  # the workers, too
            if not passed:
                sys.exit(f"tests/gpu does not pass, nothing is measured: see {log.name}")


def make_report(folder: Path, dry: bool, commit: str | None, deadline: float) -> dict[str, Any]:
    """Everything that is measured, written to gpu_report.json as it comes."""
    device = torch.device("cpu" if dry else "cuda")
    rounds = 2 if dry else 20
    widths, tokens = ((64, 96), (16, 32)) if dry else (WIDTHS, TOKENS)
    torch.manual_seed(0)
    report: dict[str, Any] = {"dry": dry, "environment": environment(device, commit)}
    report |= {"ceilings": ceilings(device, dry, rounds), "ops": [], "models": []}
    sections = {
        "ops": measure_ops(widths, tokens, device, rounds, deadline),
        "models": measure_models(device, dry, 2 if dry else 3, deadline),
    }
    for section, records in sections.items():
        for record in records:
            report[section].append(record)
            (folder / "gpu_report.json").write_text(json.dumps(report, indent=1) + "\n")
            (folder / "gpu_report.md").write_text(markdown(report))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next section wants blocks of other sizes
    return report


def environment(device: torch.device, commit: str | None) -> dict[str, str]:
    """Where the numbers come from."""
    commit = commit or output_of("git", "describe", "--always", "--dirty")
    found = {"commit": commit, "python": platform.python_version(), "torch": torch.__version__}
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


def ceilings(device: torch.device, dry: bool, rounds: int) -> dict[str, float]:
    """What this machine reaches at most: bf16 products, and copies of memory."""
    n, elements = (64, 1 << 12) if dry else (8192, 1 << 29)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    variants = {"product": Variant([lambda: a @ b]), "copy": Variant([lambda: target.copy_(source)])}
    times, _ = measure(variants, device, rounds)
    return {
        "bf16 product, TFLOP/s": 2 * n**3 / times["product"].median / 1e6,
        "copy, read + write, GB/s": 2 * source.nbytes / times["copy"].median / 1e3,
    }


def default_folder(dry: bool) -> Path:
    """bench/results/<GPU>, but never for a dry run."""
    if dry:
        return Path(tempfile.mkdtemp(prefix="gpu_report_dry_"))
    return ROOT / "bench" / "results" / torch.cuda.get_device_name().replace(" ", "-")


if __name__ == "__main__":
    main()
