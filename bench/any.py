"""``python -m bench any``: ``dcgan.fast.fuse(network)`` compared with what a user would run instead.

The networks are those of :mod:`examples.networks`, as their users write them. Each row is a network, a mode,
a batch size and a baseline. The fused network is first compared with a float64 copy of the plain one: its
output and, in training, every parameter's gradient and every buffer. The baseline and the fused network are
then timed in one process, which shares one thread pool, in short interleaved bursts; runtimes with a thread
pool of their own (ONNX Runtime, OpenVINO) and the fused network in two processes, as by ``bench generate``.
The result is the ratio of the medians, baseline over fused. A row below 0.97 is measured again for four times
as long; if it is still below, it is marked and the exit status is 1.

The memory of a training step is the peak resident memory of a process that runs only this step, minus its
memory after all imports: activations, weights in every form and the kernels' workspaces, which no count of
tensors includes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from bench import machine, options, output
from bench.cases import TOLERANCE, Case, allowed, relative_error
from bench.output import Row
from bench.providers import PROVIDERS, find
from bench.race import PREPARE_SECONDS, Process, Settings, race
from bench.situations import judge, measured_twice, medians
from bench.timing import Timed, torch_threads
from bench.training import KINK_TOLERANCE
from bench.worker import Worker, _resident_bytes
from dcgan import fast
from examples.networks import NETWORKS

HELP = "compare dcgan.fast.fuse(network) with plain PyTorch on networks as users write them"
G, D, LOOP = "DcganG", "DcganD", "DcganLoop"
LR, BETAS = 2e-4, (0.5, 0.999)
PENALTY = 10.0
PEAK_CALLS = 3  # of which the memory is measured
OTHER_RUNTIMES = ("onnxruntime", "openvino")

Call = Callable[..., Tensor]


# --- modes: each returns the callable to time, given a network and the kind of its loss ---------------------

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "images": lambda y: y.square().mean(),
    "probabilities": lambda y: F.binary_cross_entropy(y, torch.ones_like(y)),
    "hinge": lambda y: F.relu(1 - y).mean(),
    "critic": lambda y: y.mean(),
}


def inference(network: nn.Module, loss: str) -> Call:
    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = network(*inputs)
        return y

    return run


def training(network: nn.Module, loss: str) -> Call:
    """Compute the gradients of all parameters; return the output."""

    def run(*inputs: Tensor) -> Tensor:
        network.zero_grad()
        y: Tensor = network(*inputs)
        LOSSES[loss](y).backward()
        return y.detach()

    return run


def gradient_penalty(network: nn.Module, loss: str) -> Call:
    """Compute the gradients of a critic's loss with the gradient penalty of WGAN-GP; return the loss."""

    def run(real: Tensor) -> Tensor:
        network.zero_grad()
        fake, n = real.flip(0) / 2, len(real)
        share = torch.linspace(0, 1, n, dtype=real.dtype).view(-1, 1, 1, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        scores = network(between)
        (slope,) = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)
        penalty = (slope.flatten(1).norm(2, dim=1) - 1).square().mean()
        total: Tensor = network(fake).mean() - network(real).mean() + PENALTY * penalty
        total.backward()
        return total.detach()

    return run


def loop(networks: nn.Module, loss: str, lr: float = LR) -> Call:
    """Run one iteration of pytorch/examples' training loop; return its losses and mean probabilities."""
    assert isinstance(networks, nn.ModuleDict)
    generator, discriminator = networks[G], networks[D]
    criterion = nn.BCELoss()
    optimizer_d = optim.Adam(discriminator.parameters(), lr=lr, betas=BETAS)
    optimizer_g = optim.Adam(generator.parameters(), lr=lr, betas=BETAS)

    def run(real: Tensor, noise: Tensor) -> Tensor:
        # D: maximize log(D(x)) + log(1 - D(G(z)))
        discriminator.zero_grad()
        label = torch.full((len(real),), 1.0, dtype=real.dtype)
        probability = discriminator(real)
        loss_real = criterion(probability, label)
        loss_real.backward()
        d_x = probability.mean().item()
        fake = generator(noise)
        label.fill_(0.0)
        probability = discriminator(fake.detach())
        loss_fake = criterion(probability, label)
        loss_fake.backward()
        d_g_z1 = probability.mean().item()
        optimizer_d.step()
        # G: maximize log(D(G(z)))
        generator.zero_grad()
        label.fill_(1.0)
        probability = discriminator(fake)
        loss_g = criterion(probability, label)
        loss_g.backward()
        d_g_z2 = probability.mean().item()
        optimizer_g.step()
        figures = [(loss_real + loss_fake).item(), loss_g.item(), d_x, d_g_z1, d_g_z2]
        return torch.tensor(figures, dtype=real.dtype)

    return run


