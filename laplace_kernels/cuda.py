"""The compiled CUDA kernels of csrc/ as a backend: `gram_group_`, `gram_sketch_`, and both in one call for a model.

They have been compiled, and run on an emulation of a GPU, but never on a GPU: "auto" does not choose them, and
`use_backend("cuda")` does. `LAPLACE_KERNELS_BUILD_CUDA=1 pip install .` builds them.
"""

from __future__ import annotations

import functools
import importlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace_kernels import ops
from laplace_kernels.dispatch import Backend
from laplace_kernels.overlap import refuse_overlap

_DTYPES = (torch.bfloat16, torch.float16)
# The structs of csrc/updates.h.
_GRAM = struct.Struct("=3Q3qif")  # c, x, mask; tokens, strides of c and x; d; alpha
_SKETCH = struct.Struct("=4Q4q2ifi")  # y, x, omega, mask; tokens, strides of y, x, omega; d, m; alpha; unused


class Gram(NamedTuple):
    """Arguments of one `laplace_kernels.gram_`."""

    C: Tensor
    X: Tensor
    mask: Tensor | None = None
    alpha: float = 1.0


class Sketch(NamedTuple):
    """Arguments of one `laplace_kernels.gram_sketch_`."""

    Y: Tensor
    X: Tensor
    Omega: Tensor
    mask: Tensor | None = None
    alpha: float = 1.0


def flush(grams: Sequence[Gram] = (), sketches: Sequence[Sketch] = ()) -> None:
    """Issues many updates, all the factors of a micro-batch say, in one call.

    The Gram matrices share one launch, up to 500 of them; a sketch has a launch of its own (or a few per block of
    tokens), issued from C++.

    Args:
        grams: Updates as of `laplace_kernels.gram_`. No two updates may share an accumulator.
        sketches: Updates as of `laplace_kernels.gram_sketch_`.

    Raises:
        TypeError: A dtype is wrong; the message names the update and the argument.
        ValueError: A shape, device or stride does not fit, the updates differ in dtype or device, or an accumulator
            shares memory with another one or with an input.
        RuntimeError: The library is not there, has no code for the GPU, or CUDA failed in the kernel it names.
    """
    updates: list[tuple[str, Gram | Sketch]] = [(f"grams[{i}]", gram) for i, gram in enumerate(grams)]
    updates += [(f"sketches[{i}]", sketch) for i, sketch in enumerate(sketches)]
    if not updates:
        return
    first = updates[0][1].X
    tensors: list[tuple[str, Tensor, bool]] = []
    for name, update in updates:
        op = ops.gram.OP if isinstance(update, Gram) else ops.gram_sketch.OP
        try:
            op.check(*update)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        if update.X.dtype not in _DTYPES:
            raise TypeError(f"{name}: X must be bfloat16 or float16, got {update.X.dtype}")
        if (update.X.dtype, update.X.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name}: X must have the dtype and device of {updates[0][0]} ({first.dtype}, {first.device}), "
                f"got {update.X.dtype}, {update.X.device}"
            )
        tensors += [
            (f"{name}: {argument}", tensor, written) for argument, tensor, written in op.tensors(update)
        ]
    refuse_overlap(tensors)
    obstacle = _obstacle("flush", first.device, first.dtype)
    if obstacle:
        raise RuntimeError(f"the CUDA kernels cannot serve X on {first.device}: {obstacle}")
    _flush(grams, sketches)


def _gram_group(
    Cs: Sequence[Tensor], Xs: Sequence[Tensor], masks: Sequence[Tensor | None], alphas: Sequence[float]
) -> None:
    _flush([Gram(*update) for update in zip(Cs, Xs, masks, alphas, strict=True)], ())


def _gram_sketch(Y: Tensor, X: Tensor, Omega: Tensor, mask: Tensor | None, alpha: float) -> None:
    _flush((), [Sketch(Y, X, Omega, mask, alpha)])


