"""Times a method against its floor in interleaved rounds, measures the peak memory of both and the result's error.

Memory comes from torch's CPU allocator through torch.profiler: every allocation and release with its size, so that the
peak is exact for tensors, whatever the allocator below keeps. LAPACK's and BLAS's own workspaces are not in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.profiler import ProfilerActivity, profile

from bench.models import Setting

Job = Callable[[], Any]
ROUNDING = 2e-3  # what a result may be off that is exact up to fp32


@dataclass(frozen=True)
class Work:
    """A method made ready for a setting.

    Attributes:
        run: what is timed.
        error: relative error of what `run` returned, against the oracle.
    """

    run: Job
    error: Callable[[Any], float]


@dataclass(frozen=True)
class Method:
    """One way to do a job.

    Attributes:
        name: in the tables.
        prepare: makes it ready for a setting.
        exact: where its error is rounding only, so that the benchmark fails if it is not: "always", "unpadded" (where
            no sequence is padded) or "never".
        note: what it computes differently where it is not exact, or what one has to know about its time.
        peer: whether it runs another library's code throughout.
        headline: whether the README shows it; peers always are.
    """

    name: str
    prepare: Callable[[Setting], Work]
    exact: str = "always"
    note: str = ""
    peer: bool = False
    headline: bool = False

    def __str__(self) -> str:
        return self.name


def measure(
    benchmark: BenchmarkFixture,
    job: str,
    method: Method,
    setting: Setting,
    floor: Callable[[Setting], None] | None = None,
    rounds: int | None = None,
) -> None:
    """Benchmarks a method, with a run of the floor before each of its rounds by the same clock.

    Args:
        benchmark: pytest-benchmark's fixture; its `extra_info` receives the floor's median, the median of the rounds'
            ratios, both peaks, and the error.
        job: first part of the group's name.
        method: what is timed.
        setting: what on.
        floor: the bare passes, where the job needs any.
        rounds: timed rounds, instead of the setting's.
    """
    work = method.prepare(setting)
    clock = benchmark._timer
    floors: list[float] = []

    def run_floor() -> None:
        start = clock()
        if floor is not None:
            floor(setting)
        floors.append(clock() - start)

    benchmark.group = f"{job} {setting.name}"
    benchmark.extra_info |= {
        "job": job,
        "size": setting.name,
        "method": method.name,
        "peer": method.peer,
        "headline": method.headline or method.peer,
        "note": method.note,
        "threads": torch.get_num_threads(),
        "peak_mib": peak_bytes(work.run) / 2**20,  # and a run to warm up
    }
    rounds = rounds or (setting.peer_rounds if method.peer else setting.rounds)
    result = benchmark.pedantic(work.run, setup=run_floor, rounds=rounds)
    if floor is not None and benchmark.enabled:
        times = benchmark.stats.stats.data
        benchmark.extra_info |= {
            "floor_s": statistics.median(floors),
            "ratio": statistics.median(time / bare for time, bare in zip(times, floors, strict=True)),
            "floor_peak_mib": floor_peak_bytes(floor, setting) / 2**20,
        }
    error = work.error(result)
    exact = method.exact == "always" or (method.exact == "unpadded" and not setting.padded)
    benchmark.extra_info |= {"error": error, "exact": exact}
    assert error < ROUNDING if exact else error == error, f"relative error {error:.2e}"


@cache
def floor_peak_bytes(floor: Callable[[Setting], None], setting: Setting) -> int:
    return peak_bytes(lambda: floor(setting))


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
