"""What Triton's interpreter lacks: bfloat16, on whose bit patterns it computes, and speed.

Of bfloat16, casts round to nearest even, products are of values with float32 sums, elementwise operations go
through float32. Checked against Triton 3.6 and 3.8.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator
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


def speed() -> None:
    """Make the interpreter of this process more than twice as fast.

    Much of its time goes into checks of every integer operation for overflow, which only large offsets need
    (:func:`overflow_checked`), and into listing the members of triton.language anew at every call of a device
    function, to find those that it has to replace.
    """
    _check_overflow(False)

    @functools.cache
    def names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def getmembers(package: Any) -> list[tuple[str, Any]]:
        return [(name, getattr(package, name)) for name in names(package)]

    interpreter.inspect = types.SimpleNamespace(**(vars(inspect) | {"getmembers": getmembers}))


def _check_overflow(wanted: bool) -> None:
    builder: Any = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=wanted)


@contextlib.contextmanager
def overflow_checked() -> Iterator[None]:
    """An error where a 32-bit integer operation overflows, as the interpreter has it by itself."""
    _check_overflow(True)
    try:
        yield
    finally:
        _check_overflow(False)
