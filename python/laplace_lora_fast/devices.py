"""Where a model lives, and the way there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Where the model expects its inputs."""
    device = torch.device(getattr(model, "device", None) or next(model.parameters()).device)
    if device.type != "meta":
        return device
    # What accelerate keeps elsewhere is said to be there; its inputs go where the other weights are.
    return next((each.device for each in model.parameters() if not each.is_meta), device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """X on `device`. Only on the way to the CPU does the host wait for it.

    Pinned memory may thus be read after this has returned: a loader gives each batch its own, as torch's does.
    """
    return x.to(device, non_blocking=device.type != "cpu")


def brought(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> Iterator[Tensor]:
    """Tensors one by one, each on its device; to a GPU the next is copied while one is worked with.

    Copies run on a stream of their own there, and from pinned memory without the host's waiting. In their own dtype:
    what is to be wider is made so afterwards, as torch's `to` would do it before a copy. No more than two copies are
    in memory.
    """
    streams = {device: torch.cuda.Stream(device) for device in set(devices) if device.type == "cuda"}

    def start(place: int) -> tuple[Tensor, torch.cuda.Event | None]:
        tensor, device = tensors[place], devices[place]
        if tensor.device == device or device not in streams:
            return tensor.to(device), None
        with torch.cuda.stream(streams[device]):
            return tensor.to(device, non_blocking=True), streams[device].record_event()

    coming = start(0) if tensors else None
    for place, device in enumerate(devices):
        assert coming is not None
        tensor, done = coming
        coming = start(place + 1) if place + 1 < len(tensors) else None
        if done is not None:
            working = torch.cuda.current_stream(device)
            working.wait_event(done)
            tensor.record_stream(working)
        yield tensor


def room(devices: Sequence[torch.device]) -> int | None:
    """Half of the bytes that are free on GPUs, the rest being for longer batches; None of other devices."""
    gpus = {device for device in devices if device.type == "cuda"}
    if not gpus:
        return None
    free = sum(torch.cuda.mem_get_info(device)[0] for device in gpus)
    cached = sum(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) for device in gpus)
    return int(free + cached) // 2
