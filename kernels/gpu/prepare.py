"""prepare: what the products of a network in eval read besides x, kept up to date on the device.

    scale[c] = gamma[c]·rsqrt(var[c] + eps);  shift[c] = beta[c] + (bias[c] - mean[c])·scale[c]     always
    packed = layout(weight)                                                            if weights have changed

One launch in front of the products, so that replays of a CUDA graph follow changes too, and the host never
waits. A program folds the vectors of one layer, if any; together they pack the weights, tile by tile
(:func:`.packing.pack_tile`).

**Whether weights have changed** every program decides for itself, from the same values: it compares 32 cache
lines of each weight, others in each call, with a copy from when they were packed. This is the rule of the
native engine (csrc/value_guard.h), and it misses an edit with the same probability: (1 - f)^32 for a fraction
f of a weight's lines. For the decisions to be equal, nothing that they depend on may change during a launch.
A launch that finds a difference therefore packs, and leaves the copy to the next one, which packs again and
renews it without comparing. What the host sees, a changed version or an optimizer's step, it reports by one
more launch, and nothing is sampled (:meth:`Weights.follow`). Weights that nobody has declared constant
(:mod:`..weight_cache`) are packed in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .. import weight_cache
from ..cpu import value_guard
from ..spec import Stage
from . import packing, tuning
from .launcher import Launch, repeatable

_LINES = tl.constexpr(value_guard.LINES)  # of 64 bytes, compared per weight
_CHANNELS = tl.constexpr(1024)  # folded at a time
_COPIED = tl.constexpr(4096)  # elements copied at a time


class _Folds(NamedTuple):
    """The layers to fold, as compile-time constants: every field has one value per layer."""

    channels: tuple[int, ...]
    start: tuple[int, ...]
    """Of the scale in ``folded``; the shift follows it."""
    eps: tuple[float, ...]
    given: tuple[tuple[bool, ...], ...]
    """Whether the layer has a bias, a scale, a shift, and a mean and variance."""
    stride: tuple[tuple[int, ...], ...]
    """Of the five vectors."""


@triton.jit
def _fold(vectors, folded_ptr, FOLDS: tl.constexpr, INDEX: tl.constexpr):
    C: tl.constexpr = FOLDS.channels[INDEX]
    EPS: tl.constexpr = FOLDS.eps[INDEX]
    GIVEN: tl.constexpr = FOLDS.given[INDEX]
    STRIDE: tl.constexpr = FOLDS.stride[INDEX]
    CHANNELS: tl.constexpr = _CHANNELS
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        mask = c < C
        scale = tl.full((CHANNELS,), 1.0, dtype=tl.float32)
        shift = tl.zeros((CHANNELS,), dtype=tl.float32)
        if GIVEN[1]:
            scale = tl.load(vectors[5 * INDEX + 1] + c * STRIDE[1], mask=mask, other=0.0).to(tl.float32)
        if GIVEN[2]:
            shift = tl.load(vectors[5 * INDEX + 2] + c * STRIDE[2], mask=mask, other=0.0).to(tl.float32)
        offset = tl.zeros((CHANNELS,), dtype=tl.float32)
        if GIVEN[0]:
            offset = tl.load(vectors[5 * INDEX] + c * STRIDE[0], mask=mask, other=0.0).to(tl.float32)
        if GIVEN[3]:
            offset -= tl.load(vectors[5 * INDEX + 3] + c * STRIDE[3], mask=mask, other=0.0).to(tl.float32)
            var = tl.load(vectors[5 * INDEX + 4] + c * STRIDE[4], mask=mask, other=1.0).to(tl.float32)
            scale = scale * tl.div_rn(1.0, tl.sqrt_rn(var + EPS))
        at = folded_ptr + FOLDS.start[INDEX] + c
        tl.store(at, scale, mask=mask)
        tl.store(at + C, shift + offset * scale, mask=mask)


@triton.jit
def _scrambled(x):
    """Return a hash of 32 bits: one of Wellons' "Prospecting for hash functions", 2018."""
    x = x.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _difference(weight_ptr, copy_ptr, seed, SIZE: tl.constexpr, INDEX: tl.constexpr):
    """Return the bits in which random lines of a weight differ from a copy; all lines if there are few."""
    BITS: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    KIND: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    PER_LINE: tl.constexpr = 512 // BITS
    TOTAL: tl.constexpr = (SIZE + PER_LINE - 1) // PER_LINE
    LINES: tl.constexpr = _LINES
    line = tl.arange(0, LINES)
    if TOTAL > LINES:
        drawn = _scrambled(seed * 4096 + INDEX * LINES + line)
        line = tl.umulhi(drawn, tl.full((LINES,), TOTAL, dtype=tl.uint32)).to(tl.int64)
    at = line[:, None] * PER_LINE + tl.arange(0, PER_LINE)[None, :]
    now = tl.load(weight_ptr + at, mask=at < SIZE, other=0.0).to(KIND, bitcast=True)
    before = tl.load(copy_ptr + at, mask=at < SIZE, other=0.0).to(KIND, bitcast=True)
    return now ^ before


