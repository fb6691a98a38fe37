"""Time calls on a GPU: cold L2, replayed from CUDA graphs, variants interleaved, medians with spread.

Single kernels are short against the gap between two launches, and an event pair around one times the gap. So the
calls of a variant, over inputs that together exceed the L2 cache, are captured in one graph; its replays are timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Microseconds per call."""

    median: float
    p20: float
    p80: float


def measure(
    variants: Mapping[str, Sequence[Call]], device: torch.device, rounds: int, capture: bool = True
) -> dict[str, Spread]:
    """Median, 20th and 80th percentile of the time per call of each variant.

    Args:
        variants: For each variant one call per input; the inputs rotate, so that each call finds a cold cache.
        device: Where the calls run.
        rounds: Timings of each variant; the variants take turns.
        capture: Whether the calls go into a CUDA graph. Otherwise the time includes their launches.
    """
    prepare = _graph if device.type == "cuda" and capture else _loop
    replays = {name: prepare(calls) for name, calls in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(_seconds(replay, device) * 1e6 / len(variants[name]))
    return {name: _spread(values) for name, values in times.items()}


def seconds(call: Call, device: torch.device, rounds: int) -> Spread:
    """The same for one call that cannot be captured, in seconds."""
    call()
    return _spread([_seconds(call, device) for _ in range(rounds)])


def inputs_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many inputs of `nbytes` must rotate so that none is still in the L2 cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(16, -(-3 * cache // nbytes)))


def _graph(calls: Sequence[Call]) -> Call:
    for call in calls:  # compiles, and fills the workspaces of libraries, outside the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph.replay


def _loop(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    run()
    return run


def _seconds(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[-1])
