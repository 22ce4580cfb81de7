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
from torch import Tensor, optim
from torch.optim.swa_utils import AveragedModel

from dcgan import fast, models
from dcgan.kernels import ops
from dcgan.training import Config, Result, TrainStep, optimizers
from dcgan.training.augment import DiffAugment
from dcgan.training.captured_step import WARM_UP
from tests.gpu.full_size import DEVICE, reference_copy
from tests.support.reference_loop import reference_step
from tests.support.steps import Wrapper, sgds

pytestmark = pytest.mark.gpu

LATENT = 16
LR = 2e-4
Pair = tuple[Any, Any]

# Where rounding flips a sign before a LeakyReLU, an element of a gradient changes by its full size: one of
# the 2¹⁷ elements of the smallest map is 2^-8.5 of its norm, and several add up as the root of their number.
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


def adams(networks: Pair) -> tuple[optim.Adam, optim.Adam]:
    return optimizers(*networks, Config(lr=LR), fused=True)


@pytest.fixture
def _float32_products() -> Iterator[None]:
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


@pytest.mark.usefixtures("_float32_products")
@pytest.mark.parametrize("loss", ["non-saturating", "minimax"])
@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
def test_gradients_match_the_reference_recipe(capture: bool, loss: str) -> None:
    """At zero learning rate: at most twice the error of eager's worse layout, and losses to 1e-4."""
    networks = pair(features=64, image_size=64)
    real, noise = batch_of(networks, 16)
    step = TrainStep(*networks, *sgds(networks), capture=capture, loss=loss)
    for _ in range(WARM_UP + 2):
        result = step(real, noise)

    def reference_gradients(dtype: torch.dtype, layout: torch.memory_format) -> list[list[Tensor]]:
        plain = tuple(reference_copy(network, dtype).to(memory_format=layout) for network in networks)
        discriminator_gradients: list[Tensor] = []
        losses = reference_step(
            *plain,
            *sgds(plain),
            real.to(dtype, memory_format=layout),
            noise.to(dtype),
            minimax=loss == "minimax",
            between=lambda: discriminator_gradients.extend(p.grad.clone() for p in plain[1].parameters()),
        )
        return [list(losses), discriminator_gradients, [p.grad for p in plain[0].parameters()]]

    def flat(gradients: list[Tensor]) -> Tensor:
        return torch.cat([g.double().flatten() for g in gradients])

    exact = reference_gradients(torch.float64, torch.contiguous_format)
    eager = [
        reference_gradients(torch.float32, layout)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    for name, got, want in zip(Result._fields, result, exact[0], strict=True):
        assert abs(got - want) <= 1e-4, name
    for i, which in ((1, "D"), (2, "G")):
        want = flat(exact[i])
        ours = (flat([p.grad for p in networks[2 - i].parameters()]) - want).norm() / want.norm()
        worse = max((flat(run[i]) - want).norm() / want.norm() for run in eager)
        assert ours <= max(2 * worse, FLIPS), f"{which}: error {ours:.1e}, eager {worse:.1e}"


def test_triton_runs_the_step_without_computing_unused_gradients() -> None:
    networks = pair()
    step = TrainStep(*networks, *sgds(networks, 0.05), capture=False)
    with ops.recording() as choices:
        step(*batch_of(networks, 8))
    assert {choice.engine for choice in choices} == {"triton"}
    # D's backward from both halves in one pass, and that in G's phase.
    assert len([c for c in choices if c.op == "conv2d_fused_backward"]) == 2 * 4
    assert len([c for c in choices if c.op == "conv_transpose2d_fused_backward"]) == 4


SIZES = [8] * (WARM_UP + 3) + [5] + [8] * 2


def synchronize(networks: Pair, others: Pair, ours: Any = (), theirs: Any = ()) -> None:
    """Copy the state of the networks and optimizers to the others, so that both start the next step equal.

    Two runs that differ only in summation order differ by 1e-2 after nine steps, and sometimes completely: a
    pre-activation on the other side of a LeakyReLU's kink changes a gradient, and the difference grows from
    there. So the tests compare single steps instead of runs.
    """
    for network, other in zip(networks, others, strict=True):
        other.load_state_dict(network.state_dict())
    for optimizer, other in zip(ours, theirs, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.check
@pytest.mark.usefixtures("_float32_products")
@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.5}, {"flip": True, "augment": DiffAugment(["color", "translation", "cutout"])}],
    ids=["", "clip", "augmented"],
)
def test_captured_is_eager(kind: str, options: dict[str, Any]) -> None:
    """Compared step by step, with one smaller batch; cuDNN may change its summation order between runs.

    Replays draw the random numbers of augmentation that an eager step would draw.
    """
    networks = pair(kind)
    others = copy.deepcopy(networks)
    captured = TrainStep(*networks, *sgds(networks, 0.05), capture=True, **options)
    eager = TrainStep(*others, *sgds(others, 0.05), capture=False, **options)
    for size in SIZES:
        synchronize(networks, others)
        batch = batch_of(networks, size)
        random = torch.cuda.get_rng_state()
        result = captured(*batch)
        torch.cuda.set_rng_state(random)
        for name, a, b in zip(Result._fields, result, eager(*batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        for network, other in zip(networks, others, strict=True):
            for p, q in zip(network.parameters(), other.parameters(), strict=True):
                assert (p.grad - q.grad).norm() <= FLIPS * q.grad.norm()
            for value, want in zip(network.buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(value, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_captured_adam(kind: str, precision: str) -> None:
    """Every call, warm-up included, is one step: counters are exact and differences at most Adam's steps."""
    networks = pair(kind)
    others = copy.deepcopy(networks)
    options: list[dict[str, Any]] = [{}, {}]
    if precision != "float32":
        for one in options:
            one["autocast"] = getattr(torch, precision)
    if precision == "float16":
        for one in options:
            one["scaler"] = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=4)
    emas = [copy.deepcopy(networks[0]) for _ in options]
    ours, theirs = adams(networks), adams(others)
    captured = TrainStep(*networks, *ours, capture=True, ema=emas[0], ema_decay=0.9, **options[0])
    eager = TrainStep(*others, *theirs, capture=False, ema=emas[1], ema_decay=0.9, **options[1])
    assert not captured.why_not_captured
    for size in SIZES:
        if captured._optimizer_g.state:
            synchronize((*networks, emas[0]), (*others, emas[1]), ours, theirs)
        batch = batch_of(networks, size)
        for a, b in zip(captured(*batch), eager(*batch), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        for network, other in zip((*networks, emas[0]), (*others, emas[1]), strict=True):
            for p, q in zip(network.parameters(), other.parameters(), strict=True):
                assert (p - q).abs().max() <= 4 * LR  # each step is at most about lr, in either direction
                assert p.isfinite().all()
            for b, c in zip(network.buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(b, c, rtol=0.05, atol=0.02)
    steps = len(SIZES)
    assert captured._moving_average is not None
    assert captured._moving_average.updates == steps
    assert networks[0].main[1].num_batches_tracked == steps
    assert networks[1].main[3].num_batches_tracked == 3 * steps
    for optimizer in ours:
        assert all(state["step"] == steps for state in optimizer.state.values())
    if precision == "float16":
        assert options[0]["scaler"].get_scale() == options[1]["scaler"].get_scale() == 256.0 * 4


def test_a_captured_step_does_not_synchronize() -> None:
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
    assert len({result.loss_d.item() for result in results}) == len(batches), (
        "each result needs separate memory"
    )


def test_an_eager_step_does_not_synchronize() -> None:
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


def test_replays_read_a_learning_rate_on_the_device() -> None:
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
def test_a_new_learning_rate_recaptures_the_graph() -> None:
    """Even while an autograd graph is alive in which the parameters were used on another stream."""
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
def test_weights_cached_by_others_are_not_stale() -> None:
    """A replay changes weights without Python's notice: those packed by an EMA in eval mode, and those of
    networks that share the parameters, as the same tensors or as others in the same memory."""
    networks = pair()
    ema = copy.deepcopy(networks[0]).eval()
    shared, aliased = (fast.convert(reference_copy(networks[0], torch.float32).eval()) for _ in range(2))
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
                exact = reference_copy(network)(noise.double())
                network.refresh()
                refreshed = network(noise)
                off, again = (((t.double() - exact).norm() / exact.norm()).item() for t in (image, refreshed))
            assert torch.equal(image, refreshed), (
                f"{name}, step {i}: error {off:.1e}, after refresh() {again:.1e}"
            )


def with_spectral_norm(network: Any) -> Any:
    torch.nn.utils.parametrizations.spectral_norm(network.main[3 if network.main[0].in_channels > 1 else 2])
    return network


@pytest.mark.check
@pytest.mark.usefixtures("_float32_products")
@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("change", [torch.compile, Wrapper, with_spectral_norm], ids=lambda f: f.__name__)
def test_wrapped_networks_are_captured(kind: str, change: Any) -> None:
    bare = pair(kind)
    others = copy.deepcopy(bare)
    networks = tuple(map(change, bare))
    if change is with_spectral_norm:
        others = copy.deepcopy(networks)
    step = TrainStep(*networks, *sgds(networks, 0.05), capture=True)
    eager = TrainStep(*others, *sgds(others, 0.05), capture=False)
    for _ in range(WARM_UP + 3):
        synchronize(bare, others)
        batch = batch_of(bare, 8)
        for a, b in zip(step(*batch), eager(*batch), strict=True):
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


def test_a_replay_propagates_nan() -> None:
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


def test_several_batch_sizes_with_eager_steps_in_between() -> None:
    """Each graph writes its own gradients and results, whichever was captured or replayed last."""
    networks = pair()
    others = copy.deepcopy(networks)
    captured = TrainStep(*networks, *sgds(networks), capture=True)
    eager = TrainStep(*others, *sgds(others), capture=False)
    batches = [batch_of(networks, size) for size in (8, 4, 6)]
    for batch in batches:
        for _ in range(WARM_UP + 1):
            captured(*batch)
    for batch in itertools.chain(batches, reversed(batches), [batch_of(networks, 3)], batches):
        for a, b in zip(captured(*batch), eager(*batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        for network, other in zip(networks, others, strict=True):
            for p, q in zip(network.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-2 * float(q.grad.abs().max()))


def test_an_optimizer_that_cannot_be_captured() -> None:
    networks = pair()
    plain = optimizers(*networks, Config())
    reason = "optimizer_g, Adam, is not capturable=True"
    assert TrainStep(*networks, *plain).why_not_captured == reason
    with pytest.raises(ValueError, match=f"capture=True is not possible: {reason}"):
        TrainStep(*networks, *plain, capture=True)


SYNCHRONIZING_SCRIPT = """
import copy, warnings
import torch
from dcgan import models
from dcgan.training import TrainStep
from dcgan.training.captured_step import WARM_UP

class Synchronizing(models.Discriminator):
    synchronizes = True
    def forward(self, image):
        if self.synchronizes:
            assert image.mean().item() < 10  # a synchronization, which capture does not allow
        return super().forward(image)

torch.backends.cudnn.deterministic = True
g, d = models.Generator(8, features=8, image_size=32).cuda(), Synchronizing(features=8, image_size=32).cuda()
others = copy.deepcopy((g, d))
pairs = [[torch.optim.SGD(n.parameters(), lr=0.1) for n in networks] for networks in ((g, d), others)]
step, eager = TrainStep(g, d, *pairs[0]), TrainStep(*others, *pairs[1], capture=False)

def check_step():
    batch = torch.randn(4, 1, 32, 32, device="cuda").tanh(), torch.randn(4, 8, device="cuda")
    for a, b in zip(step(*batch), eager(*batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for network, other in zip((g, d), others, strict=True):
        other.load_state_dict(network.state_dict())

for _ in range(WARM_UP):
    check_step()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    check_step()
    check_step()
print(*[str(w.message) for w in caught if "captured" in str(w.message)], sep="|")
assert all(p.requires_grad for p in d.parameters())
assert torch.cuda.current_stream() == torch.cuda.default_stream()
assert len({float(torch.rand(1, device="cuda")) for _ in range(3)}) == 3
assert step.why_not_captured
for optimizer in (*pairs[0], *pairs[1]):
    optimizer.param_groups[0]["lr"] = 0.05
Synchronizing.synchronizes = False
for _ in range(WARM_UP + 3):
    check_step()
assert step.why_not_captured == "" and any(size.captured for size in step._graphs._sizes.values())
dropped = torch.nn.functional.dropout(torch.ones(1000, device="cuda"))
assert 300 < float(dropped.count_nonzero()) < 700
strict = TrainStep(g, d, *pairs[0], capture=True)
Synchronizing.synchronizes = True
try:
    for _ in range(WARM_UP + 1):
        strict(torch.randn(4, 1, 32, 32, device="cuda").tanh(), torch.randn(4, 8, device="cuda"))
except RuntimeError as error:
    print(error)
Synchronizing.synchronizes = False
check_step()
"""


@pytest.mark.check
def test_failed_capture_warns_and_falls_back_to_eager() -> None:
    """In a separate process: steps continue with eager's results, random numbers still work, and a capture
    that becomes possible succeeds."""
    done = subprocess.run(
        [sys.executable, "-c", SYNCHRONIZING_SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    warned, refused = done.stdout.strip().splitlines()
    message = "the training step cannot be captured in a CUDA graph: "
    assert warned.startswith(message)
    assert "|" not in warned, "expected a single warning"
    assert refused.startswith(message)
    assert refused.endswith("(capture=False runs it eagerly)")
