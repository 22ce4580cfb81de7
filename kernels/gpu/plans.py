"""Running products: a launch is planned once, and then only takes pointers.

Choosing a kernel and a tile, and Triton's own binding of some forty arguments, take several times as long as
the launch. All of it follows from shapes, strides, dtypes and the alignment of pointers; so what the first
call finds out, the compiled kernel included, is kept under those.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import weights
from . import aten, passes, reduce, wgrad
from . import bce as losses
from .launch import Launch, Product, Prologue, precision
from .select import Kernel, kernel_for
from .tiles import Tile, Trial, choose, multiprocessors

LIMIT = 4096  # plans kept; a plan is a few kilobytes

_PROLOGUE = ("ptr", "other_ptr", "center_ptr", "scale_ptr", "shift_ptr")
_PRODUCT = (
    *(f"x_{name}" for name in _PROLOGUE),
    *("w_ptr", "input_ptr", "center_ptr", "scale_ptr", "shift_ptr", "partial_ptr", "y_ptr"),
)
_GRADIENT = (
    *(f"small_{name}" for name in _PROLOGUE),
    *(f"large_{name}" for name in _PROLOGUE),
    "partial_ptr",
)
_STATISTICS = ("partial_ptr", "mean_ptr", "var_ptr")
_SUMS = ("partial_ptr", "scale_ptr", "dcenter_ptr", "dscale_ptr", "dshift_ptr")
_CHUNKS = ("partial_ptr", "dw_ptr")
_PASS = (*(f"x_{name}" for name in _PROLOGUE), "out_ptr")


class Plan(NamedTuple):
    """A launch that wants only its pointers, its tile, and the shape of the partial sums it leaves."""

    run: Callable[..., None]
    arguments: list[Any]
    positions: tuple[int, ...]  # of the pointers among the arguments
    tile: Tile
    partial: tuple[int, ...]

    def __call__(self, pointers: Sequence[Tensor | None], absent: Tensor) -> None:
        arguments = self.arguments.copy()
        for position, tensor in zip(self.positions, pointers, strict=True):
            arguments[position] = absent if tensor is None else tensor
        self.run(*arguments)


_plans: dict[Hashable, Plan | None] = {}
"""None: the prologue is a pass of its own, and the product after it has another key."""


_UNKNOWN = Plan(print, [], (), Tile(0, 0, 0, 0, 0), ())  # not yet planned


def _keep(
    key: Hashable, names: tuple[str, ...], launch: Launch, compiled: Any, partial: tuple[int, ...] = ()
) -> None:
    if compiled is None:  # Triton's interpreter compiles nothing
        return
    values = launch.arguments | launch.constants
    order = launch.kernel.arg_names
    arguments = [None if name in names else values[name] for name in order]
    positions = tuple(order.index(name) for name in names)
    run = compiled[(launch.programs, 1, 1)]
    _put(key, Plan(run, arguments, positions, launch.tile, partial))


def _put(key: Hashable, plan: Plan | None) -> None:
    if len(_plans) >= LIMIT:
        _plans.clear()
    _plans[key] = plan


def _aligned(tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """Which start on 16 bytes: code compiled for one that does would fault on another address."""
    return tuple([tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors])


def _described(x: Tensor, prologue: Prologue) -> tuple[Hashable, ...]:
    other = prologue.other
    strides = None if other is None else other.stride()
    return (x.shape, x.stride(), prologue.kind, prologue.act, prologue.scale is None, strides)


class Outcome(NamedTuple):
    """What a product leaves besides its output."""

    partial: Tensor | None  # sums of the epilogue
    tile: Tile
    group: int  # rows of partial that a row tile leaves
    x: Tensor  # as it was loaded
    prologue: Prologue  # as it was done inside: none after a pass of its own


def product(it: Product) -> Outcome:
    """Writes ``it.y``."""
    kernel = kernel_for(it)
    return _product(it, kernel, weights.transformed(it.weight, kernel.name, kernel.pack))


def _product(it: Product, kernel: Kernel, packed: Tensor) -> Outcome:
    """With the weight packed; calls itself where the prologue is a pass of its own."""
    prologue, epilogue = it.prologue, it.epilogue
    pointers = (
        *(it.x, prologue.other, prologue.center, prologue.scale, prologue.shift, packed, epilogue.input),
        *(epilogue.center, epilogue.scale, epilogue.shift),
    )
    key = (
        *_described(it.x, prologue),
        *(kernel.name, it.x.dtype, it.x.device, precision(it.x.dtype), it.y.shape, it.y.stride()),
        *(epilogue.kind, epilogue.act, epilogue.scale is None, epilogue.shift is None),
        None if epilogue.input is None else epilogue.input.stride(),
        *(it.slope, _aligned(pointers)),
    )
    group = kernel.tiles_a_row(it)
    plan = _plans.get(key, _UNKNOWN)
    if plan is None:
        return _product(_apart(it), kernel, packed)
    if plan is not _UNKNOWN:
        partial = _empty(it.y, plan.partial) if epilogue.sums else None
        plan((*pointers, partial, it.y), it.y)
        return Outcome(partial, plan.tile, group, it.x, prologue)

    sizes = kernel.problem(it)

    def launch(tile: Tile, now: Product) -> tuple[Launch, Tensor | None]:
        shape = (2, -(-sizes.rows // tile.block_m) * group, it.y.shape[1])
        partial = _empty(it.y, shape) if epilogue.sums else None
        return kernel.launch(now, packed, partial, tile), partial

    def results(tile: Tile) -> tuple[Tensor, ...]:
        it.y.fill_(math.nan)
        ready, partial = launch(tile, it if tile.fused else _apart(it))
        if partial is None:
            ready()
            return (it.y,)
        partial.fill_(math.nan)
        ready()
        if epilogue.kind == "adjoint":
            return it.y, *partial.sum(1)
        channels = it.y.shape[1]
        mean, var = (torch.empty_like(partial[0, 0]) for _ in range(2))
        reduce.statistics(partial, mean, var, it.y.numel() // channels // group, group, tile.block_m)()
        return it.y, mean, var

    trial = Trial(
        run=lambda tile: launch(tile, it if tile.fused else _apart(it))[0](),
        results=results,
        expected=lambda: aten.exact(it),
    )
    tile = choose(
        sizes,
        it.x.device,
        lambda tile: launch(tile, it if tile.fused else _apart(it, run=False))[0].spills(),
        trial,
    )
    if not tile.fused:
        _put(key, None)
        return _product(_apart(it), kernel, packed)
    ready, partial = launch(tile, it)
    _keep(key, _PRODUCT, ready, ready(), () if partial is None else tuple(partial.shape))
    return Outcome(partial, tile, group, it.x, prologue)


def _apart(it: Product, run: bool = True) -> Product:
    return it._replace(x=written(it.x, it.prologue, it.slope, run), prologue=Prologue())


def written(x: Tensor, prologue: Prologue, slope: float, run: bool = True) -> Tensor:
    """What the prologue makes of x, by a pass of its own; x if there is none. Not ``run``, it is empty."""
    if prologue.kind == "none":
        return x
    out = passes.output(x)
    if not run:
        return out
    pointers = (x, prologue.other, prologue.center, prologue.scale, prologue.shift)
    key = ("pass", *_described(x, prologue), x.dtype, x.device, slope, _aligned(pointers))
    _planned(key, _PASS, (*pointers, out), lambda: passes.launch(x, prologue, slope, out))
    return out


def gradient(it: wgrad.Gradient) -> Tensor:
    """The chunks of a weight gradient, for :func:`chunks`."""
    first, second = it.small_prologue, it.large_prologue
    pointers = (
        *(it.small, first.other, first.center, first.scale, first.shift),
        *(it.large, second.other, second.center, second.scale, second.shift),
    )
    key = (
        *_described(it.small, first),
        *_described(it.large, second),
        *("wgrad", it.shape, it.small.dtype, it.small.device, precision(it.small.dtype)),
        *(it.slope, it.stride, it.padding, _aligned(pointers)),
    )
    plan = _plans.get(key, _UNKNOWN)
    if plan is None:
        return gradient(_both_apart(it))
    if plan is not _UNKNOWN:
        partial = _empty(it.small, plan.partial)
        plan((*pointers, partial), partial)
        return partial

    processors = multiprocessors(it.small.device)

    def launch(tile: Tile, now: wgrad.Gradient) -> tuple[Launch, Tensor]:
        partial = wgrad.partials(now, tile, processors)
        return wgrad.launch(now, partial, tile), partial

    def results(tile: Tile) -> tuple[Tensor, ...]:
        ready, partial = launch(tile, it if tile.fused else _both_apart(it))
        partial.fill_(math.nan)
        ready()
        c_small, c_large, k_h, k_w = it.shape
        return (partial.sum(0).view(k_h, k_w, c_small, c_large).permute(2, 3, 0, 1),)

    trial = Trial(
        run=lambda tile: launch(tile, it if tile.fused else _both_apart(it))[0](),
        results=results,
        expected=lambda: aten.exact(it),
    )
    tile = choose(
        wgrad.problem(it),
        it.small.device,
        lambda tile: launch(tile, it if tile.fused else _both_apart(it, run=False))[0].spills(),
        trial,
    )
    if not tile.fused:
        _put(key, None)
        return gradient(_both_apart(it))
    ready, partial = launch(tile, it)
    _keep(key, _GRADIENT, ready, ready(), tuple(partial.shape))
    return partial


def _both_apart(it: wgrad.Gradient, run: bool = True) -> wgrad.Gradient:
    return it._replace(
        small=written(it.small, it.small_prologue, it.slope, run),
        large=written(it.large, it.large_prologue, it.slope, run),
        small_prologue=Prologue(),
        large_prologue=Prologue(),
    )


def statistics(partial: Tensor, mean: Tensor, var: Tensor, rows: int, group: int, block_m: int) -> None:
    """:func:`.reduce.statistics`, run."""
    key = ("statistics", partial.shape, partial.device, rows, group, block_m)
    _planned(
        key,
        _STATISTICS,
        (partial, mean, var),
        lambda: reduce.statistics(partial, mean, var, rows, group, block_m),
    )


def sums(partial: Tensor, scale: Tensor, dcenter: Tensor, dscale: Tensor, dshift: Tensor) -> None:
    """:func:`.reduce.sums`, run."""
    pointers = (partial, scale, dcenter, dscale, dshift)
    key = ("sums", partial.shape, partial.device, _aligned(pointers))
    _planned(key, _SUMS, pointers, lambda: reduce.sums(*pointers))


def chunks(partial: Tensor, dw: Tensor) -> None:
    """:func:`.reduce.chunks`, run."""
    key = ("chunks", partial.shape, partial.device, dw.shape, dw.stride(), dw.dtype)
    _planned(key, _CHUNKS, (partial, dw), lambda: reduce.chunks(partial, dw))


def bce(logits: Tensor, target: float, loss: Tensor, probability: Tensor) -> None:
    """:func:`.bce.forward`, run."""
    pointers = (logits, loss, probability)
    key = ("bce", logits.shape, logits.stride(), logits.dtype, logits.device, target, _aligned(pointers))
    make = functools.partial(losses.forward, logits, target, loss, probability)
    _planned(key, ("logits_ptr", "loss_ptr", "probability_ptr"), pointers, make)


def bce_backward(logits: Tensor, target: float, dloss: Tensor, dprobability: Tensor, dlogits: Tensor) -> None:
    """:func:`.bce.backward`, run."""
    pointers = (logits, dloss, dprobability, dlogits)
    key = ("dbce", logits.shape, logits.stride(), logits.dtype, logits.device, target, _aligned(pointers))
    make = functools.partial(losses.backward, logits, target, dloss, dprobability, dlogits)
    _planned(key, ("logits_ptr", "dloss_ptr", "dprobability_ptr", "dlogits_ptr"), pointers, make)


def _planned(
    key: Hashable, names: tuple[str, ...], pointers: Sequence[Tensor | None], make: Callable[[], Launch]
) -> None:
    plan = _plans.get(key)
    if plan is not None:
        last = pointers[-1]
        assert last is not None
        plan(pointers, last)
        return
    launch = make()
    _keep(key, names, launch, launch())


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
