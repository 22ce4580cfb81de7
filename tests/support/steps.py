"""Small networks, batches and optimizers for tests of the training step, and a simulated CUDA graph."""

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
    """Return a Generator and a Discriminator in training mode."""
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
    """A user's wrapper around a network; it has no logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def reference_of(networks: Pair) -> Pair:
    """Return the reference networks with the same parameters and buffers."""
    copies = []
    for network in networks:
        kind = models.Generator if isinstance(network, models.Generator) else models.Discriminator
        plain = kind(**network.sizes()).to(next(network.parameters()).dtype).train(network.training)
        plain.load_state_dict(network.state_dict())
        copies.append(plain)
    return copies[0], copies[1]


def batch_of(networks: Pair, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    pixels = networks[1].image_size
    return torch.randn(size, 1, pixels, pixels, dtype=dtype).tanh(), torch.randn(size, LATENT, dtype=dtype)


def sgds(networks: Pair, lr: float = 0.0) -> list[optim.SGD]:
    return [optim.SGD(network.parameters(), lr=lr) for network in networks]


def adams(networks: Pair, **options: Any) -> list[optim.Adam]:
    return [optim.Adam(n.parameters(), lr=0.0002, betas=(0.5, 0.999), **options) for n in networks]


def state_of(networks: Pair, optimizers: Any, scaler: Any = None) -> dict[str, Tensor]:
    """Return every parameter, buffer and optimizer state tensor, by name."""
    found: dict[str, Tensor] = {}
    for which, network, optimizer in zip("GD", networks, optimizers, strict=True):
        found |= {f"{which}.{name}": value for name, value in network.state_dict().items()}
        for name, p in network.named_parameters():
            state = optimizer.state.get(p, {})
            found |= {f"{which}.{name} {key}": v for key, v in state.items() if isinstance(v, Tensor)}
    if scaler is not None and scaler._scale is not None:
        found |= {"scale": scaler._scale, "growth": scaler._growth_tracker}
    return found


def assert_states_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, want in expected.items():
        got = ours[name]
        assert got.shape == want.shape, name
        off = (got.double() - want.double()).abs().max()
        assert off <= tolerance, f"{name} is off by {off:.1e}"


def half(scale: float = 256.0, **options: Any) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)
    return {"autocast": torch.float16, "scaler": scaler}


class SimulatedGraphBackend:
    """A simulated CUDA graph on the CPU: capture has no side effects, a replay reuses captured memory.

    A replay reads the batch from the captured inputs, and writes result and gradients to the captured memory.
    """

    def __init__(self, step: TrainStep, scaler: Any = None) -> None:
        self.step, self.scaler = step, scaler
        self.log: list[str] = []

    def device_context(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def run(self, step: Callable[[], Result]) -> Result:
        self.log.append("run")
        return step()

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.log.append("capture")
        parameters, changed = self.step._tensors()
        state = [*changed, *self._optimizer_state()]
        before = [t.detach().clone() for t in state]
        random = torch.get_rng_state()
        result = step()
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        assert len(self._optimizer_state()) + len(changed) == len(before), (
            "all state exists before the capture"
        )
        result.fill_(torch.nan)
        gradients = [p.grad for p in parameters]
        for gradient in gradients:
            if gradient is not None:
                gradient.fill_(torch.nan)

        def replay() -> None:
            self.log.append("replay")
            previous_gradients = [p.grad for p in parameters]
            result.copy_(step())
            for parameter, gradient, previous in zip(parameters, gradients, previous_gradients, strict=True):
                if gradient is not None:
                    assert parameter.grad is not None
                    gradient.copy_(parameter.grad)
                parameter.grad = previous  # a replay runs no Python

        return replay, result

    def _optimizer_state(self) -> list[Tensor]:
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
        """Return the events since the last call."""
        log, self.log = self.log, []
        return log


def simulated_step(
    *args: Any, raise_on_failure: bool = False, **options: Any
) -> tuple[TrainStep, SimulatedGraphBackend]:
    step = TrainStep(*args, **options)
    backend = SimulatedGraphBackend(step, options.get("scaler"))
    step._graphs = step._on(backend, raise_on_failure)
    return step, backend
