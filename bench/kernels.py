"""Race forward, dgrad and wgrad of each layer against cuDNN, eager and Inductor on a GPU.

``ours`` runs the launches of the phase, with BatchNorm, activations and statistics fused. ``cudnn`` runs the
convolution alone, channels_last, with algorithm search. ``eager`` runs convolution, BatchNorm and activation:
forward, or forward and backward in the row ``sum``. ``inductor`` compiles everything that ours computes with
max-autotune. The row ``pack`` is the cost of packing our weights in every step.

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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from bench import ceiling, gpu, records, replay, shortlist, table, warm, worker
from bench.budget import Budget
from bench.cases import DTYPES
from bench.layers import Layer, outputs, training
from bench.stats import Spread
from bench.usage import UsageError, positive
from dcgan import models
from dcgan.kernels import gpu as engine
from dcgan.kernels.gpu import aten, cost_model, tiles
from dcgan.kernels.gpu.launch import Product, Prologue
from dcgan.kernels.gpu.wgrad import Gradient

HELP = "race each layer's kernels against cuDNN and Inductor on a GPU (make gpu)"
FILE = "kernels.jsonl"
BATCHES = (64, 1024)
DTYPE_NAMES = ("bfloat16", "tf32")
PROVIDERS = ("ours", "cudnn", "eager", "inductor")
PHASES = ("forward", "dgrad", "wgrad")
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


class Step(NamedTuple):
    """A layer in one phase, with several sets of tensors."""

    layers: list[Layer]
    checked_tile: tiles.Tile
    """Tile of ``layers``, whose results are checked."""
    timed: list[Layer]
    """``layers``, but a weight gradient reads du from dgrad's standalone prologue if there is one."""
    tile: tiles.Tile
    """Tile of ``timed``."""


Steps = dict[tuple[str, str], Step]
"""Steps by layer and phase."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu.add_budget(parser)
    add = parser.add_argument
    add("--batch", type=positive, nargs="+", default=list(BATCHES), metavar="N", help="batch sizes (64 1024)")
    add(
        "--dtype",
        nargs="+",
        choices=tuple(TOLERANCE),
        default=list(DTYPE_NAMES),
        help="dtypes (bfloat16 tf32)",
    )
    add(
        "--providers",
        "--contestants",
        nargs="+",
        choices=PROVIDERS,
        default=list(PROVIDERS),
        help="default: all",
    )
    add(
        "--layer",
        type=positive,
        nargs="+",
        metavar="N",
        help="layers of each network, counted from its input (all)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, write and print. Returns 1 if a result of ours is wrong."""
    gpu.need_gpu(args.out)
    return Stage(args.out, Budget(args.minutes)).run(args.batch, args.dtype, args.providers, args.layer)


def measure_cold(calls: Sequence[Call]) -> Spread:
    """Measure by graph replay with cold L2."""
    return replay.measure(calls, cold=True)


# --- the providers -----------------------------------------------------------------------------------------


