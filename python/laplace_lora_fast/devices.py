"""Where a model lives, and the way there."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Where the model expects its inputs."""
    return torch.device(getattr(model, "device", None) or next(model.parameters()).device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """X on `device`. Only on the way to the CPU does the host wait for it.

    Pinned memory may thus be read after this has returned: a loader gives each batch its own, as torch's does.
    """
    return x.to(device, non_blocking=device.type != "cpu")
