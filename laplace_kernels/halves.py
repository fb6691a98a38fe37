"""A more precise matrix as two of 16 bits, for products with a 16-bit one that is not copied to fp32."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_EXPONENT = 10  # of a scaled fp16 matrix: far from overflow, and its low half far from underflow


def halves(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """High, low and scale, with matrix = (high + low) / scale to 2^-17 (bf16) or 2^-21 (fp16) of each entry.

    Fp16 has few exponents: there the scale is a power of two that brings the largest entry close to 2^10; it is None
    for bf16. Nothing waits for the device.

    Args:
        matrix: fp32 or fp64, of any shape.
        dtype: bf16 or fp16.

    Returns:
        Two tensors in `dtype`, and a scalar in that of the matrix, or None.
    """
    scale = None
    if dtype == torch.float16:
        largest = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
        exponent = torch.frexp(largest).exponent
        scale = torch.ldexp(torch.ones_like(largest), _LARGEST_EXPONENT - exponent)
        matrix = matrix * scale
    high = matrix.to(dtype)
    return high, (matrix - high).to(dtype), scale