MODES: dict[str, Callable[[nn.Module, str], Call]] = {
    "inference": inference,
    "training": training,
    "gradient penalty": gradient_penalty,
    "loop": loop,
}
# The first update of Adam is the gradient's sign, which rounding flips where the gradient is nearly 0. The
# loop is therefore checked without updates: its gradients then come from the same weights.
CHECKED = MODES | {"loop": functools.partial(loop, lr=0.0)}
BATCHES: dict[str, list[int]] = {
    "inference": [1, 8, 64],
    "training": [16],
    "gradient penalty": [16],
    "loop": [64],
}


# --- entries ------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One row."""

    network: str
    """Key of NETWORKS, or LOOP for the pair of pytorch/examples."""
    mode: str
    """Key of MODES."""
    batch: int
    baseline: str = "eager"
    """Key of :data:`bench.providers.PROVIDERS`."""

    @property
    def label(self) -> str:
        baseline = "" if self.baseline == "eager" else f", next to {self.baseline}"
        return f"{self.network} {self.mode}, batch {self.batch}{baseline}"

    @property
    def networks(self) -> tuple[str, ...]:
        return (D, G) if self.network == LOOP else (self.network,)

    @property
    def loss(self) -> str:
        return "" if self.network == LOOP else NETWORKS[self.network].loss


def entries(names: Sequence[str], batches: Sequence[int] | None) -> Iterator[Entry]:
    """Yield the rows of some networks; ``batches`` replaces the batch sizes of every mode."""
    for name in dict.fromkeys(names):
        modes = ["loop"] if name == LOOP else ["inference", "training"]
        if name != LOOP and NETWORKS[name].loss == "critic":
            modes.append("gradient penalty")
        for mode in modes:
            more = [64] if mode == "training" and name in (G, D) else []
            for batch in dict.fromkeys(batches or BATCHES[mode] + more):
                yield Entry(name, mode, batch)
                if name == LOOP or (name, mode, batch) == (G, "inference", 64):
                    for baseline in ("channels_last", "compile"):
                        yield Entry(name, mode, batch, baseline)
                if (name, mode, batch) == (G, "inference", 64):
                    for baseline in OTHER_RUNTIMES:
                        yield Entry(name, mode, batch, baseline)


