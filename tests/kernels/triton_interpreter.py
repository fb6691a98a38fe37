"""Make Triton's interpreter (TRITON_INTERPRET=1) compute what a GPU computes; for Triton 3.6 to 3.9.

The interpreter keeps bf16 as 16 bits in a uint16. It multiplies those integers in `tl.dot`, truncates when
fp32 is converted to bf16, and knows neither a reduction through a tensor descriptor nor fp32 products in bf16
parts. In Triton 3.6, NumPy 2.5 refuses what it takes for a scalar. `install` mends all of it; a product in parts is
computed in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_Bits = Any  # numpy arrays of uint16


def install() -> None:
    """Patch the interpreter of this process."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    lang_tensor = interpreter._patch_lang_tensor

    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any
    ) -> TensorHandle:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, *options)
        product = np.matmul(_fp32_data(a), _fp32_data(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(_round_to_bf16(source.data).reshape(source.data.shape), tl.bfloat16)
        return cast(self, source, target)

    def create_descriptor_reduce(self: Any, kind: Any, desc: Any, value: TensorHandle, indices: Any) -> None:
        assert "ADD" in str(kind).upper(), "only the sum is emulated"
        pointers, mask = desc.materialize_pointers(indices)
        inside = mask.data if isinstance(mask, TensorHandle) else mask
        before = interpreter._interpreter.load(
            pointers.data, inside, np.zeros_like(value.data), value.data.dtype
        )
        interpreter._interpreter.store(pointers.data, before + value.data, inside)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        allowed_dot_input_precisions=("tf32", "ieee", "bf16x3", "bf16x6")
    )
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_trunc = lambda self, source, target: cast_impl(self, source, target)
    InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce


def _fp32_data(handle: TensorHandle) -> _Bits:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _round_to_bf16(values: Any) -> _Bits:
    """To nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)
