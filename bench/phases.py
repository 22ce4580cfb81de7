"""Profile of a training step: the time of every fused-operator call, by layer and phase.

A step is run once under a dispatch mode that records the arguments of every fused-operator call, forward and
backward. The calls are then replayed one by one in their order, interleaved with whole steps. A backward that
computes dgrad and wgrad is one call; its time is divided in proportion to the times of the two computed
separately. The optimizers are timed within the step. The remainder of the step is everything else: losses,
BatchNorm's per-channel arithmetic, autograd and copies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.train_case import Batch
from bench.training_variants import Loop
from dcgan.kernels.call import Backward, Call

PHASES = ("G fprop", "D fprop", "D dgrad", "D wgrad", "G dgrad", "G wgrad")


class Part(NamedTuple):
    """All calls of one layer in one phase."""

    phase: str
    layer: str
    engine: str
    calls: int
    """Calls per step."""
    seconds: float
    """Total time of these calls."""
    flops: int
    """FLOPs of the direct convolutions, for the whole batch."""


class Profile(NamedTuple):
    """The time of a step, divided into parts."""

    parts: list[Part]
    """Ordered by phase as in PHASES, then in the order of execution."""
    optimizers: float
    step: float
    """Seconds of the whole step."""

    @property
    def calls(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def other(self) -> float:
        """The remaining time; negative if the replayed calls take longer than they do within the step."""
        return self.step - self.calls - self.optimizers


class _Product(NamedTuple):
    """A convolution (fprop) or one of its gradients (dgrad, wgrad) computed by a recorded call."""

    phase: str
    layer: str
    engine: str
    flops: int
    alone: Callable[[], object]


class _Recorded(NamedTuple):
    """A recorded call and the products it computes: one, or two for a backward."""

    run: Callable[[], object]
    products: list[_Product]


class _Recorder(TorchDispatchMode):
    """Dispatch mode that records the fused-operator calls made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Recorded] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from dcgan.kernels import ops

        transposed, backward = _OPERATORS.get(str(func), (None, False))
        if transposed is None:
            return func(*args, **(kwargs or {}))
        with ops.recording() as choices:
            result = func(*args, **(kwargs or {}))
        engine = choices[-1].engine if choices else ""
        with torch.no_grad():
            arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        make = _backward if backward else _forward
        self.calls.append(make(func, arguments, kwargs or {}, result, transposed, engine))
        return result


_OPERATORS = {
    f"dcgan.{'conv_transpose2d' if transposed else 'conv2d'}_fused{suffix}.default": (
        transposed,
        bool(suffix),
    )
    for transposed in (False, True)
    for suffix in ("", "_backward")
}


def _describe(x: Tensor, weight: Tensor, y: Tensor, transposed: bool) -> tuple[str, str, int]:
    """Return the network, layer and FLOPs of a product. Only the Generator has transposed convolutions."""
    macs = (x if transposed else y).numel() * weight[0].numel()
    layer = f"{x.shape[1]}→{y.shape[1]} @{x.shape[2]}→{y.shape[2]}"
    return "G" if transposed else "D", layer, 2 * macs


def _forward(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, transposed: bool, engine: str
) -> _Recorded:
    call = Call(*args, **kwargs)
    network, layer, flops = _describe(call.x, call.weight, result[0], transposed)

    def run() -> object:
        return func(*call)

    return _Recorded(run, [_Product(f"{network} fprop", layer, engine, flops, run)])


def _backward(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, transposed: bool, engine: str
) -> _Recorded:
    call = Backward(*args, **kwargs)
    network, layer, flops = _describe(call.x, call.weight, call.dy, transposed)
    of_x, of_weight, *of_vectors = call.needs
    wanted = {
        "dgrad": (of_x, False, *of_vectors) if of_x or any(of_vectors) else None,
        "wgrad": (False, True, False, False, False) if of_weight else None,
    }
    products = [
        _Product(f"{network} {phase}", layer, engine, flops, _with_needs(func, call, needs))
        for phase, needs in wanted.items()
        if needs is not None
    ]
    return _Recorded(lambda: func(*call), products)


def _with_needs(func: Any, call: Backward, needs: tuple[bool, ...]) -> Callable[[], object]:
    return lambda: func(*call._replace(needs=needs))  # type: ignore[arg-type]


def record(loop: Loop, batch: Batch) -> list[_Recorded]:
    """Return the fused-operator calls of one step. Raises ValueError if there are none."""
    recorder = _Recorder()
    with recorder:
        loop(batch)
    if not recorder.calls:
        raise ValueError("no call of a fused operator was seen in the step")
    return list(recorder.calls)


def measure(loop: Loop, batches: Sequence[Batch], rounds: int, device: str) -> Profile:
    """Return the profile, from medians over ``rounds`` of one step and one replay of every call."""

    def seconds(run: Callable[[], object]) -> float:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - start

    spent = _Stopwatch(loop, device)
    for batch in batches:
        loop(batch)  # warm-up: the first steps allocate optimizer state and build caches
    recorded = record(loop, batches[0])
    steps: list[float] = []
    optimizers: list[float] = []
    together: list[list[float]] = [[] for _ in recorded]
    alone: list[list[list[float]]] = [[[] for _ in call.products] for call in recorded]
    for i in range(rounds):
        spent.seconds = 0.0
        batch = batches[i % len(batches)]
        steps.append(seconds(lambda batch=batch: loop(batch)))  # type: ignore[misc]
        optimizers.append(spent.seconds)
        with torch.no_grad():
            for call, times in zip(recorded, together, strict=True):
                times.append(seconds(call.run))
            for call, separate in zip(recorded, alone, strict=True):
                for product, times in zip(call.products, separate, strict=True):
                    if len(call.products) > 1:
                        times.append(seconds(product.alone))
    found: dict[tuple[str, str], Part] = {}
    for call, times, separate in zip(recorded, together, alone, strict=True):
        shares = [statistics.median(own) if own else 1.0 for own in separate]
        for product, share in zip(call.products, shares, strict=True):
            took = statistics.median(times) * share / sum(shares)
            key = product.phase, product.layer
            known = found.get(key, Part(*key, product.engine, 0, 0.0, 0))
            found[key] = known._replace(
                calls=known.calls + 1, seconds=known.seconds + took, flops=known.flops + product.flops
            )
    parts = sorted(found.values(), key=lambda part: PHASES.index(part.phase))
    return Profile(parts, statistics.median(optimizers), statistics.median(steps))


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class _Stopwatch:
    """Accumulates the seconds spent in the optimizers' steps."""

    def __init__(self, loop: Loop, device: str) -> None:
        self.seconds = 0.0
        self._device, self._start = device, 0.0
        for adam in loop.adams:
            adam.register_step_pre_hook(self._begin)
            adam.register_step_post_hook(self._end)

    def _begin(self, *_: Any) -> None:
        _synchronize(self._device)
        self._start = time.perf_counter()

    def _end(self, *_: Any) -> None:
        _synchronize(self._device)
        self.seconds += time.perf_counter() - self._start
