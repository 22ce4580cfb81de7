"""A planned launch hands the GPU what Triton's own would; told by a driver that only records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

from bench.pretend import Driver
from dcgan.kernels import gpu
from dcgan.kernels.call import Call
from dcgan.kernels.gpu import plans

launched: list[tuple[Any, ...]] = []


class Recorder(Driver):
    class launcher_cls:
        def __init__(self, source: Any, metadata: Any) -> None:
            pass

        def __call__(self, *arguments: Any) -> None:
            launched.append(arguments)


@pytest.fixture(autouse=True)
def _recorder() -> Iterator[None]:
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Recorder())
    launched.clear()
    plans._plans.clear()
    yield
    plans._plans.clear()
    triton.runtime.driver._active = before


def call(transposed: bool, c_in: int, c_out: int, size: int, vectors: bool) -> Call:
    x = torch.randn(2, c_in, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(*((c_in, c_out) if transposed else (c_out, c_in)), 4, 4)
    stride, padding = (1, 0) if size in (1, 4) and (transposed == (size == 1)) else (2, 1)
    vector = torch.randn(c_out) if vectors else None
    return Call(x, weight, out_scale=vector, out_shift=vector, out_act="relu", stride=stride, padding=padding)


def described(arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments of a launch, tensors by what a kernel sees of them; without stream, handles and metadata."""
    grid, kernel_arguments = arguments[:3], arguments[9:]
    return [
        *grid,
        *(
            (tuple(v.shape), v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v
            for v in kernel_arguments
        ),
    ]


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize(
    ("transposed", "c_in", "c_out", "size"),
    [
        (True, 32, 16, 8),
        (True, 32, 1, 8),
        (True, 20, 16, 1),
        (False, 16, 32, 8),
        (False, 3, 32, 8),
        (False, 32, 1, 4),
    ],
    ids=["up", "up_narrow", "dense_up", "down", "down_narrow", "dense_narrow"],
)
def test_the_second_launch_is_the_first(
    transposed: bool, c_in: int, c_out: int, size: int, vectors: bool
) -> None:
    first = call(transposed, c_in, c_out, size, vectors)
    second = first._replace(x=first.x.clone(), weight=first.weight.clone())
    gpu.forward(first, transposed)
    y = gpu.forward(second, transposed)[0]
    assert len(plans._plans) == 1
    assert len(launched) == 2
    assert described(launched[0]) == described(launched[1])
    pointers = [v.data_ptr() for v in launched[1][9:] if isinstance(v, torch.Tensor)]
    assert second.x.data_ptr() in pointers
    assert first.x.data_ptr() not in pointers
    assert y.data_ptr() in pointers


def test_another_layout_alignment_or_activation_is_another_plan() -> None:
    first = call(True, 32, 16, 8, True)
    gpu.forward(first, True)
    unaligned = torch.randn(1 + first.x.numel())[1:].view(2, 8, 8, 32).permute(0, 3, 1, 2)
    for other in (
        first._replace(x=first.x.contiguous()),
        first._replace(x=unaligned),
        first._replace(out_act="tanh"),
        first._replace(out_scale=None),
        first._replace(slope=0.5),
        first._replace(channels_last=False),
        first._replace(x=first.x[:1]),
    ):
        before = len(plans._plans)
        gpu.forward(other, True)
        assert len(plans._plans) == before + 1


@pytest.mark.parametrize("c_in", [3, 32], ids=["down_narrow", "down"])
def test_an_unaligned_weight_that_needs_no_packing_is_another_plan(c_in: int) -> None:
    """Code that assumes 16-byte alignment would fault on it."""
    first = call(False, c_in, 32, 8, True)
    nhwc = torch.contiguous_format if c_in == 3 else torch.channels_last
    aligned = first.weight.to(memory_format=nhwc)
    memory = torch.empty(1 + aligned.numel())[1:]
    unaligned = memory.as_strided(aligned.shape, aligned.stride()).copy_(aligned)
    assert unaligned.data_ptr() % 16
    gpu.forward(first._replace(weight=aligned), False)
    gpu.forward(first._replace(weight=unaligned), False)
    assert len(plans._plans) == 2


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LIMIT", 3)
    for slope in range(7):
        gpu.forward(call(True, 32, 16, 8, True)._replace(slope=float(slope)), True)
    assert len(plans._plans) <= 3
