"""A benchmark case (network, weights, batch, dtype, device), its cost and its float64 reference result."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dcgan.models import Discriminator, Generator, weights_init

Network = Generator | Discriminator

NETWORKS: dict[str, type[Generator] | type[Discriminator]] = {
    "generate": Generator,
    "discriminate": Discriminator,
}

# tf32 means float32 tensors whose products run on TF32 tensor cores: a GPU setting, not a tensor dtype.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Maximum relative error ‖out - ref‖₂/‖ref‖₂ against float64. Rounding to p bits leaves a relative error of
# about 0.4 * 2^-p in the 2-norm: 1.7e-3 in bfloat16 (p = 8), 2.1e-4 in float16 and TF32 (p = 11). A network
# of 5 layers rounds its weights, convolution outputs and BatchNorm outputs once each: 15 independent
# roundings, whose errors add up in quadrature to 6.5e-3 and 8e-4 (eager on a CPU: 9.8e-3 and 1.3e-3). The
# bounds are 4 to 5 times that. The rounding error of float32 is 2^-16 times that of bfloat16, so accumulation
# dominates: direct convolutions give 6e-7 here, F(4×4, 2×2) Winograd 1 to 2.4e-6 per layer and hence 2.4e-6 *
# sqrt(5) = 5e-6 per network; the bound is twice that.
TOLERANCE = {"float32": 1e-5, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}

# Where eager float32 itself exceeds the bound, the bound becomes this multiple of eager's error. Any float32
# implementation loses digits there, either to cancellation or in the sigmoid of a trained Discriminator,
# whose tail σ(x) ≈ eˣ turns an absolute error in x into a relative one.
TIMES_EAGER = 10.0

INPUTS = 2  # with a single input, a provider that keeps returning its first output would pass
REFERENCE_BATCH = 64  # images per float64 forward


def threads(count: int) -> str:
    """Format a thread count."""
    return f"{count} thread" if count == 1 else f"{count} threads"


def title(command: str, sizes: dict[str, int]) -> str:
    """Return a heading: the command, followed by the sizes that were given."""
    return " · ".join([command, *(f"{name} {size}" for name, size in sizes.items())])


def allowed(bound: float, *eager: float) -> float:
    """Return the error bound, relaxed to TIMES_EAGER times eager's error where eager exceeds it."""
    return bound if max(eager) <= bound else TIMES_EAGER * max(eager)


@dataclass(frozen=True)
class Work:
    """The cost of one image. ``flops`` counts 2 per multiply-add.

    ``activations`` and ``weights`` are element counts: the inputs and outputs of every layer, and each weight
    once. A batch of N moves at least ``N * activations + weights`` elements.
    """

    flops: int
    activations: int
    weights: int

    def bytes_per_image(self, batch: int, itemsize: int) -> float:
        """Return the minimum memory traffic per image of a batch, in bytes."""
        return itemsize * (self.activations + self.weights / batch)


def count(network: nn.Module, input_shape: tuple[int, ...]) -> Work:
    """Return the work of ``network`` on one image; ``input_shape`` excludes the batch dimension.

    A convolution takes ``C_in * kh * kw`` multiply-adds per output. A transposed one takes ``C_out * kh *
    kw`` per *input*: the cost of its polyphase form, which multiplies no inserted zeros. BatchNorm and
    activations are not counted, since fused kernels hide them in the convolutions.
    """
    flops = activations = weights = 0

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal flops, activations, weights
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        dense = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        flops += 2 * dense.numel() * layer.weight[0].numel()
        activations += inputs[0].numel() + output.numel()
        weights += layer.weight.numel()

    network = copy.deepcopy(network).to("meta").eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(hook)
    with torch.no_grad():
        network(torch.zeros(1, *input_shape, device="meta"))
    return Work(flops, activations, weights)


