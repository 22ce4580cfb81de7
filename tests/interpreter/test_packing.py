"""Packing of weights: every layout, dtype and stride, exactly as the same permutation by aten.

Buffers start as NaN and are surrounded by a sentinel: an element that is not written stays NaN, and a write
out of bounds changes the sentinel. Weights are surrounded by NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcgan.kernels.gpu import dense, down, launcher, packing, up, up_block
from dcgan.kernels.gpu.packing import ALIGNMENT, Job, Layout
from tests.interpreter import repair
from tests.interpreter.cases import DTYPES, NAN, far_apart, surrounded

SENTINEL = 7.0


def padded_channels(packed: Tensor) -> Tensor:
    return F.pad(packed, (0, -packed.shape[-1] % 16))


LAYOUTS: dict[str, tuple[Layout, Callable[[Tensor], Tensor]]] = {
    "up": (up.LAYOUT, lambda w: w.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(3, 5, 1, 2, 4, 0)),
    "up_block": (up_block.LAYOUT, lambda w: w.permute(2, 3, 1, 0)),
    "down": (down.LAYOUT, lambda w: w.permute(0, 2, 3, 1)),
    "down_narrow": (down.NARROW_LAYOUT, lambda w: w),
    "dense_outer": (dense.OUTER_LAYOUT, lambda w: w.permute(0, 2, 3, 1)),
    "dense_up": (dense.UP_LAYOUT, lambda w: padded_channels(w.permute(2, 3, 1, 0))),
    "dense_down": (dense.DOWN_LAYOUT, lambda w: padded_channels(w.permute(0, 2, 3, 1))),
}
SHAPES: dict[str, list[tuple[int, int, int, int]]] = {
    "up": [(40, 33, 4, 4), (3, 20, 4, 4), (16, 8, 4, 4), (1, 1, 4, 4)],
    "up_block": [(17, 1, 4, 4), (64, 3, 4, 4), (20, 5, 4, 4), (33, 64, 4, 4)],
    "down": [(40, 33, 4, 4), (20, 3, 4, 4), (16, 8, 4, 4), (1, 1, 4, 4)],
    "down_narrow": [(20, 1, 4, 4), (33, 3, 4, 4)],
    "dense_outer": [(4, 20, 4, 4), (1, 33, 4, 4), (3, 5, 3, 2)],
    "dense_up": [(20, 12, 4, 4), (16, 5, 3, 2), (4, 3, 7, 11), (1, 1, 1, 1)],
    "dense_down": [(1, 40, 4, 4), (3, 16, 3, 3), (2, 5, 9, 10)],
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).mul_(100).to(dtype)


def filled_buffer(total: int, dtype: torch.dtype) -> Tensor:
    """Return a buffer of NaN inside a larger one of the sentinel."""
    return torch.full((total + 2 * ALIGNMENT,), SENTINEL, dtype=dtype)[ALIGNMENT:-ALIGNMENT].fill_(NAN)


def check(names: list[str], weights: list[Tensor], dtype: torch.dtype) -> None:
    """Pack weights in the named layouts in one launch, and compare the whole memory with aten's.

    Both into one buffer and, in another order, into two more.
    """
    jobs: list[Job] = [(weight, LAYOUTS[name][0]) for name, weight in zip(names, weights, strict=True)]
    parts = [jobs, jobs[::-2], jobs[-2::-2]]
    buffers = [filled_buffer(packing.offsets(shapes_of(part))[1], dtype) for part in parts]
    packing.pack_into(buffers, parts)
    backwards = names[::-1]
    for own, part, buffer in zip((names, backwards[::2], backwards[1::2]), parts, buffers, strict=True):
        compare(own, part, buffer)


def shapes_of(jobs: list[Job]) -> list[packing.Packed]:
    return [(weight.shape, layout) for weight, layout in jobs]


def compare(names: list[str], jobs: list[Job], buffer: Tensor) -> None:
    dtype, (starts, _) = buffer.dtype, packing.offsets(shapes_of(jobs))
    found = packing.views(buffer, shapes_of(jobs))
    assert buffer._base is not None
    everything = torch.full_like(buffer._base, SENTINEL)
    everything[ALIGNMENT:-ALIGNMENT] = 0.0  # as are the gaps
    for name, (weight, layout), start, packed in zip(names, jobs, starts, found, strict=True):
        expected = LAYOUTS[name][1](weight).to(dtype)
        assert packed.is_contiguous()
        assert packed.shape == expected.shape == layout.shape(weight.shape)
        assert packed.data_ptr() == buffer.data_ptr() + start * buffer.element_size()
        begin = ALIGNMENT + start
        everything[begin : begin + expected.numel()] = expected.flatten()
    torch.testing.assert_close(buffer._base, everything, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_layouts(name: str, shape: tuple[int, int, int, int]) -> None:
    """float32 to float32, NaN around the weight, whose strides are thus not contiguous."""
    check([name], [surrounded(drawn(shape))], torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_casts(name: str, source: torch.dtype, dtype: torch.dtype) -> None:
    """Rounded as aten does; what exceeds the dtype becomes infinite, and NaN stays NaN."""
    weight = drawn(SHAPES[name][1], source)
    weight[0, 0, 0, 0], weight[-1, -1, -1, -1] = NAN, torch.finfo(source).max
    check([name], [weight], dtype)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded": lambda w: w[:, :1, :, :1].expand_as(w),
    "every other tap": lambda w: w.repeat_interleave(2, 3)[..., ::2],
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_strides(name: str, strides: str) -> None:
    weight = drawn(SHAPES[name][1])
    strided = STRIDES[strides](weight)
    check([name], [strided], torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network_is_one_launch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight of a network for fprop and dgrad, of several dtypes and strides."""
    ran: list[str] = []
    run = launcher.Launch.__call__
    monkeypatch.setattr(
        launcher.Launch, "__call__", lambda self: (ran.append(self.kernel.__name__), run(self))[1]
    )
    head, wide = drawn((20, 36, 4, 4)), drawn((36, 18, 4, 4), torch.bfloat16)
    narrower = drawn((18, 11, 4, 4)).contiguous(memory_format=torch.channels_last)
    image = drawn((11, 3, 4, 4), torch.float16)
    names = ["dense_up", "up", "down", "up", "down", "up_block", "down_narrow", "dense_down"]
    check(names, [head, wide, wide, narrower, narrower, image, image, surrounded(head)], dtype)
    assert ran == ["_pack_kernel"]


