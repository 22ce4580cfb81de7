"""Race forward, dgrad and wgrad of each layer against cuDNN, eager and Inductor on a GPU.

``ours`` runs the launches of the phase as in a network's training: forward includes the statistics, and dgrad
includes BatchNorm's backward, whose last kernel computes du of the layer before and the x̂ that wgrad reads.
``cudnn`` runs the convolution alone, channels_last, with algorithm search. ``eager`` runs convolution,
BatchNorm and activation: forward, or forward and backward in the row ``sum``. ``inductor`` compiles
everything that ours computes with max-autotune. The row ``pack`` is one launch that packs the layer's weight
for fprop and dgrad.

All but eager, which is PyTorch itself, are checked against float64. Times come from CUDA graph replays with
cold L2. Every result is a line of ``kernels.jsonl``. Results of the same GPU and versions found there are not
measured again, so a second run continues where the first ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from bench import machine, options, output, timing, worker
from bench.options import UsageError, positive
from bench.output import NOTHING, Row, percent
from bench.timing import Budget, Spread
from dcgan.kernels.gpu import aten, packing, tiles, tuning
from dcgan.kernels.gpu.launcher import Product
from dcgan.kernels.gpu.tools import layers
from dcgan.kernels.gpu.tools.compilers import Compilers
from dcgan.kernels.gpu.tools.layers import EPS, PHASES, Layer, Shape, launches, outputs, stats_of
from dcgan.kernels.gpu.tools.predict import apply_bytes, predict
from dcgan.kernels.reference import activate

HELP = "race each layer's kernels against cuDNN and Inductor on a GPU (make gpu)"
FILE = "kernels.jsonl"
PROVIDERS = ("ours", "cudnn", "eager", "inductor")
ROWS = (*PHASES[1:], "pack")
SETS = 24  # of tensors at batch 64, enough that each is evicted from L2 before its next use
# ‖error‖/‖result‖. Products of operands rounded (TF32: truncated) to p bits are within 2^(1-p) of the exact
# ones; a result may be rounded once more, and Inductor rounds between convolution and epilogue.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10, "tf32": 2**-9}

Call = Callable[[], Any]
Measure = Callable[[Sequence[Call]], Spread]


class Entry(NamedTuple):
    """What one measurement covers."""

    network: str
    layer: str
    phase: str
    batch: int
    dtype: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add(parser, "out", "minutes")
    options.add_batches(parser, [64, 1024])
    add = parser.add_argument
    text = "dtypes (bfloat16 tf32)"
    add("--dtype", nargs="+", choices=tuple(TOLERANCE), default=["bfloat16", "tf32"], help=text)
    names = "--providers", "--contestants"
    add(*names, nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="default: all")
    text = "layers of each network, counted from its input (all)"
    add("--layer", type=positive, nargs="+", metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Measure, write and print. Returns 1 if a result of ours is wrong."""
    options.need_gpu(args.out)
    return Stage(args.out, Budget(args.minutes)).run(args.batch, args.dtype, args.providers, args.layer)


# --- the providers -----------------------------------------------------------------------------------------


def operands(it: Product) -> list[Tensor]:
    """Return a product's operands after their prologues, channels_last."""
    sides = [(it.spec.x, it.x), (it.spec.y, it.y)][: 2 if it.spec.kind == "wgrad" else 1]
    found = [aten.apply_prologue(operand, pointers, it.spec.slope) for operand, pointers in sides]
    return [x.contiguous(memory_format=torch.channels_last) for x in found]


def channels_last_weight(it: Product) -> Product:
    """Return a product with a channels_last weight, which saves PyTorch one copy per call."""
    if it.weight is None:
        return it
    return it._replace(weight=it.weight.contiguous(memory_format=torch.channels_last))


