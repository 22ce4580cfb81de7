"""Errors of the native engine against float64, by layer and by algorithm: ``python -m tests.accuracy``.

Runs every algorithm that the native engine offers for a layer, and eager float32 for comparison, on the
network's own weights and activations, on noise, and on ill-conditioned data. The exit status is 1 if the
error of an algorithm that the engine picks, or of the drop-in itself, exceeds its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from bench import cases, options, output
from bench.blocks import Block, Chain, blocks, chosen_algorithm, require_engine
from bench.cases import NETWORKS, TOLERANCE, Case, Network, float64, relative_error
from bench.options import UsageError, positive
from dcgan import checkpoint, fast
from dcgan.kernels.cpu import algorithm_selection, library
from dcgan.models import Discriminator, Generator

LAYER_BOUND = 5e-6
"""Bound of ‖out - ref‖₂/‖ref‖₂ for a layer; the bound for a network is bench.cases.TOLERANCE."""

TINY = 1e-300  # replaces a zero denominator

WHOLE = "the network"
DECADES = 6.0  # dynamic range of the ill-conditioned data, in powers of ten

MEASURES = {
    "norm": "‖out − ref‖₂ / ‖ref‖₂",
    "largest": "max |out − ref| / rms(ref)",
    "componentwise": "max (|out − ref| / Σ|x·w|)",
}


class Errors(NamedTuple):
    """The errors of an output against float64, one field per entry of MEASURES."""

    norm: float
    largest: float
    componentwise: float | None
    """None for a whole network, whose output is not a single sum of products."""


Scenario = tuple[str, Block, Tensor]
"""A name, a layer, possibly with replaced weights, and its input."""


class Finding(NamedTuple):
    """The errors of one algorithm on one layer in one scenario."""

    layer: str
    algorithm: str
    scenario: str
    errors: Errors
    bound: float | None = None
    """Bound of ``errors.norm``; None for an algorithm that the engine does not pick."""
    picked: tuple[int, ...] = ()
    """The batch sizes for which the engine picks this algorithm."""

    @property
    def over(self) -> bool:
        return self.bound is not None and not self.errors.norm <= self.bound


# --- the command --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.accuracy", description=__doc__)
    add = parser.add_argument
    add("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks (default: both)")
    options.add(parser, *options.SIZES, "threads", "json")
    text = "files with trained weights: state dicts of either network, or dicts that contain them; they "
    text += "determine the network sizes"
    add("--checkpoint", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    add("--images", type=positive, default=8, help="images per layer run (default: 8)")
    text = "batch sizes for which to query the engine's choice and to run the drop-in (default: 64 8 1)"
    add("--batch", nargs="+", type=positive, default=[64, 8, 1], metavar="N", help=text)
    text = "error measures to print (default: norm largest)"
    add("--measure", nargs="+", choices=MEASURES, default=["norm", "largest"], help=text)
    try:
        return run(parser.parse_args(arguments))
    except UsageError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> int:
    """Print the tables. Returns 1 if an error exceeds its bound."""
    require_engine()
    trained = {command: (path, state) for path in args.checkpoint for command, state in _trained(path)}
    torch.set_num_threads(args.threads)
    out = output.console()
    over: list[str] = []
    for command in dict.fromkeys(args.network):
        path, state = trained.get(command, (None, None))
        sizes = options.sizes(args, command, path, state)
        images = None
        if command == "discriminate" and "generate" in trained:
            images = _generated(trained["generate"][1], sizes, max(args.images, *args.batch))
        findings = examine(command, sizes, state, args.images, args.batch, args.threads, images)
        heading = f"{cases.title(command, sizes)} · float32 · {library.isa()}"
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
            output.append(args.json, rows(findings, about))
    out.print(
        f"bounds for picked algorithms: {LAYER_BOUND:.0e} per layer, {TOLERANCE['float32']:.0e} per network; "
        f"{cases.TIMES_EAGER:g} × eager's error where eager itself exceeds them"
    )
    for line in over:
        out.print(f"exceeds its bound: {line}", style="bold red", markup=False)
    return int(bool(over))


def _trained(path: Path) -> list[tuple[str, Mapping[str, Tensor]]]:
    """Return the networks' commands and state dicts found in a file.

    Raises:
        UsageError: the file cannot be read or contains no state dict of either network.
    """
    try:
        found = list(_states(checkpoint.load(path)))
    except (OSError, ValueError) as error:
        raise UsageError(f"argument --checkpoint: {error}") from error
    if not found:
        raise UsageError(f"argument --checkpoint: {path} contains no state dict of either network")
    return found


def _states(content: Any) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield ``content`` with its network's command if it is a state dict, else those nested in it."""
    if not isinstance(content, Mapping):
        return
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        for value in content.values():
            yield from _states(value)
        return
    for command, network in NETWORKS.items():
        with contextlib.suppress(RuntimeError, ValueError):
            network(**network.sizes_of(content)).load_state_dict(content)
            yield command, content


