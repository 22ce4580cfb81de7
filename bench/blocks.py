"""``python -m bench profile``: break down the drop-in's inference time on a CPU by layer.

Each layer runs alone through the native engine, with the algorithm that the engine selects, on the
activations that reach it in the network. The whole network is then timed as the drop-in runs it: one call
that processes the batch in blocks of images.

A layer is a :class:`Block`: a convolution with the BatchNorm and activation that follow it. The drop-in lets
the engine choose the algorithms; in a :class:`Chain` every candidate can be checked and timed.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from bench import machine, options, output
from bench.cases import Case, Network, input_shape
from bench.options import SIZES, UsageError
from bench.output import Row, percent, rate
from bench.timing import Spread, Timed, interleaved, torch_threads
from dcgan import fast
from dcgan.kernels.cpu import Geometry, Prepared, algorithm_selection, library
from dcgan.kernels.cpu.inference import geometry, plan
from dcgan.kernels.spec import Stage

HELP = "break down CPU inference time by layer"
CONVOLUTIONS = nn.Conv2d | nn.ConvTranspose2d
TOGETHER = "layers together"
WHOLE = "one call"


class Block(NamedTuple):
    """One layer of a network, as modules for eager and as a stage for the native engine."""

    name: str
    modules: nn.Sequential
    """The convolution and the modules that follow it."""
    input_shape: tuple[int, int, int]
    """[C, H, W]."""

    @property
    def convolution(self) -> nn.Conv2d | nn.ConvTranspose2d:
        convolution = self.modules[0]
        assert isinstance(convolution, CONVOLUTIONS)
        return convolution

    @property
    def stage(self) -> Stage:
        """The modules in eval mode as a stage of the kernels, with shared tensors."""
        (stage,) = fast.stages(list(self.modules.named_children()))
        return stage

    @property
    def geometry(self) -> Geometry:
        stage = self.stage
        return geometry(
            stage.transposed, stage.weight.shape, *self.input_shape[1:], stage.stride, stage.padding
        )

    @property
    def flops(self) -> int:
        """FLOP of the direct convolution per image."""
        return 2 * self.geometry.macs


def blocks(network: Network) -> list[Block]:
    """Return the network's layers in order. The blocks share the network's modules."""
    x = torch.zeros(1, *input_shape(network)).to(next(network.parameters()))
    modules = list(network.main)
    starts = [i for i, module in enumerate(modules) if isinstance(module, CONVOLUTIONS)]
    found: list[Block] = []
    for start, end in zip(starts, [*starts[1:], len(modules)], strict=True):
        sequence = nn.Sequential(*modules[start:end])
        sequence.training = network.training
        with torch.no_grad():
            y = modules[start](x)  # without BatchNorm, which would update its running statistics
        channels, height, width = x.shape[1:]
        name = f"{channels}→{y.shape[1]} @{height}→{y.shape[2]}"
        found.append(Block(name, sequence, (channels, height, width)))
        x = y
    return found


def require_engine() -> None:
    """Raise UsageError if the native engine was not built."""
    if (problem := library.problem()) is not None:
        raise UsageError(f"the native engine is missing: {problem}")


def chosen_algorithm(g: Geometry, images: int, threads: int) -> str:
    """Return the algorithm that the engine chooses for a layer with prepacked weights."""
    return algorithm_selection.algorithm(g, images, threads, library.isa(), True)


class Chain:
    """Float32 stages on images of one shape. Weights are packed at the first call and kept."""

    def __init__(
        self,
        stages: Sequence[Stage],
        shape: Sequence[int],
        algorithms: Sequence[str] | None = None,
        threads: int = 1,
    ) -> None:
        """``shape`` is that of x, [N, C, H, W]. ``algorithms`` defaults to those that the engine chooses."""
        if algorithms is None:
            geometries = plan(shape, stages, threads).geometries
            algorithms = [chosen_algorithm(g, shape[0], threads) for g in geometries]
        self.algorithms = tuple(algorithms)
        self._arguments = tuple(shape), list(stages), threads, self.algorithms
        self._layers = (library.Layer * len(stages)).from_buffer_copy(plan(*self._arguments).layers)
        self._prepared: Prepared | None = None

    @property
    def workspace(self) -> int:
        """Bytes of workspace that the engine needs for a call."""
        (images, *_), stages, threads, _ = self._arguments
        size = library.library().dcgan_workspace
        return library.checked(size(ctypes.addressof(self._layers), len(stages), images, threads))

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        size = library.library().dcgan_packed_size
        return sum(4 * library.checked(size(ctypes.addressof(layer))) for layer in self._layers)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the result for x, channels_last unless the last layer is a narrow transposed convolution."""
        self._prepared = self._prepared or Prepared(*self._arguments)
        _, stages, _, algorithms = self._arguments
        return self._prepared(x, not (algorithms[-1] == "narrow" and stages[-1].transposed))


