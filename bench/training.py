"""The case of ``python -m bench train``: training steps, their implementations and their expected results.

A *variant* is a provider whose build function gets both reference networks in training mode and float32, on
the case's device, and returns a :class:`Loop`. The baselines are the reference loop
(:func:`dcgan.training.train_step`) around the fastest networks PyTorch offers, and this project's step around
cuDNN's convolutions. In a 16-bit dtype the networks run under autocast, as is usual in mixed precision.

:class:`TrainWorker`, the process of a variant, compares gradients and losses with those of the reference loop
in float64; the gradients are read from the optimizers' state.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam

from bench import machine
from bench.cases import INPUTS, Case, Prepared, Work, count, input_shape, relative_error
from bench.providers import Provider, drop_in, find, nhwc
from bench.timing import CpuSampler, Sampler
from bench.worker import Worker, load_tensors
from dcgan.kernels.cpu import library
from dcgan.models import Discriminator, Generator, weights_init
from dcgan.training import Config, Result, TrainStep, optimizers, train_step

# No bound on a gradient's error follows from the dtype alone: where rounding moves a value across the kink of
# a LeakyReLU, a factor of the gradient changes by 80%. The tolerance is therefore TIMES_EAGER times the error
# of the reference loop run eagerly in the same dtype on the same batches (float32, batch 64: ~1e-3). Sums
# rounded k times as coarsely move k times as many values across a kink, and their error is √k times as large.
# In small batches it is a matter of chance whether any value lies near a kink, so the tolerance is at least
# KINK_TOLERANCE: every implementation errs by 1e-6 to 3e-6 if no value crosses a kink and by 1e-3 to 9e-3 if
# one does (batches of 4 and 16). Losses are smooth.
TIMES_EAGER = 4.0
KINK_TOLERANCE = 2**-6
MIN_TOLERANCE = 1e-4
"""For losses, and for gradients of networks so small that no value lies near a kink."""
LR = Config().lr
UPDATE_TOLERANCE = 1e-3  # relative: float32 rounds a weight near 1 by 3e-4 of an update of 2e-4


# --- the case -----------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The inputs of one step."""

    real: Tensor
    noise: Tensor

    def to(self, target: str | torch.dtype) -> Batch:
        return Batch(*(t.to(target) for t in self))


