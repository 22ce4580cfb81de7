"""Triton's interpreter computes on the bit patterns of bfloat16; this makes it compute on the values.

Casts round to nearest even, products are of values with float32 sums, elementwise operations go through
float32. Checked against Triton 3.6 and 3.8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    pattern = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = pattern + np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), np.uint16(0x7FC0), (rounded >> np.uint32(16)).astype(np.uint16))


def bfloat16() -> None:
    """Repair the interpreter of this process."""
    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after:
            return source
        if before == tl.bfloat16:
            source, before = handle(_values(source.data), tl.float32), tl.float32
        if after == tl.bfloat16:
            return handle(_bits(source.data.astype(np.float32)), after)
        return source if before == after else cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, acc, *options)
        product = np.matmul(_values(a.data), _values(b.data), dtype=np.float32)
        return handle(product + acc.data, acc.dtype.scalar)

    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., np.ndarray]) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, operation)
        result = operation(_values(left.data), _values(right.data))
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(_bits(result), tl.bfloat16)

    builder.cast_impl, builder.create_dot, builder.binary_op = cast_impl, create_dot, binary_op
