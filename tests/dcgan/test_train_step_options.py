"""TrainStep's options: autocast, loss scaling, clipping, averaging, and its optimizers."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dcgan.training import Config, Result, TrainStep, optimizers
from dcgan.training.augment import DiffAugment
from tests.support.steps import (
    LATENT,
    LOSSES,
    Pair,
    Wrapper,
    adams,
    assert_states_close,
    batch_of,
    half,
    pair,
    sgds,
    simulated_step,
    state_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
    """The average keeps its dtype, its decay is warmed up, and its prepacked weights are invalidated."""
    networks = pair()
    ema = copy.deepcopy(networks[0]).to(dtype).eval()
    floating = {name: b for name, b in ema.named_buffers() if b.is_floating_point()}
    assert floating
    averaged = {**dict(ema.named_parameters()), **floating}
    expected = {name: value.detach().clone() for name, value in averaged.items()}
    step = TrainStep(*networks, *adams(networks), ema=ema, ema_decay=0.25)
    noise = torch.randn(2, LATENT, dtype=dtype)
    for decay in (2 / 11, 3 / 12, 0.25):
        with torch.no_grad():
            ema(noise)  # caches the prepacked weights
        step(*batch_of(networks, 4))
        for name, value in networks[0].state_dict().items():
            if name in expected:
                expected[name] = decay * expected[name] + (1 - decay) * value.detach().to(dtype)
                torch.testing.assert_close(averaged[name], expected[name], rtol=1e-6, atol=1e-7, msg=name)
            else:
                assert torch.equal(value, ema.get_buffer(name)), name
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


# --- augmentation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["fast", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_augmentation(kind: str, loss: Any, dtype: torch.dtype) -> None:
    """Losses and both networks' gradients are those of D(T(x)) and D(T(G(z))), in both phases."""
    networks = pair(kind=kind, dtype=dtype)
    plain = copy.deepcopy(networks)

    def augment(images: Tensor) -> Tensor:  # deterministic, and different for every column
        return images * torch.linspace(0.5, 1.5, images.shape[-1], dtype=images.dtype) + 0.1

    class Augmented(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(augment(images))  # type: ignore[no-any-return]

    wrapped = plain[0], Augmented(plain[1])
    ours = TrainStep(*networks, *sgds(networks), loss=loss, augment=augment)
    theirs = TrainStep(*wrapped, *sgds(wrapped), loss=loss)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for _ in range(2):
        batch = batch_of(networks, 4, dtype)
        for got, want in zip(ours(*batch), theirs(*batch), strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)
        for p, q in zip(networks[0].parameters(), plain[0].parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            scale = float(q.grad.abs().max())
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=tolerance * scale)
        for network, other in zip(networks, plain, strict=True):
            assert_states_close(network.state_dict(), other.state_dict(), tolerance)
            other.load_state_dict(network.state_dict())  # so that rounding does not accumulate


def test_flips_and_random_augmentation() -> None:
    """Given its random numbers a step is a function of them; real images are mirrored at random."""
    seen: list[Tensor] = []
    augmentation = DiffAugment(["translation", "cutout"])

    def augment(images: Tensor) -> Tensor:
        seen.append(images.detach())
        return augmentation(images)

    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        networks = pair()
        batch = batch_of(networks, 4)
        seen.clear()
        torch.manual_seed(seed)
        results.append(TrainStep(*networks, *adams(networks), flip=True, augment=augment)(*batch))
        real = torch.cat(seen)[:4]
        mirrored = [torch.equal(image, given.flip(2)) for image, given in zip(real, batch[0], strict=True)]
        same = [torch.equal(image, given) for image, given in zip(real, batch[0], strict=True)]
        assert all(one != other for one, other in zip(mirrored, same, strict=True))
        assert sum(map(len, seen)) == 12  # x and G(z) in D's phase, G(z) again in G's
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_captured_augmentation() -> None:
    """Replays draw new random numbers, those that eager steps would draw."""
    networks = pair()
    copies = copy.deepcopy(networks)
    options: dict[str, Any] = {"flip": True, "augment": DiffAugment(["color", "translation", "cutout"])}
    step, _ = simulated_step(*networks, *adams(networks), **options)
    plain = TrainStep(*copies, *adams(copies), **options)
    for _ in range(6):
        batch = batch_of(networks, 4)
        random = torch.get_rng_state()
        result = step(*batch)
        torch.set_rng_state(random)
        assert result == plain(*batch)
    for network, other in zip(networks, copies, strict=True):
        assert_states_close(network.state_dict(), other.state_dict(), 0.0)