@dataclass(frozen=True)
class Training(Case):
    """A case of training steps; ``command`` is ``train``. Weights are DCGAN's initial weights."""

    kind: ClassVar[str] = "train"
    worker: ClassVar[str] = "bench.training:TrainWorker"

    @property
    def tolerance(self) -> float:
        return MIN_TOLERANCE

    @property
    def autocast(self) -> torch.dtype | None:
        """The autocast dtype, or None to train in float32. The parameters are float32 in both cases."""
        return None if self.torch_dtype == torch.float32 else self.torch_dtype

    def networks(self, device: str = "cpu") -> tuple[Generator, Discriminator]:
        """Return the reference networks in training mode and float32."""
        sizes = {name: size for name, size in self.sizes.items() if name != "latent_dim"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            generator, discriminator = Generator(**self.sizes), Discriminator(**sizes)
            generator.apply(weights_init)
            discriminator.apply(weights_init)
        return generator.to(device), discriminator.to(device)

    def batches(self) -> list[Batch]:
        """Return the batches that the steps cycle through: images in (-1, 1) and noise (float32, CPU)."""
        noise, image = (input_shape(network) for network in self.networks())
        random = torch.Generator().manual_seed(self.seed + 1)
        return [
            Batch(
                torch.rand(self.batch, *image, generator=random) * 2 - 1,
                torch.randn(self.batch, *noise, generator=random),
            )
            for _ in range(INPUTS)
        ]

    def work(self) -> Work:
        """Return the cost per image of a step of the reference recipe; each product moves its maps once.

        G runs one forward and one backward; D runs three of each: on the real images, on the generated images
        and on the generated images again in G's phase. A backward has two products per layer (dgrad and
        wgrad), but the noise, the real images and the detached generated images need no gradient. D's wgrad
        in G's phase is counted because the reference recipe computes it.
        """
        costs = [
            astuple(count(part, input_shape(network)))
            for network in self.networks()
            for part in (network, network.main[:1])
        ]
        transposed = zip(*costs, strict=True)
        return Work(*(3 * g - first_g + 9 * d - 2 * first_d for g, first_g, d, first_d in transposed))

    def materials(self) -> Materials:
        """Run the reference loop on the case's device, in float64 and (for the tolerances) in its dtype."""
        networks = self.networks(self.device)
        batches = [batch.to(self.device) for batch in self.batches()]
        g, d = (copy.deepcopy(network).double() for network in networks)
        expected = step_results(reference_loop(g, d), [batch.to(torch.float64) for batch in batches])
        eager = step_results(VARIANTS["eager"].build(*networks, self), batches)
        errors = [found.errors(result)[:2] for found, result in zip(eager, expected, strict=True)]
        gradient, figure = (max(own) for own in zip(*errors, strict=True))
        del networks, g, d, batches
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return Materials(
            max(KINK_TOLERANCE, TIMES_EAGER * gradient),
            [tuple(batch) for batch in self.batches()],
            [tuple(result) for result in expected],
            max(MIN_TOLERANCE, TIMES_EAGER * figure),
        )


# --- variants -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """A variant, built and ready to run."""

    step: Callable[[Tensor, Tensor], Result]
    """One step of both networks, from real images and noise."""
    adams: tuple[Adam, Adam]
    """The optimizers of G and D, which hold the parameters that the step updates and its Adam state."""

    def __call__(self, batch: Batch) -> Result:
        return self.step(*batch)


BuildLoop = Callable[[Generator, Discriminator, Training], Loop]
Transform = Callable[[nn.Module], nn.Module]


class Autocast(nn.Module):
    """A network under autocast; probabilities are returned in float32, as BCELoss requires."""

    def __init__(self, network: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.device, self.dtype = network, device, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype):
            y: Tensor = self.network(x)
        return y.float() if y.ndim == 1 else y


def reference_loop(generator: nn.Module, discriminator: nn.Module, mark: bool = False) -> Loop:
    """Return the reference loop around any two networks.

    ``mark`` marks the beginning of each step for the CUDA graphs of torch.compile.
    """
    adams = optimizers(generator, discriminator, Config())

    def step(real: Tensor, noise: Tensor) -> Result:
        if mark:
            torch.compiler.cudagraph_mark_step_begin()
        return train_step(generator, discriminator, *adams, real, noise)

    return Loop(step, adams)


def _reference(mode: str | None = None, transform: Transform = lambda network: network) -> BuildLoop:
    """Return a builder of the reference loop around transformed networks, compiled if there is a ``mode``."""

    def build(generator: Generator, discriminator: Discriminator, case: Training) -> Loop:
        networks = [transform(generator), transform(discriminator)]
        if case.autocast is not None:
            networks = [Autocast(network, case.device, case.autocast) for network in networks]
        if mode is not None:
            networks = [torch.compile(network, mode=mode) for network in networks]  # type: ignore[misc]
        g, d = networks
        return reference_loop(g, d, mark=mode is not None and case.device == "cuda")

    return build


def _train_step(transform: Transform) -> BuildLoop:
    """Return a build function of this project's TrainStep around transformed networks, with fused optimizers.

    Around channels_last networks on a GPU, it captures cuDNN's convolutions in one CUDA graph; only the loss
    is this project's.
    """

    def build(generator: Generator, discriminator: Discriminator, case: Training) -> Loop:
        pair = optimizers(generator, discriminator, Config(), fused=True)
        if case.device == "cuda":  # as a tensor, so that graph replays see the value the check sets
            for group in (group for adam in pair for group in adam.param_groups):
                group["lr"] = torch.tensor(group["lr"], device=case.device)
        step = TrainStep(transform(generator), transform(discriminator), *pair, autocast=case.autocast)
        return Loop(step, pair)

    return build


VARIANTS: dict[str, Provider] = {
    variant.name: variant
    for variant in (
        Provider("eager", _reference(), searches=True),
        Provider("channels_last", _reference(transform=nhwc), searches=True),
        Provider("compile", _reference("default")),
        Provider("compile-channels_last", _reference("default", nhwc)),
        Provider("max-autotune", _reference("max-autotune"), searches=True),
        Provider("max-autotune-channels_last", _reference("max-autotune", nhwc), searches=True),
        Provider("reduce-overhead", _reference("reduce-overhead", nhwc), devices=("cuda",)),
        Provider("cudnn-graph", _train_step(nhwc), devices=("cuda",), searches=True),
        Provider("fast", _reference(transform=drop_in), ours=True),
        Provider("fast-compile", _reference("default", drop_in), ours=True),
        Provider("train-step", _train_step(drop_in), ours=True),
    )
}


# --- the check ----------------------------------------------------------------------------------------------


class StepResult(NamedTuple):
    """The losses and gradients of one step."""

    figures: list[float]
    """Losses and mean probabilities, in the order of :class:`dcgan.training.Result`."""
    gradients: list[Tensor]
    """Gradients of G and D as their optimizers saw them: one vector per network, float64, on the CPU."""

    def errors(self, expected: StepResult) -> tuple[float, float, str]:
        """Return the largest relative errors of a gradient and of a figure, and describe the latter."""
        gradient = max(map(relative_error, self.gradients, expected.gradients))
        pairs = list(zip(Result._fields, self.figures, expected.figures, strict=True))
        relative = [abs(a - e) / abs(e) if math.isfinite(a) else math.inf for _, a, e in pairs]
        name, a, e = pairs[relative.index(max(relative))]
        return gradient, max(relative), f"{name} is {a:.6g}, expected {e:.6g}"


def step_results(loop: Loop, batches: Sequence[Batch]) -> list[StepResult]:
    """Run a step on each batch, all with the same parameters, which are left unchanged.

    With a learning rate of 0, Adam leaves the parameters unchanged but updates its running mean of gradients,
    from whose change each gradient is computed. D's ``.grad`` cannot be used: after a step it holds the
    gradient of G's phase, which no optimizer reads.
    """
    set_lr(loop, 0.0)
    decays = [adam.param_groups[0]["betas"][0] for adam in loop.adams]
    means = [state(adam, "exp_avg") for adam in loop.adams]
    results = []
    for batch in batches:
        figures = [float(figure) for figure in loop(batch)]
        before, means = means, [state(adam, "exp_avg") for adam in loop.adams]
        gradients = [
            (new - decay * old) / (1 - decay) for new, old, decay in zip(means, before, decays, strict=True)
        ]
        results.append(StepResult(figures, gradients))
    set_lr(loop, LR)
    return results


def update_error(loop: Loop, batch: Batch) -> float:
    """Take a step and return the relative error of the parameter update given Adam's state after it."""
    before = [flat(parameters(adam)) for adam in loop.adams]
    loop(batch)
    errors = []
    for adam, old in zip(loop.adams, before, strict=True):
        (decay, square_decay), eps = adam.param_groups[0]["betas"], adam.param_groups[0]["eps"]
        steps = max((float(kept["step"]) for kept in adam.state.values() if "step" in kept), default=0.0)
        if not steps:
            return math.inf
        mean = state(adam, "exp_avg") / (1 - decay**steps)
        square = state(adam, "exp_avg_sq") / (1 - square_decay**steps)
        errors.append(relative_error(flat(parameters(adam)) - old, -LR * mean / (square.sqrt() + eps)))
    return max(errors)


def set_lr(loop: Loop, lr: float) -> None:
    """Set the learning rate of both optimizers, in place where it is a tensor that a CUDA graph reads."""
    for group in (group for adam in loop.adams for group in adam.param_groups):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def parameters(adam: Adam) -> list[Tensor]:
    return [p for group in adam.param_groups for p in group["params"]]


def state(adam: Adam, name: str) -> Tensor:
    """Return one entry of Adam's state for all parameters as one vector; zeros before the first step."""
    return flat([adam.state.get(p, {}).get(name, torch.zeros_like(p)) for p in parameters(adam)])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all values in one float64 vector on the CPU."""
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


class Materials(NamedTuple):
    """A case's batches and reference results, computed once and used to check every variant."""

    tolerance: float
    """Allowed relative error of a network's gradient."""
    batches: list[tuple[Tensor, ...]]
    results: list[tuple[object, ...]]
    """The fields of each batch's StepResult."""
    figure_tolerance: float
    """Allowed relative error of a loss or mean probability."""

    @property
    def step_results(self) -> list[StepResult]:
        return [StepResult(*result) for result in self.results]  # type: ignore[arg-type]


# --- the worker ---------------------------------------------------------------------------------------------


class TrainWorker(Worker):
    """Builds a training variant and checks its steps against float64 before they are timed."""

    differentiates = True

    def prepare(self, case: Training, provider_name: str, materials_path: str) -> Prepared:  # type: ignore[override]
        """Build and check a variant; the error is the largest of a network's gradient over the batches."""
        materials = Materials(*load_tensors(materials_path))
        loop = self.build(case, provider_name)
        batches = [Batch(*batch).to(case.device) for batch in materials.batches]

        # Check every batch twice: a compiler's first call may run other code than later calls.
        actual, expected = step_results(loop, 2 * batches), 2 * materials.step_results
        errors = [a.errors(e) for a, e in zip(actual, expected, strict=True)]
        wrong = next((what for _, error, what in errors if not error <= materials.figure_tolerance), "")
        if not wrong and not (error := update_error(loop, batches[0])) <= UPDATE_TOLERANCE:
            found = f"error {error:.1e} > {UPDATE_TOLERANCE:.0e}"
            wrong = f"the parameter update does not match Adam's state: {found}"
        note = engines(loop, batches[0])
        del materials, expected, actual
        cuda = case.device == "cuda"
        self._sampler = Sampler(loop, batches) if cuda else CpuSampler(loop, batches, long=True)
        self._reset_peak()
        return Prepared(max(error for error, _, _ in errors), note, wrong)

    def build(self, case: Training, provider_name: str) -> Loop:
        """Build a variant on the case's device."""
        self._device = case.device
        machine.set_precision(case.device, case.dtype)
        loop: Loop = find(provider_name, VARIANTS).build(*case.networks(case.device), case)
        return loop


def engines(loop: Loop, batch: Batch) -> str:
    """Return how many of a step's operators run on each engine; '' if none is this project's."""
    ops = sys.modules.get("dcgan.kernels.ops")  # importing it would add to a baseline's memory
    if ops is None:
        return ""
    with ops.recording() as choices:
        loop(batch)
    counts = Counter(choice.engine for choice in choices)
    names = {"native": f"native {library.isa()}"} if "native" in counts else {}
    return ", ".join(f"{names.get(engine, engine)} {count}" for engine, count in counts.items())