@dataclass(frozen=True)
class Case:
    """One benchmark case: everything that determines the result, and the device that computes it."""

    worker: ClassVar[str] = "bench.worker:Worker"
    """Class that the worker process instantiates to build, check and time a provider."""
    kind: ClassVar[str] = "race"
    """Kind of the JSON objects."""

    command: str
    """Key of NETWORKS."""
    batch: int
    dtype: str
    """Key of DTYPES."""
    device: str
    """``cpu`` or ``cuda``."""
    threads: int
    """CPU threads per provider."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Constructor arguments of the network; omitted ones take their defaults."""
    checkpoint: str | None = None
    """Path of a state dict; None for random weights."""
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    @property
    def title(self) -> str:
        where = f"cpu, {threads(self.threads)}" if self.device == "cpu" else self.device
        return f"{title(self.command, self.sizes)} · batch {self.batch} · {self.dtype} · {where}"

    def skeleton(self) -> Network:
        """Return the reference network with PyTorch's default weights instead of the case's."""
        return NETWORKS[self.command](**self.sizes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one input without the batch dimension."""
        return input_shape(self.skeleton())

    def network(self) -> Network:
        """Return the reference network with the case's weights: float32, eval mode, on the CPU."""
        network = self.skeleton()
        if self.checkpoint is not None:
            network.load_state_dict(load_state(Path(self.checkpoint)))
        else:
            shape = self.input_shape  # makes a network, which draws random numbers
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                calibrate(network.apply(weights_init), shape)
        return network.eval()

    def inputs(self) -> list[Tensor]:
        """Return the inputs that calls cycle through, on the CPU, already rounded to the case's dtype."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (INPUTS, self.batch, *self.input_shape)
        values = torch.randn(shape, generator=generator)
        if self.command == "discriminate":
            values = values.tanh()  # images lie in (-1, 1)
        return list(values.to(self.torch_dtype))

    def work(self) -> Work:
        """Return the cost of one image."""
        return count(self.skeleton(), self.input_shape)

    def materials(self) -> Any:
        """Return what the providers are given, and the results that they are checked against."""
        network = self.network()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        inputs = self.inputs()
        expected = [float64(network, x) for x in inputs]
        with torch.no_grad():
            eager = [network(x.float()) for x in inputs]
        errors = [relative_error(y, e) for y, e in zip(eager, expected, strict=True)]
        factor = allowed(TOLERANCE["float32"], *errors) / TOLERANCE["float32"]
        return Materials(factor * self.tolerance, state, inputs, expected)


def input_shape(network: Network) -> tuple[int, int, int]:
    """Return the shape of one input without the batch dimension."""
    if isinstance(network, Generator):
        return network.latent_dim, 1, 1
    return network.channels, network.image_size, network.image_size


def calibrate(network: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Set the BatchNorm running statistics from a random batch; leave the network in training mode.

    With the default statistics the signal would halve at every layer and vanish, and any provider that
    returns zeros would pass. The statistics are then perturbed slightly, so that a provider which normalizes
    with batch statistics is caught.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(16, *input_shape))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)


def float64(network: nn.Module, x: Tensor) -> Tensor:
    """Compute the network's output in float64, REFERENCE_BATCH images at a time to bound memory."""
    network = copy.deepcopy(network).double()
    with torch.no_grad():
        return torch.cat([network(part.double()) for part in x.split(REFERENCE_BATCH)])


def load_state(path: Path) -> dict[str, Tensor]:
    """Load a state dict from a file onto the CPU. Raises ValueError if it cannot be read or is none."""
    from dcgan import checkpoint  # not above: it imports dcgan.fast, which would count as a baseline's memory

    state = checkpoint.load(path)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a state dict")
    return state


class Materials(NamedTuple):
    """A case's weights, inputs and float64 outputs, computed once and shared by all providers."""

    tolerance: float
    """Maximum allowed error; the case's, relaxed where eager float32 exceeds its own (see TIMES_EAGER)."""
    state: dict[str, Tensor]
    inputs: list[Tensor]
    expected: list[Tensor]

    def first(self, batch: int) -> Materials:
        """Return the same materials restricted to the first ``batch`` images of each input."""
        return self._replace(
            inputs=[x[:batch].clone() for x in self.inputs],
            expected=[y[:batch].clone() for y in self.expected],
        )


class Prepared(NamedTuple):
    """The result of building and checking a provider."""

    error: float
    """‖out - ref‖₂/‖ref‖₂ against float64."""
    note: str
    """The engines that run it if it is a network of :mod:`dcgan.fast`, else an empty string."""
    wrong: str = ""
    """Any other mismatch with the reference, or an empty string."""


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Return ‖output - expected‖₂ / ‖expected‖₂; inf if shapes differ or the error is not finite."""
    if output.shape != expected.shape:
        return math.inf
    difference = output.detach().cpu().double() - expected
    error = (difference.norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf
