"""Test and measure everything on a GPU with one command: `python -m bench.gpu_report`.

1. tests/gpu has to pass, or there is no report (`--sanitize` runs it once more under compute-sanitizer);
2. each op against its baseline, over d and T;
3. fit and predict on Llama-shaped models against bare passes;
4. one JSON with the commit, GPU and versions, Markdown tables made from it, and plots.

`--dry` runs all of it on the CPU at toy sizes, to see that the script works; its numbers mean nothing and stay out of
bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu.models import measure_models
from bench.gpu.ops import cases, run_case
from bench.gpu.output import markdown, plot
from bench.gpu.timing import measure

ROOT = Path(__file__).parent.parent
WIDTHS, TOKENS = (1024, 2048, 4096, 5120, 8192, 14336), (512, 2048, 8192, 16384)
SECONDS = 8.5 * 60  # for everything; models not reached by then are reported as skipped


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU; no measurement")
    parser.add_argument("--sanitize", action="store_true", help="run tests/gpu under compute-sanitizer too")
    parser.add_argument("--output", type=Path, help="folder to write to; default bench/results/<GPU>")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("needs a GPU; --dry runs without one")
    deadline = time.monotonic() + SECONDS
    run_tests(options.sanitize)
    report = make_report(options.dry, deadline)
    folder = options.output or default_folder(options.dry)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "gpu_report.md").write_text(markdown(report))
    plot(report, folder)
    print(f"wrote {folder}")


def run_tests(sanitize: bool) -> None:
    """Stop unless tests/gpu passes."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu"]
    for prefix in ([], ["compute-sanitizer", "--error-exitcode", "1"]) if sanitize else ([],):
        if subprocess.run([*prefix, *command], cwd=ROOT, check=False).returncode:
            sys.exit("tests/gpu does not pass: no report")


def make_report(dry: bool, deadline: float) -> dict[str, Any]:
    """Everything that is measured."""
    device = torch.device("cpu" if dry else "cuda")
    rounds = 2 if dry else 20
    widths, tokens = ((64, 96), (16, 32)) if dry else (WIDTHS, TOKENS)
    torch.manual_seed(0)
    return {
        "dry": dry,
        "environment": environment(device),
        "ceilings": ceilings(device, dry, rounds),
        "ops": [run_case(case, device, rounds) for case in cases(widths, tokens, device)],
        "models": list(measure_models(device, dry, 2 if dry else 3, deadline)),
    }


def environment(device: torch.device) -> dict[str, str]:
    """Where the numbers come from."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    found = {"commit": commit.stdout.strip(), "python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def ceilings(device: torch.device, dry: bool, rounds: int) -> dict[str, float]:
    """What this machine reaches at most: bf16 products, and copies of memory."""
    n, elements = (64, 1 << 12) if dry else (8192, 1 << 29)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    times = measure({"product": [lambda: a @ b], "copy": [lambda: target.copy_(source)]}, device, rounds)
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
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
