"""Five launches to look at: `ncu python -m bench.gpu.profiled`, which the GPU report does where there is an ncu."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from bench.gpu import tree  # isort: split

import torch

import laplace_kernels as lk
from bench.gpu.gate import run

_METRICS = (
    "gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active,launch__registers_per_thread,"
    "lts__t_sectors_op_read.sum"
)


def profile(log: Path, seconds: float) -> str:
    """Counters of the launches, in a log. Returns what came of it."""
    tool = shutil.which("ncu")
    if tool is None:
        return "ncu is not installed"
    command = [tool, "--metrics", _METRICS, sys.executable, "-m", "bench.gpu.profiled"]
    code = run(command, log, seconds, {})
    return f"{'done' if code == 0 else 'out of time' if code is None else f'ncu exits with {code}'}: see {log.name}"


def main() -> None:
    """Each once, at one shape of a 7B model."""
    tree.require()
    d, T = 4096, 2048
    X, W = torch.randn(T, d, device="cuda").bfloat16(), torch.randn(144, d, device="cuda").bfloat16().mT
    mask = torch.rand(T, device="cuda") < 0.8
    lk.project_(torch.empty(T, 144, device="cuda"), X, W)
    lk.jacobian(torch.randn(4, 512, 8, device="cuda"), X.view(4, 512, d))
    with lk.use_backend("triton"):
        lk.gram_(torch.zeros(d, d, device="cuda"), X)
        lk.gram_(torch.zeros(d, d, device="cuda"), X, mask)
        lk.gram_sketch_(torch.zeros(d, 128, device="cuda"), X, torch.randn(d, 128, device="cuda").bfloat16())
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
