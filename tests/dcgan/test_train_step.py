"""TrainStep against the seed's loop as written, and everything that it does besides."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from seed_loop import seed_step
from steps import (
    LATENT,
    LOSSES,
    Pair,
    Wrapper,
    adams,
    assert_states_close,
    batch_of,
    half,
    pair,
    reference_of,
    sgds,
    state_of,
)
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from dcgan import models
from dcgan.kernels import ops
from dcgan.training import Config, Result, TrainStep, optimizers, train_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _reference_engine() -> Iterator[None]:
    with ops.use_engine("reference"):
        yield


# --- the seed's mathematics ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("_reference_engine")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("kind", "size"), [("fast", 32), ("fast", 64), ("reference", 32), ("mlp", 32)])
def test_float64_is_the_seeds_loop(kind: str, size: int, loss: str) -> None:
    """Losses, parameters, running statistics and Adam's state over some steps, to 1e-10.

    The logits' loss and BCELoss differ by rounding, 1e-16; Adam's first steps divide a gradient by its own
    size plus 1e-8, so that makes at most lr·1e-16/1e-8 of a gradient that is 0 but for rounding.
    """
    networks = pair(kind, torch.float64, image_size=size)
    seeds = copy.deepcopy(networks) if kind == "mlp" else reference_of(networks)
    ours, theirs = optimizers(*networks, Config()), adams(seeds)
    step = TrainStep(*networks, *ours, loss=loss)
    for count in (6, 6, 3, 1):
        real, noise = batch_of(networks, count, torch.float64)
        result = step(real, noise)
        wanted = seed_step(*seeds, *theirs, real, noise[:, :, None, None], minimax=loss == "minimax")
        for name, got, want in zip(Result._fields, result, wanted, strict=True):
            assert abs(got - want) <= 1e-10, name
            assert got.dtype == torch.float64
        assert_states_close(state_of(networks, ours), state_of(seeds, theirs), 1e-10)


# What an engine may have at least. Where no sign changes before a LeakyReLU, sums of some hundred terms are
# off by 1e-6 in eager, and a Winograd rounds 6 times as much (the README's accuracy).
ROUNDING = 2**-17
# Where one does, a gradient changes by as much as it is, 1e-2 of all in a small network, whoever rounds. So
# small networks are given batches on which no pre-activation is that near to 0, of the size of its map: 1e-5
# is some times what such a Winograd is off by in one pixel. The real ones have millions of pre-activations,
# and eager's two layouts themselves differ by some: one of the 2¹⁷ of the smallest map is 2^-8.5 of its
# gradient, and a few of them add up as their root.
KINK = 1e-5
FLIPS = 2**-7


def nearest_to_a_kink(networks: Pair, real: Tensor, noise: Tensor) -> float:
    """The smallest |pre-activation| in a step, relative to its map's size."""
    nearest = []

    def measure(module: nn.Module, args: tuple[Tensor]) -> None:
        (x,) = args
        nearest.append(float(x.abs().min() / x.square().mean().sqrt()))

    generator, discriminator = (network.double() for network in reference_of(networks))
    for module in (*generator.modules(), *discriminator.modules()):
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.register_forward_pre_hook(measure)
    with torch.no_grad():
        discriminator(generator(noise.double()))
        discriminator(real.double())
    return min(nearest)


Errors = dict[str, float]


