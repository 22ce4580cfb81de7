"""Forward, dgrad and wgrad of each layer, raced with cuDNN, eager and Inductor on a GPU.

``ours``: the launches of the phase, with BatchNorm, activations and statistics inside. ``cudnn``: the
convolution alone, channels_last, its algorithm searched for. ``eager``: convolution, BatchNorm and
activation, forward, or in the row of sums forward and backward. ``inductor``: all that ours computes,
compiled with max-autotune. The row ``pack`` is what making the weights ready costs ours in every step.

Each but eager, which is PyTorch itself, is checked against float64, then timed as replays of a CUDA graph
over tensors that are not in L2. Every result is a line of ``kernels.jsonl``; what is there from this GPU and
these versions is not measured again, so that a second run goes on where the time of the first was up.
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

from bench import ceiling, gpu, replay, results, shortlist, table, warm, worker
from bench.budget import Budget
from bench.cases import DTYPES
from bench.layers import Layer, outputs, training
from bench.stats import Spread
from bench.usage import UsageError, positive
from dcgan import models
from dcgan.kernels import gpu as engine
from dcgan.kernels.gpu import aten, model, tiles
from dcgan.kernels.gpu.launch import Product, Prologue
from dcgan.kernels.gpu.wgrad import Gradient

HELP = "each layer's kernels beside cuDNN and Inductor, on a GPU (make gpu)"
FILE = "kernels.jsonl"
BATCHES = (64, 1024)
DTYPE_NAMES = ("bfloat16", "tf32")
CONTESTANTS = ("ours", "cudnn", "eager", "inductor")
PHASES = ("forward", "dgrad", "wgrad")
SETS = 24  # of tensors at batch 64, so that none is in L2 when its turn comes
# ‖error‖/‖result‖. Products of operands rounded (TF32: cut off) to p bits are within 2^(1-p) of the exact
# ones; a result may be rounded once more, and Inductor rounds between convolution and epilogue.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10, "tf32": 2**-9}

Call = Callable[[], Any]
Measure = Callable[[Sequence[Call]], Spread]


class Entry(NamedTuple):
    """What one time is of."""

    network: str
    layer: str
    phase: str
    batch: int
    dtype: str


class Step(NamedTuple):
    """A layer in one phase, over several sets of tensors."""

    layers: list[Layer]
    own: tiles.Tile
    """What a launch by itself takes."""
    timed: list[Layer]
    """Of a weight gradient, with du from the adjoint's pass if that has one; else ``layers``."""
    tile: tiles.Tile


Steps = dict[tuple[str, str], Step]
"""By layer and phase."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu.add_budget(parser)
    add = parser.add_argument
    add("--batch", type=positive, nargs="+", default=list(BATCHES), metavar="N", help="batch sizes (64 1024)")
    add("--dtype", nargs="+", choices=tuple(TOLERANCE), default=list(DTYPE_NAMES), help="bfloat16 tf32")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="all")
    add(
        "--layer", type=positive, nargs="+", metavar="N", help="of each network, counted from its input (all)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, writes, prints. 1 if a result of ours is wrong."""
    gpu.need_gpu(args.out)
    return Stage(args.out, Budget(args.minutes)).run(args.batch, args.dtype, args.contestants, args.layer)


def cold(calls: Sequence[Call]) -> Spread:
    """By replay, L2 overwritten before."""
    return replay.measure(calls, cold=True)


# --- the contestants ---------------------------------------------------------------------------------------


def prepared(layer: Layer) -> tuple[Any, tuple[Tensor, ...]]:
    """The operation with a channels_last weight, and what its prologues have made, channels_last."""
    it = layer.operation

    def made(x: Tensor, prologue: Prologue) -> Tensor:
        return aten.prepared(x, prologue, it.slope).contiguous(memory_format=torch.channels_last)

    if isinstance(it, Product):
        return with_weight(it), (made(it.x, it.prologue),)
    return it, (made(it.small, it.small_prologue), made(it.large, it.large_prologue))


