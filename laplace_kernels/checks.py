"""What each op accepts, checked in one place; every error names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Fp32 for bf16, fp16 and fp32 inputs, fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_gram(C: Tensor, X: Tensor, mask: Tensor | None, alpha: float, suffix: str = "") -> None:
    """Arguments of `gram_`; `suffix` marks the member of a group."""
    _check_float(f"X{suffix}", X, 2)
    d = X.shape[1]
    _check_accumulator(f"C{suffix}", C, (d, d), f"X{suffix}", X)
    _check_mask(f"mask{suffix}", mask, (X.shape[0],), X)
    _check_number(f"alpha{suffix}", alpha)


def check_gram_sketch(Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None, alpha: float) -> None:
    """Arguments of `gram_sketch_`."""
    _check_float("X", X, 2)
    _check_float("Omega", Omega, 2)
    d = X.shape[1]
    _check_companion("Omega", Omega, (d, Omega.shape[1]), "X", X)
    _check_accumulator("Y", Y, (d, Omega.shape[1]), "X", X)
    _check_mask("mask", mask, (X.shape[0],), X)
    _check_number("alpha", alpha)


def check_gram_group(
    Cs: Sequence[Tensor], Xs: Sequence[Tensor], masks: Sequence[Tensor | None], alphas: Sequence[float]
) -> None:
    """Arguments of `gram_group_`."""
    for name, sequence in (("Xs", Xs), ("masks", masks), ("alphas", alphas)):
        if len(sequence) != len(Cs):
            raise ValueError(f"{name} must have as many members as Cs ({len(Cs)}), got {len(sequence)}")
    for i, (C, X, mask, alpha) in enumerate(zip(Cs, Xs, masks, alphas, strict=True)):
        check_gram(C, X, mask, alpha, suffix=f"s[{i}]")
        if X.dtype != Xs[0].dtype or X.device != Xs[0].device:
            raise ValueError(
                f"Xs[{i}] must have the dtype and device of Xs[0] ({Xs[0].dtype}, {Xs[0].device}), "
                f"got {X.dtype}, {X.device}"
            )


def check_jacobian_stats(small: Tensor, large: Tensor, basis: Tensor, mask: Tensor | None) -> None:
    """Arguments of `jacobian_stats`."""
    _check_float("small", small, 4)
    _check_float("large", large, 4)
    _check_float("basis", basis, 2)
    N, Cs, T, _ = small.shape
    Cl, d = large.shape[1], large.shape[3]
    if min(Cs, Cl) < 1 or (Cs != Cl and 1 not in (Cs, Cl)):
        raise ValueError(f"small and large must have the same number of classes, or 1, got {Cs} and {Cl}")
    _check_companion("large", large, (N, Cl, T, d), "small", small)
    _check_companion("basis", basis, (d, basis.shape[1]), "large", large)
    _check_mask("mask", mask, (N, T), large)


def check_kron_apply(W: Tensor, U: Tensor, V: Tensor, core: Tensor, tail: Tensor) -> None:
    """Arguments of `kron_apply`."""
    _check_float("W", W, 3)
    _check_float("U", U, 2)
    _, r, d = W.shape
    k = U.shape[1]
    if k > d:
        raise ValueError(f"U must have orthonormal columns, at most d = {d} of them, got {k}")
    for name, tensor, shape in (
        ("U", U, (d, k)),
        ("V", V, (r, r)),
        ("core", core, (r, k)),
        ("tail", tail, (r,)),
    ):
        _check_float(name, tensor, len(shape))
        _check_companion(name, tensor, shape, "W", W)


def check_mirror(C: Tensor) -> None:
    """Arguments of `mirror_`."""
    _check_float("C", C, 2)
    if C.shape[0] != C.shape[1]:
        raise ValueError(f"C must be square, got {tuple(C.shape)}")


def _check_float(name: str, tensor: Tensor, ndim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
    if tensor.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")


def _check_companion(
    name: str, tensor: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor
) -> None:
    """Shape, device, and fp64 on both sides or on neither."""
    _check_shape(name, tensor, shape, other_name, other)
    _check_device(name, tensor, other_name, other)
    if (tensor.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"{name} and {other_name} must both be float64 or neither, got {tensor.dtype} and {other.dtype}"
        )


def _check_accumulator(
    name: str, tensor: Tensor, shape: tuple[int, int], other_name: str, other: Tensor
) -> None:
    _check_float(name, tensor, 2)
    _check_shape(name, tensor, shape, other_name, other)
    dtype = accumulation_dtype(other.dtype)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for {other_name} in {other.dtype}, got {tensor.dtype}")
    if shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {tensor.stride()}")
    if shape[0] > 1 and tensor.stride(0) < shape[1]:
        raise ValueError(f"{name} must have rows that do not overlap, got strides {tensor.stride()}")
    _check_device(name, tensor, other_name, other)


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], other: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, True where a row counts, got {got}")
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(mask.shape)}")
    if mask.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {mask.device}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], other_name: str, other: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} to match {other_name} {tuple(other.shape)}, "
            f"got {tuple(tensor.shape)}"
        )


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, Tensor):  # reading it would wait for the device
        raise TypeError(f"{name} must be a Python number, got a tensor")