def gradient_errors(networks: Pair, real: Tensor, noise: Tensor) -> tuple[Errors, Errors]:
    """‖error‖/‖gradients‖ of D's and of G's, no step between: ours, and of eager's worse layout.

    Asserts losses to 1e-4.
    """

    def seeds(dtype: torch.dtype, layout: torch.memory_format) -> tuple[list[Tensor], ...]:
        plain = reference_of(networks)
        for network in plain:
            network.to(dtype=dtype, memory_format=layout)
        kept: list[Tensor] = []
        losses = seed_step(
            *plain,
            *sgds(plain),
            real.to(dtype, memory_format=layout),
            noise.to(dtype)[:, :, None, None],
            between=lambda: kept.extend(p.grad.clone() for p in plain[1].parameters()),
        )
        return list(losses), kept, [p.grad for p in plain[0].parameters()]

    def flat(gradients: list[Tensor]) -> Tensor:
        return torch.cat([g.double().flatten() for g in gradients])

    exact = seeds(torch.float64, torch.contiguous_format)
    eager = [seeds(torch.float32, layout) for layout in (torch.contiguous_format, torch.channels_last)]
    result = TrainStep(*networks, *sgds(networks))(real, noise)
    for name, got, want in zip(Result._fields, result, exact[0], strict=True):
        assert abs(got - want) <= 1e-4, name

    ours, worse = {}, {}
    for i, which in ((1, "D"), (2, "G")):
        want = flat(exact[i])
        made = [p.grad for p in networks[2 - i].parameters()]
        ours[which] = float((flat(made) - want).norm() / want.norm())
        worse[which] = max(float((flat(run[i]) - want).norm() / want.norm()) for run in eager)
    return ours, worse


def assert_at_most_twice(found: list[tuple[Errors, Errors]], least: float) -> None:
    """The largest over the seeds: where a sign changes is luck, by seed and engine."""
    for which in "DG":
        ours, worse = (max(errors[side][which] for errors in found) for side in (0, 1))
        assert ours <= max(2 * worse, least), f"{which}'s gradients: {ours:.1e}, eager has {worse:.1e}"


@pytest.mark.parametrize("image_size", [32, 64])
def test_float32_gradients(image_size: int) -> None:
    found = []
    for seed in range(100):
        torch.manual_seed(seed)
        networks = pair(image_size=image_size)
        batch = batch_of(networks, 4)
        if nearest_to_a_kink(networks, *batch) > KINK:
            found.append(gradient_errors(networks, *batch))
        if len(found) == 4:
            break
    assert len(found) == 4
    assert_at_most_twice(found, ROUNDING)


@pytest.mark.slow
def test_float32_gradients_of_the_real_networks() -> None:
    """Eager's own error is 1e-6 on one batch and 4e-3 on another."""
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        networks = pair(features=64, image_size=64)
        found.append(gradient_errors(networks, *batch_of(networks, 16)))
    assert_at_most_twice(found, FLIPS)


@pytest.mark.parametrize("kind", ["fast", "reference", "mlp"])
def test_logits_are_what_the_sigmoid_is_given(kind: str) -> None:
    networks = pair(kind)
    real, _ = batch_of(networks, 4)
    for training in (True, False):
        discriminator = networks[1].train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(discriminator.logits(real).sigmoid(), discriminator(real))
    discriminator.main[-1] = nn.Identity()
    with pytest.raises(TypeError, match="main ends in Identity"):
        discriminator.logits(real)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sure_discriminator_still_teaches(loss: str) -> None:
    """In float32 p is 1 where D's logit is 40: BCELoss has no gradient to give, the logits' loss has."""

    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def logits(self, image: Tensor) -> Tensor:
            return image.mean((1, 2, 3)) * self.weight + 40

        def forward(self, image: Tensor) -> Tensor:
            return self.logits(image).sigmoid()

    generator, _ = pair()
    sure = Sure()
    step = TrainStep(generator, sure, *sgds((generator, sure)), loss=loss)
    result = step(*batch_of(pair(), 4))
    want = {"non-saturating": 0.1 * 40, "minimax": -40.0}[loss]  # -(0.9·log p + 0.1·log(1-p)), log p = 0
    assert result.loss_g.item() == pytest.approx(want, rel=1e-2)
    assert all(p.grad.abs().max() > 0 for p in generator.parameters())


# --- other people's networks --------------------------------------------------------------------------------


class Doubtful(models.Discriminator):
    """A subclass whose forward is another function than its logits."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * 0.5


def with_hook(discriminator: nn.Module) -> nn.Module:
    """Its output is another than the Sigmoid's of its logits."""
    discriminator.register_forward_hook(lambda module, args, output: output * 0.5)
    return discriminator


def with_hooked_sigmoid(discriminator: Any) -> nn.Module:
    discriminator.main[-1].register_forward_hook(lambda module, args, output: output * 0.5)
    return discriminator


