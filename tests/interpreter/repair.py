"""Patches of Triton's interpreter: bfloat16 arithmetic, and speed.

The interpreter computes on the bit patterns of bfloat16. Patched, casts round to nearest even, products
multiply values and accumulate in float32, and elementwise operations go through float32. Tested with Triton
3.6 and 3.8.
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
    """Patch bfloat16 arithmetic into this process's interpreter."""
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
    """Make this process's interpreter more than twice as fast.

    It spends much of its time on overflow checks of every integer operation, which only large offsets need
    (:func:`overflow_checked`), and on listing the members of triton.language at every call of a device
    function to find those it has to patch; this list is cached.
    """
    _check_overflow(False)

    @functools.cache
    def names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def getmembers(package: Any) -> list[tuple[str, Any]]:
        return [(name, getattr(package, name)) for name in names(package)]

    interpreter.inspect = types.SimpleNamespace(**(vars(inspect) | {"getmembers": getmembers}))


def _check_overflow(enabled: bool) -> None:
    builder: Any = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=enabled)


@contextlib.contextmanager
def overflow_checked() -> Iterator[None]:
    """Raise an error where a 32-bit integer operation overflows, as the unpatched interpreter does."""
    _check_overflow(True)
    try:
        yield
    finally:
        _check_overflow(False)
