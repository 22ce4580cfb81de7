"""Threads within a call, concurrent callers, and forked processes: the same bits, and no deadlocks."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dcgan.kernels import chain, ops
from dcgan.kernels.spec import Stage
from tests.support import native
from tests.support.networks import NETWORKS, fast_network, sample

pytestmark = [native.NEEDED, pytest.mark.usefixtures("no_grad", "threads_restored")]


def network(kind: str, features: int = 8) -> torch.nn.Module:
    return fast_network(kind, image_size=64, features=features)  # type: ignore[no-any-return]


# --- thread counts -----------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("batch", [1, 2, 17])
def test_the_same_bits_on_any_number_of_threads(kind: str, batch: int) -> None:
    model = network(kind)
    x = sample(model, batch)
    torch.set_num_threads(1)
    expected = model(x)
    for threads in (2, 7, 3, 1):
        torch.set_num_threads(threads)
        assert torch.equal(model(x), expected)
        model.refresh()  # also pack on that many threads
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("algorithm", [*native.SPATIAL, "dense"])
@pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
def test_a_layer_has_the_same_bits_on_any_number_of_threads(transposed: bool, algorithm: str) -> None:
    """For every algorithm, also where there is less work than threads."""
    for sizes in ({}, {"batch": 1, "c_out": 1, "c_in": 40}, {"c_in": 33, "c_out": 70}):
        call = native.small(algorithm, transposed).with_(**sizes).call()
        found = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            with native.forced(algorithm):
                found.append(native.run_native(call, transposed))
        assert all(torch.equal(y, found[0]) for y in found)


def in_a_thread(f: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(f).result()


def test_the_thread_count_is_a_per_thread_setting() -> None:
    """PyTorch's thread count is a per-thread setting, which the engine follows.

    A new thread starts with the value that any thread set last.
    """
    torch.set_num_threads(3)
    assert in_a_thread(torch.get_num_threads) == 3

    def set_here() -> int:
        torch.set_num_threads(2)
        return torch.get_num_threads()

    assert in_a_thread(set_here) == 2
    assert torch.get_num_threads() == 3
    assert in_a_thread(torch.get_num_threads) == 2


# --- concurrent callers ------------------------------------------------------------------------------------


@NETWORKS
def test_concurrent_callers_of_one_network(kind: str) -> None:
    """One network, packed by the first caller; several batch sizes; a different thread count per caller."""
    model = network(kind)
    torch.set_num_threads(1)
    batches = [sample(model, n) for n in (1, 3, 8, 2)]
    expected = [model(x) for x in batches]
    model.refresh()
    start = threading.Barrier(4)

    def work(threads: int) -> list[bool]:
        torch.set_num_threads(threads)
        start.wait(60)
        equal = []
        with torch.no_grad():
            for i in range(12):
                j = (i + threads) % len(batches)
                equal.append(torch.equal(model(batches[j]), expected[j]))
        return equal

    with ThreadPoolExecutor(4) as pool:
        for equal in pool.map(work, (1, 2, 3, 4)):
            assert equal == [True] * 12


def test_concurrent_callers_with_separate_networks() -> None:
    """Each caller thread has a separate workspace, which is freed with the thread."""

    def work(seed: int) -> bool:
        with torch.no_grad():
            model = network("GD"[seed % 2], 4 + seed)
            x = sample(model, 4)
            expected = model(x)
            return all(torch.equal(model(x), expected) for _ in range(5))

    torch.set_num_threads(2)
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(work, range(6)))


def test_the_gil_is_released_during_a_call() -> None:
    """The GIL is released: another Python thread runs in the middle of a long call."""
    stages = [Stage(True, torch.randn(64, 64, 4, 4), act="relu") for _ in range(2)]
    x = torch.randn(48, 64, 32, 32)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    torch.set_num_threads(1)
    ticking = threading.Thread(target=tick)
    with ops.use_engine("native"):
        chain.conv_chain(x[:1], stages)
        ticking.start()
        begin = time.perf_counter()
        chain.conv_chain(x, stages)
        end = time.perf_counter()
    done.set()
    ticking.join()
    assert end - begin > 0.02, "the call is too short to measure"
    # With the GIL held there would be none: nearly all of the call is one foreign function.
    within = [t for t in ticks if begin + 0.25 * (end - begin) < t < end - 0.25 * (end - begin)]
    assert len(within) >= 2


# --- forked children ---------------------------------------------------------------------------------------


def in_a_child(f: Callable[[], bytes], seconds: int = 30) -> bytes:
    """Return the result of ``f`` in a forked child; raise AssertionError if it hangs or dies."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            signal.alarm(seconds)
            result = f()
            while result:
                result = result[os.write(writing, result) :]
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    received = b""
    try:
        while select.select([reading], [], [], seconds + 5)[0]:
            piece = os.read(reading, 1 << 16)
            if not piece:
                break
            received += piece
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status), f"the child was killed by signal {os.WTERMSIG(status)}: it hung"
    assert os.WEXITSTATUS(status) == 0
    return received


def as_bytes(y: Tensor) -> bytes:
    return bytes(y.contiguous().numpy().tobytes())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@NETWORKS
def test_in_a_forked_child(kind: str) -> None:
    """The thread pool does not survive a fork: the child runs on one thread, whatever number is set."""
    torch.set_num_threads(2)
    model = network(kind)
    x = sample(model, 8)
    expected = as_bytes(model(x))

    def repacked() -> bytes:
        model.refresh()
        return as_bytes(model(x))

    assert in_a_child(lambda: as_bytes(model(x))) == expected
    assert in_a_child(repacked) == expected
    assert in_a_child(lambda: in_a_child(lambda: as_bytes(model(x)))) == expected
    assert as_bytes(model(x)) == expected


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_runs() -> None:
    torch.set_num_threads(2)
    model = network("G")
    x = sample(model, 8)
    expected = as_bytes(model(x))
    done = threading.Event()

    def busy() -> None:
        with torch.no_grad():
            while not done.is_set():
                model(x)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(3):
            assert in_a_child(lambda: as_bytes(model(x))) == expected
    finally:
        done.set()
        thread.join()


FIRST_USE = """
import os, signal, torch
from dcgan import fast
from dcgan.kernels.cpu import library
torch.set_num_threads(2)
torch.randn(1 << 20).exp()  # PyTorch's own pool of threads, which the library shares
assert library.problem() is None
model = fast.Generator(8, 3, 16, 64).eval()
with torch.no_grad():
    child = os.fork()
    if child == 0:
        signal.alarm(15)
        model(torch.ones(8, 8))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    model(torch.ones(8, 8))
print("exited" if status == 0 else f"ended by signal {status & 127}")
"""


def test_first_used_in_a_forked_child() -> None:
    """The parent has used PyTorch's threads and loaded the library, but has not run it."""
    done = native.in_a_new_process(FIRST_USE)
    assert done.stdout.strip() == "exited", done.stdout + done.stderr