def materialized(layer: Layer) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the operation with a channels_last weight, and its materialized operands, channels_last."""
    it = layer.operation

    def operand(x: Tensor, prologue: Prologue) -> Tensor:
        return aten.apply_prologue(x, prologue, it.slope).contiguous(memory_format=torch.channels_last)

    if isinstance(it, Product):
        return channels_last_weight(it), (operand(it.x, it.prologue),)
    return it, (operand(it.small, it.small_prologue), operand(it.large, it.large_prologue))


def channels_last_weight(it: Any) -> Any:
    """Return a product with a channels_last weight, which saves PyTorch one copy per call."""
    if not isinstance(it, Product):
        return it
    return it._replace(weight=it.weight.contiguous(memory_format=torch.channels_last))


def convolution_only(it: Product | Gradient, operands: Sequence[Tensor]) -> Tensor:
    """Compute the convolution without prologues and epilogue."""
    if isinstance(it, Product):
        (x,) = operands
        return aten.convolution(x, it)
    small, large = operands
    return aten.convolution_weight(small, large, it)


def eager(network: str, layer: Layer, backward: bool, input_gradient: bool) -> Call:
    """Return a call of a layer's convolution, training BatchNorm and activation, from its forward product."""
    it, (x,) = materialized(layer)
    norm = it.epilogue.kind == "statistics"
    act = it.epilogue.act if not norm else {"G": "relu", "D": "leaky_relu"}[network]
    weight = it.weight.detach().requires_grad_(backward)
    x = x.detach().requires_grad_(backward and input_gradient)
    channels = it.y.shape[1]
    gamma, beta = (torch.ones(channels, device=x.device, requires_grad=backward) for _ in range(2))
    mean, var = (torch.zeros(channels, device=x.device) for _ in range(2))
    dy = torch.randn_like(it.y)
    activation = {
        "relu": F.relu_,
        "leaky_relu": lambda y: F.leaky_relu_(y, models.LEAKY_SLOPE),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }[act]
    convolve = F.conv_transpose2d if it.transposed else F.conv2d
    leaves = [t for t in (x, weight, *((gamma, beta) if norm else ())) if t.requires_grad]

    def call() -> object:
        with torch.set_grad_enabled(backward):
            y = convolve(x, weight, None, it.stride, it.padding)
            if norm:
                y = F.batch_norm(y, mean, var, gamma, beta, training=True)
            y = activation(y)
        return torch.autograd.grad(y, leaves, dy) if backward else y

    return call


def inductor_function() -> Callable[[Any], tuple[Tensor, ...]]:
    """Return :func:`.aten.compute` compiled by Inductor, to be called with a single layer."""
    torch._dynamo.reset()  # otherwise Dynamo stops compiling after eight shapes
    return torch.compile(aten.compute, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)


# --- measuring ---------------------------------------------------------------------------------------------


def measurements(
    network: str, layers: Sequence[Layer], batch: int, dtype: str, numbers: Sequence[int] | None = None
) -> Iterator[tuple[Entry, str]]:
    """Yield (entry, provider) for a network's training step, or for its layers with the given numbers."""
    names = list(dict.fromkeys(layer.name for layer in layers))
    chosen = names if numbers is None else [names[n - 1] for n in numbers if n <= len(names)]
    for layer in layers:
        if layer.name not in chosen:
            continue
        entry = Entry(network, layer.name, layer.phase, batch, dtype)
        yield from ((entry, provider) for provider in ("ours", "cudnn", "inductor"))
        if layer.phase == "forward":
            yield entry, "eager"
            yield entry._replace(phase="sum"), "eager"
            yield entry._replace(phase="pack"), "ours"


def default_networks() -> dict[str, Any]:
    return {name: make() for name, make in warm.NETWORKS.items()}


