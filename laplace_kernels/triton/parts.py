"""fp32 numbers as bf16 parts, which tensor cores multiply."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bf16_parts(value):
    """Two bf16 numbers that add up to a fp32 one, to 16 bits."""
    high = value.to(tl.bfloat16)
    return high, (value - high.to(tl.float32)).to(tl.bfloat16)