@triton.jit
def _differ(weights, copies, seed, SIZES: tl.constexpr):
    """Return whether any weight differs from its copy where they are compared."""
    LINES: tl.constexpr = _LINES
    # One reduction for all weights: each would wait for its own loads alone.
    of_16_bits = tl.zeros((LINES, 32), dtype=tl.int16)
    of_32_bits = tl.zeros((LINES, 16), dtype=tl.int32)
    for i in tl.static_range(len(SIZES)):
        difference = _difference(weights[i], copies[i], seed, SIZES[i], i)
        if weights[i].dtype.element_ty.primitive_bitwidth == 16:
            of_16_bits = of_16_bits | difference
        else:
            of_32_bits = of_32_bits | difference
    count = tl.sum(tl.sum((of_16_bits != 0).to(tl.int32), axis=1), axis=0)
    return count + tl.sum(tl.sum((of_32_bits != 0).to(tl.int32), axis=1), axis=0) != 0


@triton.jit
def _copy(weight_ptr, copy_ptr, SIZE: tl.constexpr):
    COPIED: tl.constexpr = _COPIED
    for first in range(tl.program_id(0) * COPIED, SIZE, tl.num_programs(0) * COPIED):
        at = first + tl.arange(0, COPIED)
        tl.store(copy_ptr + at, tl.load(weight_ptr + at, mask=at < SIZE), mask=at < SIZE)


@triton.jit
def _prepare_kernel(
    weights,
    vectors,  # of each layer: bias, scale, shift, mean, var
    buffers,  # (packed,)
    folded_ptr,
    copies,  # of the weights, as they lie in memory
    state_ptr,  # [2]: the launch that renews the copies, and the programs that have run in all launches
    JOBS: tl.constexpr,
    FOLDS: tl.constexpr,
    SIZES: tl.constexpr,  # of the weights; empty if they are packed in every call
    DEPENDENTS: tl.constexpr,  # whether the next kernel is a dependent launch
):
    pid = tl.program_id(0)
    if DEPENDENTS:
        gdc_launch_dependents()
    CHECKED: tl.constexpr = len(SIZES) > 0
    renews = False
    changed = True
    if CHECKED:
        due = tl.load(state_ptr)
        # No program counts itself before it has read the count, which is thus the same launch for all.
        launch = tl.load(state_ptr + 1) // tl.num_programs(0)
        renews = (due < 0) | (due == launch)
        changed = renews | _differ(weights, copies, launch, SIZES)
    for i in tl.static_range(len(FOLDS.channels)):
        if pid == i:
            _fold(vectors, folded_ptr, FOLDS, i)
    if changed:
        for tile in range(pid, JOBS.end[len(JOBS.end) - 1], tl.num_programs(0)):
            packing.pack_tile(weights, buffers, tile, JOBS)
        if CHECKED:
            # Programs that read this later in the launch decide the same.
            tl.store(state_ptr, tl.where(renews, launch, launch + 1))
            if renews:
                for i in tl.static_range(len(SIZES)):
                    _copy(weights[i], copies[i], SIZES[i])
    if CHECKED:
        tl.debug_barrier()  # all threads have read the state
        tl.atomic_add(state_ptr + 1, 1)


# --- packed weights -----------------------------------------------------------------------------------------


def vectors_of(stage: Stage) -> tuple[Tensor | None, ...]:
    """Return a layer's bias, scale, shift, mean and variance."""
    return stage.bias, stage.scale, stage.shift, stage.mean, stage.var


def epilogue_of(stage: Stage) -> tuple[bool, bool]:
    """Return whether a layer's folded vectors are a scale and a shift."""
    scaled = stage.scale is not None or stage.mean is not None
    return scaled, any(v is not None for v in (stage.bias, stage.shift, stage.mean))


def may_be_checked(weights: Sequence[Tensor]) -> bool:
    """Return whether weights are constant, so that they are packed only if they have changed, and dense."""
    return all(weight_cache.frozen(weight) and value_guard.dense(weight) for weight in weights)


def _memory(weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Hashable]:
    """Return what a launch depends on besides the values of its tensors."""
    found: list[Hashable] = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in weights]
    found += [(t.data_ptr(), t.dtype, t.stride()) for t in vectors]  # their shape is that of a weight's axis
    return found