def eager(network: str, it: Product, backward: bool, input_gradient: bool) -> Call:
    """Return a call of a layer's convolution, training BatchNorm and activation, from its forward product."""
    spec, it = it.spec, channels_last_weight(it)
    assert it.weight is not None
    norm = spec.y.function == "statistics"
    act = spec.y.act if not norm else {"G": "relu", "D": "leaky_relu"}[network]
    weight = it.weight.detach().requires_grad_(backward)
    x = operands(it)[0].detach().requires_grad_(backward and input_gradient)
    channels = spec.y.size[0]
    gamma, beta = (torch.ones(channels, device=x.device, requires_grad=backward) for _ in range(2))
    mean, var = (torch.zeros(channels, device=x.device) for _ in range(2))
    dy = torch.randn_like(it.y.ptr)
    leaky = functools.partial(F.leaky_relu_, negative_slope=spec.slope)
    activations: dict[str, Callable[[Tensor], Tensor]]
    activations = {"relu": F.relu_, "leaky_relu": leaky, "tanh": torch.tanh, "none": lambda y: y}
    convolve = F.conv_transpose2d if spec.transposed else F.conv2d
    leaves = [t for t in (x, weight, *((gamma, beta) if norm else ())) if t.requires_grad]

    def call() -> object:
        with torch.set_grad_enabled(backward):
            y = convolve(x, weight, None, spec.stride, spec.padding)
            if norm:
                y = F.batch_norm(y, mean, var, gamma, beta, training=True)
            y = activations[act](y)
        return torch.autograd.grad(y, leaves, dy) if backward else y

    return call


# --- what ours computes ------------------------------------------------------------------------------------


def computed(it: Product) -> tuple[Tensor, ...]:
    """Return the results of a product and of what follows it, in plain PyTorch.

    They are those of :func:`aten.compute` and, after a dgrad through BatchNorm, the factor and the offset
    that ``batchnorm.backward`` computes, and du of the layer before and x̂ from ``batchnorm.apply``.
    """
    found = aten.compute(it)
    if it.spec.y.function != "gradient":
        return found
    g, first, second = found
    var = stats_of(it)[1]
    count = g[:, 0].numel() // it.spec.groups
    factor, offset = -second.view_as(var) / (var + EPS) / count, -first.view_as(var) / count
    du, x_hat = applied(it, g, factor, offset)
    return *found, factor, offset, du.to(g.dtype), x_hat.to(g.dtype)