def with_weight(it: Any) -> Any:
    """A product with a channels_last weight, which saves PyTorch a copy a call."""
    if not isinstance(it, Product):
        return it
    return it._replace(weight=it.weight.contiguous(memory_format=torch.channels_last))


def bare(it: Product | Gradient, operands: Sequence[Tensor]) -> Tensor:
    """The convolution alone."""
    if isinstance(it, Product):
        (x,) = operands
        return aten.convolution(x, it)
    small, large = operands
    return aten.convolution_weight(small, large, it)


def eager(network: str, layer: Layer, backward: bool, input_gradient: bool) -> Call:
    """Convolution, BatchNorm in training and activation of a layer, from its forward product."""
    it, (x,) = prepared(layer)
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


def compiled() -> Callable[[Any], tuple[Tensor, ...]]:
    """Inductor's :func:`.aten.compute`, for the one layer it is then called with."""
    torch._dynamo.reset()  # or after eight shapes the next would not be compiled at all
    return torch.compile(aten.compute, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)


# --- measuring ---------------------------------------------------------------------------------------------


def work(
    network: str, layers: Sequence[Layer], batch: int, dtype: str, numbers: Sequence[int] | None = None
) -> Iterator[tuple[Entry, str]]:
    """(what is timed, of whom) for the layers of a network's training step, or those of the numbers."""
    names = list(dict.fromkeys(layer.name for layer in layers))
    chosen = names if numbers is None else [names[n - 1] for n in numbers if n <= len(names)]
    for layer in layers:
        if layer.name not in chosen:
            continue
        entry = Entry(network, layer.name, layer.phase, batch, dtype)
        yield from ((entry, who) for who in ("ours", "cudnn", "inductor"))
        if layer.phase == "forward":
            yield entry, "eager"
            yield entry._replace(phase="sum"), "eager"
            yield entry._replace(phase="pack"), "ours"


def default_networks() -> dict[str, Any]:
    return {name: make() for name, make in warm.NETWORKS.items()}


