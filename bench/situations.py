"""``python -m bench situations``: the drop-in compared with eager where a drop-in could be slower.

Each row is a situation: a dtype, a mode and an edit of the network. The drop-in's output is first compared
with float64; both networks are then timed in one process, which shares one thread pool, in short interleaved
bursts. The result is the ratio of the medians, eager over drop-in. A row below 0.97 is measured again for
four times as long; if it is still below, it is marked and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import machine, options, output
from bench.blocks import CONVOLUTIONS
from bench.cases import relative_error
from bench.options import UsageError, positive
from bench.output import Row
from bench.timing import Timed, interleaved
from dcgan import fast, models

HELP = "compare the drop-in with eager by dtype, mode and edit of the network"
MIN_RATIO = 0.97
Network = Any

# The network's dtype and the autocast dtype.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03}


# --- modes -------------------------------------------------------------------------------------------------


def inference(network: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)  # type: ignore[no-any-return]


def parameter_gradients(network: Network, x: Tensor) -> Tensor:
    """Compute the gradients of all parameters; return the output."""
    network.zero_grad()
    y = network(x)
    y.float().square().mean().backward()
    return y.detach()  # type: ignore[no-any-return]


def input_gradient(network: Network, x: Tensor) -> Tensor:
    """Compute the gradient of the input only, as in latent-space optimization; return the output."""
    x = x.detach().requires_grad_()
    y = network(x)
    torch.autograd.grad(y.float().square().mean(), x)
    return y.detach()  # type: ignore[no-any-return]


# The computation, and whether the network is in training mode.
MODES: dict[str, tuple[Callable[[Network, Tensor], Tensor], bool]] = {
    "inference": (inference, False),
    "training": (parameter_gradients, True),
    "eval, gradients": (parameter_gradients, False),
    "eval, the input's gradient": (input_gradient, False),
}


# --- edits -------------------------------------------------------------------------------------------------


def _replace(network: Network, kinds: Any, make: Callable[[Any], nn.Module]) -> None:
    for i, module in enumerate(network.main):
        if isinstance(module, kinds):
            network.main[i] = make(module)


def _add_biases(network: Network) -> None:
    def with_bias(conv: Any) -> nn.Module:
        new: nn.Module = type(conv)(conv.in_channels, conv.out_channels, 4, conv.stride, conv.padding)
        new.weight = conv.weight
        return new

    _replace(network, CONVOLUTIONS, with_bias)


def _fold(network: Network) -> None:
    """Fold every BatchNorm into the preceding convolution, as exporters do."""
    _add_biases(network)
    network.main = nn.Sequential(*(m for m in network.main if not isinstance(m, nn.BatchNorm2d)))


def _six_by_six(conv: Any) -> Any:
    """Return a convolution of the same input and output sizes with a kernel size that no engine supports."""
    if conv.stride != (2, 2):
        return conv
    return type(conv)(conv.in_channels, conv.out_channels, 6, 2, 2, bias=False)


def _nest(network: Network) -> None:
    half = len(network.main) // 2
    network.main = nn.Sequential(network.main[:half], network.main[half:])


EDITS: dict[str, Callable[[Network], object]] = {
    "biases": _add_biases,
    "BatchNorm folded": _fold,
    "LeakyReLU(0.01)": lambda net: _replace(net, nn.ReLU | nn.LeakyReLU, lambda _: nn.LeakyReLU(0.01)),
    "GroupNorm": lambda net: _replace(net, nn.BatchNorm2d, lambda norm: nn.GroupNorm(8, norm.num_features)),
    "no norms": lambda net: _replace(net, nn.BatchNorm2d, lambda _: nn.Identity()),
    "6×6 kernels": lambda net: _replace(net, CONVOLUTIONS, _six_by_six),
    "a hook": lambda net: net.main[4].register_forward_hook(lambda module, args, y: None),
    "nested": _nest,
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "a norm in eval": lambda net: next(m for m in net.main if isinstance(m, nn.BatchNorm2d)).eval(),
}


# --- situations --------------------------------------------------------------------------------------------


class Situation(NamedTuple):
    """One row. If ``busy``, another process keeps a core busy while it is timed."""

    network: str
    dtype: str
    mode: str
    edit: str = ""
    features: int = 64
    image_size: int = 64
    batch: int = 16
    busy: bool = False

    @property
    def title(self) -> str:
        """Describe how the network differs from the default one."""
        features = f"features {self.features}" if self.features != 64 else ""
        size = f"image size {self.image_size}" if self.image_size != 64 else ""
        return ", ".join(filter(None, [self.edit, features, size, "busy core" if self.busy else ""]))

    @property
    def label(self) -> str:
        return f"{self.network} {self.dtype} {self.mode} {self.title}".rstrip()


def situations(batch: int) -> list[Situation]:
    found = []
    for network in ("G", "D"):
        add = functools.partial(Situation, network, batch=batch)
        for dtype, mode in itertools.product(DTYPES, MODES):
            # PyTorch takes half a minute for float16 gradients of a default network on a CPU.
            small = "float16" in dtype.split() and mode != "inference"
            found.append(add(dtype, mode, features=16 if small else 64))
        both = ("inference", "training")
        for edit, mode in itertools.product(EDITS, both):
            if not (edit == "a norm in eval" and mode == "inference"):
                found.append(add("float32", mode, edit))
        for (features, size), mode in itertools.product([(16, 64), (8, 32)], both):
            found.append(add("float32", mode, features=features, image_size=size))
        # In training, smaller networks fall back to PyTorch whether or not a core is busy.
        for mode, features in (("inference", 64), ("inference", 16), ("training", 64), ("training", 32)):
            found.append(add("float32", mode, features=features, busy=True))
    return found


def verdict(situation: Situation, row: Row) -> str:
    """Judge the row of a situation: ``wrong``, ``slower`` or an empty string."""
    dtype, cast = DTYPES[situation.dtype]
    return judge(row["ratio"], row["error"], TOLERANCES[cast or dtype])


def judge(ratio: float, error: float, bound: float) -> str:
    """Judge a ratio and an error: ``wrong``, ``slower`` or an empty string."""
    if not error <= bound:
        return "wrong"
    return "" if ratio >= MIN_RATIO else "slower"


def networks(situation: Situation) -> tuple[Network, Network, Tensor]:
    """Return the reference network, a drop-in with copies of its parameters, and an input."""
    torch.manual_seed(0)
    size, dtype = situation.image_size, DTYPES[situation.dtype][0]
    generates = situation.network == "G"
    kind: Network = models.Generator if generates else models.Discriminator
    eager: Network = kind(features=situation.features, image_size=size)
    eager.apply(models.weights_init)
    n = situation.batch
    x = torch.randn(n, 100) if generates else torch.rand(n, 1, size, size)
    eager.train(MODES[situation.mode][1])
    if situation.edit:
        EDITS[situation.edit](eager)
    eager.to(dtype)
    return eager, fast.convert(copy.deepcopy(eager)), x.to(dtype)


def error(eager: Network, ours: Network, x: Tensor, autocast: Callable[[], Any]) -> float:
    """Return the relative error of the drop-in's output against float64."""
    with torch.no_grad():
        expected = copy.deepcopy(eager).double()(x.double())
        with autocast():
            y = copy.deepcopy(ours)(x)
    return relative_error(y, expected)