def applied(it: Product, g: Tensor, factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return du = s·(g + offset + (y - mean)·factor) and x̂, unrounded, from vectors [groups, C]."""
    mean, _, scale, shift = stats_of(it)
    images = g.shape[0] // len(mean)
    spread = (v.repeat_interleave(images, 0)[:, :, None, None] for v in (mean, scale, shift, factor, offset))
    mean, scale, shift, factor, offset = spread
    y = it.y.other.to(mean.dtype) - mean
    return scale * (g + offset + y * factor), activate(y * scale + shift, it.spec.y.act, it.spec.slope)


def misrounded(it: Product, g: Tensor, factor: Tensor, offset: Tensor, du: Tensor) -> float:
    """Return the share of elements of a 16-bit du that are not :func:`applied`, rounded to nearest.

    The terms of the mean and the variance may be smaller than a unit of g's dtype. Added to a value that has
    been rounded before, they vanish or double in all elements alike. ‖error‖/‖du‖ hides that, but the sums
    over pixels that a weight gradient is do not.
    """
    exact, _ = applied(aten.cast(it, torch.float64), *(t.double() for t in (g, factor, offset)))
    eps, smallest = torch.finfo(du.dtype).eps, torch.finfo(du.dtype).smallest_normal
    unit = torch.ldexp(torch.full_like(exact, eps), torch.frexp(exact).exponent - 1).clamp(min=eps * smallest)
    return ((du.double() - exact).abs() > 0.51 * unit).double().mean().item()


# --- measuring ---------------------------------------------------------------------------------------------


class Stage:
    """Measure what is not yet in the file, append it and print the tables."""

    def __init__(
        self,
        out: Path,
        budget: Budget,
        device: str = "cuda",
        measure: Measure | None = None,
        networks: Mapping[str, Sequence[Shape]] | None = None,
        sets: int = SETS,
    ) -> None:
        self._path, self._out, self._budget = out / FILE, out, budget
        self._measure = measure or functools.partial(timing.replay, cold=True)
        self._device, self._sets = device, sets
        self._sms = tuning.sm_count(torch.device(device))
        self._networks = networks or layers.networks()
        self._common = output.common("kernels")
        self._rows: dict[tuple[Entry, str], Row] = {}
        try:
            read = output.read(self._path) if self._path.exists() else []
        except ValueError as error:
            raise UsageError(str(error)) from error
        for row in filter(self._same_environment, read):
            self._rows[Entry(*(row[name] for name in Entry._fields)), row["contestant"]] = row

    def _same_environment(self, row: Row) -> bool:
        return bool(
            row["kind"] == "kernels"
            and row["hardware"]["gpu"] == self._common["hardware"]["gpu"]
            and all(row["versions"][p] == self._common["versions"][p] for p in ("torch", "triton"))
        )

    def run(
        self,
        batches: Sequence[int],
        dtypes: Sequence[str],
        providers: Sequence[str],
        numbers: Sequence[int] | None = None,
    ) -> int:
        """Measure and print. Returns 1 if a result of ours is wrong.

        ``numbers`` selects layers, counted from 1; None selects all.
        """
        cases = list(itertools.product(dict.fromkeys(batches), dict.fromkeys(dtypes), self._networks))
        rates: dict[str, machine.Ceiling] = {}
        for dtype in dict.fromkeys(dtypes):
            rate = rates[dtype] = machine.measure(self._device, dtype)
            flops, copied = f"{rate.flops / 1e12:,.1f} TFLOP/s", f"{rate.bandwidth / 1e9:,.0f} GB/s"
            print(f"{dtype}: {flops} ({rate.measure}), {copied} (copy)", flush=True)
        compile_ours = self._device == "cuda" and "ours" in providers
        with Compilers() if compile_ours else contextlib.nullcontext() as compilers:
            # Inductor takes half a minute per layer, so it runs after everything else.
            for group in (("ours", "cudnn", "eager"), ("inductor",)):
                wanted = [name for name in group if name in providers]
                for batch, dtype, network in cases:
                    self._case(network, batch, dtype, wanted, numbers, compilers)
        console = output.console()
        for batch, dtype, network in cases:
            console.print(self.table(network, batch, dtype, rates[dtype]))
        print(self._budget.report())
        ours = (row for (_, provider), row in self._rows.items() if provider == "ours")
        return int(any(row["status"] == "wrong" for row in ours))

    def _case(
        self,
        network: str,
        batch: int,
        dtype: str,
        providers: Sequence[str],
        numbers: Sequence[int] | None,
        compilers: Compilers | None,
    ) -> None:
        machine.set_precision(self._device, dtype)
        # D needs the gradient of its input image when G trains through it; z needs none.
        steps = layers.training(self._networks[network], batch, dtype, input_gradient=network == "D")
        todo = [
            (entry, provider, run)
            for entry, provider, run in self._measurements(network, steps, batch, dtype, numbers)
            if provider in providers and (entry, provider) not in self._rows
        ]
        if not todo or not self._budget.allows(f"{network} batch {batch} {dtype} {'/'.join(providers)}"):
            return
        if compilers is not None and "ours" in providers:
            names = {entry.layer for entry, _, _ in todo}
            self._precompile(compilers, [layer for layer in steps if layer.name in names])
        for entry, provider, run in todo:
            if self._budget.allows(f"{' '.join(map(str, entry))} {provider}"):
                self._record(entry, provider, run())

    def _precompile(self, compilers: Compilers, steps: Sequence[Layer]) -> None:
        """Compile our training launches in parallel before tiles are selected and timed.

        If a selected tile turns out to spill, the next one is compiled serially.
        """
        problems = {layer.problem.key(): layer for layer in steps}
        chosen = [(layer, self._tile(layer, lambda tile: False)) for layer in problems.values()]
        for future in [compilers.submit(*one, self._sms) for one in chosen]:
            future.exception()  # waits; a failed compilation fails again here and is reported

    def _tile(self, layer: Layer, spills: Callable[[tiles.Tile], bool] | None = None) -> tiles.Tile:
        """Return the tile that stage ``tune`` found, else the one that a call selects by compiling."""
        if self._device == "cuda":
            tuned = tiles.read(self._out / tiles.gpu_file(torch.cuda.get_device_name()))
            if layer.problem.key() in tuned:
                return tuned[layer.problem.key()]

        def compiled(tile: tiles.Tile) -> bool:
            return layer.launches(tile, self._sms).product.spills()

        return tuning.choose(layer.problem, torch.device(self._device), spills or compiled)

    def _sets_of(self, layer: Layer) -> list[Product]:
        """Return a layer with several sets of tensors."""
        batch = layer.spec.images
        return [layer.product(self._device) for _ in range(max(2, min(self._sets, self._sets * 64 // batch)))]

    def _measurements(
        self, network: str, steps: Sequence[Layer], batch: int, dtype: str, numbers: Sequence[int] | None
    ) -> Iterator[tuple[Entry, str, Callable[[], Row]]]:
        """Yield (entry, provider, its measurement) for the chosen layers of a network's training step."""
        names = list(dict.fromkeys(layer.name for layer in steps))
        chosen = names if numbers is None else [names[n - 1] for n in numbers if n <= len(names)]
        for layer in steps:
            if layer.name not in chosen:
                continue
            entry = Entry(network, layer.name, layer.phase, batch, dtype)
            dgrad = next((own for own in steps if (own.name, own.phase) == (layer.name, "dgrad")), None)
            yield entry, "ours", functools.partial(self._ours, layer, dtype)
            yield entry, "cudnn", functools.partial(self._cudnn, layer, dtype)
            yield entry, "inductor", functools.partial(self._inductor, layer, dtype)
            if layer.phase == "forward":
                for phase in ("forward", "sum"):
                    run = functools.partial(self._eager, network, layer, phase == "sum", dgrad is not None)
                    yield entry._replace(phase=phase), "eager", run
                packed = [layer] if dgrad is None else [layer, dgrad]
                yield entry._replace(phase="pack"), "ours", functools.partial(self._pack, packed)

    def _time(self, calls: Sequence[Call], **more: Any) -> Row:
        with _cudnn_search(True):
            spread = self._measure(calls)
        return {"status": "ok", "us": 1e6 * spread.median, "relative": spread.relative} | more

    def _check_and_time(self, error: float, dtype: str, calls: Sequence[Call]) -> Row:
        if not error <= TOLERANCE[dtype]:
            return {"status": "wrong", "error": None if math.isinf(error) else error}
        return self._time(calls, error=error)

    def _ours(self, layer: Layer, dtype: str) -> Row:
        it, tile = layer.product(self._device), self._tile(layer)
        prediction, seconds = predict(layer, tile, self._sms)
        details = {
            "tile": list(astuple(tile)),
            "kernel": layer.kernel_name,
            "predicted_us": 1e6 * seconds,
            "flops": prediction.flops,
            "bytes": prediction.bytes + apply_bytes(layer),
        }
        calls = [launches(one, tile, self._sms).__call__ for one in self._sets_of(layer)]
        return self._check_and_time(self._error(it, tile), dtype, calls) | details

    def _error(self, it: Product, tile: tiles.Tile) -> float:
        """Return the error of a product's own results, and of what the launches after it make of them."""
        expected = _expected(it)
        got = [t.clone() for t in outputs(it, tile, self._sms)]  # as du will overwrite g
        made = launches(it, tile, self._sms)
        made.poison()
        made()
        last = expected[len(expected) - len(made.results) :]
        error = aten.error([*got, *made.results], [*expected[: len(got)], *last])
        if it.spec.y.function == "gradient" and it.spec.dtype.itemsize == 2:
            error = max(error, misrounded(it, got[0], *made.results[:3]))
        return error

    def _pack(self, steps: Sequence[Layer]) -> Row:
        layouts = [layout for layer in steps if (layout := layer.kernel.layout) is not None]

        def call(weight: Tensor) -> list[Tensor]:
            return packing.pack([(weight, layout) for layout in layouts], weight.dtype)

        weights = [weight for it in self._sets_of(steps[0]) if (weight := it.weight) is not None]
        return self._time([functools.partial(call, weight) for weight in weights])

    def _eager(self, network: str, layer: Layer, backward: bool, input_gradient: bool) -> Row:
        return self._time([eager(network, it, backward, input_gradient) for it in self._sets_of(layer)])

    def _cudnn(self, layer: Layer, dtype: str) -> Row:
        sets = self._sets_of(layer)
        with _cudnn_search(False):
            wide = [t.double() for t in operands(sets[0])]
            expected = aten.convolve(aten.cast(sets[0], torch.float64), *wide)
        calls = [functools.partial(aten.convolve, channels_last_weight(it), *operands(it)) for it in sets]
        return self._check_and_time(aten.error([calls[0]()], [expected]), dtype, calls)

    def _inductor(self, layer: Layer, dtype: str) -> Row:
        sets = self._sets_of(layer)
        torch._dynamo.reset()  # otherwise Dynamo stops compiling after eight shapes
        options: Any = {"mode": "max-autotune-no-cudagraphs", "fullgraph": True, "dynamic": False}
        function = torch.compile(computed, **options)
        calls = [functools.partial(function, channels_last_weight(it)) for it in sets]
        with torch.no_grad():
            try:
                got = calls[0]()
            except Exception as failure:  # any failure of Inductor is a result, not an error of ours
                return {"status": "failed", "reason": worker.describe(failure)}
            return self._check_and_time(aten.error(got, _expected(sets[0])), dtype, calls)

    def _record(self, entry: Entry, provider: str, result: Row) -> None:
        row = self._common | entry._asdict() | {"contestant": provider} | result
        if "us" in result:
            row[f"{provider}_us"] = result["us"]
        self._rows[entry, provider] = row
        output.append(self._path, [row])
        outcome = f"{result['us']:.1f} µs" if "us" in result else result["status"].upper()
        print(f"{' '.join(map(str, entry))} {provider}: {outcome}", flush=True)

    def table(self, network: str, batch: int, dtype: str, rate: machine.Ceiling) -> Table:
        """Build the table of a network's layers, with sums for the providers that have all phases."""
        columns = ["ours µs", "of roofline", "predicted", "cuDNN", "eager", "Inductor"]
        shown = output.table(f"{network} · batch {batch} · {dtype}", ["layer", "phase"], columns)
        found: dict[str, dict[tuple[str, str], Row]] = {}
        for (entry, provider), row in self._rows.items():
            if (entry.network, entry.batch, entry.dtype) == (network, batch, dtype):
                found.setdefault(entry.layer, {})[entry.phase, provider] = row
        for name, of_layer in found.items():
            for cells in _lines(of_layer, rate):
                shown.add_row(name, *cells, end_section=cells[0] == "sum")
        return shown


def _lines(found: Mapping[tuple[str, str], Row], rate: machine.Ceiling) -> Iterator[list[str]]:
    """Yield the cells of a layer, by phase, and of its sums; ``found`` holds rows by phase and provider."""
    by = dict(found)
    phases = [phase for phase in ROWS if any(phase == measured for measured, _ in by)]
    products = [phase for phase in phases if phase != "pack"]
    for phase in products:
        ours = by.get((phase, "ours"), {})
        if "flops" in ours:
            bound = max(ours["flops"] / rate.flops, ours["bytes"] / rate.bandwidth)
            by[phase, "ours"] = ours | {"bound_us": 1e6 * bound}

    def total(who: str, field: str, over: Sequence[str]) -> float | None:
        values = [by.get((phase, who), {}).get(field) for phase in over]
        return None if not values or None in values else float(sum(filter(None, values)))

    sums = {name: total("ours", name, products) for name in ("bound_us", "predicted_us")}
    by["sum", "ours"] = {"us": total("ours", "us", phases)} | sums
    for who in ("cudnn", "inductor"):
        by["sum", who] = {"us": total(who, "us", products)}
    for phase in [*phases, "sum"]:
        ours = by.get((phase, "ours"), {})
        bound, us = ours.get("bound_us"), ours.get("us")
        first, *others = (_cell(by.get((phase, who))) for who in PROVIDERS)
        predicted = _us(ours.get("predicted_us"))
        yield [phase, first, percent(bound / us if bound and us else None), predicted, *others]


def _us(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def _cell(row: Row | None) -> str:
    if row is None:
        return NOTHING
    return _us(row["us"]) if "us" in row else str(row["status"]).upper()


def _expected(it: Product) -> tuple[Tensor, ...]:
    with _cudnn_search(False):  # searching float64 algorithms would take long
        return computed(aten.cast(it, torch.float64))


@contextlib.contextmanager
def _cudnn_search(on: bool) -> Iterator[None]:
    """Enable or disable cuDNN's algorithm search."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
