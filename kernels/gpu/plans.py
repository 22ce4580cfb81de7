"""Launch plans: a launch is planned once per shape and then only receives new pointers.

Selecting a kernel and a tile, and Triton's binding of some forty arguments, take several times as long as the
launch itself. They depend only on shapes, strides, dtypes and pointer alignment, so the first call caches the
result, including the compiled kernel, under these.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import weight_cache
from . import aten, prologue_kernel, reduce, wgrad
from . import bce as losses
from .kernel_selection import Kernel, kernel_for
from .launch import Launch, Product, Prologue, precision
from .tiles import Tile, Trial, choose, sm_count

MAX_PLANS = 4096  # cached plans, of a few kilobytes each

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
_SPLIT_K = ("partial_ptr", "dw_ptr")
_STANDALONE_PROLOGUE = (*(f"x_{name}" for name in _PROLOGUE), "out_ptr")


class Plan(NamedTuple):
    """A launch that lacks only its pointers, with its tile and the shape of its partial sums."""

    run: Callable[..., None]
    arguments: list[Any]
    positions: tuple[int, ...]  # of the pointers in ``arguments``
    tile: Tile
    partial: tuple[int, ...]

    def __call__(self, pointers: Sequence[Tensor | None], absent: Tensor) -> None:
        arguments = self.arguments.copy()
        for position, tensor in zip(self.positions, pointers, strict=True):
            arguments[position] = absent if tensor is None else tensor
        self.run(*arguments)


_plans: dict[Hashable, Plan | None] = {}
"""None: a standalone kernel materializes the prologue, and the product after it has its own key."""

_UNPLANNED = Plan(print, [], (), Tile(0, 0, 0, 0, 0), ())


def _cache_launch(
    key: Hashable, names: tuple[str, ...], launch: Launch, compiled: Any, partial: tuple[int, ...] = ()
) -> None:
    if compiled is None:  # Triton's interpreter
        return
    values = launch.arguments | launch.constants
    order = launch.kernel.arg_names
    arguments = [None if name in names else values[name] for name in order]
    positions = tuple(order.index(name) for name in names)
    run = compiled[(launch.programs, 1, 1)]
    _cache(key, Plan(run, arguments, positions, launch.tile, partial))


def _cache(key: Hashable, plan: Plan | None) -> None:
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    _plans[key] = plan


def _aligned(tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """Return which tensors are 16-byte aligned: code compiled for aligned pointers faults on others."""
    return tuple([tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors])


def _operand_key(x: Tensor, prologue: Prologue) -> tuple[Hashable, ...]:
    other = prologue.other
    strides = None if other is None else other.stride()
    return (x.shape, x.stride(), prologue.kind, prologue.act, prologue.scale is None, strides)


class ProductResult(NamedTuple):
    """What a product returns besides its output."""

    partial: Tensor | None  # the epilogue's partial sums
    tile: Tile
    group: int  # rows of ``partial`` per row tile
    x: Tensor  # as the product loaded it
    prologue: Prologue  # as fused: none after a standalone prologue kernel


def product(it: Product) -> ProductResult:
    """Run a product; writes ``it.y``."""
    kernel = kernel_for(it)
    return _product(it, kernel, weight_cache.get_or_make(it.weight, kernel.name, kernel.pack))


def _product(it: Product, kernel: Kernel, packed: Tensor) -> ProductResult:
    """Run a product with its packed weight; recurses after a standalone prologue kernel."""
    prologue, epilogue = it.prologue, it.epilogue
    pointers = (
        *(it.x, prologue.other, prologue.center, prologue.scale, prologue.shift, packed, epilogue.input),
        *(epilogue.center, epilogue.scale, epilogue.shift),
    )
    key = (
        *_operand_key(it.x, prologue),
        *(kernel.name, it.x.dtype, it.x.device, precision(it.x.dtype), it.y.shape, it.y.stride()),
        *(epilogue.kind, epilogue.act, epilogue.scale is None, epilogue.shift is None),
        None if epilogue.input is None else epilogue.input.stride(),
        *(it.slope, _aligned(pointers)),
    )
    group = kernel.partial_rows_per_row_tile(it)
    plan = _plans.get(key, _UNPLANNED)
    if plan is None:
        return _product(_with_standalone_prologue(it), kernel, packed)
    if plan is not _UNPLANNED:
        partial = _empty(it.y, plan.partial) if epilogue.sums else None
        plan((*pointers, partial, it.y), it.y)
        return ProductResult(partial, plan.tile, group, it.x, prologue)

    sizes = kernel.problem(it)

    def build(tile: Tile, product: Product) -> tuple[Launch, Tensor | None]:
        shape = (2, -(-sizes.rows // tile.block_m) * group, it.y.shape[1])
        partial = _empty(it.y, shape) if epilogue.sums else None
        return kernel.launch(product, packed, partial, tile), partial

    def results(tile: Tile) -> tuple[Tensor, ...]:
        it.y.fill_(math.nan)
        launch, partial = build(tile, it if tile.fused else _with_standalone_prologue(it))
        if partial is None:
            launch()
            return (it.y,)
        partial.fill_(math.nan)
        launch()
        if epilogue.kind == "adjoint":
            return it.y, *partial.sum(1)
        channels = it.y.shape[1]
        mean, var = (torch.empty_like(partial[0, 0]) for _ in range(2))
        reduce.statistics(partial, mean, var, it.y.numel() // channels // group, group, tile.block_m)()
        return it.y, mean, var

    trial = Trial(
        run=lambda tile: build(tile, it if tile.fused else _with_standalone_prologue(it))[0](),
        results=results,
        expected=lambda: aten.exact(it),
    )
    tile = choose(
        sizes,
        it.x.device,
        lambda tile: build(tile, it if tile.fused else _with_standalone_prologue(it, run=False))[0].spills(),
        trial,
    )
    if not tile.fused:
        _cache(key, None)
        return _product(_with_standalone_prologue(it), kernel, packed)
    launch, partial = build(tile, it)
    _cache_launch(key, _PRODUCT, launch, launch(), () if partial is None else tuple(partial.shape))
    return ProductResult(partial, tile, group, it.x, prologue)


def _with_standalone_prologue(it: Product, run: bool = True) -> Product:
    return it._replace(x=materialize(it.x, it.prologue, it.slope, run), prologue=Prologue())


def materialize(x: Tensor, prologue: Prologue, slope: float, run: bool = True) -> Tensor:
    """Return prologue(x) from a standalone kernel, or x without a prologue; if not ``run``, uninitialized."""
    if prologue.kind == "none":
        return x
    out = prologue_kernel.output(x)
    if not run:
        return out
    pointers = (x, prologue.other, prologue.center, prologue.scale, prologue.shift)
    key = ("prologue", *_operand_key(x, prologue), x.dtype, x.device, slope, _aligned(pointers))
    _run_planned(
        key, _STANDALONE_PROLOGUE, (*pointers, out), lambda: prologue_kernel.launch(x, prologue, slope, out)
    )
    return out


def gradient(it: wgrad.Gradient) -> Tensor:
    """Return the split-K partials of a weight gradient, to be reduced by :func:`split_k`."""
    first, second = it.small_prologue, it.large_prologue
    pointers = (
        *(it.small, first.other, first.center, first.scale, first.shift),
        *(it.large, second.other, second.center, second.scale, second.shift),
    )
    key = (
        *_operand_key(it.small, first),
        *_operand_key(it.large, second),
        *("wgrad", it.shape, it.small.dtype, it.small.device, precision(it.small.dtype)),
        *(it.slope, it.stride, it.padding, _aligned(pointers)),
    )
    plan = _plans.get(key, _UNPLANNED)
    if plan is None:
        return gradient(_with_standalone_prologues(it))
    if plan is not _UNPLANNED:
        partial = _empty(it.small, plan.partial)
        plan((*pointers, partial), partial)
        return partial

    sms = sm_count(it.small.device)

    def build(tile: Tile, gradient: wgrad.Gradient) -> tuple[Launch, Tensor]:
        partial = wgrad.partials(gradient, tile, sms)
        return wgrad.launch(gradient, partial, tile), partial

    def results(tile: Tile) -> tuple[Tensor, ...]:
        launch, partial = build(tile, it if tile.fused else _with_standalone_prologues(it))
        partial.fill_(math.nan)
        launch()
        c_small, c_large, k_h, k_w = it.shape
        return (partial.sum(0).view(k_h, k_w, c_small, c_large).permute(2, 3, 0, 1),)

    trial = Trial(
        run=lambda tile: build(tile, it if tile.fused else _with_standalone_prologues(it))[0](),
        results=results,
        expected=lambda: aten.exact(it),
    )
    tile = choose(
        wgrad.problem(it),
        it.small.device,
        lambda tile: build(tile, it if tile.fused else _with_standalone_prologues(it, run=False))[0].spills(),
        trial,
    )
    if not tile.fused:
        _cache(key, None)
        return gradient(_with_standalone_prologues(it))
    launch, partial = build(tile, it)
    _cache_launch(key, _GRADIENT, launch, launch(), tuple(partial.shape))
    return partial


def _with_standalone_prologues(it: wgrad.Gradient, run: bool = True) -> wgrad.Gradient:
    return it._replace(
        small=materialize(it.small, it.small_prologue, it.slope, run),
        large=materialize(it.large, it.large_prologue, it.slope, run),
        small_prologue=Prologue(),
        large_prologue=Prologue(),
    )


def statistics(partial: Tensor, mean: Tensor, var: Tensor, rows: int, group: int, block_m: int) -> None:
    """Run :func:`.reduce.statistics`."""
    key = ("statistics", partial.shape, partial.device, rows, group, block_m)
    _run_planned(
        key,
        _STATISTICS,
        (partial, mean, var),
        lambda: reduce.statistics(partial, mean, var, rows, group, block_m),
    )


def sums(partial: Tensor, scale: Tensor, dcenter: Tensor, dscale: Tensor, dshift: Tensor) -> None:
    """Run :func:`.reduce.sums`."""
    pointers = (partial, scale, dcenter, dscale, dshift)
    key = ("sums", partial.shape, partial.device, _aligned(pointers))
    _run_planned(key, _SUMS, pointers, lambda: reduce.sums(*pointers))


def split_k(partial: Tensor, dw: Tensor) -> None:
    """Run :func:`.reduce.split_k`."""
    key = ("split_k", partial.shape, partial.device, dw.shape, dw.stride(), dw.dtype)
    _run_planned(key, _SPLIT_K, (partial, dw), lambda: reduce.split_k(partial, dw))


def bce(logits: Tensor, target: float, loss: Tensor, probability: Tensor) -> None:
    """Run :func:`.bce.forward`."""
    pointers = (logits, loss, probability)
    key = ("bce", logits.shape, logits.stride(), logits.dtype, logits.device, target, _aligned(pointers))
    make = functools.partial(losses.forward, logits, target, loss, probability)
    _run_planned(key, ("logits_ptr", "loss_ptr", "probability_ptr"), pointers, make)


def bce_backward(logits: Tensor, target: float, dloss: Tensor, dprobability: Tensor, dlogits: Tensor) -> None:
    """Run :func:`.bce.backward`."""
    pointers = (logits, dloss, dprobability, dlogits)
    key = ("dbce", logits.shape, logits.stride(), logits.dtype, logits.device, target, _aligned(pointers))
    make = functools.partial(losses.backward, logits, target, dloss, dprobability, dlogits)
    _run_planned(key, ("logits_ptr", "dloss_ptr", "dprobability_ptr", "dlogits_ptr"), pointers, make)


def _run_planned(
    key: Hashable, names: tuple[str, ...], pointers: Sequence[Tensor | None], make: Callable[[], Launch]
) -> None:
    plan = _plans.get(key)
    if plan is not None:
        last = pointers[-1]
        assert last is not None
        plan(pointers, last)
        return
    launch = make()
    _cache_launch(key, names, launch, launch())


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