def _flush(grams: Sequence[Gram], sketches: Sequence[Sketch]) -> None:
    X = grams[0].X if grams else sketches[0].X
    copies: list[Tensor] = []  # what the kernels read besides the arguments, alive until they are launched
    packed_grams = b"".join(_pack_gram(gram, copies) for gram in grams)
    packed_sketches = b"".join(_pack_sketch(sketch, copies) for sketch in sketches)
    fp16 = X.dtype == torch.float16
    deterministic = torch.are_deterministic_algorithms_enabled()
    library = _library()
    with torch.cuda.device(X.device):
        floats = library.workspace_floats(packed_sketches, fp16, deterministic) if sketches else 0
        workspace = X.new_empty(floats, dtype=torch.float32)
        library.flush(
            packed_grams,
            packed_sketches,
            fp16,
            workspace.data_ptr(),
            deterministic,
            torch._C._cuda_getCurrentRawStream(X.device.index),
        )


def _pack_gram(gram: Gram, copies: list[Tensor]) -> bytes:
    C, X, mask, alpha = gram
    X = _contiguous_rows(X, copies)
    return _GRAM.pack(
        C.data_ptr(), X.data_ptr(), _address(mask, copies),
        X.shape[0], C.stride(0), X.stride(0), X.shape[1], alpha,
    )  # fmt: skip


def _pack_sketch(sketch: Sketch, copies: list[Tensor]) -> bytes:
    Y, X, Omega, mask, alpha = sketch
    X = _contiguous_rows(X, copies)
    Omega = _aligned_rows(Omega, copies)
    return _SKETCH.pack(
        Y.data_ptr(), X.data_ptr(), Omega.data_ptr(), _address(mask, copies),
        X.shape[0], Y.stride(0), X.stride(0), Omega.stride(0), *Y.shape, alpha, 0,
    )  # fmt: skip


def _contiguous_rows(X: Tensor, copies: list[Tensor]) -> Tensor:
    """X itself when its last axis is contiguous, else a copy."""
    if X.stride(1) != 1 and X.shape[1] > 1:
        X = X.contiguous()
        copies.append(X)
    return X


def _aligned_rows(Omega: Tensor, copies: list[Tensor]) -> Tensor:
    """Omega in fp32 with contiguous rows that start at multiples of 16 bytes: itself, or a padded copy."""
    d, m = Omega.shape
    contiguous = Omega.dtype == torch.float32 and (Omega.stride(1) == 1 or m == 1)
    if contiguous and Omega.stride(0) % 4 == 0 and Omega.data_ptr() % 16 == 0:
        return Omega
    padded = Omega.new_empty((d, -(-m // 4) * 4), dtype=torch.float32)
    copies.append(padded)
    return padded[:, :m].copy_(Omega)


def _address(mask: Tensor | None, copies: list[Tensor]) -> int:
    """Address of the mask as bytes; 0 for none."""
    if mask is None:
        return 0
    if not mask.is_contiguous():
        mask = mask.contiguous()
        copies.append(mask)
    return mask.data_ptr()


@functools.cache
def _library() -> Any:
    return importlib.import_module("laplace_kernels._cuda")


def _obstacle(op: str, device: torch.device, dtype: torch.dtype) -> str:
    try:
        _library()
    except ImportError as error:
        return f"laplace_kernels._cuda is not there: install with LAPLACE_KERNELS_BUILD_CUDA=1 ({error})"
    if dtype not in _DTYPES:
        return f"it reads bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return _needs_gpu(device)


def _needs_gpu(device: torch.device) -> str:
    """Why kernels cannot run on `device`, empty when they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "it needs an NVIDIA GPU"
    try:
        with torch.cuda.device(device):
            return str(_library().refusal())
    except RuntimeError as error:  # no driver, no such device
        return str(error)


BACKEND = Backend(
    name="cuda",
    kernels={"gram_group_": _gram_group, "gram_sketch_": _gram_sketch},
    obstacle=_obstacle,
    reservation="its kernels have not yet run on hardware, they serve only when asked for",
)
