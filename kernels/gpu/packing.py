"""Packing: one launch writes the weights of a network, in the dtype and layouts that its products read.

A product reads its weight with the contiguous axis as K and in the dtype of x. The parameter that it comes
from is [first, second, kH, kW], often float32, and has two layouts in a training step: fprop's and dgrad's. A
transposition per layer, layout and cast would be many small kernels, of which each costs more to launch than
to run; here a network's are one launch, which writes flat buffers of packed weights.

A packed weight (:class:`Layout`) is a permutation of the weight's axes, zero-padded, with the taps' axes
split into halves and parities where a kernel treats parities separately. All layouts are thus the same loop:

    packed[o·s₀ + c·s₁ + (h // 2)·s₂ + (h % 2)·s₃ + (w // 2)·s₄ + (w % 2)·s₅]
        = weight(o, c, h, w), or 0 for a channel c beyond the weight's

A program belongs to one packed weight. It loads a tile of [BLOCK_R pairs of channels (o, c), BLOCK_T taps],
whose taps are usually contiguous in memory, and stores it, usually with contiguous channels. Weights may have
any strides and are read once per layout; every element of a packed weight is written once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launcher import INT32_MAX, MAX_PLANS, Launch, extent, run_planned
from .tiles import next_power_of_two

ALIGNMENT = 64  # elements between starts of packed weights in a buffer: at least 128 bytes, a cache line
_TILE = 2048  # elements per program: 64 bytes per thread from a float32 weight
_MAX_TAPS = 64  # per program


class Jobs(NamedTuple):
    """The weights to pack, as compile-time constants: every field has one value per packed weight.

    Sizes and strides are in the order (o, c, h, w).
    """

    first: tuple[int, ...]
    """The first program; the last is before ``end``."""
    end: tuple[int, ...]
    buffer: tuple[int, ...]
    """Which of the buffers the packed weight lies in."""
    start: tuple[int, ...]
    """Of the packed weight, in its buffer."""
    size: tuple[tuple[int, ...], ...]
    """Of the weight."""
    stride: tuple[tuple[int, ...], ...]
    packed_size: tuple[tuple[int, ...], ...]
    """With padding."""
    packed_stride: tuple[tuple[int, ...], ...]
    """Of (o, c, h // 2, h % 2, w // 2, w % 2)."""
    gap: tuple[int, ...]
    """Elements behind the packed weight, up to the start of the next."""
    wide: tuple[bool, ...]
    """Whether an offset needs 64 bits."""
    block_r: tuple[int, ...]
    block_t: tuple[int, ...]


@triton.jit
def _pack_tile(weight_ptr, packed_ptr, tile, JOBS: tl.constexpr, INDEX: tl.constexpr):
    SIZE: tl.constexpr = JOBS.size[INDEX]
    STRIDE: tl.constexpr = JOBS.stride[INDEX]
    PACKED: tl.constexpr = JOBS.packed_size[INDEX]
    TO: tl.constexpr = JOBS.packed_stride[INDEX]
    BLOCK_R: tl.constexpr = JOBS.block_r[INDEX]
    BLOCK_T: tl.constexpr = JOBS.block_t[INDEX]
    ROWS: tl.constexpr = PACKED[0] * PACKED[1]
    TAPS: tl.constexpr = PACKED[2] * PACKED[3]
    TAP_TILES: tl.constexpr = (TAPS + BLOCK_T - 1) // BLOCK_T
    if JOBS.wide[INDEX]:
        tile = tile.to(tl.int64)
    row = (tile // TAP_TILES) * BLOCK_R + tl.arange(0, BLOCK_R)
    tap = (tile % TAP_TILES) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = row // PACKED[1]
    c = row % PACKED[1]
    h = tap // PACKED[3]
    w = tap % PACKED[3]

    inside = (row < ROWS)[:, None] & (tap < TAPS)[None, :]
    valid = inside & (c < SIZE[1])[:, None]
    from_tap = h * STRIDE[2] + w * STRIDE[3]
    if STRIDE[2] == SIZE[3] * STRIDE[3]:
        from_tap = tap * STRIDE[3]  # computed from h and w, contiguous taps would be loaded one at a time
    weight_at = weight_ptr + (o * STRIDE[0] + c * STRIDE[1])[:, None] + from_tap[None, :]
    values = tl.load(weight_at, mask=valid, other=0.0)

    to_tap = (h // 2) * TO[2] + (h % 2) * TO[3] + (w // 2) * TO[4] + (w % 2) * TO[5]
    packed_at = packed_ptr + (o * TO[0] + c * TO[1])[:, None] + to_tap[None, :]
    tl.store(packed_at, values.to(packed_ptr.dtype.element_ty), mask=inside)

    GAP: tl.constexpr = JOBS.gap[INDEX]
    if GAP > 0 and tile == 0:  # so that the same weights give the same buffer
        behind = tl.arange(0, 64)  # ALIGNMENT
        zeros = tl.zeros((64,), dtype=packed_ptr.dtype.element_ty)
        tl.store(packed_ptr + ROWS * TAPS + behind, zeros, mask=behind < GAP)


@triton.jit
def pack_tile(weights, buffers, tile, JOBS: tl.constexpr):
    """Pack a tile, numbered over all jobs."""
    for i in tl.static_range(len(JOBS.first)):
        if (tile >= JOBS.first[i]) & (tile < JOBS.end[i]):
            packed_ptr = buffers[JOBS.buffer[i]] + JOBS.start[i]
            _pack_tile(weights[i], packed_ptr, tile - JOBS.first[i], JOBS, i)


@triton.jit
def _pack_kernel(weights, buffers, JOBS: tl.constexpr):
    pack_tile(weights, buffers, tl.program_id(0), JOBS)


# --- layouts ------------------------------------------------------------------------------------------------


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True, eq=False)  # compared by identity: plans are looked up by layouts at every launch
class Layout:
    """The layout of a kernel's packed weights.

    A weight is [C_out, C_in, kH, kW], or [C_in, C_out, kH, kW] if ``transposed``: of the product that reads
    it, so that for dgrad, C_in are the layer's output channels.
    """

    transposed: bool
    axes: tuple[str, ...]
    """The packed weight's axes, outermost first: "out", "in", and the taps.

    The taps are "h" and "w", or "h//2", "h%2", "w//2" and "w%2" of a kernel of even size.
    """
    in_multiple: int = 1
    """C_in is padded with zeros to a multiple."""

    def shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the packed weight of a weight of shape ``weight``."""
        o, c, h, w = self.padded(weight)
        sizes = {"out": o, "in": c, "h": h, "w": w, "h//2": h // 2, "h%2": 2, "w//2": w // 2, "w%2": 2}
        return tuple([sizes[axis] for axis in self.axes])

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the packed weight in a dtype, see :func:`pack`."""
        return pack([(weight, self)], dtype)[0]

    def ordered(self, weight: Sequence[int]) -> tuple[int, ...]:
        """Return a weight's sizes, or strides, in the order (o, c, kh, kw)."""
        first, second, h, w = weight
        return (second, first, h, w) if self.transposed else (first, second, h, w)

    def padded(self, weight: Sequence[int]) -> tuple[int, ...]:
        """Return the packed weight's sizes of (o, c, h, w), padding included."""
        o, c, h, w = self.ordered(weight)
        return o, _round_up(c, self.in_multiple), h, w

    def strides(self, weight: Sequence[int]) -> tuple[int, ...]:
        """Return the packed weight's strides of (o, c, h // 2, h % 2, w // 2, w % 2)."""
        steps = dict(zip(self.axes, _contiguous_strides(self.shape(weight)), strict=True))
        for tap in {"h", "w"} & steps.keys():
            steps |= {f"{tap}//2": 2 * steps[tap], f"{tap}%2": steps[tap]}
        return tuple([steps[axis] for axis in ("out", "in", "h//2", "h%2", "w//2", "w%2")])

    def in_place(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return a view of a weight that is packed already, else None."""
        order = dict(zip(("out", "in", "h", "w"), self.ordered(range(4)), strict=True))
        if weight.dtype != dtype or not order.keys() >= set(self.axes):
            return None
        view = weight.permute([order[axis] for axis in self.axes])
        return view if view.is_contiguous() and view.shape == self.shape(weight.shape) else None


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple([math.prod(shape[i + 1 :]) for i in range(len(shape))])


# --- buffers ------------------------------------------------------------------------------------------------

Job = tuple[Tensor, Layout]
"""A weight and the layout to pack it in."""
Packed = tuple[Sequence[int], Layout]
"""The shape of a weight, and its layout."""


@functools.lru_cache(maxsize=MAX_PLANS)
def _places(weights: tuple[Packed, ...]) -> tuple[list[tuple[int, tuple[int, ...], tuple[int, ...]]], int]:
    """Return (start, shape, strides) of each packed weight in a buffer, and the buffer's size."""
    places, total = [], 0
    for weight, layout in weights:
        shape = layout.shape(weight)
        places.append((total, shape, _contiguous_strides(shape)))
        total = _round_up(total + math.prod(shape), ALIGNMENT)
    return places, total


def offsets(weights: Sequence[Packed]) -> tuple[list[int], int]:
    """Return where each packed weight starts in a buffer, and the buffer's size, in elements of any dtype.

    Args:
        weights: the shape and the layout of each weight.
    """
    places, total = _places(tuple(weights))
    return [start for start, _, _ in places], total


def views(buffer: Tensor, weights: Sequence[Packed]) -> list[Tensor]:
    """Return the packed weights in a buffer, contiguous tensors of the shapes :meth:`Layout.shape`.

    Args:
        buffer: contiguous, of the size that :func:`offsets` returns.
        weights: the shape and the layout of each weight.

    Raises:
        ValueError: the buffer is not contiguous or has another size.
    """
    places, total = _places(tuple(weights))
    _check(buffer, total)
    offset = buffer.storage_offset()
    return [buffer.as_strided(shape, strides, offset + start) for start, shape, strides in places]


def _check(buffer: Tensor, total: int) -> None:
    if buffer.shape != (total,) or not buffer.is_contiguous():
        raise ValueError(
            f"a buffer of packed weights must be contiguous and [{total}], got {list(buffer.shape)} of "
            f"strides {list(buffer.stride())}"
        )


def pack_into(buffers: Sequence[Tensor], jobs: Sequence[Sequence[Job]]) -> None:
    """Pack weights into buffers, all in one launch.

    Args:
        buffers: as for :func:`views`, of one dtype, float16, bfloat16 or float32: that of the packed weights.
            Gaps behind packed weights are zero.
        jobs: for each buffer the weights, of any strides, float16, bfloat16 or float32 each, on the buffers'
            device, and their layouts. A weight may occur more than once. A buffer without weights is [0].

    Raises:
        ValueError: a buffer is not contiguous or has another size.
    """
    for buffer, own in zip(buffers, jobs, strict=True):
        _check(buffer, _places(_shapes(own))[1])
    written = tuple([buffer for buffer, own in zip(buffers, jobs, strict=True) if own])
    jobs = [own for own in jobs if own]
    made = [(i, *job) for i, own in enumerate(jobs) for job in own]
    if made:
        described = tuple([(i, w.shape, w.stride(), w.dtype, layout) for i, w, layout in made])
        key = ("pack", written[0].dtype, written[0].device, described)
        run_planned(key, (tuple([w for _, w, _ in made]), written), lambda: launch(written, jobs))


def _shapes(jobs: Sequence[Job]) -> tuple[Packed, ...]:
    return tuple([(weight.shape, layout) for weight, layout in jobs])


def pack(jobs: Sequence[Job], dtype: torch.dtype) -> list[Tensor]:
    """Return packed weights in a dtype; as :func:`pack_into` does, but in a buffer of their own.

    A weight that has the layout and the dtype already is not copied: the result is a view of it.
    """
    found = [layout.in_place(weight, dtype) for weight, layout in jobs]
    missing = [job for job, packed in zip(jobs, found, strict=True) if packed is None]
    if not missing:
        return [packed for packed in found if packed is not None]
    shapes = _shapes(missing)
    buffer = torch.empty(_places(shapes)[1], dtype=dtype, device=missing[0][0].device)
    pack_into([buffer], [missing])
    made = iter(views(buffer, shapes))
    return [next(made) if packed is None else packed for packed in found]


def constants_of(jobs: Sequence[Sequence[Job]]) -> Jobs:
    """Return what :func:`pack_tile` needs to know about the weights of each buffer."""
    found: list[tuple[Any, ...]] = []
    end = 0
    for i, own in enumerate(jobs):
        starts, total = offsets(_shapes(own))
        for start, (weight, layout) in zip(starts, own, strict=True):
            size, stride = layout.ordered(weight.shape), layout.ordered(weight.stride())
            o, c, h, w = packed = layout.padded(weight.shape)
            block_t = min(_MAX_TAPS, next_power_of_two(h * w))
            block_r = min(_TILE // block_t, next_power_of_two(o * c))
            first, end = end, end + -(-o * c // block_r) * -(-h * w // block_t)
            wide = max(extent(size, stride), total) + _TILE > INT32_MAX
            gap = -math.prod(packed) % ALIGNMENT
            sizes = size, stride, packed, layout.strides(weight.shape)
            found.append((first, end, i, start, *sizes, gap, wide, block_r, block_t))
    return Jobs(*zip(*found, strict=True))


def launch(buffers: Sequence[Tensor], jobs: Sequence[Sequence[Job]]) -> Launch:
    """Return the launch of :func:`pack_into`."""
    constants = constants_of(jobs)
    weights = tuple([weight for own in jobs for weight, _ in own])
    tensors: dict[str, Any] = {"weights": weights, "buffers": tuple(buffers)}
    return Launch(_pack_kernel, constants.end[-1], tensors, {}, {"JOBS": constants})
