"""What is computed: a network, its weights, a batch, a dtype and a device; and the float64 answer to it."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import asdict, dataclass, field, fields, replace
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

# tf32 is float32 whose products run on TF32 tensor cores: a setting of the GPU, not a dtype of tensors.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# How far ‖out - ref‖₂/‖ref‖₂ may be from float64. A rounding to p bits leaves a relative error of about
# 0.4 * 2^-p in the 2-norm: 1.7e-3 in bfloat16 (p = 8), 2.1e-4 in float16 and TF32 (p = 11). A network of 5
# layers rounds weights, convolution and BatchNorm output once each: 15 independent roundings, whose errors
# add in squares to 6.5e-3 and 8e-4 (eager on a CPU: 9.8e-3 and 1.3e-3). The bounds are 4 to 5 times that.
# float32 rounds 2^-16 times as much as bfloat16 and is ruled by its sums: direct convolutions give 6e-7 here,
# F(4×4, 2×2) Winograd 1 to 2.4e-6 a layer, so 2.4e-6 * sqrt(5) = 5e-6 a network; the bound is twice that.
TOLERANCE = {"float32": 1e-5, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}

# The bound is this times eager float32's own error where that is beyond the bound. float32 then loses digits
# however it computes: to sums that cancel, or in a trained Discriminator's sigmoid, in whose tail σ(x) = eˣ
# turns an absolute error of x into a relative one.
TIMES_EAGER = 10.0

INPUTS = 2  # one would let a provider pass that returns its first answer for ever
PIECE = 64  # images that float64 computes at a time


def threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def title(command: str, sizes: dict[str, int]) -> str:
    """The network, with the sizes that are given."""
    return " · ".join([command, *(f"{name} {size}" for name, size in sizes.items())])


def allowed(bound: float, *eager: float) -> float:
    """The bound of an error where eager's errors are these."""
    return bound if max(eager) <= bound else TIMES_EAGER * max(eager)


@dataclass(frozen=True)
class Case:
    """One race: everything that determines the answer, and where it is computed."""

    worker: ClassVar[str] = "bench.worker"
    """Module of the process that builds, checks and times a provider."""

    command: str
    """Key of NETWORKS."""
    batch: int
    dtype: str
    """Key of DTYPES."""
    device: str
    """``cpu`` or ``cuda``."""
    threads: int
    """Threads of each provider on the CPU."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Arguments of the network's constructor; absent ones are its defaults."""
    checkpoint: str | None = None
    """A state dict's file; random weights without."""
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
        """The reference network, without meaningful weights."""
        return NETWORKS[self.command](**self.sizes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch."""
        network = self.skeleton()
        if isinstance(network, Generator):
            return (network.latent_dim, 1, 1)
        return (network.channels, network.image_size, network.image_size)

    def network(self) -> Network:
        """The reference network in float32, eval mode, on the CPU, with the case's weights."""
        network = self.skeleton()
        if self.checkpoint is not None:
            network.load_state_dict(load_state(Path(self.checkpoint)))
        else:
            _randomise(network, self.input_shape, self.seed)
        return network.eval()

    def inputs(self) -> list[Tensor]:
        """The inputs the calls take in turn, already rounded to the case's dtype, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (INPUTS, self.batch, *self.input_shape)
        values = torch.randn(shape, generator=generator)
        if self.command == "discriminate":
            values = values.tanh()  # images lie in (-1, 1)
        return list(values.to(self.torch_dtype))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _randomise(network: nn.Module, input_shape: tuple[int, ...], seed: int) -> None:
    """DCGAN's initial weights, with running statistics such as training would have left."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.apply(weights_init)
        calibrate(network, input_shape)


def calibrate(network: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Gives BatchNorms the statistics of a random batch; leaves the network in training mode.

    Without statistics of its own the signal shrinks by half each layer to nothing, and every provider would
    be right about an image of zeros. They are shifted and scaled a little, so that a provider that normalises
    with the batch's own is caught.
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
    """What the network gives in float64; in pieces, so that a large batch's maps need little memory."""
    network = copy.deepcopy(network).double()
    with torch.no_grad():
        return torch.cat([network(piece.double()) for piece in x.split(PIECE)])


def load(path: Path) -> Any:
    """What a file holds, on the CPU. Raises OSError, or ValueError if it is no checkpoint."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint: {str(error).splitlines()[0]}") from error


def load_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, on the CPU. Raises ValueError if the file holds something else."""
    state = load(path)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a state dict")
    return state


@dataclass(frozen=True)
class Materials:
    """A case's weights, inputs and float64 outputs, computed once and handed to every provider."""

    state: dict[str, Tensor]
    inputs: list[Tensor]
    expected: list[Tensor]
    tolerance: float
    """The case's own, but where the case is beyond float32."""

    @staticmethod
    def of(case: Case) -> Materials:
        network = case.network()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        inputs = case.inputs()
        expected = [float64(network, x) for x in inputs]
        with torch.no_grad():
            eager = [network(x.float()) for x in inputs]
        errors = [relative_error(y, e) for y, e in zip(eager, expected, strict=True)]
        factor = allowed(TOLERANCE["float32"], *errors) / TOLERANCE["float32"]
        return Materials(state, inputs, expected, factor * case.tolerance)

    def first(self, batch: int) -> Materials:
        """The same for the first ``batch`` images of each input."""
        return replace(
            self,
            inputs=[x[:batch].clone() for x in self.inputs],
            expected=[y[:batch].clone() for y in self.expected],
        )

    def save(self, path: Path) -> None:
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, path)

    @staticmethod
    def load(path: Path) -> Materials:
        return Materials(**torch.load(path, map_location="cpu", weights_only=True))


class Prepared(NamedTuple):
    """What came of building a provider."""

    error: float
    """‖out - ref‖₂/‖ref‖₂ against float64."""
    note: str
    """The engines that run it, for a network of :mod:`dcgan.fast`; '' for any other."""
    wrong: str = ""
    """What else is wrong with what it computes."""


def relative_error(output: Tensor, expected: Tensor) -> float:
    """‖output - expected‖₂ / ‖expected‖₂; infinite if the shape differs or anything is not finite."""
    if output.shape != expected.shape:
        return math.inf
    difference = output.detach().cpu().double() - expected
    error = (difference.norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf
