"""On a real GPU: TrainStep, eager and captured in one CUDA graph."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from real import DEVICE, twin
from seed_loop import seed_step
from torch import Tensor, optim
from torch.optim.swa_utils import AveragedModel

from dcgan import fast, models
from dcgan.kernels import ops
from dcgan.training import Config, Result, TrainStep, optimizers
from dcgan.training.graph import WARM_UP

pytestmark = pytest.mark.gpu

LATENT = 16
LR = 2e-4
Pair = tuple[Any, Any]

# A sign that rounding changes before a LeakyReLU changes an element of a gradient by as much as it is: one of
# the 2¹⁷ of the smallest map is 2^-8.5 of its norm, and a few add up as their root.
FLIPS = 2**-7


def pair(kind: str = "fast", features: int = 16, image_size: int = 32) -> Pair:
    generator = models.Generator(LATENT, 1, features, image_size)
    networks = generator, models.Discriminator(1, features, image_size)
    for network in networks:
        network.apply(models.weights_init).to(DEVICE)
    return tuple(map(fast.convert, networks)) if kind == "fast" else networks  # type: ignore[return-value]


def batch_of(networks: Pair, size: int) -> tuple[Tensor, Tensor]:
    pixels = networks[1].image_size
    return (
        torch.randn(size, 1, pixels, pixels, device=DEVICE).tanh(),
        torch.randn(size, LATENT, 1, 1, device=DEVICE),
    )


def sgds(networks: Pair, lr: float = 0.05) -> list[optim.SGD]:
    return [optim.SGD(network.parameters(), lr=lr) for network in networks]


def adams(networks: Pair) -> tuple[optim.Adam, optim.Adam]:
    return optimizers(*networks, Config(lr=LR), fused=True)


@pytest.fixture
def _exact_products() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def assert_networks_close(ours: Pair, theirs: Pair, **tolerance: float) -> None:
    for which, network, other in zip("GD", ours, theirs, strict=True):
        for (name, value), want in zip(
            network.state_dict().items(), other.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(
                value, want, **tolerance, msg=lambda m, name=f"{which}.{name}": f"{name}: {m}"
            )


@pytest.mark.usefixtures("_exact_products")
@pytest.mark.parametrize("loss", ["non-saturating", "minimax"])
@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
def test_gradients_are_the_seeds(capture: bool, loss: str) -> None:
    """No step between, against float64: at most twice as far as eager's worse layout; losses to 1e-4."""
    networks = pair(features=64, image_size=64)
    real, noise = batch_of(networks, 16)
    step = TrainStep(*networks, *sgds(networks, 0.0), capture=capture, loss=loss)
    for _ in range(WARM_UP + 2):
        result = step(real, noise)

    def seeds(dtype: torch.dtype, layout: torch.memory_format) -> list[list[Tensor]]:
        plain = tuple(twin(network, dtype).to(memory_format=layout) for network in networks)
        kept: list[Tensor] = []
        losses = seed_step(
            *plain,
            *sgds(plain, 0.0),
            real.to(dtype, memory_format=layout),
            noise.to(dtype),
            minimax=loss == "minimax",
            between=lambda: kept.extend(p.grad.clone() for p in plain[1].parameters()),
        )
        return [list(losses), kept, [p.grad for p in plain[0].parameters()]]

    def flat(gradients: list[Tensor]) -> Tensor:
        return torch.cat([g.double().flatten() for g in gradients])

    exact = seeds(torch.float64, torch.contiguous_format)
    eager = [seeds(torch.float32, layout) for layout in (torch.contiguous_format, torch.channels_last)]
    for name, got, want in zip(Result._fields, result, exact[0], strict=True):
        assert abs(got - want) <= 1e-4, name
    for i, which in ((1, "D"), (2, "G")):
        want = flat(exact[i])
        ours = (flat([p.grad for p in networks[2 - i].parameters()]) - want).norm() / want.norm()
        worse = max((flat(run[i]) - want).norm() / want.norm() for run in eager)
        assert ours <= max(2 * worse, FLIPS), f"{which}: {ours:.1e}, eager has {worse:.1e}"


def test_triton_runs_it_and_makes_no_gradient_that_nothing_reads() -> None:
    networks = pair()
    step = TrainStep(*networks, *sgds(networks), capture=False)
    with ops.recording() as choices:
        step(*batch_of(networks, 8))
    assert {choice.engine for choice in choices} == {"triton"}
    assert len([c for c in choices if c.op == "conv2d_fused_backward"]) == 3 * 4
    assert len([c for c in choices if c.op == "conv_transpose2d_fused_backward"]) == 4