def test_starts_are_aligned() -> None:
    """To 128 bytes in 16 bits, whatever the sizes."""
    shapes = [(shape, LAYOUTS[name][0]) for name, shape in CASES]
    starts, total = packing.offsets(shapes)
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert ALIGNMENT * torch.float16.itemsize >= 128
    for (shape, layout), start, end in zip(shapes, starts, [*starts[1:], total], strict=True):
        assert 0 <= end - start - torch.Size(layout.shape(shape)).numel() < ALIGNMENT


def test_a_buffer_of_another_size_is_an_error() -> None:
    shapes = [((3, 20, 4, 4), up.LAYOUT)]
    _, total = packing.offsets(shapes)
    for buffer in (torch.empty(total - 1), torch.empty(0), torch.empty(2 * total)[::2]):
        match = rf"contiguous and \[{total}\], got \[{buffer.numel()}\]"
        with pytest.raises(ValueError, match=match):
            packing.views(buffer, shapes)
        with pytest.raises(ValueError, match=match):
            packing.pack_into([buffer], [[(drawn((3, 20, 4, 4)), up.LAYOUT)]])


def test_a_weight_that_is_packed_already_is_not_copied() -> None:
    """Those beside it are packed in one launch."""
    nchw, nhwc = drawn((20, 3, 4, 4)), drawn((20, 16, 4, 4)).contiguous(memory_format=torch.channels_last)
    jobs = [(nchw, "down_narrow"), (nchw, "up"), (nhwc, "down"), (nhwc, "dense_down"), (nhwc, "down_narrow")]
    found = packing.pack([(weight, LAYOUTS[name][0]) for weight, name in jobs], torch.float32)
    for (weight, name), packed in zip(jobs, found, strict=True):
        assert torch.equal(packed, LAYOUTS[name][1](weight))
    copied = [packed.data_ptr() != weight.data_ptr() for (weight, _), packed in zip(jobs, found, strict=True)]
    assert copied == [False, True, False, False, True]
    for weight, name in ((nchw, "down_narrow"), (nhwc, "down")):
        packed = LAYOUTS[name][0].pack(weight, torch.bfloat16)
        assert packed.dtype == torch.bfloat16
        assert torch.equal(packed, LAYOUTS[name][1](weight).bfloat16())
    padded = dense.DOWN_LAYOUT.pack(nhwc[:, :5], torch.float32)
    assert torch.equal(padded, LAYOUTS["dense_down"][1](nhwc[:, :5]))


@pytest.mark.parametrize("name", ["up", "down"])
def test_a_weight_beyond_int32(name: str) -> None:
    with repair.overflow_checked():
        check([name], [far_apart(drawn((2, 5, 4, 4), torch.float16))], torch.float16)
