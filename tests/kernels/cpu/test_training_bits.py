"""The native engine in training gives equal bits for any strides, in any run, and to concurrent callers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.cpu import library
from tests.support import native
from tests.support.engine_results import results
from tests.support.float64_reference import (
    BOTH,
    leaves,
)
from tests.support.native import (
    ALGORITHMS,
    ISAS,
    LAYER,
    instruction_set,
)
from tests.support.native_training import (
    cotangents,
    forced,
    layer,
    native_results,
    random_call,
    strided,
)
from tests.support.tolerance import relative

pytestmark = [native.NEEDED, pytest.mark.usefixtures("nan_in_new_memory", "threads_restored")]


# --- strides ------------------------------------------------------------------------------------------------


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check for equal bits; dout_scale sums over the weights in memory order, and may differ by rounding."""
    assert found.keys() == expected.keys()
    for name, result in found.items():
        if name == "dout_scale":
            assert relative(result, expected[name]) <= LAYER
        else:
            assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("epilogue", ["statistics", "scale_shift_leaky_relu"])
@ALGORITHMS
@BOTH
def test_any_strides(transposed: bool, algorithm: str, epilogue: str) -> None:
    """x, weight, vectors and output gradients of any strides give the same bits."""
    call = random_call(layer(algorithm, transposed, "affine_relu", epilogue))
    given = cotangents(call, transposed)
    with forced(algorithm):
        expected = native_results(call, transposed, given)
        weights = (
            call.weight.contiguous(memory_format=torch.channels_last),
            call.weight.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
            strided(call.weight),
        )
        odd = call._replace(**{name: strided(t) for name, t in leaves(call).items() if name != "weight"})
        spread: Any = tuple(None if c is None else strided(c) for c in given)
        for weight in weights:
            assert_same(native_results(odd._replace(weight=weight), transposed, spread), expected)


@BOTH
def test_expanded_and_negated_operands(transposed: bool) -> None:
    for epilogue in ("statistics", "scale_shift_tanh"):
        call = random_call(layer("f4", transposed, "affine_relu", epilogue))
        given = cotangents(call, transposed)
        for name, t in leaves(call).items():
            for odd in (t.narrow(0, 0, 1).expand(t.shape), torch._neg_view(t)):
                now = call._replace(**{name: odd})
                copied = call._replace(**{name: odd.clone().resolve_neg().contiguous()})
                found, expected = (native_results(c, transposed, given) for c in (now, copied))
                assert_same(found, expected)


def test_live_outputs_are_not_overwritten() -> None:
    """Over several steps: memory returns to the pool with its last tensor, and not earlier."""
    problem = layer("f4", True, "affine_relu", "statistics", batch=4, c_in=16, c_out=24, size=(40, 40))
    call = problem.call()
    given = cotangents(call, True)
    kept: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for step in range(4):
        found = native_results(call._replace(x=call.x + step), True, given)
        kept.append((found, {name: t.clone() for name, t in found.items()}))
        if step % 2:
            kept.pop(0)
    for found, copies in kept:
        for name, t in found.items():
            assert torch.equal(t, copies[name]), name
    views = [found["y"][1:, :, ::2] for found, _ in kept]
    expected = [view.clone() for view in views]
    kept.clear()
    del found, copies
    native_results(call, True, given)
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


# --- threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@ALGORITHMS
@BOTH
def test_runs_are_deterministic(transposed: bool, algorithm: str, isa: str) -> None:
    """For each number of threads, with new and with reused memory."""
    problem = layer(algorithm, transposed, "affine_leaky_relu", "statistics", batch=5, c_in=17, c_out=18)
    call = random_call(problem)
    given = cotangents(call, transposed)
    with instruction_set(isa), forced(algorithm):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            library.release()
            first = native_results(call, transposed, given)
            for _ in range(3):
                again = native_results(call, transposed, given)
                assert all(torch.equal(first[key], again[key]) for key in first), threads


@pytest.mark.parametrize("algorithm", ["direct", "f4", "dense"])
def test_concurrent_callers(algorithm: str) -> None:
    """Each caller uses a different number of threads; forward and backward of both ops."""
    problems = [layer(algorithm, t, "affine_relu", "statistics", batch=5) for t in (False, True)]
    calls = [(random_call(p), p.transposed) for p in problems]
    tasks = [(call, transposed, cotangents(call, transposed)) for call, transposed in calls]
    expected = {}
    with forced(algorithm):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            expected[threads] = [native_results(*task) for task in tasks]
        start = threading.Barrier(4)

        def work(index: int) -> bool:
            threads = 1 + index % 3
            torch.get_num_threads()  # a new thread's first use sets its count to the last set by any thread
            start.wait(60)
            torch.set_num_threads(threads)
            equal = True
            for i in range(12):
                which = (i + index) % 2
                call, transposed, given = tasks[which]
                found = results(call, transposed, given)  # all use one engine, which is a global
                equal &= all(torch.equal(t, expected[threads][which][key]) for key, t in found.items())
            return equal

        with ops.use_engine("native"), ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
