"""Time calls on a GPU: cold L2, replayed from CUDA graphs, variants interleaved, medians with spread.

Single kernels are short against the gap between two launches, and an event pair around one times the gap. So the
calls of a variant, over inputs that together exceed the L2 cache, are captured in one graph; its replays are timed.
"""

from __future__ import annotations

import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]
Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Spread:
    """Microseconds per call."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Variant:
    """One call per input; the inputs rotate, so that each call finds a cold cache. All run within the context."""

    calls: Sequence[Call]
    context: Context = nullcontext


def measure(
    variants: Mapping[str, Variant], device: torch.device, rounds: int, capture: bool = True
) -> tuple[dict[str, Spread], dict[str, str]]:
    """Median, 20th and 80th percentile of the time per call of each variant.

    Args:
        variants: What is compared.
        device: Where the calls run.
        rounds: Timings of each variant; the variants take turns.
        capture: Whether the calls go into a CUDA graph. Otherwise the time includes their launches.

    Returns:
        The times of the variants that run, and the errors of those that do not.
    """
    prepare = _graph if device.type == "cuda" and capture else _loop
    replays: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, variant in variants.items():
        with recording(failed, name), variant.context(), no_fallback():
            replays[name] = prepare(variant.calls)
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            with variants[name].context():
                variants[name].calls[-1]()  # here the choice of a backend takes its time
                times[name].append(_seconds(replay, device) * 1e6 / len(variants[name].calls))
    return {name: spread(values) for name, values in times.items()}, failed


@contextmanager
def no_fallback() -> Iterator[None]:
    """A kernel that does not compile is an error here: the reference's time must not pass for its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="laplace_kernels.*does not compile")
        yield


@contextmanager
def recording(record: dict[str, Any], key: str) -> Iterator[None]:
    """An error within it becomes an entry of `record`, in one line; what follows goes on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        record[key] = " ".join(f"{type(error).__name__}: {error}".split())[:500]


class Laps:
    """Batches, each timed from when it is handed out until the next one is asked for.

    Args:
        batches: What to iterate over, once.
        device: Where the work on them runs.
    """

    def __init__(self, batches: Sequence[Any], device: torch.device) -> None:
        self.batches, self._device = batches, device
        self._stamps: list[Any] = []  # events, or seconds

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self._stamp()
            yield batch
        self._stamp()

    def seconds(self) -> list[float]:
        """Of each batch; waits for the device."""
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        if self._device.type != "cuda":
            return [after - before for before, after in pairs]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]

    def spread(self) -> Spread:
        """Without the first batch, on which kernels are compiled and buffers allocated."""
        return spread(self.seconds()[1:])

    def _stamp(self) -> None:
        if self._device.type != "cuda":
            self._stamps.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._stamps.append(event)


def inputs_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many inputs of `nbytes` must rotate so that none is still in the L2 cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(160, -(-3 * cache // nbytes)))


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


def spread(values: Sequence[float]) -> Spread:
    """Median and fifths of values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[-1])