def _generated(state: Mapping[str, Tensor], sizes: dict[str, int], count: int) -> Tensor | None:
    """Return images of a trained Generator for a Discriminator of ``sizes``; None if the sizes differ."""
    own, wanted = Generator.sizes_of(state), Discriminator(**sizes).sizes()
    if any(own[name] != wanted[name] for name in ("channels", "image_size")):
        return None
    network = Generator(**own).eval()
    network.load_state_dict(state)
    with torch.no_grad():
        return network(Case("generate", count, "float32", "cpu", 1, own).inputs()[0])  # type: ignore[no-any-return]


# --- measurements -------------------------------------------------------------------------------------------


def examine(
    command: str,
    sizes: dict[str, int],
    state: Mapping[str, Tensor] | None,
    images: int,
    batches: list[int],
    threads: int,
    inputs: Tensor | None = None,
) -> list[Finding]:
    """Return all findings for one network: for each layer, then for the whole network.

    Args:
        state: trained weights, if any.
        inputs: at least ``max(images, *batches)`` inputs; random inputs by default.
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
            for scenario in (*(own for owns in layer for own in owns), *_ill_conditioned(layer[0][0])):
                found += _layer(scenario, batches, threads)
        networks["lognormal"] = _lognormal(case)
        for name, network in networks.items():
            found += _network(name, network, inputs, batches, threads)
    return found


def _scenarios(name: str, network: Network, x: Tensor) -> Iterator[tuple[Scenario, Scenario]]:
    """Yield two scenarios per layer: its activations within the network, and noise."""
    for block in blocks(network):
        noise = torch.randn(x.shape, generator=_generator(block.name))
        yield (name, block, x), (f"{name}, noise", block, noise)
        x = block.modules(x.clone())  # the activation functions work in place


def _generator(name: str) -> torch.Generator:
    """Return a random generator seeded by the layer's name, independent of other draws."""
    return torch.Generator().manual_seed(sum(name.encode()))


def _ill_conditioned(origin: Scenario) -> Iterator[Scenario]:
    """Yield the layer's convolution alone, on weights and inputs that are harder than a network's own.

    * lognormal: values of both signs, with magnitudes over 6 decades (±3σ);
    * channels: separate scales for each channel of the input, the weights and the output, over 6 decades;
    * pixels: a separate scale for each input pixel, over 6 decades;
    * cancelling: pairs of channels equal to within 0.1%, with weights that are opposite to within 0.1%, so
      that sums are about 10⁴ times smaller than their terms. With a single channel: a nearly constant map
      and weights whose sum is zero.
    """
    _, block, original = origin
    c_in, c_out = (0, 1) if block.stage.transposed else (1, 0)
    generator = _generator(block.name)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    def scaled(t: Tensor, *dims: int) -> Tensor:
        shape = [t.shape[d] if d in dims else 1 for d in range(4)]
        return t * 10 ** (DECADES * (torch.rand(shape, generator=generator) - 0.5))

    def lognormal(shape: torch.Size) -> Tensor:
        return normal(shape).sign() * 10 ** (DECADES / 6 * normal(shape))

    def scenario(name: str, weight: Tensor, x: Tensor) -> Scenario:
        """Replace the layer by its convolution with these weights, without BatchNorm and activation."""
        convolution = copy.deepcopy(block.convolution)
        convolution.weight.copy_(weight)
        return name, block._replace(modules=nn.Sequential(convolution).eval()), x

    x_shape, w_shape = original.shape, block.convolution.weight.shape
    x, w = normal(x_shape), normal(w_shape)
    yield scenario("lognormal", lognormal(w_shape), lognormal(x_shape))
    yield scenario("channels", scaled(scaled(w, c_in), c_out), scaled(x, 1))
    yield scenario("pixels", w, scaled(x, 0, 2, 3))
    half = x_shape[1] // 2
    if half:
        x[:, half : 2 * half] = x[:, :half] * (1 + 1e-3 * normal(x[:, :half].shape))
        x[:, 2 * half :] = 0
        by_input = w.transpose(0, c_in)  # a view
        by_input[half : 2 * half] = -by_input[:half] * (1 + 1e-3 * normal(by_input[:half].shape))
    else:
        x, w = 1 + 1e-3 * x, w - w.mean((2, 3), keepdim=True)
    yield scenario("cancelling", w, x)


