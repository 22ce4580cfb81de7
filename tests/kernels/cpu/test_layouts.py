"""x, weight and vectors of any strides and alignment; the gaps between elements hold NaN and are not read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from tests.support import native
from tests.support.float64_reference import BOTH, Problem, leaves, op
from tests.support.native import ALGORITHMS, SPATIAL, assert_correct, forced, small
from tests.support.native_training import strided

pytestmark = [native.NEEDED, pytest.mark.usefixtures("one_thread", "nan_in_new_memory")]


def slice_of(t: Tensor) -> Tensor:
    inner = tuple(slice(1, s + 1) for s in t.shape)
    big = torch.full([s + 3 for s in t.shape], float("nan"), dtype=t.dtype)
    big[inner] = t
    return big[inner]


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def channel_slice(t: Tensor) -> Tensor:
    """Slice channels of a wider channels_last tensor: the pixel stride is no multiple of a vector."""
    dim = 1 if t.ndim == 4 else 0
    sides = torch.full_like(t, float("nan")).narrow(dim, 0, 1)
    return channels_last(torch.cat([sides, t, sides], dim)).narrow(dim, 1, t.shape[dim])


def offset(floats: int) -> Callable[[Tensor], Tensor]:
    """Return a function that moves a channels_last tensor ``floats`` elements past a cache line."""

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
    "step": strided,
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
    """Every layout of x with every layout of the weight; no argument is modified."""
    problem = small(algorithm, transposed, channels_last=nhwc, dtype=dtype)
    call = problem.call()
    with forced(algorithm):
        expected = assert_correct(problem)
        for x_of in LAYOUTS.values():
            for weight_of in LAYOUTS.values():
                odd = call._replace(
                    x=x_of(call.x),
                    weight=weight_of(call.weight),
                    out_scale=weight_of(call.out_scale),
                    out_shift=weight_of(call.out_shift),
                )
                y = native.run_native(odd, transposed)
                assert torch.equal(y, expected)
                assert y.stride() == expected.stride()
                for name, t in leaves(odd).items():
                    assert torch.equal(t, getattr(call, name)), name


@BOTH
@ALGORITHMS
@pytest.mark.parametrize("dim", range(4))
def test_expanded(transposed: bool, algorithm: str, dim: int) -> None:
    """x, weight and vectors with strides of 0."""
    problem = small(algorithm, transposed)
    call = problem.call()
    x, weight = (t.narrow(dim, 0, 1).expand(t.shape) for t in (call.x, call.weight))
    vectors = {n: getattr(call, n)[:1].expand_as(getattr(call, n)) for n in ("out_scale", "out_shift")}
    with forced(algorithm):
        y = assert_correct(problem, call._replace(x=x, weight=weight, **vectors))
        whole = {name: t.clone() for name, t in vectors.items()}
        copies = call._replace(x=x.contiguous(), weight=weight.contiguous(), **whole)
        assert torch.equal(y, assert_correct(problem, copies))


@BOTH
@ALGORITHMS
def test_overlapping_windows(transposed: bool, algorithm: str) -> None:
    """Images that share memory, as sliding windows over a signal."""
    problem = small(algorithm, transposed)
    call = problem.call()
    c, h, w = call.x.shape[1:]
    signal = torch.randn(c * h * w + 64)
    x = signal.as_strided(call.x.shape, (5, 1, 3 * c, c))
    with forced(algorithm):
        assert_correct(problem, call._replace(x=x))


@BOTH
@ALGORITHMS
def test_negated_views(transposed: bool, algorithm: str) -> None:
    """Views with the negation bit, whose memory is not negated."""
    problem = small(algorithm, transposed)
    call = problem.call()
    for name in ("x", "weight", "out_scale", "out_shift"):
        negative = torch._neg_view(getattr(call, name))
        assert negative.is_neg()
        with forced(algorithm):
            assert_correct(problem, call._replace(**{name: negative}))


@BOTH
@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("c_out", [1, 3, 6])
def test_strides_where_both_formats_coincide(
    transposed: bool, nhwc: bool, dtype: torch.dtype, c_out: int
) -> None:
    """Strides equal the reference's and the fake's, including size-1 dimensions."""
    for sizes in (
        {"size": (1, 1), "kernel": (1, 1), "stride": 1, "padding": 0},
        {"size": (1, 1), "kernel": (3, 3), "stride": 1, "padding": 0} if transposed else {"size": (2, 2)},
        {"size": (3, 3), "kernel": (3, 3), "stride": 1, "padding": 0} if not transposed else {"size": (1, 2)},
        {"size": (2, 4)},
    ):
        problem = Problem(transposed, 2, 5, c_out, dtype=dtype, channels_last=nhwc, **sizes)
        for algorithm in SPATIAL:
            with forced(algorithm):
                y = assert_correct(problem)
        meta = ops.Call(*[v.to("meta") if isinstance(v, Tensor) else v for v in problem.call()])
        assert y.stride() == op(transposed)(*meta)[0].stride()


@BOTH
def test_default_dtype_and_device_are_ignored(transposed: bool) -> None:
    """A layer allocates with its arguments' dtype and device, not the defaults of torch.empty."""
    problem = small("f2", transposed)
    expected = assert_correct(problem)
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
        assert torch.equal(native.run_native(call, transposed), expected)
