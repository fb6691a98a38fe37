"""What fits cost on a 7B model, and where: GPU and host time, launches, memory, and the end of a fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from bench.gpu.models import ANSWERS, SHAPES, TARGETS, Batch, build, forward_backward, make_batch
from bench.gpu.timing import Laps, recording, spread
from laplace_lora_fast import KFAC, Answers, LaplaceLoRA, Rows
from laplace_lora_fast.structures import Structure

Record = dict[str, Any]
Case = tuple[str, str]  # model, LoRA targets
STRUCTURES: dict[str, Structure] = {"rows (default)": Rows(), "KFAC reduce": KFAC()}
SIZES = {"2,048 tokens": (4, 512), "512 tokens": (8, 64), "1,024 tokens, 128 texts": (128, 8)}
BATCHES = 8


def cases(dry: bool) -> list[Case]:
    """One: the model is built once."""
    return [("tiny" if dry else "Llama-2-7B", "q, v")]


def describe(case: Case) -> Record:
    """What names a case in the report."""
    return dict(zip(("model", "targets"), case, strict=True))


def measure(case: Case, device: str, dry: bool) -> Iterator[Record]:
    """A record per size of a batch and job: the bare passes, and each fit beside them."""
    name, targets = case
    on = torch.device(device)
    model = build(SHAPES[name], TARGETS[targets], on)
    for label, (size, tokens) in SIZES.items():
        size, tokens = (2, 8) if dry else (size, tokens)
        batches = [make_batch(SHAPES[name], size, tokens) for _ in range(BATCHES)]
        jobs: dict[str, Callable[[Any], object]] = {
            "bare passes": lambda loader: forward_backward(model, on, loader)
        }
        jobs |= {f"fit, {kind}": fit_of(model, structure) for kind, structure in STRUCTURES.items()}
        for job, run in jobs.items():
            record: Record = {**describe(case), "batch": label, "job": job}
            with recording(record, "failed"):
                record |= _costs(run, batches, on)
            yield record


def fit_of(model: nn.Module, structure: Structure) -> Callable[[Any], object]:
    """A whole fit, its end included."""
    return lambda loader: LaplaceLoRA(model, Answers(ANSWERS), structure=structure).fit(
        loader, progress=False
    )


def _costs(run: Callable[[Any], object], batches: Sequence[Batch], device: torch.device) -> Record:
    """Of a batch: seconds by the GPU's clock and the host's, busy seconds, kernels. Of all: what comes at the end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    laps = HostLaps(batches, device)
    run(laps)
    end = laps.since_last()
    record: Record = {
        "seconds": asdict(laps.spread()),
        "host_seconds": asdict(spread(laps.host_seconds()[1:])),
    }
    record["end_seconds"] = end
    if device.type == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        watched = Watched(batches[:3])
        run(watched)
        record |= {"kernels": watched.kernels, "busy_seconds": watched.busy_seconds}
    return record


class HostLaps(Laps):
    """Laps by the host's clock too: where they are as long as the GPU's, the GPU may have waited for Python."""

    def __init__(self, batches: Sequence[Any], device: torch.device) -> None:
        super().__init__(batches, device)
        self._host: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self._host.append(time.perf_counter())
            yield batch
        self._host.append(time.perf_counter())
        self._wait()
        self._over = time.perf_counter()

    def host_seconds(self) -> list[float]:
        return [after - before for before, after in zip(self._host, self._host[1:], strict=False)]

    def since_last(self) -> float:
        """Seconds from when the last batch was done: what comes at the end of a fit."""
        self._wait()
        return time.perf_counter() - self._over

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Watched:
    """Batches of which the last is profiled."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.kernels, self.busy_seconds = 0, 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[:-1]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield self.batches[-1]
            torch.cuda.synchronize()
        on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        self.kernels = len(on_gpu)
        self.busy_seconds = sum(event.time_range.elapsed_us() for event in on_gpu) / 1e6
