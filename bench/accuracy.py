"""``python -m bench accuracy``: errors against float64, layer by layer and algorithm by algorithm.

Every algorithm that the native engine has for a layer, beside eager float32, on the network's own weights and
activations, on noise, and on data made to be hard. Exit status 1 if an algorithm that the engine picks, or
the drop-in itself, errs by more than it may.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from bench import native, options, results, table
from bench.blocks import Block, blocks
from bench.cases import (
    NETWORKS,
    TIMES_EAGER,
    TOLERANCE,
    Case,
    Network,
    allowed,
    calibrate,
    float64,
    load,
    relative_error,
    title,
)
from bench.usage import UsageError, positive
from dcgan import fast
from dcgan.kernels.cpu import library, select
from dcgan.models import Discriminator, Generator

HELP = "errors of every algorithm of the native engine against float64"

LAYER_BOUND = 5e-6
"""‖out - ref‖₂/‖ref‖₂ of a layer; a network's bound is bench.cases.TOLERANCE's."""

TINY = 1e-300  # instead of a sum that is 0

WHOLE = "the network"
DECADES = 6.0  # of magnitude, in what is made to be hard

MEASURES = {
    "norm": "‖out − ref‖₂ / ‖ref‖₂",
    "largest": "max |out − ref| / rms(ref)",
    "componentwise": "max (|out − ref| / Σ|x·w|)",
}


class Errors(NamedTuple):
    """How far an output is from float64: a field of each of MEASURES."""

    norm: float
    largest: float
    componentwise: float | None
    """None for a network, which is no one sum."""


class Scenario(NamedTuple):
    """A layer's modules, perhaps with other weights, and an input."""

    name: str
    block: Block
    x: Tensor


@dataclass(frozen=True)
class Finding:
    """One algorithm's errors on one layer in one scenario."""

    layer: str
    algorithm: str
    scenario: str
    errors: Errors
    bound: float | None
    """Of the norm; None where nothing is picked, and nothing has to hold."""
    picked: tuple[int, ...] = ()
    """The batches at which the engine takes this algorithm."""

    @property
    def over(self) -> bool:
        return self.bound is not None and not self.errors.norm <= self.bound