def measure(situation: Situation, seconds: float, rounds: int, threads: int) -> Row:
    """Return the row of a situation: the medians of a call in seconds, their ratio, and the error."""
    eager, ours, x = networks(situation)
    _, cast = DTYPES[situation.dtype]
    mode, _ = MODES[situation.mode]
    autocast = contextlib.nullcontext if cast is None else functools.partial(torch.autocast, "cpu", cast)

    def run(network: Network, x: Tensor) -> Tensor:
        with autocast():
            return mode(network, x)

    relative = error(eager, ours, x, autocast)
    if situation.busy:  # times also depend on the scheduler, so take more of them
        seconds, rounds = 4 * seconds, 4 * rounds
    with busy() if situation.busy else contextlib.nullcontext():
        both = [Timed(functools.partial(run, network), x, threads) for network in (eager, ours)]
        times = medians(both, seconds, rounds)
    figures = {"eager_s": times[0], "fast_s": times[1], "ratio": times[0] / times[1]}
    return situation._asdict() | figures | {"error": relative}


def medians(calls: Sequence[Timed], seconds: float, rounds: int) -> list[float]:
    """Return the median seconds of each call, from interleaved bursts after one call of each."""
    for timed in calls:
        timed.run(timed.x)
    begin = time.perf_counter()
    calls[0].run(calls[0].x)
    long = time.perf_counter() - begin > seconds / rounds
    return [spread.median for spread in interleaved(calls, seconds, rounds, long=long)]


def measured_twice(
    measure: Callable[[float, int], Row], judged: Callable[[Row], str], seconds: float, rounds: int
) -> Row:
    """Return the row of ``measure(seconds, rounds)``, or if that is slower, of four times as long."""
    row = measure(seconds, rounds)
    return measure(4 * seconds, 4 * rounds) if judged(row) == "slower" else row


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Run another process that keeps one core busy."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


# --- the command -------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="batch size (default: 16)")
    about = "run only the rows that contain all of these words, for example 'D training'"
    parser.add_argument("--only", default="", metavar="WORDS", help=about)
    options.add_timing(parser, "each network and situation", 0.6, rounds=4)
    options.add(parser, "threads", "json")


def run(args: argparse.Namespace) -> int:
    wanted = set(args.only.split())
    chosen = [s for s in situations(args.batch) if wanted <= set(s.label.replace(",", "").split())]
    if not chosen:
        raise UsageError(f"argument --only: no situation has all of the words {args.only!r}")
    load, rows, verdicts = machine.load(), [], []
    heading = f"dcgan.fast compared with eager · batch {args.batch} · cpu, {args.threads} threads"
    left, right = ["network", "dtype", "mode", "situation"], ["eager ms", "fast ms", "ratio", "error"]
    shown = output.table(heading, left, right)
    shown.add_column("", no_wrap=True)
    for s in chosen:
        row = measured_twice(
            functools.partial(measure, s, threads=args.threads),
            functools.partial(verdict, s),
            args.seconds,
            args.rounds,
        )
        rows.append(row)
        verdicts.append(verdict(s, row))
        ratio = output.times(row["ratio"])
        output.log(f"{s.label}: {ratio} {verdicts[-1]}".rstrip())
        times = [output.rate(1e3 * row[name]) for name in ("eager_s", "fast_s")]
        shown.add_row(s.network, s.dtype, s.mode, s.title, *times, ratio, f"{row['error']:.0e}", verdicts[-1])
    output.console().print(shown)
    shared = output.common("situations", load)
    output.append(args.json, [shared | row for row in rows])
    return int(any(verdicts))