# --- the command --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add(parser, "network", *SIZES, "threads", "json")
    options.add_batches(parser, [64])
    options.add_timing(parser, "each layer and the whole", 1.5)


def run(args: argparse.Namespace) -> int:
    require_engine()
    sizes = options.sizes(args, args.network)
    out, load = output.console(), machine.load()
    for batch in dict.fromkeys(args.batch):
        case = Case(args.network, batch, "float32", "cpu", args.threads, sizes)
        with torch.no_grad(), torch_threads(args.threads):
            rows, roof = measure(case, args.seconds, args.rounds)
        out.print(profile_table(f"{case.title} · {library.isa()}", rows, roof))
        out.print(
            f"ceiling: {roof / 1e9:,.0f} GFLOP/s, float32 FMA peak; rates count the FLOPs of direct "
            "convolution, so Winograd may exceed it",
            soft_wrap=True,
        )
        shared = output.common("profile", load) | {"case": asdict(case), "isa": library.isa()}
        shared["ceiling"] = {"flops": roof, "measure": "float32 FMA peak"}
        output.append(args.json, [shared | row for row in rows])
    return 0


def measure(case: Case, seconds: float, rounds: int) -> tuple[list[Row], float]:
    """Time each layer, in order, and last the whole network; also return the peak FMA rate in FLOP/s.

    Rows are JSON objects: times in seconds, FLOPs of direct convolution for the whole batch and their rate,
    the size of the prepacked weights.
    """
    network = case.network().requires_grad_(False)
    x = inputs = case.inputs()[0]
    timed: list[Timed] = []
    rows: list[Row] = []
    for block in blocks(network):
        chain = Chain([block.stage], x.shape, threads=case.threads)
        timed.append(Timed(chain, x, case.threads))
        sizes = {"flops": case.batch * block.flops, "weight_bytes": chain.packed_bytes}
        rows.append({"layer": block.name, "algorithm": chain.algorithms[0]} | sizes)
        x = chain(x)
    timed.append(Timed(fast.convert(network), inputs, case.threads))
    sizes = {name: sum(row[name] for row in rows) for name in ("flops", "weight_bytes")}
    rows.append({"layer": WHOLE, "algorithm": None} | sizes)
    roofs: list[float] = []
    spreads = interleaved(timed, seconds, rounds, lambda: roofs.append(machine.fma(case.threads)))
    total = sum(spread.median for spread in spreads[:-1])
    for row, spread in zip(rows, spreads, strict=True):
        row |= {"times": asdict(spread), "share": spread.median / total}
        row["flops_per_s"] = row["flops"] / spread.median
    return rows, max(roofs)


def profile_table(heading: str, rows: Sequence[Row], roof: float) -> Table:
    """Build a table of the layers, their sum and the single call; shares are relative to the sum."""
    columns = ["ms", "±", "share", "GFLOP/s", "ceiling", "GFLOP", "weights MB"]
    shown = output.table(heading, ["layer", "algorithm"], columns)
    total = sum(row["times"]["median"] for row in rows[:-1])

    def add(row: Row, seconds: float, relative: float | None) -> None:
        flops_per_s = row["flops"] / seconds
        shown.add_row(
            *(row["layer"], row["algorithm"], rate(1e3 * seconds), percent(relative)),
            *(percent(seconds / total), rate(flops_per_s / 1e9), percent(flops_per_s / roof)),
            *(rate(row["flops"] / 1e9), rate(row["weight_bytes"] / 1e6)),
        )

    for row in rows:
        if row["layer"] == WHOLE:
            shown.add_section()
            add(row | {"layer": TOGETHER}, total, None)
        add(row, row["times"]["median"], Spread.of(row["times"]).relative)
    return shown
