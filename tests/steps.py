"""Small networks, batches and optimizers for the training step's tests, and a CUDA graph of the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

from dcgan import fast, models
from dcgan.training import Result, TrainStep

LOSSES = ("non-saturating", "minimax")
LATENT = 10
Pair = tuple[Any, Any]


def pair(
    kind: str = "fast", dtype: torch.dtype = torch.float32, features: int = 8, image_size: int = 32
) -> Pair:
    """Generator and Discriminator in training mode."""
    if kind == "mlp":
        return (
            models.MLPGenerator(LATENT, image_size=image_size).to(dtype),
            models.MLPDiscriminator(image_size=image_size).to(dtype),
        )
    networks = (
        models.Generator(LATENT, 1, features, image_size),
        models.Discriminator(1, features, image_size),
    )
    for network in networks:
        network.apply(models.weights_init).to(dtype)
    return tuple(map(fast.convert, networks)) if kind == "fast" else networks  # type: ignore[return-value]


class Wrapper(nn.Module):
    """Somebody's own module around a network; it has no logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def reference_of(networks: Pair) -> Pair:
    """The seed's networks, with the same values."""
    found = []
    for network in networks:
        known = models.Generator if isinstance(network, models.Generator) else models.Discriminator
        plain = known(**network.sizes()).to(next(network.parameters()).dtype).train(network.training)
        plain.load_state_dict(network.state_dict())
        found.append(plain)
    return found[0], found[1]


def batch_of(networks: Pair, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    pixels = networks[1].image_size
    return torch.randn(size, 1, pixels, pixels, dtype=dtype).tanh(), torch.randn(size, LATENT, dtype=dtype)


def sgds(networks: Pair, lr: float = 0.0) -> list[optim.SGD]:
    return [optim.SGD(network.parameters(), lr=lr) for network in networks]


def adams(networks: Pair, **options: Any) -> list[optim.Adam]:
    return [optim.Adam(n.parameters(), lr=0.0002, betas=(0.5, 0.999), **options) for n in networks]


def state_of(networks: Pair, optimizers: Any, scaler: Any = None) -> dict[str, Tensor]:
    """Every parameter, buffer and tensor of the optimizers, by name."""
    found: dict[str, Tensor] = {}
    for which, network, optimizer in zip("GD", networks, optimizers, strict=True):
        found |= {f"{which}.{name}": value for name, value in network.state_dict().items()}
        for name, p in network.named_parameters():
            state = optimizer.state.get(p, {})
            found |= {f"{which}.{name} {key}": v for key, v in state.items() if isinstance(v, Tensor)}
    if scaler is not None and scaler._scale is not None:
        found |= {"scale": scaler._scale, "growth": scaler._growth_tracker}
    return found


def assert_states_close(ours: dict[str, Tensor], seeds: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == seeds.keys()
    for name, want in seeds.items():
        got = ours[name]
        assert got.shape == want.shape, name
        off = (got.double() - want.double()).abs().max()
        assert off <= tolerance, f"{name} is off by {off:.1e}"


def half(scale: float = 256.0, **options: Any) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)
    return {"autocast": torch.float16, "scaler": scaler}


class Pretended:
    """A graph of the CPU: capturing executes nothing, and a replay does on the same memory what was captured.

    That is, it reads the batch, writes the result and the gradients where the capture had them.
    """

    def __init__(self, step: TrainStep, scaler: Any = None) -> None:
        self.step, self.scaler = step, scaler
        self.log: list[str] = []

    def here(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def run(self, step: Callable[[], Result]) -> Result:
        self.log.append("run")
        return step()

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.log.append("capture")
        parameters, changed = self.step._tensors()
        state = [*changed, *self._more()]
        before = [t.detach().clone() for t in state]
        result = step()
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        assert len(self._more()) + len(changed) == len(before), "all state is there before the capture"
        result.fill_(torch.nan)
        gradients = [p.grad for p in parameters]
        for gradient in gradients:
            if gradient is not None:
                gradient.fill_(torch.nan)

        def replay() -> None:
            self.log.append("replay")
            attributes = [p.grad for p in parameters]
            result.copy_(step())
            for parameter, gradient, attribute in zip(parameters, gradients, attributes, strict=True):
                if gradient is not None:
                    assert parameter.grad is not None
                    gradient.copy_(parameter.grad)
                parameter.grad = attribute  # a replay runs no Python

        return replay, result

    def _more(self) -> list[Tensor]:
        optimizers = (self.step._optimizer_g, self.step._optimizer_d)
        found = [
            value
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        if self.scaler is not None and self.scaler._scale is not None:
            found += [self.scaler._scale, self.scaler._growth_tracker]
        return found

    def new(self) -> list[str]:
        """What happened since the last call."""
        log, self.log = self.log, []
        return log


def pretend(*args: Any, insist: bool = False, **options: Any) -> tuple[TrainStep, Pretended]:
    step = TrainStep(*args, **options)
    backend = Pretended(step, options.get("scaler"))
    step._graphs = step._on(backend, insist)
    return step, backend