SIZES = [8] * (WARM_UP + 3) + [5] + [8] * 2


@pytest.mark.usefixtures("_exact_products")
@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.5}], ids=["", "clip"])
def test_captured_is_eager(kind: str, options: dict[str, Any]) -> None:
    """SGD, which follows its gradients as far as they are off; a short batch among the others."""
    networks = pair(kind)
    beside = copy.deepcopy(networks)
    captured = TrainStep(*networks, *sgds(networks), capture=True, **options)
    eager = TrainStep(*beside, *sgds(beside), capture=False, **options)
    results = []
    for size in SIZES:
        batch = batch_of(networks, size)
        results.append((captured(*batch), eager(*batch)))
    for got, want in results:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert_networks_close(networks, beside, rtol=1e-3, atol=1e-4)
    for network, other in zip(networks, beside, strict=True):
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-3 * float(q.grad.abs().max()))


@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_captured_adam(kind: str, precision: str) -> None:
    """Warm-up included, every step is one step: counters are exact, and nothing is further than Adam goes."""
    networks = pair(kind)
    beside = copy.deepcopy(networks)
    options: list[dict[str, Any]] = [{}, {}]
    if precision != "float32":
        for one in options:
            one["autocast"] = getattr(torch, precision)
    if precision == "float16":
        for one in options:
            one["scaler"] = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=4)
    emas = [copy.deepcopy(networks[0]) for _ in options]
    ours, theirs = adams(networks), adams(beside)
    captured = TrainStep(*networks, *ours, capture=True, ema=emas[0], ema_decay=0.9, **options[0])
    eager = TrainStep(*beside, *theirs, capture=False, ema=emas[1], ema_decay=0.9, **options[1])
    assert not captured.why_not_captured
    for size in SIZES:
        batch = batch_of(networks, size)
        for a, b in zip(captured(*batch), eager(*batch), strict=True):
            torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    steps = len(SIZES)
    assert networks[0].main[1].num_batches_tracked == steps
    assert networks[1].main[3].num_batches_tracked == 3 * steps
    for optimizer in ours:
        assert all(state["step"] == steps for state in optimizer.state.values())
    if precision == "float16":
        assert options[0]["scaler"].get_scale() == options[1]["scaler"].get_scale() == 256.0 * 4
    for network, other in zip((*networks, emas[0]), (*beside, emas[1]), strict=True):
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            assert (p - q).abs().max() <= 4 * LR * steps  # a step is about lr at most, either way
            assert p.isfinite().all()
        for b, c in zip(network.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(b, c, rtol=0.1, atol=0.05)


def test_results_are_read_later_and_nothing_waits() -> None:
    networks = pair()
    batches = [batch_of(networks, 8) for _ in range(4)]
    step = TrainStep(*networks, *adams(networks), capture=True, clip=1.0, ema=copy.deepcopy(networks[0]))
    for _ in range(WARM_UP + 1):
        step(*batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [step(*batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({result.loss_d.item() for result in results}) == len(batches), "each has memory of its own"


def test_an_eager_step_waits_for_nothing_either() -> None:
    networks = pair()
    batches = [batch_of(networks, 8) for _ in range(3)]
    step = TrainStep(*networks, *adams(networks), capture=False, clip=1.0)
    step(*batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [step(*batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for result in results for value in result)


def test_a_learning_rate_on_the_device_is_read_by_replays() -> None:
    networks = pair()
    rate = torch.tensor(LR, device=DEVICE)
    ours = [
        optim.Adam(n.parameters(), lr=rate, betas=(0.5, 0.999), fused=True, capturable=True) for n in networks
    ]
    step = TrainStep(*networks, *ours, capture=True)
    batch = batch_of(networks, 8)
    for _ in range(WARM_UP + 1):
        step(*batch)
    before = [p.clone() for network in networks for p in network.parameters()]
    rate.zero_()
    step(*batch)
    parameters = [p for network in networks for p in network.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    rate.fill_(LR)
    step(*batch)
    assert not any(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_a_number_as_learning_rate_makes_the_graph_anew() -> None:
    networks = pair()
    ours = adams(networks)
    step = TrainStep(*networks, *ours, capture=True)
    batch = batch_of(networks, 8)
    for _ in range(WARM_UP + 2):
        step(*batch)
    for optimizer in ours:
        optimizer.param_groups[0]["lr"] = 0.0
    parameters = [p for network in networks for p in network.parameters()]
    before = [p.clone() for p in parameters]
    for _ in range(WARM_UP + 2):
        step(*batch)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_weights_kept_by_others_are_not_stale() -> None:
    """An EMA in eval mode packs its weights and keeps them; a replay changes them without Python."""
    networks = pair()
    ema = copy.deepcopy(networks[0]).eval()
    shared = fast.convert(twin(networks[0], torch.float32).eval())
    for name, parameter in networks[0].named_parameters():
        module, _, attribute = name.rpartition(".")
        setattr(shared.get_submodule(module), attribute, parameter)
    step = TrainStep(*networks, *adams(networks), capture=True, ema=ema, ema_decay=0.5)
    noise = torch.randn(4, LATENT, device=DEVICE)
    for _ in range(WARM_UP + 3):
        step(*batch_of(networks, 8))
        for network in (ema, shared):
            with torch.no_grad():
                image = network(noise)
                network.refresh()
                assert torch.equal(image, network(noise))


def test_averaged_model() -> None:
    networks = pair()
    ema = AveragedModel(networks[0])
    step = TrainStep(*networks, *adams(networks), capture=True, ema=ema)
    for _ in range(WARM_UP + 2):
        step(*batch_of(networks, 8))
    assert ema.n_averaged == WARM_UP + 2
    assert all(p.isfinite().all() for p in ema.parameters())


def test_nan_is_visible_in_a_replay() -> None:
    networks = pair()
    step = TrainStep(*networks, *adams(networks), capture=True)
    real, noise = batch_of(networks, 8)
    for _ in range(WARM_UP + 1):
        step(real, noise)
    real[0, 0, 0, 0] = torch.nan
    result = step(real, noise)
    assert result.loss_d.isnan()
    assert result.d_x.isnan()
    assert result.loss_g.isnan()


def test_several_sizes_and_eager_steps_between() -> None:
    """Each graph has its own gradients and results, whichever was captured or replayed last."""
    networks = pair()
    beside = copy.deepcopy(networks)
    captured = TrainStep(*networks, *sgds(networks, 0.0), capture=True)
    eager = TrainStep(*beside, *sgds(beside, 0.0), capture=False)
    batches = [batch_of(networks, size) for size in (8, 4, 6)]
    for batch in batches:
        for _ in range(WARM_UP + 1):
            captured(*batch)
    for batch in itertools.chain(batches, reversed(batches), [batch_of(networks, 3)], batches):
        for a, b in zip(captured(*batch), eager(*batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        for network, other in zip(networks, beside, strict=True):
            for p, q in zip(network.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-2 * float(q.grad.abs().max()))


def test_what_is_not_captured() -> None:
    networks = pair()
    plain = optimizers(*networks, Config())
    reason = "optimizer_g, Adam, is not capturable=True"
    assert TrainStep(*networks, *plain).why_not_captured == reason
    with pytest.raises(ValueError, match=f"capture=True is not possible: {reason}"):
        TrainStep(*networks, *plain, capture=True)


WAITS = """
import torch
from dcgan import models
from dcgan.training import TrainStep
from dcgan.training.graph import WARM_UP

class Asks(models.Discriminator):
    def forward(self, image):
        assert image.mean().item() < 10
        return super().forward(image)

g, d = models.Generator(8, features=8, image_size=32).cuda(), Asks(features=8, image_size=32).cuda()
step = TrainStep(g, d, *[torch.optim.SGD(n.parameters(), lr=0.1) for n in (g, d)])
batch = torch.randn(4, 1, 32, 32, device="cuda").tanh(), torch.randn(4, 8, device="cuda")
for _ in range(WARM_UP):
    step(*batch)
try:
    step(*batch)
except RuntimeError as error:
    assert all(p.requires_grad for p in d.parameters())
    print(error)
"""


def test_what_cannot_be_captured_says_so() -> None:
    """In a process of its own, as a capture that failed may leave CUDA in any state."""
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=300)
    assert "cannot be captured in a CUDA graph (capture=False runs it eagerly)" in done.stdout, done.stderr