def prepared(
    entry: Entry, sizes: Mapping[str, Mapping[str, int]] = MappingProxyType({})
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the plain network of an entry, in the mode's training or eval mode, and its inputs.

    ``sizes`` has arguments of the networks' constructors. The pair of LOOP is an ``nn.ModuleDict``.
    """
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {}
    inputs: tuple[Tensor, ...] = ()
    for name in entry.networks:
        made[name] = NETWORKS[name].make(**sizes.get(name, {}))
        calibrate(made[name], NETWORKS[name].inputs(16))
        inputs += NETWORKS[name].inputs(entry.batch)
    network = nn.ModuleDict(made) if entry.network == LOOP else made[entry.network]
    return network.train(entry.mode != "inference"), inputs


def calibrate(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Draw the norms' affine parameters, and set the running statistics from one batch.

    With the default ones, a network that left out a norm's parameters would pass, and in eval mode the signal
    would vanish layer by layer.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
            norm.momentum = 1.0
        network.train()(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def each(network: nn.Module, change: Callable[[nn.Module], Any]) -> Any:
    """Return the changed network; of a pair, each network is changed separately."""
    if isinstance(network, nn.ModuleDict):
        return nn.ModuleDict({name: change(part) for name, part in network.items()})
    return change(network)


def fused(model: nn.Module, example: Tensor | None = None, threads: int = 0) -> nn.Module:
    """Return the fused network; the build function of a provider (:mod:`bench.providers`)."""
    return each(model, fast.fuse)  # type: ignore[no-any-return]


# --- the check ----------------------------------------------------------------------------------------------


def results(entry: Entry, network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Run a network once; return its output and, in training, all gradients and buffers."""
    torch.manual_seed(0)  # of dropout's masks
    with mock.patch.object(F, "dropout", _dropout):
        found = {"output": CHECKED[entry.mode](network, entry.loss)(*inputs)}
    if entry.mode != "inference":
        parameters = network.named_parameters()
        found |= {f"gradient of {name}": p.grad for name, p in parameters if p.grad is not None}
        found |= {f"buffer {name}": buffer.clone() for name, buffer in network.named_buffers()}
    return found


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop the same elements whatever the dtype and memory layout of x; PyTorch draws in memory order."""
    return x * (torch.empty(x.shape).bernoulli_(1 - p) / (1 - p)).to(x.dtype) if training else x


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of every tensor; inf if it is missing."""
    missing = torch.empty(0)
    return {
        name: 0.0 if torch.equal(found.get(name, missing), e) else _error(found.get(name, missing), e)
        for name, e in expected.items()
    }


def _error(found: Tensor, expected: Tensor) -> float:
    return relative_error(found, expected.double())


def check(entry: Entry, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[float, float, str]:
    """Compare the fused network with a float64 copy of the plain one, both in the entry's mode.

    Returns the error, the bound and the name of the tensor whose error is the largest relative to its bound:
    that of :mod:`bench.cases`, relaxed where eager's error is larger. A gradient's is at least
    KINK_TOLERANCE: where rounding moves a value across the kink of a ReLU, gradients change by far more than
    the rounding.
    """
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    expected = results(entry, copy.deepcopy(network).double(), wide)
    eager = errors(results(entry, copy.deepcopy(network), inputs), expected)
    found = results(entry, fused(copy.deepcopy(network)), inputs)
    if extra := found.keys() - expected.keys():
        return math.inf, 0.0, f"unexpected: {min(extra)}"
    worst = -1.0, 0.0, 0.0, ""
    for name, error in errors(found, expected).items():
        bound = allowed(TOLERANCE["float32"], eager[name])
        if name.startswith("gradient"):
            bound = max(bound, KINK_TOLERANCE)
        excess = math.inf if math.isinf(error) else error / bound
        worst = max(worst, (excess, error, bound, name))
    return worst[1:]


# --- measurements -------------------------------------------------------------------------------------------


def measure(entry: Entry, seconds: float, rounds: int, threads: int) -> Row:
    """Return the row of an entry: median seconds, their ratio, the check, the engines and the memory.

    Raises:
        UnavailableError: its baseline cannot run on this machine.
        WorkerFailed: a process that measures the memory fails.
    """
    if entry.baseline in OTHER_RUNTIMES:
        return measure_runtime(entry, seconds, rounds, threads)
    network, inputs = prepared(entry)
    error, bound, where = check(entry, network, inputs)
    checked = {"error": error, "bound": bound, "where": where}
    ours = fused(copy.deepcopy(network))
    build = PROVIDERS[entry.baseline].build
    theirs = each(copy.deepcopy(network), lambda part: build(part, inputs[0], threads))
    calls = [MODES[entry.mode](own, entry.loss) for own in (theirs, ours)]
    timed = [Timed(functools.partial(_call, call, inputs), inputs[0], threads) for call in calls]

    def times(seconds: float, rounds: int) -> Row:
        return timed_row(entry, checked, *medians(timed, seconds, rounds))

    row = measured_twice(times, verdict, seconds, rounds)
    return row | {"engines": engines(ours, inputs), "memory_ratio": memory_ratio(entry, threads)}


def _call(call: Call, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    return call(*inputs)


def timed_row(entry: Entry, checked: Row, baseline_s: float, fused_s: float) -> Row:
    times = {"baseline_s": baseline_s, "fused_s": fused_s, "ratio": baseline_s / fused_s}
    return entry._asdict() | times | checked | {"engines": "", "memory_ratio": None}


def verdict(row: Row) -> str:
    """Judge a row: ``wrong``, ``slower`` or an empty string."""
    return judge(row["ratio"], row["error"], row["bound"])


def engines(ours: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """Return how many of the fused network's convolutions run on each engine."""
    parts = [(ours, inputs)]
    if isinstance(ours, nn.ModuleDict):
        parts = [(part, (x,)) for part, x in zip(ours.values(), inputs, strict=True)]
    counts = Counter(
        layer.engine
        for part, own in parts
        for layer in fast.explain(part, *own)
        if "conv" in layer.op.lower()
    )
    return ", ".join(f"{engine} {count}" for engine, count in counts.most_common())


# --- runtimes with their own thread pools -------------------------------------------------------------------


class UnavailableError(Exception):
    """A baseline has no times here; the message says why."""


@dataclass(frozen=True)
class Registered(Case):
    """Inference of a network of NETWORKS that has one input; ``command`` is its name."""

    def skeleton(self) -> Any:
        return NETWORKS[self.command].make()

    @property
    def input_shape(self) -> Any:
        return NETWORKS[self.command].inputs(1)[0].shape[1:]


def measure_runtime(entry: Entry, seconds: float, rounds: int, threads: int) -> Row:
    """Return the row of a baseline that runs, as does the fused network, in a process of its own.

    Raises:
        UnavailableError: the baseline cannot run on this machine, or is wrong.
    """
    case = Registered(entry.network, entry.batch, "float32", "cpu", threads)
    providers = PROVIDERS[entry.baseline], find(f"{__name__}:{fused.__name__}")

    def times(seconds: float, rounds: int) -> Row:
        settings = Settings(seconds, rounds)
        theirs, ours = race([(case, provider) for provider in providers], settings, lambda line: None)
        if theirs.status != "ok":
            raise UnavailableError(theirs.reason)
        error = math.inf if ours.error is None else ours.error
        checked = {"error": error, "bound": ours.tolerance, "where": ours.reason or "output"}
        if ours.status != "ok":
            return timed_row(entry, checked, math.nan, math.nan)
        return timed_row(entry, checked, *(o.spreads["warm"].median for o in (theirs, ours)))

    return measured_twice(times, verdict, seconds, rounds)


# --- memory -------------------------------------------------------------------------------------------------


class PeakWorker(Worker):
    """The process whose memory is measured."""

    differentiates = True

    def peak(self, entry: Entry, fuse: bool) -> int:
        """Return the peak resident memory, in bytes, of an entry's calls after the first one."""
        network, inputs = prepared(entry)
        call = MODES[entry.mode](fused(network) if fuse else network, entry.loss)
        call(*inputs)
        self._reset_peak()
        for _ in range(PEAK_CALLS):
            call(*inputs)
        return _resident_bytes("VmHWM") - self._baseline


def memory_ratio(entry: Entry, threads: int) -> float | None:
    """Return the peak memory of the fused network's step over that of eager's; None outside training."""
    if entry.mode == "inference" or entry.baseline != "eager":
        return None
    peaks = []
    for fuse in (True, False):
        with closing(Process(threads, f"{__name__}:{PeakWorker.__name__}")) as worker:
            peaks.append(worker.ask(PREPARE_SECONDS, "peak", entry, fuse))
    ratio: float = peaks[0] / peaks[1]
    return ratio


# --- the command --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [*NETWORKS, LOOP]
    about = f"any of {', '.join(names)} (default: all)"
    parser.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NAME", help=about)
    options.add_batches(parser, None, "inference 1 8 64, training 16 or 64")
    options.add_timing(parser, "each network and row", 0.6, rounds=4)
    options.add(parser, "threads", "json")


def run(args: argparse.Namespace) -> int:
    """Run the command. Return 1 if a row is wrong or slower than its baseline, else 0."""
    load, rows = machine.load(), []
    heading = f"dcgan.fast.fuse compared with what a user would run · cpu, {args.threads} threads"
    right = ["batch", "baseline ms", "fused ms", "ratio", "memory", "error", "bound"]
    shown = output.table(heading, ["network", "mode", "baseline"], right)
    for name in ("convolutions", ""):
        shown.add_column(name, no_wrap=True)
    for entry in entries(args.networks, args.batch):
        try:
            with torch_threads(args.threads):
                row = measure(entry, args.seconds, args.rounds, args.threads)
        except UnavailableError as failure:
            output.log(f"{entry.label}: left out: {failure}")
            continue
        word = verdict(row)
        output.log(f"{entry.label}: {output.times(row['ratio'])} {word}".rstrip())
        shown.add_row(
            *(entry.network, entry.mode, entry.baseline, str(entry.batch)),
            *(output.rate(1e3 * row[name]) for name in ("baseline_s", "fused_s")),
            *(output.times(row[name]) for name in ("ratio", "memory_ratio")),
            *(f"{row[name]:.0e}" for name in ("error", "bound")),
            *(row["engines"], f"wrong: {row['where']}" if word == "wrong" else word),
        )
        # JSON has neither infinity nor NaN.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        rows.append(finite | {"verdict": word})
    output.console().print(shown)
    shared = output.common("any", load)
    output.append(args.json, [shared | row for row in rows])
    return int(any(row["verdict"] for row in rows))