class Stage:
    """Measures what is not yet in the file, appends it, prints the tables."""

    def __init__(
        self,
        out: Path,
        budget: Budget,
        device: str = "cuda",
        measure: Measure = cold,
        networks: Callable[[], dict[str, Any]] = default_networks,
        sets: int = SETS,
    ) -> None:
        self._path, self._out, self._budget = out / FILE, out, budget
        self._device, self._measure, self._networks, self._sets = device, measure, networks, sets
        self._common = results.common("kernels")
        self._rows: dict[tuple[Entry, str], dict[str, Any]] = {}
        if self._path.exists():
            try:
                read = results.read(self._path)
            except ValueError as error:
                raise UsageError(str(error)) from error
            for row in filter(self._same_machine, read):
                self._rows[Entry(*(row[name] for name in Entry._fields)), row["contestant"]] = row
        self._console = table.console()

    def _same_machine(self, row: dict[str, Any]) -> bool:
        return bool(
            row["kind"] == "kernels"
            and row["hardware"]["gpu"] == self._common["hardware"]["gpu"]
            and all(row["versions"][p] == self._common["versions"][p] for p in ("torch", "triton"))
        )

    def run(
        self,
        batches: Iterable[int],
        dtypes: Iterable[str],
        contestants: Sequence[str],
        numbers: Sequence[int] | None = None,
    ) -> int:
        """1 if a result of ours is wrong. ``numbers``: of the layers, from 1; all without."""
        cases = list(itertools.product(dict.fromkeys(batches), dict.fromkeys(dtypes)))
        rates: dict[str, ceiling.Ceiling] = {}
        for dtype in dict.fromkeys(dtypes):
            worker.set_precision(self._device, dtype)
            rate = rates[dtype] = ceiling.measure(self._device, dtype)
            flops, copied = f"{rate.flops / 1e12:,.1f} TFLOP/s", f"{rate.bandwidth / 1e9:,.0f} GB/s"
            print(f"{dtype}: {flops} ({rate.measure}), {copied} (copy)", flush=True)
        with contextlib.ExitStack() as stack:
            compilers = None
            if self._device == "cuda" and "ours" in contestants:
                compilers = stack.enter_context(warm.Compilers())
            # Inductor takes half a minute a layer: last, when all else is there.
            for these in (("ours", "cudnn", "eager"), ("inductor",)):
                for (batch, dtype), network in itertools.product(cases, self._networks()):
                    wanted = [name for name in these if name in contestants]
                    self._case(network, batch, dtype, wanted, numbers, compilers)
        for (batch, dtype), network in itertools.product(cases, self._networks()):
            self._console.print(self.table(network, batch, dtype, rates[dtype]))
        print(self._budget.report())
        return int(any(row["status"] == "wrong" for (_, who), row in self._rows.items() if who == "ours"))

    def _case(
        self,
        network: str,
        batch: int,
        dtype: str,
        contestants: Sequence[str],
        numbers: Sequence[int] | None,
        compilers: warm.Compilers | None,
    ) -> None:
        worker.set_precision(self._device, dtype)
        shapes = self._training(self._networks()[network], network, batch, dtype, "meta")
        todo = [
            (entry, who)
            for entry, who in work(network, shapes, batch, dtype, numbers)
            if who in contestants and (entry, who) not in self._rows
        ]
        if not todo or not self._budget.allows(f"{network} batch {batch} {dtype} {'/'.join(contestants)}"):
            return
        names = {entry.layer for entry, _ in todo}
        if compilers is not None and "ours" in contestants:
            self._precompile(compilers, network, batch, dtype, names)
        steps = self.steps(network, batch, dtype, names)
        for entry, who in todo:
            if self._budget.allows(f"{' '.join(map(str, entry))} {who}"):
                self._keep(entry, who, self._figures(entry, who, steps))

    def _training(self, made: Any, network: str, batch: int, dtype: str, device: str) -> list[Layer]:
        # D's image has a gradient where G trains through it; z has none.
        return training(made, batch, DTYPES[dtype], device, input_gradient=network == "D")

    def _precompile(
        self, compilers: warm.Compilers, network: str, batch: int, dtype: str, names: Collection[str]
    ) -> None:
        """What ours launches in training, compiled beside each other before it is chosen and timed.

        Where a tile then turns out to spill, the next is compiled by itself.
        """
        processors = tiles.multiprocessors(torch.device(self._device))
        futures: dict[str, Future[None]] = {}
        for index, layer in enumerate(warm.listed(network, 1, batch, dtype, "meta")):
            key = layer.problem.key()
            if layer.name in names and layer.phase != "eval" and key not in futures:
                where = warm.Where(network, 1, batch, dtype, index)
                futures[key] = compilers.submit(where, self._tile(layer, lambda tile: False), processors)
        for future in futures.values():
            future.exception()  # what does not compile there is found out here

    def steps(self, network: str, batch: int, dtype: str, names: Collection[str] | None = None) -> Steps:
        """The phases of the network's layers, or those of the names, each over several sets of tensors."""
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
            own = self._tile(layer)
            timed, tile = same, own
            adjoint = found.get((layer.name, "dgrad"))
            if layer.phase == "wgrad" and adjoint and not adjoint.tile.fused and warm.takes_du(layer):
                timed = [warm.shared(one) for one in same]
                tile = self._tile(timed[0])
            found[layer.name, layer.phase] = Step(same, own, timed, tile)
        return found

    def _tile(self, layer: Layer, spills: Callable[[tiles.Tile], bool] | None = None) -> tiles.Tile:
        """From the stage ``tune`` if it has run, else what a call would take, which compiles to be chosen."""
        if self._device == "cuda":
            tuned = tiles.read(self._out / tiles.gpu_file(torch.cuda.get_device_name()))
            if layer.problem.key() in tuned:
                return tuned[layer.problem.key()]
        device = torch.device(self._device)
        processors = tiles.multiprocessors(device)

        def compiled(tile: tiles.Tile) -> bool:
            return layer.launches(tile, processors).product.spills()

        return tiles.choose(layer.problem, device, spills or compiled)

    def _figures(self, entry: Entry, who: str, steps: Steps) -> dict[str, Any]:
        """A row's own."""
        forward = steps.get((entry.layer, "forward"))
        adjoint = steps.get((entry.layer, "dgrad"))
        assert forward is not None
        if entry.phase == "pack":
            return self._pack([step for step in (forward, adjoint) if step is not None])
        if who == "eager":
            backward = entry.phase == "sum"
            return self._timed(
                [eager(entry.network, one, backward, adjoint is not None) for one in forward.layers]
            )
        step = steps[entry.layer, entry.phase]
        return {"ours": self._ours, "cudnn": self._cudnn, "inductor": self._inductor}[who](step, entry.dtype)

    def _timed(self, calls: Sequence[Call], **more: Any) -> dict[str, Any]:
        with _searching(True):
            spread = self._measure(calls)
        return {"status": "ok", "us": 1e6 * spread.median, "relative": spread.relative} | more

    def _checked(
        self,
        got: Sequence[Tensor],
        expected: Sequence[Tensor],
        dtype: str,
        calls: Callable[[], Sequence[Call]],
    ) -> dict[str, Any]:
        found = aten.error(got, expected)
        if not found <= TOLERANCE[dtype]:
            return {"status": "wrong", "error": None if math.isinf(found) else found}
        return self._timed(calls(), error=found)

    def _exact(self, layer: Layer) -> tuple[Tensor, ...]:
        with _searching(False):  # among float64's algorithms, that would take long
            return aten.compute(aten.converted(layer.operation, torch.float64))

    def _ours(self, step: Step, dtype: str) -> dict[str, Any]:
        processors = tiles.multiprocessors(torch.device(self._device))
        got = outputs(step.layers[0], step.own, processors)
        launches = [one.launches(step.tile, processors) for one in step.timed]
        calls = [one.__call__ for one in launches]
        problem = step.timed[0].problem
        seen = problem if step.tile.fused else model.plain(problem)
        about = model.predict(seen, step.tile, processors=processors)
        facts = {
            "tile": list(step.tile),
            "kernel": step.layers[0].kernel,
            "predicted_us": 1e6 * shortlist.seconds(problem, launches[0], step.tile, processors),
            "flops": about.flops,
            "bytes": about.bytes,
        }
        return self._checked(got, self._exact(step.layers[0]), dtype, lambda: calls) | facts

    def _pack(self, steps: Sequence[Step]) -> dict[str, Any]:
        def call(index: int) -> None:
            for step in steps:
                it = step.layers[index].operation
                assert isinstance(it, Product)
                engine.kernel_for(it).pack(it.weight)

        return self._timed([functools.partial(call, i) for i in range(len(steps[0].layers))])

    def _cudnn(self, step: Step, dtype: str) -> dict[str, Any]:
        it, operands = prepared(step.layers[0])
        with _searching(False):
            expected = bare(
                aten.converted(it, torch.float64), tuple(aten.converted(x, torch.float64) for x in operands)
            )
        got = bare(it, operands)

        def calls() -> list[Call]:
            return [functools.partial(bare, *prepared(one)) for one in step.layers]

        return self._checked([got], [expected], dtype, calls)

    def _inductor(self, step: Step, dtype: str) -> dict[str, Any]:
        function = compiled()
        operations = [with_weight(one.operation) for one in step.layers]
        with torch.no_grad():
            try:
                got = function(operations[0])
            except Exception as failure:  # whatever it is, it is the rival's
                lines = str(failure).strip().splitlines() or [type(failure).__name__]
                return {"status": "failed", "reason": lines[0]}
            calls = [functools.partial(function, it) for it in operations]
            return self._checked(got, self._exact(step.layers[0]), dtype, lambda: calls)

    def _keep(self, entry: Entry, who: str, figures: dict[str, Any]) -> None:
        row = self._common | entry._asdict() | {"contestant": who} | figures
        if "us" in figures:
            row[f"{who}_us"] = figures["us"]
        self._rows[entry, who] = row
        results.append(self._path, [row])
        said = f"{figures['us']:.1f} µs" if "us" in figures else figures["status"].upper()
        print(f"{' '.join(map(str, entry))} {who}: {said}", flush=True)

    # --- the table ---

    def _us(self, entry: Entry, who: str) -> float | None:
        row = self._rows.get((entry, who))
        return None if row is None else row.get("us")

    def _cell(self, entry: Entry, who: str) -> str:
        row = self._rows.get((entry, who))
        if row is None:
            return table.NOTHING
        return f"{row['us']:.1f}" if "us" in row else str(row["status"]).upper()

    def table(self, network: str, batch: int, dtype: str, rate: ceiling.Ceiling) -> Table:
        """A network's layers, with a row of sums where a contestant has all phases."""
        columns = ["ours µs", "of roofline", "predicted", "cuDNN", "eager", "Inductor"]
        shown = table.start(f"{network} · batch {batch} · {dtype}", ["layer", "phase"], columns)
        names = dict.fromkeys(
            e.layer for e, _ in self._rows if (e.network, e.batch, e.dtype) == (network, batch, dtype)
        )
        for name in names:
            of = Entry(network, name, "", batch, dtype)
            phases = [
                p
                for p in (*PHASES, "pack")
                if any((of._replace(phase=p), who) in self._rows for who in CONTESTANTS)
            ]
            roofline: list[float] = []
            for phase in phases:
                entry = of._replace(phase=phase)
                ours = self._rows.get((entry, "ours"), {})
                share = None
                if "flops" in ours and "us" in ours:
                    least = max(ours["flops"] / rate.flops, ours["bytes"] / rate.bandwidth)
                    share = 1e6 * least / ours["us"]
                    roofline.append(least)
                predicted = ours.get("predicted_us")
                shown.add_row(
                    name,
                    phase,
                    self._cell(entry, "ours"),
                    table.percent(share),
                    table.NOTHING if predicted is None else f"{predicted:.1f}",
                    *(self._cell(entry, who) for who in ("cudnn", "eager", "inductor")),
                )
            shown.add_row(name, "sum", *self._sums(of, phases, sum(roofline)), end_section=True)
        return shown

    def _sums(self, of: Entry, phases: Sequence[str], roofline: float) -> list[str]:
        def total(who: str, over: Iterable[str]) -> float | None:
            times = [self._us(of._replace(phase=phase), who) for phase in over]
            return None if not times or None in times else sum(t for t in times if t is not None)

        products = [phase for phase in phases if phase != "pack"]
        ours, predicted = (
            total("ours", phases),
            [self._rows.get((of._replace(phase=p), "ours"), {}).get("predicted_us") for p in products],
        )
        eager_us = self._us(of._replace(phase="sum"), "eager")
        sums = [total("cudnn", products), eager_us, total("inductor", products)]
        return [
            table.NOTHING if ours is None else f"{ours:.1f}",
            table.percent(None if ours is None or not roofline else 1e6 * roofline / ours),
            table.NOTHING if None in predicted else f"{sum(p or 0.0 for p in predicted):.1f}",
            *(table.NOTHING if value is None else f"{value:.1f}" for value in sums),
        ]


@contextlib.contextmanager
def _searching(on: bool) -> Iterator[None]:
    """Whether cuDNN times its algorithms."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
