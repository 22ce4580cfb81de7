"""x, weight and vectors in any strides and alignment; what lies between elements is NaN, and not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import native
import pytest
import torch
from native import SPATIAL, assert_right, forced, small
from statement import Problem, leaves, op
from torch import Tensor

from dcgan.kernels import ops

pytestmark = [native.NEEDED, pytest.mark.usefixtures("one_thread")]
BOTH = pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
ALGORITHMS = pytest.mark.parametrize("algorithm", [*SPATIAL, "dense"])


@pytest.fixture(autouse=True)
def _nan() -> Iterator[None]:
    with native.fresh_memory_is_nan():
        yield


def slice_of(t: Tensor) -> Tensor:
    inner = tuple(slice(1, s + 1) for s in t.shape)
    big = torch.full([s + 3 for s in t.shape], float("nan"), dtype=t.dtype)
    big[inner] = t
    return big[inner]


def step_of(t: Tensor) -> Tensor:
    every = tuple(slice(None, None, 2) for _ in t.shape)
    big = torch.full([2 * s for s in t.shape], float("nan"), dtype=t.dtype)
    big[every] = t
    return big[every]


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def channel_slice(t: Tensor) -> Tensor:
    """Of a channels_last tensor with more channels: adjacent, but pixels no multiple of a vector apart."""
    dim = 1 if t.ndim == 4 else 0
    sides = torch.full_like(t, float("nan")).narrow(dim, 0, 1)
    return channels_last(torch.cat([sides, t, sides], dim)).narrow(dim, 1, t.shape[dim])


def offset(floats: int) -> Callable[[Tensor], Tensor]:
    """The tensor's own strides from an address that is that many elements past a cache line."""

    def move(t: Tensor) -> Tensor:
        t = channels_last(t)
        room = torch.full((t.numel() + 64,), float("nan"), dtype=t.dtype)
        start = -room.data_ptr() % 64 // t.element_size() + floats
        moved = room.as_strided(t.shape, t.stride(), start).copy_(t)
        assert moved.data_ptr() % 64 == floats * t.element_size() % 64
        return moved

    return move


def transposed_view(t: Tensor) -> Tensor:
    return t.transpose(0, t.ndim - 1).contiguous().transpose(0, t.ndim - 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": channels_last,
    "slice": slice_of,
    "step": step_of,
    "channel slice": channel_slice,
    "1 past a line": offset(1),
    "7 past a line": offset(7),
    "transposed": transposed_view,
}


@BOTH
@ALGORITHMS
@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(transposed: bool, algorithm: str, nhwc: bool, dtype: torch.dtype) -> None:
    """Every layout of x with every one of the weight, in turn; nothing that was given is changed."""
    problem = small(algorithm, transposed, channels_last=nhwc, dtype=dtype)
    call = problem.call()
    with forced(algorithm):
        expected = assert_right(problem)
        for x_of in LAYOUTS.values():
            for weight_of in LAYOUTS.values():
                odd = call._replace(
                    x=x_of(call.x),
                    weight=weight_of(call.weight),
                    out_scale=weight_of(call.out_scale),
                    out_shift=weight_of(call.out_shift),
                )
                y = native.native(odd, transposed)
                assert torch.equal(y, expected)
                assert y.stride() == expected.stride()
                for name, t in leaves(odd).items():
                    assert torch.equal(t, getattr(call, name)), name


@BOTH
@ALGORITHMS
@pytest.mark.parametrize("dim", range(4))
def test_expanded(transposed: bool, algorithm: str, dim: int) -> None:
    """Strides of 0 in x, weight and vectors."""
    problem = small(algorithm, transposed)
    call = problem.call()
    x, weight = (t.narrow(dim, 0, 1).expand(t.shape) for t in (call.x, call.weight))
    vectors = {n: getattr(call, n)[:1].expand_as(getattr(call, n)) for n in ("out_scale", "out_shift")}
    with forced(algorithm):
        y = assert_right(problem, call._replace(x=x, weight=weight, **vectors))
        whole = {name: t.clone() for name, t in vectors.items()}
        copies = call._replace(x=x.contiguous(), weight=weight.contiguous(), **whole)
        assert torch.equal(y, assert_right(problem, copies))


@BOTH
@ALGORITHMS
def test_overlapping_windows(transposed: bool, algorithm: str) -> None:
    """Images that share memory, as sliding windows over a signal do."""
    problem = small(algorithm, transposed)
    call = problem.call()
    c, h, w = call.x.shape[1:]
    signal = torch.randn(c * h * w + 64)
    x = signal.as_strided(call.x.shape, (5, 1, 3 * c, c))
    with forced(algorithm):
        assert_right(problem, call._replace(x=x))


@BOTH
@ALGORITHMS
def test_negated_views(transposed: bool, algorithm: str) -> None:
    """A view that is negative by a flag alone: the bit is not in its memory."""
    problem = small(algorithm, transposed)
    call = problem.call()
    for name in ("x", "weight", "out_scale", "out_shift"):
        negative = torch._neg_view(getattr(call, name))
        assert negative.is_neg()
        with forced(algorithm):
            assert_right(problem, call._replace(**{name: negative}))


@BOTH
@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("c_out", [1, 3, 6])
def test_strides_where_one_pixel_or_channel_is_both_formats(
    transposed: bool, nhwc: bool, dtype: torch.dtype, c_out: int
) -> None:
    """The reference's strides to the last size-1 dimension, as the operator's fake gives them."""
    for sizes in (
        {"size": (1, 1), "kernel": (1, 1), "stride": 1, "padding": 0},
        {"size": (1, 1), "kernel": (3, 3), "stride": 1, "padding": 0} if transposed else {"size": (2, 2)},
        {"size": (3, 3), "kernel": (3, 3), "stride": 1, "padding": 0} if not transposed else {"size": (1, 2)},
        {"size": (2, 4)},
    ):
        problem = Problem(transposed, 2, 5, c_out, dtype=dtype, channels_last=nhwc, **sizes)
        for algorithm in SPATIAL:
            with forced(algorithm):
                y = assert_right(problem)
        meta = ops.Call(*[v.to("meta") if isinstance(v, Tensor) else v for v in problem.call()])
        assert y.stride() == op(transposed)(*meta)[0].stride()


@BOTH
def test_the_default_dtype_and_device_do_not_matter(transposed: bool) -> None:
    """A layer makes its tensors beside the ones that it is given, whatever torch.empty would make."""
    problem = small("f2", transposed)
    expected = assert_right(problem)
    call = problem.call()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with ops.use_engine("native"):
            y, mean, var = op(transposed)(*call)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(y, expected)
    assert (mean.dtype, var.dtype) == (torch.float32, torch.float32)
    with torch.device("meta"):
        assert torch.equal(native.native(call, transposed), expected)
