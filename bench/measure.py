"""Times a job against its floor in interleaved rounds, and measures the peak memory of both.

Memory comes from torch's CPU allocator through torch.profiler: every allocation and release with its size, so that the
peak is exact for tensors, whatever the allocator below keeps. LAPACK's and BLAS's own workspaces are not in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench import models
from laplace_lora_fast import LaplaceLoRA

Job = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """One model with its training batches."""

    name: str
    padded: bool
    model: nn.Module
    loader: list[models.Batch]
    rounds: int
    peer_rounds: int

    def laplace(self, kfac: str, rank: int | None = None, fisher: str = "exact") -> LaplaceLoRA:
        return LaplaceLoRA(
            self.model, answer_token_ids=models.ANSWERS, kfac=kfac, rank=rank, fisher=fisher, factor="dense"
        )


def against_floor(
    benchmark: BenchmarkFixture, job: Job, floor: Job, rounds: int, **facts: str | float
) -> None:
    """Benchmarks `job`, with a run of `floor` before each of its rounds by the same clock.

    Args:
        benchmark: pytest-benchmark's fixture; its `extra_info` receives the floor's median, the median of the rounds'
            ratios, and both peaks.
        job: what is timed.
        floor: the bare passes.
        rounds: timed rounds.
        facts: further entries of `extra_info`.
    """
    clock = benchmark._timer
    floors: list[float] = []

    def run_floor() -> None:
        start = clock()
        floor()
        floors.append(clock() - start)

    benchmark.pedantic(job, setup=run_floor, rounds=rounds)
    ratios = [time / bare for time, bare in zip(benchmark.stats.stats.data, floors, strict=True)]
    benchmark.extra_info |= {
        "floor_s": statistics.median(floors),
        "ratio": statistics.median(ratios),
        "peak_mib": peak_bytes(job) / 2**20,
        "floor_peak_mib": peak_bytes(floor) / 2**20,
        "threads": torch.get_num_threads(),
        **facts,
    }


def peak_bytes(job: Job) -> int:
    """Peak of what torch holds for tensors on the CPU while `job` runs, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        job()
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