class Stage:
    """Measure what is not yet in the file, append it and print the tables."""

    def __init__(
        self,
        out: Path,
        budget: Budget,
        device: str = "cuda",
        measure: Measure = measure_cold,
        networks: Callable[[], dict[str, Any]] = default_networks,
        sets: int = SETS,
    ) -> None:
        self._path, self._out, self._budget = out / FILE, out, budget
        self._device, self._measure, self._networks, self._sets = device, measure, networks, sets
        self._common = records.common("kernels")
        self._rows: dict[tuple[Entry, str], dict[str, Any]] = {}
        if self._path.exists():
            try:
                read = records.read(self._path)
            except ValueError as error:
                raise UsageError(str(error)) from error
            for row in filter(self._same_environment, read):
                self._rows[Entry(*(row[name] for name in Entry._fields)), row["contestant"]] = row
        self._console = table.console()

    def _same_environment(self, row: dict[str, Any]) -> bool:
        return bool(
            row["kind"] == "kernels"
            and row["hardware"]["gpu"] == self._common["hardware"]["gpu"]
            and all(row["versions"][p] == self._common["versions"][p] for p in ("torch", "triton"))
        )

    def run(
        self,
        batches: Iterable[int],
        dtypes: Iterable[str],
        providers: Sequence[str],
        numbers: Sequence[int] | None = None,
    ) -> int:
        """Measure and print. Returns 1 if a result of ours is wrong.

        ``numbers`` selects layers, counted from 1; None selects all.
        """
        cases = list(itertools.product(dict.fromkeys(batches), dict.fromkeys(dtypes)))
        rates: dict[str, ceiling.Ceiling] = {}
        for dtype in dict.fromkeys(dtypes):
            worker.set_precision(self._device, dtype)
            rate = rates[dtype] = ceiling.measure(self._device, dtype)
            flops, copied = f"{rate.flops / 1e12:,.1f} TFLOP/s", f"{rate.bandwidth / 1e9:,.0f} GB/s"
            print(f"{dtype}: {flops} ({rate.measure}), {copied} (copy)", flush=True)
        with contextlib.ExitStack() as stack:
            compilers = None
            if self._device == "cuda" and "ours" in providers:
                compilers = stack.enter_context(warm.Compilers())
            # Inductor takes half a minute per layer, so it runs after everything else.
            for group in (("ours", "cudnn", "eager"), ("inductor",)):
                for (batch, dtype), network in itertools.product(cases, self._networks()):
                    wanted = [name for name in group if name in providers]
                    self._case(network, batch, dtype, wanted, numbers, compilers)
        for (batch, dtype), network in itertools.product(cases, self._networks()):
            self._console.print(self.table(network, batch, dtype, rates[dtype]))
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
        compilers: warm.Compilers | None,
    ) -> None:
        worker.set_precision(self._device, dtype)
        shapes = self._training(self._networks()[network], network, batch, dtype, "meta")
        todo = [
            (entry, provider)
            for entry, provider in measurements(network, shapes, batch, dtype, numbers)
            if provider in providers and (entry, provider) not in self._rows
        ]
        if not todo or not self._budget.allows(f"{network} batch {batch} {dtype} {'/'.join(providers)}"):
            return
        names = {entry.layer for entry, _ in todo}
        if compilers is not None and "ours" in providers:
            self._precompile(compilers, network, batch, dtype, names)
        steps = self.steps(network, batch, dtype, names)
        for entry, provider in todo:
            if self._budget.allows(f"{' '.join(map(str, entry))} {provider}"):
                self._record(entry, provider, self._result(entry, provider, steps))

    def _training(self, made: Any, network: str, batch: int, dtype: str, device: str) -> list[Layer]:
        # D needs the gradient of its input image when G trains through it; z needs none.
        return training(made, batch, DTYPES[dtype], device, input_gradient=network == "D")

    def _precompile(
        self, compilers: warm.Compilers, network: str, batch: int, dtype: str, names: Collection[str]
    ) -> None:
        """Compile our training launches in parallel before tiles are selected and timed.

        If a selected tile turns out to spill, the next one is compiled serially.
        """
        sms = tiles.sm_count(torch.device(self._device))
        futures: dict[str, Future[None]] = {}
        for index, layer in enumerate(warm.all_layers(network, 1, batch, dtype, "meta")):
            key = layer.problem.key()
            if layer.name in names and layer.phase != "eval" and key not in futures:
                spec = warm.LayerSpec(network, 1, batch, dtype, index)
                futures[key] = compilers.submit(spec, self._tile(layer, lambda tile: False), sms)
        for future in futures.values():
            future.exception()  # waits; a failed compilation fails again here and is reported

    def steps(self, network: str, batch: int, dtype: str, names: Collection[str] | None = None) -> Steps:
        """Build the phases of all or the named layers, with several sets of tensors each."""
        copies = max(2, min(self._sets, self._sets * 64 // batch))
        sets = [
            self._training(self._networks()[network], network, batch, dtype, self._device)
            for _ in range(copies)
        ]
        found: Steps = {}
        for same in map(list, zip(*sets, strict=True)):
            layer = same[0]
            if names is not None and layer.name not in names:
                continue
            checked_tile = self._tile(layer)
            timed, tile = same, checked_tile
            dgrad = found.get((layer.name, "dgrad"))
            if layer.phase == "wgrad" and dgrad and not dgrad.tile.fused and warm.accepts_shared_du(layer):
                timed = [warm.with_shared_du(one) for one in same]
                tile = self._tile(timed[0])
            found[layer.name, layer.phase] = Step(same, checked_tile, timed, tile)
        return found

    def _tile(self, layer: Layer, spills: Callable[[tiles.Tile], bool] | None = None) -> tiles.Tile:
        """Return the tile that stage ``tune`` found, else the one that a call selects by compiling."""
        if self._device == "cuda":
            tuned = tiles.read(self._out / tiles.gpu_file(torch.cuda.get_device_name()))
            if layer.problem.key() in tuned:
                return tuned[layer.problem.key()]
        device = torch.device(self._device)
        sms = tiles.sm_count(device)

        def compiled(tile: tiles.Tile) -> bool:
            return layer.launches(tile, sms).product.spills()

        return tiles.choose(layer.problem, device, spills or compiled)

    def _result(self, entry: Entry, provider: str, steps: Steps) -> dict[str, Any]:
        """Measure an entry and return the fields of its row that describe the result."""
        forward = steps.get((entry.layer, "forward"))
        dgrad = steps.get((entry.layer, "dgrad"))
        assert forward is not None
        if entry.phase == "pack":
            return self._pack([step for step in (forward, dgrad) if step is not None])
        if provider == "eager":
            backward = entry.phase == "sum"
            return self._time(
                [eager(entry.network, one, backward, dgrad is not None) for one in forward.layers]
            )
        step = steps[entry.layer, entry.phase]
        measures = {"ours": self._ours, "cudnn": self._cudnn, "inductor": self._inductor}
        return measures[provider](step, entry.dtype)

    def _time(self, calls: Sequence[Call], **more: Any) -> dict[str, Any]:
        with _cudnn_search(True):
            spread = self._measure(calls)
        return {"status": "ok", "us": 1e6 * spread.median, "relative": spread.relative} | more

    def _check_and_time(
        self,
        got: Sequence[Tensor],
        expected: Sequence[Tensor],
        dtype: str,
        calls: Callable[[], Sequence[Call]],
    ) -> dict[str, Any]:
        error = aten.error(got, expected)
        if not error <= TOLERANCE[dtype]:
            return {"status": "wrong", "error": None if math.isinf(error) else error}
        return self._time(calls(), error=error)

    def _expected(self, layer: Layer) -> tuple[Tensor, ...]:
        with _cudnn_search(False):  # searching float64 algorithms would take long
            return aten.compute(aten.cast(layer.operation, torch.float64))

    def _ours(self, step: Step, dtype: str) -> dict[str, Any]:
        sms = tiles.sm_count(torch.device(self._device))
        got = outputs(step.layers[0], step.checked_tile, sms)
        launches = [one.launches(step.tile, sms) for one in step.timed]
        calls = [one.__call__ for one in launches]
        problem = step.timed[0].problem
        seen = problem if step.tile.fused else cost_model.without_prologue(problem)
        prediction = cost_model.predict(seen, step.tile, sms=sms)
        details = {
            "tile": list(step.tile),
            "kernel": step.layers[0].kernel,
            "predicted_us": 1e6 * shortlist.seconds(problem, launches[0], step.tile, sms),
            "flops": prediction.flops,
            "bytes": prediction.bytes,
        }
        return self._check_and_time(got, self._expected(step.layers[0]), dtype, lambda: calls) | details

    def _pack(self, steps: Sequence[Step]) -> dict[str, Any]:
        def call(index: int) -> None:
            for step in steps:
                it = step.layers[index].operation
                assert isinstance(it, Product)
                engine.kernel_for(it).pack(it.weight)

        return self._time([functools.partial(call, i) for i in range(len(steps[0].layers))])

    def _cudnn(self, step: Step, dtype: str) -> dict[str, Any]:
        it, operands = materialized(step.layers[0])
        with _cudnn_search(False):
            expected = convolution_only(
                aten.cast(it, torch.float64), tuple(aten.cast(x, torch.float64) for x in operands)
            )
        got = convolution_only(it, operands)

        def calls() -> list[Call]:
            return [functools.partial(convolution_only, *materialized(one)) for one in step.layers]

        return self._check_and_time([got], [expected], dtype, calls)

    def _inductor(self, step: Step, dtype: str) -> dict[str, Any]:
        function = inductor_function()
        operations = [channels_last_weight(one.operation) for one in step.layers]
        with torch.no_grad():
            try:
                got = function(operations[0])
            except Exception as failure:  # any failure of Inductor is a result, not an error of ours
                lines = str(failure).strip().splitlines() or [type(failure).__name__]
                return {"status": "failed", "reason": lines[0]}
            calls = [functools.partial(function, it) for it in operations]
            return self._check_and_time(got, self._expected(step.layers[0]), dtype, lambda: calls)

    def _record(self, entry: Entry, provider: str, result: dict[str, Any]) -> None:
        row = self._common | entry._asdict() | {"contestant": provider} | result
        if "us" in result:
            row[f"{provider}_us"] = result["us"]
        self._rows[entry, provider] = row
        records.append(self._path, [row])
        outcome = f"{result['us']:.1f} µs" if "us" in result else result["status"].upper()
        print(f"{' '.join(map(str, entry))} {provider}: {outcome}", flush=True)

    # --- the table ---

    def _us(self, entry: Entry, provider: str) -> float | None:
        row = self._rows.get((entry, provider))
        return None if row is None else row.get("us")

    def _cell(self, entry: Entry, provider: str) -> str:
        row = self._rows.get((entry, provider))
        if row is None:
            return table.NOTHING
        return f"{row['us']:.1f}" if "us" in row else str(row["status"]).upper()

    def table(self, network: str, batch: int, dtype: str, rate: ceiling.Ceiling) -> Table:
        """Build the table of a network's layers, with sums for the providers that have all phases."""
        columns = ["ours µs", "of roofline", "predicted", "cuDNN", "eager", "Inductor"]
        shown = table.start(f"{network} · batch {batch} · {dtype}", ["layer", "phase"], columns)
        names = dict.fromkeys(
            e.layer for e, _ in self._rows if (e.network, e.batch, e.dtype) == (network, batch, dtype)
        )
        for name in names:
            base = Entry(network, name, "", batch, dtype)
            phases = [
                p
                for p in (*PHASES, "pack")
                if any((base._replace(phase=p), provider) in self._rows for provider in PROVIDERS)
            ]
            roofline: list[float] = []
            for phase in phases:
                entry = base._replace(phase=phase)
                ours = self._rows.get((entry, "ours"), {})
                share = None
                if "flops" in ours and "us" in ours:
                    bound = max(ours["flops"] / rate.flops, ours["bytes"] / rate.bandwidth)
                    share = 1e6 * bound / ours["us"]
                    roofline.append(bound)
                predicted = ours.get("predicted_us")
                shown.add_row(
                    name,
                    phase,
                    self._cell(entry, "ours"),
                    table.percent(share),
                    table.NOTHING if predicted is None else f"{predicted:.1f}",
                    *(self._cell(entry, provider) for provider in ("cudnn", "eager", "inductor")),
                )
            shown.add_row(name, "sum", *self._sums(base, phases, sum(roofline)), end_section=True)
        return shown

    def _sums(self, base: Entry, phases: Sequence[str], roofline: float) -> list[str]:
        def total(provider: str, over: Iterable[str]) -> float | None:
            times = [self._us(base._replace(phase=phase), provider) for phase in over]
            return None if not times or None in times else sum(t for t in times if t is not None)

        products = [phase for phase in phases if phase != "pack"]
        ours, predicted = (
            total("ours", phases),
            [self._rows.get((base._replace(phase=p), "ours"), {}).get("predicted_us") for p in products],
        )
        eager_us = self._us(base._replace(phase="sum"), "eager")
        sums = [total("cudnn", products), eager_us, total("inductor", products)]
        return [
            table.NOTHING if ours is None else f"{ours:.1f}",
            table.percent(None if ours is None or not roofline else 1e6 * roofline / ours),
            table.NOTHING if None in predicted else f"{sum(p or 0.0 for p in predicted):.1f}",
            *(table.NOTHING if value is None else f"{value:.1f}" for value in sums),
        ]


@contextlib.contextmanager
def _cudnn_search(on: bool) -> Iterator[None]:
    """Enable or disable cuDNN's algorithm search."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