def without_sigmoid(discriminator: Any) -> nn.Module:
    discriminator.main[-1] = nn.Hardsigmoid()
    return discriminator


@pytest.mark.parametrize(
    "change",
    [
        Wrapper,
        lambda d: Doubtful(**d.sizes()).double(),
        with_hook,
        with_hooked_sigmoid,
        without_sigmoid,
    ],
    ids=["wrapper", "subclass", "hook", "hook of the Sigmoid", "no Sigmoid"],
)
@pytest.mark.parametrize("kind", ["reference", "fast"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_discriminator_of_ones_own(kind: str, change: Callable[[Any], Any], loss: str) -> None:
    """Where D is not the Sigmoid of its logits, D itself is asked."""
    generator, discriminator = pair(kind, torch.float64)
    networks = generator, change(discriminator)
    seeds = copy.deepcopy(networks)
    ours, theirs = adams(networks), adams(seeds)
    real, noise = batch_of((generator, discriminator), 4, torch.float64)
    result = TrainStep(*networks, *ours, loss=loss)(real, noise)
    wanted = seed_step(*seeds, *theirs, real, noise, minimax=loss == "minimax")
    for got, want in zip(result, wanted, strict=True):
        assert abs(got - want) <= 1e-10
    assert_states_close(state_of(networks, ours), state_of(seeds, theirs), 1e-10)


def test_compiled_discriminators_are_called_compiled() -> None:
    networks = pair("reference")
    called = []

    def compiler(module: Any, inputs: Any) -> Any:
        called.append(True)
        return module.forward

    networks[1].compile(backend=compiler)
    step = TrainStep(*networks, *sgds(networks))
    assert all(value.isfinite() for value in step(*batch_of(networks, 2)))
    assert called
    torch._dynamo.reset()


# --- what it does not compute -------------------------------------------------------------------------------


class Backwards(TorchDispatchMode):
    """For each convolution's backward: whether it is a transposed one, and whether it makes a dweight."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("dcgan::conv") and "_backward" in name:
            needs = next(a for a in reversed(args) if isinstance(a, list | tuple) and len(a) == 5)
            self.found.append(("transpose" in name, needs[1]))
        elif name.startswith("aten::convolution_backward"):
            self.found.append((args[7], args[10][1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["fast", "reference"])
def test_no_gradient_of_ds_weights_in_gs_phase(kind: str) -> None:
    networks = pair(kind)
    layers = 4  # convolutions of each network at 32×32
    ours = adams(networks)
    real, noise = batch_of(networks, 4)
    with Backwards() as backwards:
        TrainStep(*networks, *ours)(real, noise)
    of_d = [dweight for transposed, dweight in backwards.found if not transposed]
    of_g = [dweight for transposed, dweight in backwards.found if transposed]
    assert of_d == [True] * 2 * layers + [False] * layers
    assert of_g == [True] * layers
    with Backwards() as backwards:
        train_step(*networks, *ours, real, noise)
    assert [w for t, w in backwards.found if not t] == [True] * 3 * layers, "the seed computes them all"


def test_ds_grad_is_what_its_own_phase_made() -> None:
    networks = pair(dtype=torch.float64)
    seeds = copy.deepcopy(networks)
    real, noise = batch_of(networks, 4, torch.float64)
    TrainStep(*networks, *sgds(networks, 0.1))(real, noise)
    kept: list[Tensor] = []
    seed_step(
        *seeds,
        *sgds(seeds, 0.1),
        real,
        noise,
        between=lambda: kept.extend(p.grad.clone() for p in seeds[1].parameters()),
    )
    for p, want, accumulated in zip(networks[1].parameters(), kept, seeds[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(p.grad, accumulated.grad)


def test_gradients_of_before_are_cleared_first() -> None:
    networks = pair(dtype=torch.float64)
    beside = copy.deepcopy(networks)
    real, noise = batch_of(networks, 4, torch.float64)
    for network in networks:
        network(real if network is networks[1] else noise).sum().backward()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
    ours, theirs = adams(networks), adams(beside)
    TrainStep(*networks, *ours)(real, noise)
    TrainStep(*beside, *theirs)(real, noise)
    assert_states_close(state_of(networks, ours), state_of(beside, theirs), 0.0)


def test_nothing_of_a_step_stays_alive() -> None:
    networks = pair()
    step = TrainStep(*networks, *adams(networks))
    real, noise = batch_of(networks, 4)
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(real)
        step(real, noise)
        del real
        assert seen() is None
    finally:
        gc.enable()


# --- frozen parameters, exceptions, NaN ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fast", "reference"])
def test_frozen_parameters_stay_frozen(kind: str) -> None:
    """One convolution and one BatchNorm of each network: no gradient, no change; the rest as in the loop."""
    networks = pair(kind, torch.float64)
    frozen = [networks[0].main[3], networks[0].main[4], networks[1].main[2], networks[1].main[3]]
    for module in frozen:
        module.requires_grad_(False)
    seeds = copy.deepcopy(networks)
    before = [p.clone() for module in frozen for p in module.parameters()]
    ours, theirs = adams(networks), adams(seeds)
    step = TrainStep(*networks, *ours)
    for _ in range(2):
        real, noise = batch_of(networks, 4, torch.float64)
        step(real, noise)
        seed_step(*seeds, *theirs, real, noise)
    assert_states_close(state_of(networks, ours), state_of(seeds, theirs), 1e-10)
    parameters = [p for module in frozen for p in module.parameters()]
    for p, old in zip(parameters, before, strict=True):
        assert not p.requires_grad
        assert p.grad is None
        assert torch.equal(p, old)
    for network in networks:
        others = [p for p in network.parameters() if all(p is not q for q in parameters)]
        assert all(p.requires_grad for p in others)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)], ids=["G", "D", "both"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_a_network_frozen_whole(frozen: tuple[int, ...], scaled: bool) -> None:
    networks = pair()
    ours = adams(networks)
    for which in frozen:
        networks[which].requires_grad_(False)
    before = [[p.clone() for p in network.parameters()] for network in networks]
    options = half() if scaled else {}
    step = TrainStep(*networks, *ours, **options)
    for _ in range(2):
        assert all(value.isfinite() for value in step(*batch_of(networks, 4)))
    for which, (network, old) in enumerate(zip(networks, before, strict=True)):
        for p, q in zip(network.parameters(), old, strict=True):
            assert torch.equal(p, q) == (which in frozen)


@pytest.mark.parametrize("phase", [1, 2, 3], ids=["D(x)", "D(G(z))", "G's"])
def test_exceptions_leave_requires_grad_as_it_was(phase: int) -> None:
    networks = pair("reference")
    networks[1].main[2].requires_grad_(False)
    before = [p.requires_grad for p in networks[1].parameters()]
    calls = []

    def fail(module: Any, args: Any, output: Any) -> None:
        calls.append([p.requires_grad for p in networks[1].parameters()])
        if len(calls) == phase:
            raise KeyboardInterrupt

    handle = networks[1].main[5].register_forward_hook(fail)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step = TrainStep(*networks, *adams(networks), autocast=torch.float16, scaler=scaler)
    real, noise = batch_of(networks, 4)
    with pytest.raises(KeyboardInterrupt):
        step(real, noise)
    assert [p.requires_grad for p in networks[1].parameters()] == before
    assert calls[-1] == ([False] * len(before) if phase == 3 else before)
    handle.remove()
    assert all(value.isfinite() for value in step(real, noise)), "the next step is as good as any"


@pytest.mark.parametrize("kind", ["fast", "reference", "own"])
@pytest.mark.parametrize("where", ["real", "noise", "weight"])
def test_nan_is_visible(kind: str, where: str) -> None:
    """In the losses that it reaches, and in what they update; a D without logits does not raise for it."""
    networks = pair("reference" if kind == "own" else kind)
    real, noise = batch_of(networks, 4)
    if kind == "own":
        networks = networks[0], Wrapper(networks[1])
    if where == "weight":
        with torch.no_grad():
            next(networks[1].parameters())[0, 0, 0, 0] = torch.nan
    else:
        (real if where == "real" else noise)[0, 0] = torch.nan
    result = TrainStep(*networks, *adams(networks))(real, noise)
    assert result.loss_d.isnan()
    assert result.loss_g.isnan(), "D's update has taken the NaN into its weights"
    assert result.d_x.isnan() == (where != "noise")
    assert result.d_g_z.isnan() == (where != "real")
    assert all(p.isnan().any() for network in networks for p in network.parameters())


@pytest.mark.parametrize("kind", ["fast", "reference"])
def test_one_value_per_channel_is_batch_norms_own_error(kind: str) -> None:
    generator, discriminator = pair(kind)
    discriminator.main[-2] = nn.Conv2d(32, 1, 4, 1, 0, bias=False)
    discriminator.main.insert(len(discriminator.main) - 1, nn.BatchNorm2d(1))
    networks = generator, discriminator
    step = TrainStep(*networks, *adams(networks))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        step(*batch_of(networks, 1))
    assert all(p.requires_grad for p in discriminator.parameters())
    assert all(value.isfinite() for value in step(*batch_of(networks, 2)))


def test_eval_mode_leaves_running_statistics() -> None:
    networks = pair(dtype=torch.float64)
    for network in networks:
        network.eval()
    seeds = reference_of(networks)
    ours, theirs = adams(networks), adams(seeds)
    real, noise = batch_of(networks, 4, torch.float64)
    step = TrainStep(*networks, *ours)
    for _ in range(2):
        step(real, noise)
        seed_step(*seeds, *theirs, real, noise)
    assert_states_close(state_of(networks, ours), state_of(seeds, theirs), 1e-10)
    assert networks[1].main[3].num_batches_tracked == 0


# --- precisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(kind: str, loss: str) -> None:
    """The plain loop under autocast on the same network's logits, step for step; parameters stay float32.

    Losses are means of some numbers of bfloat16's 8 bits; that they are the plain loop's to float32's tells
    that the same products ran in the same precision.
    """
    networks = pair(kind)
    plain = copy.deepcopy(networks)
    ours, theirs = sgds(networks, 0.01), sgds(plain, 0.01)
    step = TrainStep(*networks, *ours, autocast=torch.bfloat16, loss=loss)
    for _ in range(3):
        real, noise = batch_of(networks, 8)
        result = step(real, noise)
        wanted = plain_loop(plain, theirs, real, noise, torch.bfloat16, minimax=loss == "minimax")
        for name, got, want in zip(Result._fields, result, wanted, strict=True):
            assert got.dtype == torch.float32
            assert got.item() == pytest.approx(want.item(), rel=1e-5), name
        for network, other in zip(networks, plain, strict=True):
            for (name, p), q in zip(network.named_parameters(), other.parameters(), strict=True):
                assert p.dtype == torch.float32
                # D's gradients come from the same sums of bfloat16 products, in one order or another.
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def plain_loop(
    networks: Pair,
    optimizers: Any,
    real: Tensor,
    noise: Tensor,
    autocast: torch.dtype | None = None,
    *,
    minimax: bool = False,
    clip: tuple[float | None, float | None] = (None, None),
    scaler: Any = None,
) -> list[Tensor]:
    """The seed's order on logits, with torch's own recipes for autocast, clipping and scaling written out."""
    (g, d), (optimizer_g, optimizer_d) = networks, optimizers
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    bce = nn.functional.binary_cross_entropy_with_logits

    def precision() -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)

    def wide(logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(torch.float32, real.dtype))

    def update(loss: Tensor, network: nn.Module, optimizer: Any, largest: float | None) -> None:
        scaler.scale(loss).backward()
        if largest is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), largest)
        scaler.step(optimizer)

    optimizer_d.zero_grad()
    with precision():
        on_real = d.logits(real)
        fake = g(noise)
    # Two regions: in one, both would come to the same cast weight and their gradients add up in 16 bits.
    with precision():
        on_fake = d.logits(fake.detach())
    on_real, on_fake = wide(on_real), wide(on_fake)
    loss_d = bce(on_real, torch.full_like(on_real, 0.9)) + bce(on_fake, torch.zeros_like(on_fake))
    update(loss_d, d, optimizer_d, clip[1])
    optimizer_g.zero_grad()
    with precision():
        logits = d.logits(fake)
    logits = wide(logits)
    loss_g = -bce(logits, 0 * logits) if minimax else bce(logits, torch.full_like(logits, 0.9))
    update(loss_g, g, optimizer_g, clip[0])
    if scaler.is_enabled():
        scaler.update()
    return [v.detach() for v in (loss_d, loss_g, on_real.sigmoid().mean(), on_fake.sigmoid().mean())]


def test_autocast_of_a_discriminator_without_logits() -> None:
    """BCELoss raises under autocast: the loss is computed outside of it."""
    generator, discriminator = pair()
    networks = generator, Wrapper(discriminator)
    step = TrainStep(*networks, *sgds(networks), autocast=torch.bfloat16)
    result = step(*batch_of((generator, discriminator), 4))
    assert all(value.isfinite() and value.dtype == torch.float32 for value in result)


@pytest.mark.parametrize("kind", ["fast", "reference"])
def test_the_callers_autocast_sees_updated_weights(kind: str) -> None:
    """Autocast keeps cast weights until its outermost context ends, which may be after several steps."""
    networks = pair(kind)
    beside = copy.deepcopy(networks)
    batches = [batch_of(networks, 4) for _ in range(3)]
    outside = TrainStep(*networks, *sgds(networks, 0.05))
    with torch.autocast("cpu", torch.bfloat16):
        results = [outside(*batch) for batch in batches]
    inside = TrainStep(*beside, *sgds(beside, 0.05), autocast=torch.bfloat16)
    for batch, result in zip(batches, results, strict=True):
        assert result == inside(*batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_networks_of_16_bits(dtype: torch.dtype) -> None:
    networks = pair(dtype=dtype)
    step = TrainStep(*networks, *sgds(networks, 0.1))
    real, noise = batch_of(networks, 4, dtype)
    wide = TrainStep(*(w := tuple(copy.deepcopy(n).float() for n in networks)), *sgds(w, 0.1))
    for got, want in zip(step(real, noise), wide(real.float(), noise.float()), strict=True):
        assert got.dtype == torch.float32
        # Some ten layers' activations, each rounded to 8 bits; BatchNorm keeps them of size 1.
        assert abs(got - want) <= 0.1


@pytest.mark.parametrize("clip", [None, 0.05])
def test_grad_scaler(clip: float | None) -> None:
    """The plain loop with torch's recipe: scale, unscale, clip, step, and one update for both."""
    networks = pair()
    plain = copy.deepcopy(networks)
    ours, theirs = sgds(networks, 0.01), sgds(plain, 0.01)
    options, other = half(growth_interval=2), half(growth_interval=2)["scaler"]
    step = TrainStep(*networks, *ours, clip=clip, **options)
    for i in range(4):
        real, noise = batch_of(networks, 4)
        result = step(real, noise)
        wanted = plain_loop(plain, theirs, real, noise, torch.float16, clip=(clip, clip), scaler=other)
        for got, want in zip(result, wanted, strict=True):
            assert got.item() == pytest.approx(want.item(), rel=1e-4)
        assert_states_close(state_of(networks, ours), state_of(plain, theirs), 1e-5)
        assert options["scaler"].get_scale() == other.get_scale() == 256.0 * 2 ** ((i + 1) // 2)


def test_an_overflow_skips_its_step_and_lowers_the_scale() -> None:
    networks = pair()
    before = copy.deepcopy([network.state_dict() for network in networks])
    options = half(2.0**40)
    result = TrainStep(*networks, *adams(networks), **options)(*batch_of(networks, 4))
    assert all(value.isfinite() for value in result)
    assert options["scaler"].get_scale() == 2.0**39
    for network, state in zip(networks, before, strict=True):
        for name, p in network.named_parameters():
            assert torch.equal(p, state[name])


def test_a_disabled_scaler_is_none() -> None:
    networks = pair()
    step = TrainStep(*networks, *adams(networks), scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert all(value.isfinite() for value in step(*batch_of(networks, 2)))


# --- clipping and averaging ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "norms"),
    [
        (0.05, (0.05, 0.05)),
        ((0.02, 0.1), (0.02, 0.1)),
        ((None, 0.1), (None, 0.1)),
        ((1e9, None), (1e9, None)),
    ],
    ids=str,
)
def test_clipping_is_clip_grad_norm(clip: Any, norms: tuple[float | None, float | None]) -> None:
    networks = pair(dtype=torch.float64)
    plain = copy.deepcopy(networks)
    ours, theirs = adams(networks), adams(plain)
    step = TrainStep(*networks, *ours, clip=clip)
    for _ in range(2):
        real, noise = batch_of(networks, 4, torch.float64)
        step(real, noise)
        plain_loop(plain, theirs, real, noise, clip=norms)
    assert_states_close(state_of(networks, ours), state_of(plain, theirs), 1e-10)
    for network, largest in zip(networks, norms, strict=True):
        norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
        assert largest is None or norm <= largest * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ema(dtype: torch.dtype) -> None:
    """Of its own dtype, buffers copied, and what a fast one in eval mode has kept is not stale."""
    networks = pair()
    ema = copy.deepcopy(networks[0]).to(dtype).eval()
    wanted = {name: p.detach().clone() for name, p in ema.named_parameters()}
    step = TrainStep(*networks, *adams(networks), ema=ema, ema_decay=0.9)
    noise = torch.randn(2, LATENT, dtype=dtype)
    for _ in range(3):
        with torch.no_grad():
            ema(noise)  # packs its weights
        step(*batch_of(networks, 4))
        for name, p in networks[0].named_parameters():
            wanted[name] = 0.9 * wanted[name] + 0.1 * p.detach().to(dtype)
        for name, p in ema.named_parameters():
            torch.testing.assert_close(p, wanted[name], rtol=1e-6, atol=1e-8, msg=name)
        for (name, b), own in zip(ema.named_buffers(), networks[0].buffers(), strict=True):
            assert torch.equal(b, own.to(b.dtype)), name
        with torch.no_grad():
            image = ema(noise)
            ema.refresh()
            assert torch.equal(image, ema(noise))


def test_averaged_model() -> None:
    networks = pair()
    ours = AveragedModel(networks[0], multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs = AveragedModel(networks[0], multi_avg_fn=get_ema_multi_avg_fn(0.9))
    step = TrainStep(*networks, *adams(networks), ema=ours)
    for _ in range(3):
        step(*batch_of(networks, 4))
        theirs.update_parameters(networks[0])
    assert ours.n_averaged == 3
    for (name, got), want in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers(fused: bool) -> None:
    """Fused or not, they are the seed's; capturable only where there is a graph to capture."""
    networks = pair(dtype=torch.float64)
    plain = copy.deepcopy(networks)
    ours, theirs = optimizers(*networks, Config(lr=1e-3), fused=fused), optimizers(*plain, Config(lr=1e-3))
    for adam in ours:
        assert bool(adam.defaults["fused"]) == fused
        assert not adam.defaults["capturable"]
    for _ in range(3):
        batch = batch_of(networks, 4, torch.float64)
        TrainStep(*networks, *ours)(*batch)
        TrainStep(*plain, *theirs)(*batch)
    for network, other in zip(networks, plain, strict=True):
        for p, q in zip(network.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    networks = g, d = pair()
    a, b = adams(networks)
    other = pair()

    def refused(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            TrainStep(*args, **options)

    refused(TypeError, "generator must be a torch.nn.Module, got str", "G", d, a, b)
    refused(ValueError, "discriminator has no parameters", g, nn.Sigmoid(), a, b)
    refused(TypeError, "optimizer_d must be a torch.optim.Optimizer, got list", g, d, a, [])
    refused(ValueError, "optimizer_g must hold every parameter of the generator .* but lacks", g, d, b, a)
    refused(ValueError, "optimizer_d must hold every", g, d, a, adams(other)[1])
    both = optim.Adam([*g.parameters(), *d.parameters()])
    refused(
        ValueError, "optimizer_g must hold the generator's parameters alone, but has 8 others", g, d, both, b
    )
    few = optim.Adam(list(g.parameters())[1:])
    refused(ValueError, "lacks 1, e.g. main.0.weight", g, d, few, b)
    for label in (0, 1.1, float("nan"), "0.9", True):
        refused(ValueError, r"real_label must be in \(0, 1\], got", g, d, a, b, real_label=label)
    refused(
        ValueError,
        r"loss must be one of \('non-saturating', 'minimax'\), got 'hinge'",
        *(g, d, a, b),
        loss="hinge",
    )
    refused(ValueError, "autocast must be None, torch.bfloat16 or torch.float16", g, d, a, b, autocast="half")
    refused(TypeError, "scaler must be a torch.amp.GradScaler or None, got float", g, d, a, b, scaler=2.0)
    scaler = torch.amp.GradScaler("cpu")
    for autocast in (None, torch.bfloat16):
        refused(
            ValueError,
            f"a scaler is for autocast=torch.float16, got autocast={autocast}",
            *(g, d, a, b),
            scaler=scaler,
            autocast=autocast,
        )
    for clip in (0, -1.0, float("nan"), float("inf"), "1", (1.0,), (1.0, 0.0), (1.0, 1.0, 1.0), True):
        refused(ValueError, "clip must be None, a positive number, or a pair", g, d, a, b, clip=clip)
    for decay in (1.0, -0.1, None):
        refused(
            ValueError,
            r"ema_decay must be in \[0, 1\), got",
            g,
            d,
            a,
            b,
            ema=copy.deepcopy(g),
            ema_decay=decay,
        )
    refused(TypeError, "ema must be a torch.nn.Module, got float", g, d, a, b, ema=0.999)
    refused(ValueError, "ema must be a copy of the generator, but shares main.0.weight", g, d, a, b, ema=g)
    wide = models.Generator(LATENT, 1, 16, 32)
    refused(ValueError, r"main.0.weight is \[10, 64, 4, 4\] and not \[10, 32, 4, 4\]", g, d, a, b, ema=wide)
    elsewhere = copy.deepcopy(g).to("meta")
    refused(
        ValueError,
        "ema must be on the networks' device cpu, but main.0.weight is on meta",
        g,
        d,
        a,
        b,
        ema=elsewhere,
    )


def test_networks_that_do_not_belong_together() -> None:
    g, d = pair()
    for change, found in (
        (
            lambda n: n.double(),
            r"one dtype, got torch.float32 \(generator\), torch.float64 \(discriminator\)",
        ),
        (lambda n: n.to("meta"), r"one device, got cpu \(generator\), meta \(discriminator\)"),
    ):
        other = change(copy.deepcopy(d))
        with pytest.raises(ValueError, match=found):
            TrainStep(g, other, *adams((g, other)))


def test_bad_batches_change_nothing() -> None:
    networks = pair()
    step = TrainStep(*networks, *adams(networks))
    before = copy.deepcopy([network.state_dict() for network in networks])
    real, noise = batch_of(networks, 4)
    for error, match, batch in (
        (TypeError, "real must be a tensor, got list", ([], noise)),
        (
            TypeError,
            "real must have the networks' dtype torch.float32, got torch.float64",
            (real.double(), noise),
        ),
        (
            TypeError,
            "noise must have the networks' dtype torch.float32, got torch.int64",
            (real, noise.long()),
        ),
        (ValueError, "noise must be on the networks' device cpu, got meta", (real, noise.to("meta"))),
        (ValueError, "real and noise must be equally many, got 4 and 3", (real, noise[:3])),
        (
            ValueError,
            r"noise must have a dimension of its own for the batch, got \[10\]",
            (real[0, 0], noise[0]),
        ),
        (ValueError, r"image must be \[N, 1, 32, 32\], got \[4, 1, 32, 31\]", (real[..., 1:], noise)),
        (ValueError, r"z must be \[N, 10\] or .*, got \[4, 9\]", (real, noise[:, 1:])),
    ):
        with pytest.raises(error, match=match):
            step(*batch)
    for network, state in zip(networks, before, strict=True):
        for name, value in network.state_dict().items():
            assert torch.equal(value, state[name]), name
