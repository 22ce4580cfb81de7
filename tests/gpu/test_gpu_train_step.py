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
from steps import Wrapper
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


def lead(networks: Pair, beside: Pair, ours: Any = (), theirs: Any = ()) -> None:
    """Let the networks beside begin the next step where ours do.

    Two runs that differ in nothing but the order of some sums are apart by 1e-2 after nine steps, and now
    and then by all there is: a pre-activation on the other side of a LeakyReLU's kink changes a gradient, and
    from there on it grows. So steps are compared, and not runs.
    """
    for network, other in zip(networks, beside, strict=True):
        other.load_state_dict(network.state_dict())
    for optimizer, other in zip(ours, theirs, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.check
@pytest.mark.usefixtures("_exact_products")
@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.5}], ids=["", "clip"])
def test_captured_is_eager(kind: str, options: dict[str, Any]) -> None:
    """Step by step, a short batch among the others; cuDNN may sum in another order each time."""
    networks = pair(kind)
    beside = copy.deepcopy(networks)
    captured = TrainStep(*networks, *sgds(networks), capture=True, **options)
    eager = TrainStep(*beside, *sgds(beside), capture=False, **options)
    for size in SIZES:
        lead(networks, beside)
        batch = batch_of(networks, size)
        for name, a, b in zip(Result._fields, captured(*batch), eager(*batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        for network, other in zip(networks, beside, strict=True):
            for p, q in zip(network.parameters(), other.parameters(), strict=True):
                assert (p.grad - q.grad).norm() <= FLIPS * q.grad.norm()
            for value, want in zip(network.buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(value, want, rtol=1e-3, atol=1e-5)


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
        if captured._optimizer_g.state:
            lead((*networks, emas[0]), (*beside, emas[1]), ours, theirs)
        batch = batch_of(networks, size)
        for a, b in zip(captured(*batch), eager(*batch), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        for network, other in zip((*networks, emas[0]), (*beside, emas[1]), strict=True):
            for p, q in zip(network.parameters(), other.parameters(), strict=True):
                assert (p - q).abs().max() <= 4 * LR  # a step is about lr at most, either way
                assert p.isfinite().all()
            for b, c in zip(network.buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(b, c, rtol=0.05, atol=0.02)
    steps = len(SIZES)
    assert networks[0].main[1].num_batches_tracked == steps
    assert networks[1].main[3].num_batches_tracked == 3 * steps
    for optimizer in ours:
        assert all(state["step"] == steps for state in optimizer.state.values())
    if precision == "float16":
        assert options[0]["scaler"].get_scale() == options[1]["scaler"].get_scale() == 256.0 * 4


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


@pytest.mark.check
def test_a_number_as_learning_rate_makes_the_graph_anew() -> None:
    """While somebody keeps a graph of autograd in which the parameters were used on another stream."""
    networks = pair()
    ours = adams(networks)
    step = TrainStep(*networks, *ours, capture=True)
    batch = batch_of(networks, 8)
    parameters = [p for network in networks for p in network.parameters()]
    for rate in (LR, 0.0, LR, 0.0):
        for optimizer in ours:
            optimizer.param_groups[0]["lr"] = rate
        before = [p.clone() for p in parameters]
        for _ in range(WARM_UP + 2):
            step(*batch)
        same = [torch.equal(p, q) for p, q in zip(parameters, before, strict=True)]
        assert not any(same) if rate else all(same)
    torch.stack([p.sum() for p in before]).sum().backward()


@pytest.mark.check
def test_weights_kept_by_others_are_not_stale() -> None:
    """A replay changes weights without Python: those that an EMA in eval mode has packed, and those that a
    network has that shares the parameters, by the same tensors or by others in the same memory."""
    networks = pair()
    ema = copy.deepcopy(networks[0]).eval()
    shared, aliased = (fast.convert(twin(networks[0], torch.float32).eval()) for _ in range(2))
    for name, parameter in networks[0].named_parameters():
        module, _, attribute = name.rpartition(".")
        setattr(shared.get_submodule(module), attribute, parameter)
        aliased.get_parameter(name).data = parameter.data
    step = TrainStep(*networks, *adams(networks), capture=True, ema=ema, ema_decay=0.5)
    noise = torch.randn(4, LATENT, device=DEVICE)
    for i in range(WARM_UP + 3):
        step(*batch_of(networks, 8))
        for name, network in {"ema": ema, "shared": shared, "aliased": aliased}.items():
            with torch.no_grad():
                image = network(noise)
                exact = twin(network)(noise.double())
                network.refresh()
                anew = network(noise)
                off, again = (((t.double() - exact).norm() / exact.norm()).item() for t in (image, anew))
            assert torch.equal(image, anew), (
                f"{name}, step {i}: {off:.1e} from float64, refreshed {again:.1e}"
            )


def with_spectral_norm(network: Any) -> Any:
    torch.nn.utils.parametrizations.spectral_norm(network.main[3 if network.main[0].in_channels > 1 else 2])
    return network


@pytest.mark.check
@pytest.mark.usefixtures("_exact_products")
@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("change", [torch.compile, Wrapper, with_spectral_norm], ids=lambda f: f.__name__)
def test_wrapped_networks_are_captured(kind: str, change: Any) -> None:
    bare = pair(kind)
    beside = copy.deepcopy(bare)
    networks = tuple(map(change, bare))
    if change is with_spectral_norm:
        beside = copy.deepcopy(networks)
    step = TrainStep(*networks, *sgds(networks), capture=True)
    plain = TrainStep(*beside, *sgds(beside), capture=False)
    for _ in range(WARM_UP + 3):
        lead(bare, beside)
        batch = batch_of(bare, 8)
        for a, b in zip(step(*batch), plain(*batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert step.why_not_captured == ""
    torch._dynamo.reset()


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
import copy, warnings
import torch
from dcgan import models
from dcgan.training import TrainStep
from dcgan.training.graph import WARM_UP

class Asks(models.Discriminator):
    asks = True
    def forward(self, image):
        if self.asks:
            assert image.mean().item() < 10  # waits for the device, which no capture allows
        return super().forward(image)

torch.backends.cudnn.deterministic = True
g, d = models.Generator(8, features=8, image_size=32).cuda(), Asks(features=8, image_size=32).cuda()
beside = copy.deepcopy((g, d))
pairs = [[torch.optim.SGD(n.parameters(), lr=0.1) for n in networks] for networks in ((g, d), beside)]
step, plain = TrainStep(g, d, *pairs[0]), TrainStep(*beside, *pairs[1], capture=False)

def same():
    batch = torch.randn(4, 1, 32, 32, device="cuda").tanh(), torch.randn(4, 8, device="cuda")
    for a, b in zip(step(*batch), plain(*batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for network, other in zip((g, d), beside, strict=True):
        other.load_state_dict(network.state_dict())

for _ in range(WARM_UP):
    same()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    same()
    same()
print(*[str(w.message) for w in said if "captured" in str(w.message)], sep="|")
assert all(p.requires_grad for p in d.parameters())
assert torch.cuda.current_stream() == torch.cuda.default_stream()
assert len({float(torch.rand(1, device="cuda")) for _ in range(3)}) == 3
assert step.why_not_captured
for optimizer in (*pairs[0], *pairs[1]):
    optimizer.param_groups[0]["lr"] = 0.05
Asks.asks = False
for _ in range(WARM_UP + 3):
    same()
assert step.why_not_captured == "" and any(size.captured for size in step._graphs._sizes.values())
dropped = torch.nn.functional.dropout(torch.ones(1000, device="cuda"))
assert 300 < float(dropped.count_nonzero()) < 700
strict = TrainStep(g, d, *pairs[0], capture=True)
Asks.asks = True
try:
    for _ in range(WARM_UP + 1):
        strict(torch.randn(4, 1, 32, 32, device="cuda").tanh(), torch.randn(4, 8, device="cuda"))
except RuntimeError as error:
    print(error)
Asks.asks = False
same()
"""


@pytest.mark.check
def test_what_cannot_be_captured_says_so_and_breaks_nothing() -> None:
    """In a process of its own: steps go on with eager's numbers, random numbers are drawn, and a capture that
    can be made is."""
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    warned, refused = done.stdout.strip().splitlines()
    cannot = "the training step cannot be captured in a CUDA graph: "
    assert warned.startswith(cannot)
    assert "|" not in warned, "once"
    assert refused.startswith(cannot)
    assert refused.endswith("(capture=False runs it eagerly)")