# --- arguments ----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="one of them (both)")
    options.add_sizes(parser)
    add(
        "--checkpoint",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="trained weights: state dicts of either network, or dicts that hold them; sizes are theirs",
    )
    add("--images", type=positive, default=8, help="images that the layers are run on (8)")
    add(
        "--batch",
        nargs="+",
        type=positive,
        default=[64, 8, 1],
        metavar="N",
        help="batches for which the engine picks, and that the drop-in is run on (64 8 1)",
    )
    add("--measure", nargs="+", choices=MEASURES, default=["norm", "largest"], help="(norm largest)")
    options.add_threads(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    native.required()
    trained = dict(_trained(args.checkpoint))
    torch.set_num_threads(args.threads)
    out = table.console()
    over: list[str] = []
    for command in dict.fromkeys(args.network):
        path, state = trained.get(command, (None, None))
        sizes = options.sizes(args, command, path, state)
        source = trained["generate"][1] if command == "discriminate" and "generate" in trained else None
        images = None if source is None else _generated(source, sizes, max(args.images, *args.batch))
        findings = examine(command, sizes, state, args.images, args.batch, args.threads, images)
        heading = f"{title(command, sizes)} · float32 · {library.isa()}"
        for measure in dict.fromkeys(args.measure):
            out.print(error_table(findings, measure, f"{heading} · {MEASURES[measure]}"))
        over += [
            f"{command}, {f.layer}, {f.algorithm}, {f.scenario}: {f.errors.norm:.1e} > {f.bound:.0e}"
            for f in findings
            if f.over
        ]
        if args.json is not None:
            about = {"command": command, "sizes": sizes, "checkpoint": None if path is None else str(path)}
            about |= {"isa": library.isa(), "threads": args.threads}
            results.append(args.json, rows(findings, about))
    out.print(
        f"bounds, for what is picked: {LAYER_BOUND:.0e} a layer, {TOLERANCE['float32']:.0e} a network; "
        f"{TIMES_EAGER:g} × eager's error where eager is beyond them"
    )
    for line in over:
        out.print(f"over its bound: {line}", style="bold red", markup=False)
    return int(bool(over))


def _trained(paths: list[Path]) -> Iterator[tuple[str, tuple[Path, Mapping[str, Tensor]]]]:
    """The state dicts in the files, by their networks' commands. Raises UsageError for a file without any."""
    for path in paths:
        try:
            content = load(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"argument --checkpoint: {error}") from error
        found = [(command, (path, state)) for state in _states(content) for command in _commands(state)]
        if not found:
            raise UsageError(f"argument --checkpoint: {path} holds no state dict of either network")
        yield from found


def _states(content: Any) -> Iterator[Mapping[str, Tensor]]:
    """``content`` if it is a state dict, else those among its values."""
    if not isinstance(content, Mapping):
        return
    if content and all(isinstance(value, Tensor) for value in content.values()):
        yield content
    else:
        for value in content.values():
            yield from _states(value)


def _commands(state: Mapping[str, Tensor]) -> Iterator[str]:
    for command, network_type in NETWORKS.items():
        try:
            network_type(**network_type.sizes_of(state)).load_state_dict(state)
        except (RuntimeError, ValueError):
            continue
        yield command


def _generated(state: Mapping[str, Tensor], sizes: dict[str, int], count: int) -> Tensor | None:
    """Images of a trained Generator for a Discriminator of ``sizes``; None if it makes others."""
    own, wanted = Generator.sizes_of(state), Discriminator(**sizes).sizes()
    if any(own[name] != wanted[name] for name in ("channels", "image_size")):
        return None
    network = Generator(**own).eval()
    network.load_state_dict(state)
    case = Case("generate", count, "float32", "cpu", 1, own)
    with torch.no_grad():
        return network(case.inputs()[0])  # type: ignore[no-any-return]


# --- what is run --------------------------------------------------------------------------------------------


def examine(
    command: str,
    sizes: dict[str, int],
    state: Mapping[str, Tensor] | None,
    images: int,
    batches: list[int],
    threads: int,
    inputs: Tensor | None = None,
) -> list[Finding]:
    """All findings for one network: layer by layer, then whole.

    ``state``: trained weights, if any. ``inputs``: as many as the layers or the largest batch take; random
    ones without.
    """
    case = Case(command, max(images, *batches), "float32", "cpu", threads, sizes)
    if inputs is None:
        inputs = case.inputs()[0]
    networks = {"init": case.network()}
    if state is not None:
        networks["trained"] = case.skeleton().eval()
        networks["trained"].load_state_dict(state)
    found: list[Finding] = []
    with torch.no_grad():
        for layer in zip(*(_scenarios(n, net, inputs[:images]) for n, net in networks.items()), strict=True):
            for scenario in (*(own for owns in layer for own in owns), *_hard(layer[0][0])):
                found += _layer(scenario, batches, threads)
        networks["lognormal"] = _lognormal(case)
        for name, network in networks.items():
            found += _network(name, network, inputs, batches, threads)
    return found


def _scenarios(name: str, network: Network, x: Tensor) -> Iterator[tuple[Scenario, Scenario]]:
    """For each layer: on the activations that reach it in the network, and on noise."""
    for block in blocks(network):
        noise = torch.randn(x.shape, generator=_generator(block.name))
        yield Scenario(name, block, x), Scenario(f"{name}, noise", block, noise)
        x = block.modules(x.clone())  # the activations work in place


def _generator(name: str) -> torch.Generator:
    """The random numbers of a layer, whatever else was drawn before."""
    return torch.Generator().manual_seed(sum(name.encode()))


def _hard(origin: Scenario) -> Iterator[Scenario]:
    """The layer's convolution alone, on weights and inputs that ask for more than a network's do.

    * lognormal: every value of either sign, magnitudes over 6 decades (±3σ);
    * channels: each channel of input, weights and output on a scale of its own, over 6 decades;
    * pixels: each input pixel on a scale of its own, over 6 decades;
    * cancelling: channels in pairs, alike to 0.1%, with weights that are opposite to 0.1%: sums some 10⁴
      times smaller than their terms. For one channel: an all but constant map under weights of sum zero.
    """
    block = origin.block
    transposed = isinstance(block.convolution, nn.ConvTranspose2d)
    c_in, c_out = (0, 1) if transposed else (1, 0)
    generator = _generator(block.name)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    def scaled(t: Tensor, *dims: int) -> Tensor:
        shape = [t.shape[d] if d in dims else 1 for d in range(4)]
        return t * 10 ** (DECADES * (torch.rand(shape, generator=generator) - 0.5))

    def lognormal(shape: torch.Size) -> Tensor:
        return normal(shape).sign() * 10 ** (DECADES / 6 * normal(shape))

    x_shape, w_shape = origin.x.shape, block.convolution.weight.shape
    x, w = normal(x_shape), normal(w_shape)
    yield Scenario("lognormal", _alone(block, lognormal(w_shape)), lognormal(x_shape))
    yield Scenario("channels", _alone(block, scaled(scaled(w, c_in), c_out)), scaled(x, 1))
    yield Scenario("pixels", _alone(block, w), scaled(x, 0, 2, 3))
    half = x_shape[1] // 2
    if half:
        x[:, half : 2 * half] = x[:, :half] * (1 + 1e-3 * normal(x[:, :half].shape))
        x[:, 2 * half :] = 0
        by_input = w.transpose(0, c_in)  # a view
        by_input[half : 2 * half] = -by_input[:half] * (1 + 1e-3 * normal(by_input[:half].shape))
    else:
        x, w = 1 + 1e-3 * x, w - w.mean((2, 3), keepdim=True)
    yield Scenario("cancelling", _alone(block, w), x)


def _alone(block: Block, weight: Tensor) -> Block:
    """The block's convolution with other weights, and nothing after it."""
    convolution = copy.deepcopy(block.convolution)
    convolution.weight.copy_(weight)
    return block._replace(modules=nn.Sequential(convolution).eval())


def _layer(scenario: Scenario, batches: list[int], threads: int) -> Iterator[Finding]:
    name, block, x = scenario
    expected = float64(block.modules, x)
    sums = _sums(block, x)

    def errors(output: Tensor) -> Errors:
        found = _errors(output, expected)
        difference = (output.double() - expected).abs()
        componentwise = (difference / sums.clamp_min(TINY)).max().item()
        return found._replace(componentwise=componentwise)

    eager = {
        "eager": errors(block.modules(x.clone())),
        "channels_last": errors(
            _nhwc(block.modules)(x.contiguous(memory_format=torch.channels_last).clone())
        ),
    }
    for algorithm, found in eager.items():
        yield Finding(block.name, algorithm, name, found, None)
    bound = allowed(LAYER_BOUND, *(found.norm for found in eager.values()))
    g = block.geometry
    for algorithm in select.candidates(g):
        picked = tuple(n for n in batches if native.picked(g, n, threads) == algorithm)
        found = errors(native.Chain([block.stage], x.shape, [algorithm], threads)(x))
        yield Finding(block.name, algorithm, name, found, bound if picked else None, picked)


def _nhwc(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to(memory_format=torch.channels_last)


def _errors(output: Tensor, expected: Tensor) -> Errors:
    rms = expected.norm() / math.sqrt(expected.numel())
    largest = (output.double() - expected).abs().max() / rms
    return Errors(relative_error(output, expected), largest.item(), None)


def _sums(block: Block, x: Tensor) -> Tensor:
    """The sum of its terms' magnitudes behind each element of the layer's output, BatchNorm's included.

    An activation is no steeper than 1, so that an error of the sum is no smaller than its output's.
    """
    modules = copy.deepcopy(block.modules).double()
    convolution = modules[0]
    assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
    convolution.weight.abs_()
    sums: Tensor = convolution(x.double().abs())
    for norm in modules:
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            terms = scale.abs() * norm.running_mean.abs() + norm.bias.abs()
            sums = sums * scale.abs()[:, None, None] + terms[:, None, None]
    return sums


def _network(
    name: str, network: Network, inputs: Tensor, batches: list[int], threads: int
) -> Iterator[Finding]:
    """The whole network: eager, the native engine with one algorithm throughout, the drop-in as it picks."""
    expected = float64(network, inputs)
    stages = [block.stage for block in blocks(network)]
    geometries = native.geometries(stages, *inputs.shape[2:])

    def by(algorithm: str) -> Tensor:
        available = [select.candidates(g) for g in geometries]
        algorithms = [algorithm if algorithm in found else found[0] for found in available]
        return native.Chain(stages, inputs.shape, algorithms, threads)(inputs).view(expected.shape)

    eager = {"eager": network(inputs), "channels_last": _nhwc(network)(inputs)}
    for algorithm, output in eager.items():
        yield Finding(WHOLE, algorithm, name, _errors(output, expected), None)
    for algorithm in ("direct", "f2", "f4"):
        yield Finding(WHOLE, algorithm, name, _errors(by(algorithm), expected), None)
    ours = fast.convert(copy.deepcopy(network))
    for n in batches:
        theirs = [relative_error(output[:n], expected[:n]) for output in eager.values()]
        errors = _errors(ours(inputs[:n]), expected[:n])
        yield Finding(WHOLE, "fast", name, errors, allowed(TOLERANCE["float32"], *theirs), (n,))


def _lognormal(case: Case) -> Network:
    """The case's network with a lognormal factor on every weight, over 6 decades; each layer's rms stays."""
    network = case.network()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        for block in blocks(network):
            weight = block.convolution.weight
            rms = weight.norm()
            weight *= 10 ** (DECADES / 6 * torch.randn(weight.shape))
            weight *= rms / weight.norm()
        calibrate(network, case.input_shape)
    return network.eval()


# --- what is shown ------------------------------------------------------------------------------------------


def error_table(findings: list[Finding], measure: str, heading: str) -> Table:
    """A row for each layer and algorithm, a column for each scenario; what is over its bound is marked."""
    scenarios = list(dict.fromkeys(f.scenario for f in findings))
    shown = table.start(heading, ["layer", "algorithm", "picked at"], scenarios)
    lines: dict[tuple[str, str, str], dict[str, Finding]] = {}
    for f in findings:
        if getattr(f.errors, measure) is None:
            continue
        picked = " ".join(map(str, f.picked))
        lines.setdefault((f.layer, f.algorithm, picked), {})[f.scenario] = f
    above = ""
    for (layer, algorithm, picked), found in lines.items():
        if above and layer != above:
            shown.add_section()
        cells = [_cell(found.get(scenario), measure) for scenario in scenarios]
        name = Text(algorithm, style="bold" if picked else "")
        shown.add_row(layer if layer != above else "", name, picked, *cells)
        above = layer
    return shown


def _cell(finding: Finding | None, measure: str) -> Text:
    value = None if finding is None else getattr(finding.errors, measure)
    if finding is None or value is None:
        return Text(table.NOTHING)
    over = finding.over and measure == "norm"
    return Text(f"{value:.1e}" + ("!" if over else ""), style="bold red" if over else "")


def rows(findings: list[Finding], about: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON objects; an error that is not finite is None."""
    shared = results.common("accuracy") | about
    return [
        shared
        | asdict(f)
        | {"errors": {name: _finite(value) for name, value in f.errors._asdict().items()}, "over": f.over}
        for f in findings
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
