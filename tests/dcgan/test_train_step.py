"""TrainStep compared with the reference step, and its additional features."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference_loop import reference_step
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


# --- equivalence to the reference step ----------------------------------------------------------------------


@pytest.mark.usefixtures("_reference_engine")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("kind", "size"), [("fast", 32), ("fast", 64), ("reference", 32), ("mlp", 32)])
def test_float64_matches_the_reference_step(kind: str, size: int, loss: str) -> None:
    """Losses, parameters, running statistics and Adam's state agree to 1e-10 over several steps.

    The loss on logits and BCELoss differ by rounding errors of 1e-16. Adam's first steps divide a gradient by
    its magnitude plus 1e-8, so a gradient that is zero up to rounding changes a weight by at most
    lr·1e-16/1e-8.
    """
    networks = pair(kind, torch.float64, image_size=size)
    reference = copy.deepcopy(networks) if kind == "mlp" else reference_of(networks)
    ours, theirs = optimizers(*networks, Config()), adams(reference)
    step = TrainStep(*networks, *ours, loss=loss)
    for count in (6, 6, 3, 1):
        real, noise = batch_of(networks, count, torch.float64)
        result = step(real, noise)
        expected = reference_step(
            *reference, *theirs, real, noise[:, :, None, None], minimax=loss == "minimax"
        )
        for name, got, want in zip(Result._fields, result, expected, strict=True):
            assert abs(got - want) <= 1e-10, name
            assert got.dtype == torch.float64
        assert_states_close(state_of(networks, ours), state_of(reference, theirs), 1e-10)


# Error that is always allowed. If no LeakyReLU input changes sign, sums of a few hundred terms have an error
# of 1e-6 in eager mode, and a Winograd convolution rounds 6 times as much (see the README's accuracy table).
ROUNDING = 2**-17
# If a LeakyReLU input does change sign, one gradient element changes by its own magnitude, 1e-2 of the total
# in a small network, whichever engine rounds. Small networks are therefore given batches on which no
# pre-activation is that close to 0, relative to the RMS of its feature map: 1e-5 is several times the error
# of such a Winograd convolution in one pixel. Full-size networks have millions of pre-activations, and
# eager's two memory formats themselves differ in some signs: one of the 2¹⁷ elements of the smallest map is
# 2^-8.5 of its gradient's norm, and a few of them add up as the square root of their number.
KINK = 1e-5
FLIPS = 2**-7


def nearest_to_a_kink(networks: Pair, real: Tensor, noise: Tensor) -> float:
    """Return the smallest |pre-activation| in a step, relative to the RMS of its feature map."""
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
    """Return ‖error‖/‖gradient‖ of D and of G, with lr 0: ours, and that of eager's worse memory format.

    Asserts that the losses agree to 1e-4.
    """

    def reference(dtype: torch.dtype, layout: torch.memory_format) -> tuple[list[Tensor], ...]:
        plain = reference_of(networks)
        for network in plain:
            network.to(dtype=dtype, memory_format=layout)
        kept: list[Tensor] = []
        losses = reference_step(
            *plain,
            *sgds(plain),
            real.to(dtype, memory_format=layout),
            noise.to(dtype)[:, :, None, None],
            between=lambda: kept.extend(p.grad.clone() for p in plain[1].parameters()),
        )
        return list(losses), kept, [p.grad for p in plain[0].parameters()]

    def flat(gradients: list[Tensor]) -> Tensor:
        return torch.cat([g.double().flatten() for g in gradients])

    exact = reference(torch.float64, torch.contiguous_format)
    eager = [reference(torch.float32, layout) for layout in (torch.contiguous_format, torch.channels_last)]
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


def assert_at_most_twice(found: list[tuple[Errors, Errors]], minimum: float) -> None:
    """Compare the maximum over RNG seeds: which signs change depends on the seed and the engine."""
    for which in "DG":
        ours, worse = (max(errors[side][which] for errors in found) for side in (0, 1))
        assert ours <= max(2 * worse, minimum), f"{which}'s gradients: {ours:.1e}, eager {worse:.1e}"


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
def test_float32_gradients_of_full_size_networks() -> None:
    """Eager's error is 1e-6 on one batch and 4e-3 on another."""
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        networks = pair(features=64, image_size=64)
        found.append(gradient_errors(networks, *batch_of(networks, 16)))
    assert_at_most_twice(found, FLIPS)


