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
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import machine, options, records, table
from bench.stats import Spread
from bench.timing import Timed, interleaved
from bench.usage import UsageError, positive
from dcgan import fast, models

HELP = "compare the drop-in with eager by dtype, mode and edit of the network"
MIN_RATIO = 0.97
Network = Any
Edit = Callable[[Network], None]


# --- dtypes ------------------------------------------------------------------------------------------------

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


class Mode(NamedTuple):
    """The computation, and whether the network is in training mode."""

    run: Callable[[Network, Tensor], Tensor]
    training: bool


MODES = {
    "inference": Mode(inference, False),
    "training": Mode(parameter_gradients, True),
    "eval, gradients": Mode(parameter_gradients, False),
    "eval, the input's gradient": Mode(input_gradient, False),
}


# --- edits -------------------------------------------------------------------------------------------------


def _replace(kinds: Any, make: Callable[[Any], nn.Module]) -> Edit:
    def edit(network: Network) -> None:
        for i, module in enumerate(network.main):
            if isinstance(module, kinds):
                network.main[i] = make(module)

    return edit


CONVOLUTIONS = nn.Conv2d | nn.ConvTranspose2d


def _with_bias(conv: Any) -> nn.Module:
    new = type(conv)(conv.in_channels, conv.out_channels, 4, conv.stride, conv.padding)
    new.weight = conv.weight
    return new  # type: ignore[no-any-return]


def _fold(network: Network) -> None:
    """Fold every BatchNorm into the preceding convolution, as exporters do."""
    _replace(CONVOLUTIONS, _with_bias)(network)
    _replace(nn.BatchNorm2d, lambda norm: nn.Identity())(network)
    network.main = nn.Sequential(*(m for m in network.main if not isinstance(m, nn.Identity)))


def _six_by_six(conv: Any) -> nn.Module:
    """Return a convolution of the same input and output sizes with a kernel size that no engine supports."""
    if conv.stride != (2, 2):
        return conv  # type: ignore[no-any-return]
    return type(conv)(conv.in_channels, conv.out_channels, 6, 2, 2, bias=False)  # type: ignore[no-any-return]


def _add_hook(network: Network) -> None:
    network.main[4].register_forward_hook(lambda module, args, y: None)


def _nest(network: Network) -> None:
    half = len(network.main) // 2
    network.main = nn.Sequential(network.main[:half], network.main[half:])


def _channels_last(network: Network) -> None:
    network.to(memory_format=torch.channels_last)


def _freeze_first_norm(network: Network) -> None:
    next(m for m in network.main if isinstance(m, nn.BatchNorm2d)).eval()


