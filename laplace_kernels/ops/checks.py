"""What the checks of several ops have in common; every error names the argument."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Fp32 for bf16, fp16 and fp32 inputs, fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float(name: str, tensor: Tensor, ndim: int) -> None:
    """A dense float tensor with so many dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
    _check_dense(name, tensor)
    if tensor.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")


def check_companion(
    name: str, tensor: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor
) -> None:
    """Shape, device, and fp64 on both sides or on neither."""
    _check_shape(name, tensor, shape, other_name, other)
    _check_device(name, tensor, other_name, other)
    if (tensor.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"{name} and {other_name} must both be float64 or neither, got {tensor.dtype} and {other.dtype}"
        )


def check_accumulator(
    name: str, tensor: Tensor, shape: tuple[int, int], other_name: str, other: Tensor
) -> None:
    """A matrix for products of `other`: shape, dtype, strides, device."""
    check_float(name, tensor, 2)
    _check_shape(name, tensor, shape, other_name, other)
    dtype = accumulation_dtype(other.dtype)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for {other_name} in {other.dtype}, got {tensor.dtype}")
    if shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {tensor.stride()}")
    if shape[0] > 1 and tensor.stride(0) < shape[1]:
        raise ValueError(f"{name} must have rows that do not overlap, got strides {tensor.stride()}")
    _check_device(name, tensor, other_name, other)


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], other: Tensor) -> None:
    """None, or a dense bool tensor of this shape beside `other`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, True where a row counts, got {got}")
    _check_dense(name, mask)
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(mask.shape)}")
    if mask.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {mask.device}")


def check_number(name: str, value: float) -> None:
    """A real number; not a tensor, since reading it would wait for the device."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} must be a float or fit into 64 bits, got a larger integer")


def check_bool(name: str, value: bool) -> None:
    """True or False; not a tensor, since reading it would wait for the device."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def members(name: str, value: Iterable[Any]) -> list[Any]:
    """The members of an argument that is a sequence."""
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return list(value)


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a dense tensor with strides, got a {kind} one")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} to match {other_name} {tuple(other.shape)}, "
            f"got {tuple(tensor.shape)}"
        )


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")