class Weights:
    """Packed weights and folded vectors of a network, and the launch that keeps them up to date."""

    def __init__(
        self,
        stages: Sequence[Stage],
        layouts: Sequence[packing.Layout],
        dtype: torch.dtype,
        checked: bool,
        dependents: bool,
    ) -> None:
        """Allocate, on the current stream; :meth:`prepare` fills.

        Args:
            stages: of the network.
            layouts: in which the products read the weights.
            dtype: of the products.
            checked: whether weights are packed only if they have changed; they are dense and have versions.
            dependents: whether the first product is a dependent launch.
        """
        self._weights = [stage.weight for stage in stages]
        self._given = [t for stage in stages for t in vectors_of(stage) if t is not None]
        self.checked = checked
        self._memory = _memory(self._weights, self._given)
        self._versions = self._current_versions()
        self._epoch = weight_cache.epoch()
        device = self._weights[0].device
        shapes = [(weight.shape, layout) for weight, layout in zip(self._weights, layouts, strict=True)]
        jobs = list(zip((w.detach() for w in self._weights), layouts, strict=True))
        folds, total = self._folds(stages)
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.empty(packing.offsets(shapes)[1], dtype=dtype, device=device)
            self._folded = torch.empty(total, dtype=torch.float32, device=device)
            self._state = torch.zeros(2, dtype=torch.int64, device=device) if checked else None
            copied = self._weights if checked else ()
            copies = [torch.empty(w.numel(), dtype=w.dtype, device=device) for w in copied]
        self.packed = packing.views(buffer, shapes)
        self.scales, self.shifts = self._folded_views(stages, folds)
        absent = self._folded
        vectors = [absent if v is None else v.detach() for stage in stages for v in vectors_of(stage)]
        programs = max(tuning.sm_count(device), len(stages))
        self.launch = Launch(
            _prepare_kernel,
            programs,
            {
                "weights": tuple([weight for weight, _ in jobs]),
                "vectors": tuple(vectors),
                "buffers": (buffer,),
                "folded_ptr": self._folded,
                "copies": tuple(copies or [absent]),
                "state_ptr": absent if self._state is None else self._state,
            },
            {},
            {
                "JOBS": packing.constants_of([jobs]),
                "FOLDS": folds,
                "SIZES": tuple([copy.numel() for copy in copies]),
                "DEPENDENTS": dependents,
            },
        )
        self._repeat: Callable[[int], object] | None = None
        self.expire()

    @staticmethod
    def _folds(stages: Sequence[Stage]) -> tuple[_Folds, int]:
        """Return the constants of ``_fold``, and the size of ``folded``."""
        rows, total = [], 0
        for stage in stages:
            vectors = vectors_of(stage)
            given = tuple([v is not None for v in vectors[:4]])
            strides = tuple([0 if v is None else v.stride(0) for v in vectors])
            rows.append((stage.c_out, total, float(stage.eps), given, strides))
            total += 2 * (-(-stage.c_out // 4) * 4)  # vectors that start 16-byte aligned
        return _Folds(*zip(*rows, strict=True)), total

    def _folded_views(
        self, stages: Sequence[Stage], folds: _Folds
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return each layer's scale and shift, None where it has none."""
        scales: list[Tensor | None] = []
        shifts: list[Tensor | None] = []
        for stage, start in zip(stages, folds.start, strict=True):
            scale, shift = self._folded[start : start + 2 * stage.c_out].chunk(2)
            scaled, shifted = epilogue_of(stage)
            scales.append(scale if scaled else None)
            shifts.append(shift if shifted else None)
        return scales, shifts

    def _current_versions(self) -> list[int]:
        return [weight._version for weight in self._weights] if self.checked else []

    def moved(self) -> bool:
        """Return whether a tensor of the network has another address, dtype, shape or strides by now."""
        return self._memory != _memory(self._weights, self._given)

    def expire(self) -> None:
        """Make the next :meth:`prepare` pack the weights without comparing them, by a launch."""
        if self._state is not None:
            self._state[:1].fill_(-1)

    def follow(self, freeze: Callable[[], None]) -> bool:
        """Report to the device what the host sees of a change.

        ``freeze`` declares the weights constant. Return False if they are not, though they were.
        """
        if not self.checked:
            return True
        versions, epoch = self._current_versions(), weight_cache.epoch()
        if versions != self._versions or epoch != self._epoch:
            freeze()
            self._versions, self._epoch = versions, weight_cache.epoch()
            self.expire()
            return may_be_checked(self._weights)
        return True

    def prepare(self, stream: int = 0) -> None:
        """Launch ``prepare`` on the current stream, whose handle is ``stream``."""
        if self._repeat is None:
            self._repeat = repeatable(self.launch)
        else:
            self._repeat(stream)