EDITS: dict[str, Edit] = {
    "biases": _replace(CONVOLUTIONS, _with_bias),
    "BatchNorm folded": _fold,
    "LeakyReLU(0.01)": _replace(nn.ReLU | nn.LeakyReLU, lambda _: nn.LeakyReLU(0.01)),
    "GroupNorm": _replace(nn.BatchNorm2d, lambda norm: nn.GroupNorm(8, norm.num_features)),
    "no norms": _replace(nn.BatchNorm2d, lambda norm: nn.Identity()),
    "6×6 kernels": _replace(CONVOLUTIONS, _six_by_six),
    "a hook": _add_hook,
    "nested": _nest,
    "channels_last": _channels_last,
    "a norm in eval": _freeze_first_norm,
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
        return ", ".join(
            filter(
                None,
                [
                    self.edit,
                    f"features {self.features}" if self.features != 64 else "",
                    f"image size {self.image_size}" if self.image_size != 64 else "",
                    "busy core" if self.busy else "",
                ],
            )
        )

    @property
    def label(self) -> str:
        return f"{self.network} {self.dtype} {self.mode} {self.title}".rstrip()


def situations(batch: int) -> list[Situation]:
    found = []
    for network in ("G", "D"):
        for dtype, mode in itertools.product(DTYPES, MODES):
            # PyTorch takes half a minute for float16 gradients of a default network on a CPU.
            features = 16 if "float16" in dtype.split() and mode != "inference" else 64
            found.append(Situation(network, dtype, mode, "", features, batch=batch))
        for edit, mode in itertools.product(EDITS, ("inference", "training")):
            if not (edit == "a norm in eval" and mode == "inference"):
                found.append(Situation(network, "float32", mode, edit, batch=batch))
        for (features, size), mode in itertools.product([(16, 64), (8, 32)], ("inference", "training")):
            found.append(Situation(network, "float32", mode, "", features, size, batch))
        # In training, smaller networks fall back to PyTorch whether or not a core is busy.
        for mode, features in (("inference", 64), ("inference", 16), ("training", 64), ("training", 32)):
            found.append(Situation(network, "float32", mode, "", features, batch=batch, busy=True))
    return found


class Measured(NamedTuple):
    situation: Situation
    eager: Spread
    fast: Spread
    error: float
    tolerance: float

    @property
    def ratio(self) -> float:
        return self.eager.median / self.fast.median

    @property
    def verdict(self) -> str:
        if not self.error <= self.tolerance:
            return "wrong"
        return "" if self.ratio >= MIN_RATIO else "slower"


def networks(situation: Situation) -> tuple[Network, Network, Tensor]:
    """Return the reference network, a drop-in with copies of its parameters, and an input."""
    torch.manual_seed(0)
    sizes = {"features": situation.features, "image_size": situation.image_size}
    size, dtype = situation.image_size, DTYPES[situation.dtype][0]
    eager: Network = models.Generator(**sizes) if situation.network == "G" else models.Discriminator(**sizes)
    eager.apply(models.weights_init)
    x = (
        torch.randn(situation.batch, 100)
        if situation.network == "G"
        else torch.rand(situation.batch, 1, size, size)
    )
    eager.train(MODES[situation.mode].training)
    if situation.edit:
        EDITS[situation.edit](eager)
    eager.to(dtype)
    return eager, fast.convert(copy.deepcopy(eager)), x.to(dtype)


def error(eager: Network, ours: Network, x: Tensor, autocast: Callable[[], Any]) -> float:
    """Return the relative error of the drop-in's output against float64."""
    exact = copy.deepcopy(eager).double()
    with torch.no_grad():
        expected = exact(x.double())
        with autocast():
            y = copy.deepcopy(ours)(x)
    return float((y.double() - expected).norm() / expected.norm())


def measure(situation: Situation, seconds: float, rounds: int, threads: int) -> Measured:
    eager, ours, x = networks(situation)
    dtype, cast = DTYPES[situation.dtype]
    mode = MODES[situation.mode].run

    def autocast() -> Any:
        return contextlib.nullcontext() if cast is None else torch.autocast("cpu", cast)

    def runner(network: Network) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with autocast():
                return mode(network, x)

        return run

    relative = error(eager, ours, x, autocast)
    with busy() if situation.busy else contextlib.nullcontext():
        both = [Timed(runner(network), x, threads) for network in (eager, ours)]
        for timed in both:
            timed.run(x)
        begin = time.perf_counter()
        both[0].run(x)
        long = time.perf_counter() - begin > seconds / rounds
        if situation.busy:  # times also depend on the scheduler, so take more of them
            seconds, rounds = 4 * seconds, 4 * rounds
        first, second = interleaved(both, seconds, rounds, long=long)
    return Measured(situation, first, second, relative, TOLERANCES[cast or dtype])


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
    parser.add_argument(
        "--only",
        default="",
        metavar="WORDS",
        help="run only the rows that contain all of these words, for example 'D training'",
    )
    options.add_timing(parser, "each network and situation", 0.6, rounds=4)
    options.add_threads(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    wanted = set(args.only.split())
    chosen = [s for s in situations(args.batch) if wanted <= set(s.label.replace(",", "").split())]
    if not chosen:
        raise UsageError(f"argument --only: no situation has all of the words {args.only!r}")
    out, progress = table.console(), table.console(stderr=True)
    load = machine.load()
    measured = []
    for situation in chosen:
        m = measure(situation, args.seconds, args.rounds, args.threads)
        if m.verdict == "slower":
            m = measure(situation, 4 * args.seconds, 4 * args.rounds, args.threads)
        measured.append(m)
        line = f"  {situation.label}: {table.times(m.ratio)} {m.verdict}"
        progress.print(line.rstrip(), style="dim", markup=False)
    out.print(situations_table(measured, args))
    if args.json is not None:
        records.append(args.json, rows(measured, load))
    return int(any(m.verdict for m in measured))


def situations_table(measured: list[Measured], args: argparse.Namespace) -> Any:
    title = f"dcgan.fast compared with eager · batch {args.batch} · cpu, {args.threads} threads"
    shown = table.start(
        title, ["network", "dtype", "mode", "situation"], ["eager ms", "fast ms", "ratio", "error"]
    )
    shown.add_column("", no_wrap=True)
    for m in measured:
        s = m.situation
        shown.add_row(
            *(s.network, s.dtype, s.mode, s.title),
            *(table.rate(spread.median * 1e3) for spread in (m.eager, m.fast)),
            *(table.times(m.ratio), f"{m.error:.0e}", m.verdict),
        )
    return shown


def rows(measured: list[Measured], load: float | None) -> list[dict[str, Any]]:
    shared = records.common("situations", load)
    return [
        shared
        | m.situation._asdict()
        | {"eager_s": m.eager.median, "fast_s": m.fast.median, "ratio": m.ratio, "error": m.error}
        for m in measured
    ]