@pytest.mark.parametrize("kind", ["fast", "reference", "mlp"])
def test_logits_are_the_input_of_the_sigmoid(kind: str) -> None:
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
def test_a_saturated_discriminator_still_gives_gradients(loss: str) -> None:
    """With a logit of 40, p is 1 in float32: BCELoss has no gradient, the loss on logits does."""

    class Saturated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def logits(self, image: Tensor) -> Tensor:
            return image.mean((1, 2, 3)) * self.weight + 40

        def forward(self, image: Tensor) -> Tensor:
            return self.logits(image).sigmoid()

    generator, _ = pair()
    saturated = Saturated()
    step = TrainStep(generator, saturated, *sgds((generator, saturated)), loss=loss)
    result = step(*batch_of(pair(), 4))
    want = {"non-saturating": 0.1 * 40, "minimax": -40.0}[loss]  # -(0.9·log p + 0.1·log(1-p)), log p = 0
    assert result.loss_g.item() == pytest.approx(want, rel=1e-2)
    assert all(p.grad.abs().max() > 0 for p in generator.parameters())


# --- user-defined networks ----------------------------------------------------------------------------------


class Halved(models.Discriminator):
    """A subclass whose forward is not the Sigmoid of its logits."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * 0.5


def with_hook(discriminator: nn.Module) -> nn.Module:
    """Add a hook, so that the output is not the Sigmoid of the logits."""
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
        lambda d: Halved(**d.sizes()).double(),
        with_hook,
        with_hooked_sigmoid,
        without_sigmoid,
    ],
    ids=["wrapper", "subclass", "hook", "hook of the Sigmoid", "no Sigmoid"],
)
@pytest.mark.parametrize("kind", ["reference", "fast"])
@pytest.mark.parametrize("loss", LOSSES)
def test_user_defined_discriminators(kind: str, change: Callable[[Any], Any], loss: str) -> None:
    """If D is not the Sigmoid of its logits, D itself is called."""
    generator, discriminator = pair(kind, torch.float64)
    networks = generator, change(discriminator)
    reference = copy.deepcopy(networks)
    ours, theirs = adams(networks), adams(reference)
    real, noise = batch_of((generator, discriminator), 4, torch.float64)
    result = TrainStep(*networks, *ours, loss=loss)(real, noise)
    expected = reference_step(*reference, *theirs, real, noise, minimax=loss == "minimax")
    for got, want in zip(result, expected, strict=True):
        assert abs(got - want) <= 1e-10
    assert_states_close(state_of(networks, ours), state_of(reference, theirs), 1e-10)


def test_a_compiled_discriminator_runs_compiled() -> None:
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


# --- skipped computations -----------------------------------------------------------------------------------


class ConvolutionBackwards(TorchDispatchMode):
    """Records for each convolution backward whether it is transposed and whether it computes wgrad."""

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
def test_gs_phase_computes_no_weight_gradients_of_d(kind: str) -> None:
    networks = pair(kind)
    layers = 4  # convolutions of each network at 32×32
    ours = adams(networks)
    real, noise = batch_of(networks, 4)
    with ConvolutionBackwards() as backwards:
        TrainStep(*networks, *ours)(real, noise)
    of_d = [dweight for transposed, dweight in backwards.found if not transposed]
    of_g = [dweight for transposed, dweight in backwards.found if transposed]
    assert of_d == [True] * 2 * layers + [False] * layers
    assert of_g == [True] * layers
    with ConvolutionBackwards() as backwards:
        train_step(*networks, *ours, real, noise)
    assert [w for t, w in backwards.found if not t] == [True] * 3 * layers, (
        "the reference step computes them all"
    )


def test_ds_grad_holds_the_gradients_of_ds_phase() -> None:
    networks = pair(dtype=torch.float64)
    reference = copy.deepcopy(networks)
    real, noise = batch_of(networks, 4, torch.float64)
    TrainStep(*networks, *sgds(networks, 0.1))(real, noise)
    kept: list[Tensor] = []
    reference_step(
        *reference,
        *sgds(reference, 0.1),
        real,
        noise,
        between=lambda: kept.extend(p.grad.clone() for p in reference[1].parameters()),
    )
    for p, want, accumulated in zip(networks[1].parameters(), kept, reference[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(p.grad, accumulated.grad)


def test_stale_gradients_are_cleared() -> None:
    networks = pair(dtype=torch.float64)
    copies = copy.deepcopy(networks)
    real, noise = batch_of(networks, 4, torch.float64)
    for network in networks:
        network(real if network is networks[1] else noise).sum().backward()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
    ours, theirs = adams(networks), adams(copies)
    TrainStep(*networks, *ours)(real, noise)
    TrainStep(*copies, *theirs)(real, noise)
    assert_states_close(state_of(networks, ours), state_of(copies, theirs), 0.0)


def test_a_step_keeps_no_reference_to_its_inputs() -> None:
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
    """A frozen convolution and BatchNorm per network get no gradient and no update; the rest is trained."""
    networks = pair(kind, torch.float64)
    frozen = [networks[0].main[3], networks[0].main[4], networks[1].main[2], networks[1].main[3]]
    for module in frozen:
        module.requires_grad_(False)
    reference = copy.deepcopy(networks)
    before = [p.clone() for module in frozen for p in module.parameters()]
    ours, theirs = adams(networks), adams(reference)
    step = TrainStep(*networks, *ours)
    for _ in range(2):
        real, noise = batch_of(networks, 4, torch.float64)
        step(real, noise)
        reference_step(*reference, *theirs, real, noise)
    assert_states_close(state_of(networks, ours), state_of(reference, theirs), 1e-10)
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
def test_a_fully_frozen_network(frozen: tuple[int, ...], scaled: bool) -> None:
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
def test_exceptions_restore_requires_grad(phase: int) -> None:
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
    assert all(value.isfinite() for value in step(real, noise)), "the next step works"


@pytest.mark.parametrize("kind", ["fast", "reference", "own"])
@pytest.mark.parametrize("where", ["real", "noise", "weight"])
def test_nan_propagates(kind: str, where: str) -> None:
    """NaN reaches the losses and the updated weights; a D without logits does not raise."""
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
    assert result.loss_g.isnan(), "D's update has put NaN into its weights"
    assert result.d_x.isnan() == (where != "noise")
    assert result.d_g_z.isnan() == (where != "real")
    assert all(p.isnan().any() for network in networks for p in network.parameters())


@pytest.mark.parametrize("kind", ["fast", "reference"])
def test_one_value_per_channel_raises_the_error_of_batch_norm(kind: str) -> None:
    generator, discriminator = pair(kind)
    discriminator.main[-2] = nn.Conv2d(32, 1, 4, 1, 0, bias=False)
    discriminator.main.insert(len(discriminator.main) - 1, nn.BatchNorm2d(1))
    networks = generator, discriminator
    step = TrainStep(*networks, *adams(networks))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        step(*batch_of(networks, 1))
    assert all(p.requires_grad for p in discriminator.parameters())
    assert all(value.isfinite() for value in step(*batch_of(networks, 2)))


def test_eval_mode_does_not_update_running_statistics() -> None:
    networks = pair(dtype=torch.float64)
    for network in networks:
        network.eval()
    reference = reference_of(networks)
    ours, theirs = adams(networks), adams(reference)
    real, noise = batch_of(networks, 4, torch.float64)
    step = TrainStep(*networks, *ours)
    for _ in range(2):
        step(real, noise)
        reference_step(*reference, *theirs, real, noise)
    assert_states_close(state_of(networks, ours), state_of(reference, theirs), 1e-10)
    assert networks[1].main[3].num_batches_tracked == 0


# --- precisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(kind: str, loss: str) -> None:
    """The step matches the plain loop under autocast on the same network's logits; parameters stay float32.

    The losses are means of a few numbers with bfloat16's 8 bits. That they match the plain loop to float32
    accuracy shows that the same products ran in the same precision.
    """
    networks = pair(kind)
    plain = copy.deepcopy(networks)
    ours, theirs = sgds(networks, 0.01), sgds(plain, 0.01)
    step = TrainStep(*networks, *ours, autocast=torch.bfloat16, loss=loss)
    for _ in range(3):
        real, noise = batch_of(networks, 8)
        result = step(real, noise)
        expected = plain_loop(plain, theirs, real, noise, torch.bfloat16, minimax=loss == "minimax")
        for name, got, want in zip(Result._fields, result, expected, strict=True):
            assert got.dtype == torch.float32
            assert got.item() == pytest.approx(want.item(), rel=1e-5), name
        for network, other in zip(networks, plain, strict=True):
            for (name, p), q in zip(network.named_parameters(), other.parameters(), strict=True):
                assert p.dtype == torch.float32
                # D's gradients are the same sums of bfloat16 products, in a different order.
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
    """The reference step on logits, with PyTorch's recipes for autocast, clipping and loss scaling."""
    (g, d), (optimizer_g, optimizer_d) = networks, optimizers
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    bce = nn.functional.binary_cross_entropy_with_logits

    def precision() -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)

    def wide(logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(torch.float32, real.dtype))

    def update(loss: Tensor, network: nn.Module, optimizer: Any, max_norm: float | None) -> None:
        scaler.scale(loss).backward()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        scaler.step(optimizer)

    optimizer_d.zero_grad()
    with precision():
        on_real = d.logits(real)
        fake = g(noise)
    # Two autocast regions: in one, both would share cast weights, whose gradients accumulate in 16 bits.
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
    """BCELoss raises under autocast, so the loss is computed outside of it."""
    generator, discriminator = pair()
    networks = generator, Wrapper(discriminator)
    step = TrainStep(*networks, *sgds(networks), autocast=torch.bfloat16)
    result = step(*batch_of((generator, discriminator), 4))
    assert all(value.isfinite() and value.dtype == torch.float32 for value in result)


