"""TrainStep compared with the reference step, for any discriminator, and the computations that it skips."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcgan import models
from dcgan.training import Config, Result, TrainStep, optimizers, train_step
from tests.support.reference_loop import reference_step
from tests.support.steps import (
    LOSSES,
    Pair,
    Wrapper,
    adams,
    assert_states_close,
    batch_of,
    pair,
    reference_of,
    sgds,
    state_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- equivalence to the reference step ----------------------------------------------------------------------


@pytest.mark.usefixtures("reference_engine")
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
        if name.startswith("dcgan::train_chain_backward"):
            arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            self.found += zip(arguments["transposed"], arguments["needs"][1:], strict=False)
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
    passes = 1 if kind == "fast" else 2  # of D's phase
    assert of_d == [True] * passes * layers + [False] * layers
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