def _layer(scenario: Scenario, batches: list[int], threads: int) -> Iterator[Finding]:
    name, block, x = scenario
    expected = float64(block.modules, x)
    sums = _magnitude_sums(block, x).clamp_min(TINY)

    def errors(output: Tensor) -> Errors:
        difference = (output.double() - expected).abs()
        return _errors(output, expected)._replace(componentwise=(difference / sums).max().item())

    eager = {algorithm: errors(output) for algorithm, output in _eager(block.modules, x).items()}
    for algorithm, found in eager.items():
        yield Finding(block.name, algorithm, name, found)
    bound = cases.allowed(LAYER_BOUND, *(found.norm for found in eager.values()))
    g = block.geometry
    for algorithm in algorithm_selection.candidates(g):
        picked = tuple(n for n in batches if chosen_algorithm(g, n, threads) == algorithm)
        found = errors(Chain([block.stage], x.shape, [algorithm], threads)(x))
        yield Finding(block.name, algorithm, name, found, bound if picked else None, picked)


def _eager(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of PyTorch's modules in float32, in both memory formats."""
    nhwc = copy.deepcopy(module).to(memory_format=torch.channels_last)
    # The activation functions work in place.
    by_nhwc = nhwc(x.contiguous(memory_format=torch.channels_last).clone())
    return {"eager": module(x.clone()), "channels_last": by_nhwc}


def _errors(output: Tensor, expected: Tensor) -> Errors:
    rms = expected.norm() / math.sqrt(expected.numel())
    largest = (output.double() - expected).abs().max() / rms
    return Errors(relative_error(output, expected), largest.item(), None)


def _magnitude_sums(block: Block, x: Tensor) -> Tensor:
    """Return Σ|x·w| for each element of the layer's output, including BatchNorm's scale and shift.

    The activation's slope is at most 1, so the output's error is at most the sum's.
    """
    modules = copy.deepcopy(block.modules).double()
    convolution = block._replace(modules=modules).convolution
    convolution.weight.abs_()
    sums: Tensor = convolution(x.double().abs())
    for norm in modules:
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).abs()
            terms = scale * norm.running_mean.abs() + norm.bias.abs()
            sums = sums * scale[:, None, None] + terms[:, None, None]
    return sums


def _network(
    name: str, network: Network, inputs: Tensor, batches: list[int], threads: int
) -> Iterator[Finding]:
    """Yield the whole network's errors: eager, each algorithm in all layers, and the drop-in's own choice."""
    expected = float64(network, inputs)
    layers = blocks(network)
    stages = [block.stage for block in layers]
    offered = [algorithm_selection.candidates(block.geometry) for block in layers]
    outputs = eager = _eager(network, inputs)
    for algorithm in ("direct", "f2", "f4"):
        algorithms = [algorithm if algorithm in own else own[0] for own in offered]
        output = Chain(stages, inputs.shape, algorithms, threads)(inputs)
        outputs = outputs | {algorithm: output.view(expected.shape)}
    for algorithm, output in outputs.items():
        yield Finding(WHOLE, algorithm, name, _errors(output, expected))
    ours = fast.convert(copy.deepcopy(network))
    for n in batches:
        errors = [relative_error(output[:n], expected[:n]) for output in eager.values()]
        bound = cases.allowed(TOLERANCE["float32"], *errors)
        yield Finding(WHOLE, "fast", name, _errors(ours(inputs[:n]), expected[:n]), bound, (n,))


def _lognormal(case: Case) -> Network:
    """Return the case's network with lognormal factors over 6 decades on all weights; layer RMS is kept."""
    network = case.network()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        for block in blocks(network):
            weight = block.convolution.weight
            norm = weight.norm()
            weight *= 10 ** (DECADES / 6 * torch.randn(weight.shape))
            weight *= norm / weight.norm()
        cases.calibrate(network, case.input_shape)
    return network.eval()


# --- output -------------------------------------------------------------------------------------------------


def error_table(findings: list[Finding], measure: str, heading: str) -> Table:
    """Return one row per layer and algorithm, one column per scenario; errors over their bound are marked."""
    scenarios = list(dict.fromkeys(f.scenario for f in findings))
    shown = output.table(heading, ["layer", "algorithm", "picked at"], scenarios)
    lines: dict[tuple[str, str, str], dict[str, Text]] = {}
    for f in findings:
        if (value := getattr(f.errors, measure)) is not None:
            mark = f.over and measure == "norm"
            cell = Text(f"{value:.1e}" + "!" * mark, style="bold red" if mark else "")
            lines.setdefault((f.layer, f.algorithm, " ".join(map(str, f.picked))), {})[f.scenario] = cell
    above = ""
    for (layer, algorithm, picked), cells in lines.items():
        if above and layer != above:
            shown.add_section()
        name = Text(algorithm, style="bold" if picked else "")
        in_order = (cells.get(scenario, Text(output.NOTHING)) for scenario in scenarios)
        shown.add_row(layer if layer != above else "", name, picked, *in_order)
        above = layer
    return shown


def rows(findings: list[Finding], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the JSON objects; a non-finite error is None."""
    shared = output.common("accuracy") | about
    found = []
    for f in findings:
        errors = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in f.errors._asdict().items()
        }
        found.append(shared | f._asdict() | {"errors": errors, "over": f.over})
    return found


if __name__ == "__main__":
    sys.exit(main())