@pytest.mark.parametrize("kind", ["fast", "reference"])
def test_steps_under_an_outer_autocast_use_updated_weights(kind: str) -> None:
    """Autocast caches cast weights until its outermost context ends, possibly after several steps."""
    networks = pair(kind)
    copies = copy.deepcopy(networks)
    batches = [batch_of(networks, 4) for _ in range(3)]
    outside = TrainStep(*networks, *sgds(networks, 0.05))
    with torch.autocast("cpu", torch.bfloat16):
        results = [outside(*batch) for batch in batches]
    inside = TrainStep(*copies, *sgds(copies, 0.05), autocast=torch.bfloat16)
    for batch, result in zip(batches, results, strict=True):
        assert result == inside(*batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_networks(dtype: torch.dtype) -> None:
    networks = pair(dtype=dtype)
    step = TrainStep(*networks, *sgds(networks, 0.1))
    real, noise = batch_of(networks, 4, dtype)
    wide = TrainStep(*(w := tuple(copy.deepcopy(n).float() for n in networks)), *sgds(w, 0.1))
    for got, want in zip(step(real, noise), wide(real.float(), noise.float()), strict=True):
        assert got.dtype == torch.float32
        # About ten layers of activations, each rounded to 8 bits; BatchNorm keeps their scale at 1.
        assert abs(got - want) <= 0.1


@pytest.mark.parametrize("clip", [None, 0.05])
def test_grad_scaler(clip: float | None) -> None:
    """The step matches PyTorch's recipe: scale, unscale, clip, step, and one update for both optimizers."""
    networks = pair()
    plain = copy.deepcopy(networks)
    ours, theirs = sgds(networks, 0.01), sgds(plain, 0.01)
    options, other = half(growth_interval=2), half(growth_interval=2)["scaler"]
    step = TrainStep(*networks, *ours, clip=clip, **options)
    for i in range(4):
        real, noise = batch_of(networks, 4)
        result = step(real, noise)
        expected = plain_loop(plain, theirs, real, noise, torch.float16, clip=(clip, clip), scaler=other)
        for got, want in zip(result, expected, strict=True):
            assert got.item() == pytest.approx(want.item(), rel=1e-4)
        assert_states_close(state_of(networks, ours), state_of(plain, theirs), 1e-5)
        assert options["scaler"].get_scale() == other.get_scale() == 256.0 * 2 ** ((i + 1) // 2)


def test_an_overflow_skips_the_update_and_lowers_the_scale() -> None:
    networks = pair()
    before = copy.deepcopy([network.state_dict() for network in networks])
    options = half(2.0**40)
    result = TrainStep(*networks, *adams(networks), **options)(*batch_of(networks, 4))
    assert all(value.isfinite() for value in result)
    assert options["scaler"].get_scale() == 2.0**39
    for network, state in zip(networks, before, strict=True):
        for name, p in network.named_parameters():
            assert torch.equal(p, state[name])


def test_a_disabled_scaler_is_ignored() -> None:
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
def test_clipping_matches_clip_grad_norm(clip: Any, norms: tuple[float | None, float | None]) -> None:
    networks = pair(dtype=torch.float64)
    plain = copy.deepcopy(networks)
    ours, theirs = adams(networks), adams(plain)
    step = TrainStep(*networks, *ours, clip=clip)
    for _ in range(2):
        real, noise = batch_of(networks, 4, torch.float64)
        step(real, noise)
        plain_loop(plain, theirs, real, noise, clip=norms)
    assert_states_close(state_of(networks, ours), state_of(plain, theirs), 1e-10)
    for network, max_norm in zip(networks, norms, strict=True):
        norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
        assert max_norm is None or norm <= max_norm * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ema(dtype: torch.dtype) -> None:
    """The average keeps its dtype, buffers are copied, and its prepacked weights are invalidated."""
    networks = pair()
    ema = copy.deepcopy(networks[0]).to(dtype).eval()
    expected = {name: p.detach().clone() for name, p in ema.named_parameters()}
    step = TrainStep(*networks, *adams(networks), ema=ema, ema_decay=0.9)
    noise = torch.randn(2, LATENT, dtype=dtype)
    for _ in range(3):
        with torch.no_grad():
            ema(noise)  # caches the prepacked weights
        step(*batch_of(networks, 4))
        for name, p in networks[0].named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach().to(dtype)
        for name, p in ema.named_parameters():
            torch.testing.assert_close(p, expected[name], rtol=1e-6, atol=1e-8, msg=name)
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
    """Fused or not, the mathematics is the same; they are capturable only on CUDA."""
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

    def assert_rejected(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            TrainStep(*args, **options)

    assert_rejected(TypeError, "generator must be a torch.nn.Module, got str", "G", d, a, b)
    assert_rejected(ValueError, "discriminator has no parameters", g, nn.Sigmoid(), a, b)
    assert_rejected(TypeError, "optimizer_d must be a torch.optim.Optimizer, got list", g, d, a, [])
    assert_rejected(
        ValueError, "optimizer_g must hold every parameter of the generator .* but lacks", g, d, b, a
    )
    assert_rejected(ValueError, "optimizer_d must hold every", g, d, a, adams(other)[1])
    both = optim.Adam([*g.parameters(), *d.parameters()])
    assert_rejected(
        ValueError, "optimizer_g must hold only parameters of the generator, but has 8 others", g, d, both, b
    )
    few = optim.Adam(list(g.parameters())[1:])
    assert_rejected(ValueError, "lacks 1, e.g. main.0.weight", g, d, few, b)
    for label in (0, 1.1, float("nan"), "0.9", True):
        assert_rejected(ValueError, r"real_label must be in \(0, 1\], got", g, d, a, b, real_label=label)
    assert_rejected(
        ValueError,
        r"loss must be one of \('non-saturating', 'minimax'\), got 'hinge'",
        *(g, d, a, b),
        loss="hinge",
    )
    assert_rejected(
        ValueError, "autocast must be None, torch.bfloat16 or torch.float16", g, d, a, b, autocast="half"
    )
    assert_rejected(
        TypeError, "scaler must be a torch.amp.GradScaler or None, got float", g, d, a, b, scaler=2.0
    )
    scaler = torch.amp.GradScaler("cpu")
    for autocast in (None, torch.bfloat16):
        assert_rejected(
            ValueError,
            f"scaler requires autocast=torch.float16, got autocast={autocast}",
            *(g, d, a, b),
            scaler=scaler,
            autocast=autocast,
        )
    for clip in (0, -1.0, float("nan"), float("inf"), "1", (1.0,), (1.0, 0.0), (1.0, 1.0, 1.0), True):
        assert_rejected(ValueError, "clip must be None, a positive number, or a pair", g, d, a, b, clip=clip)
    for decay in (1.0, -0.1, None):
        assert_rejected(
            ValueError,
            r"ema_decay must be in \[0, 1\), got",
            g,
            d,
            a,
            b,
            ema=copy.deepcopy(g),
            ema_decay=decay,
        )
    assert_rejected(TypeError, "ema must be a torch.nn.Module, got float", g, d, a, b, ema=0.999)
    assert_rejected(
        ValueError, "ema must be a copy of the generator, but shares main.0.weight", g, d, a, b, ema=g
    )
    wide = models.Generator(LATENT, 1, 16, 32)
    assert_rejected(
        ValueError, r"main.0.weight is \[10, 64, 4, 4\] instead of \[10, 32, 4, 4\]", g, d, a, b, ema=wide
    )
    elsewhere = copy.deepcopy(g).to("meta")
    assert_rejected(
        ValueError,
        "ema must be on the networks' device cpu, but main.0.weight is on meta",
        g,
        d,
        a,
        b,
        ema=elsewhere,
    )


def test_networks_with_different_dtypes_or_devices() -> None:
    g, d = pair()
    for change, found in (
        (
            lambda n: n.double(),
            r"the same dtype, got torch.float32 \(generator\), torch.float64 \(discriminator\)",
        ),
        (lambda n: n.to("meta"), r"the same device, got cpu \(generator\), meta \(discriminator\)"),
    ):
        other = change(copy.deepcopy(d))
        with pytest.raises(ValueError, match=found):
            TrainStep(g, other, *adams((g, other)))


def test_bad_batches_change_no_state() -> None:
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
        (ValueError, "real and noise must have the same length, got 4 and 3", (real, noise[:3])),
        (
            ValueError,
            r"noise must have a batch dimension and at least one more, got shape \[10\]",
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
