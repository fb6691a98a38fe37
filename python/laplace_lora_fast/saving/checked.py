"""Safetensors files with a header and a checksum over both: written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laplace_lora_fast.errors import StateError
from laplace_lora_fast.saving.atomic import replacing

MALFORMED = (
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    RecursionError,
    OverflowError,
    RuntimeError,
)
_RESTORE = "bring it back from a copy, or make it anew"


def write(path: Path, form: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes `path`, whole or not at all.

    Args:
        path: in a folder that exists.
        form: name and version of the format.
        header: JSON-serialisable.
        tensors: on any device.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(contiguous, partial, metadata=metadata(form, json.dumps(header), contiguous))
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path} cannot be written: {error}") from error


def metadata(form: str, header: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of a file with this header and these tensors on the CPU, with a checksum over both."""
    digest = hashlib.sha256(header.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {"format": form, "header": header, "sha256": digest.hexdigest()}


def read(path: Path, form: str, remedy: str) -> tuple[Any, dict[str, Tensor]]:
    """Header and tensors, on the CPU, of what `write` wrote.

    Args:
        path: of a file that exists.
        form: name and version of the format.
        remedy: what to do about a file of another format.

    Raises:
        StateError: it is truncated, damaged, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if found.get("format") == form:
                # cloned to torch's alignment, on which the last bit of products can depend
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, *MALFORMED) as error:
        raise StateError(f"{path} is truncated or damaged: {_RESTORE} ({error})") from error
    if found.get("format") != form:
        raise StateError(f"{path} has format {found.get('format')!r}, this version reads {form!r}: {remedy}")
    text = found.get("header", "")
    if metadata(form, text, tensors) != found:
        raise StateError(f"{path} is damaged, its content does not match its checksum: {_RESTORE}")
    try:
        return json.loads(text), tensors
    except MALFORMED as error:
        raise StateError(f"{path} has a damaged header: {_RESTORE} ({error})") from error


def as_json(value: Any) -> Any:
    """What JSON gives back of a value."""
    return json.loads(json.dumps(value))
