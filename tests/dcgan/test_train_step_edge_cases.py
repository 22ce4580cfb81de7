"""TrainStep with frozen parameters, exceptions, NaN, and invalid arguments."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim

from dcgan import models
from dcgan.training import TrainStep
from tests.support.reference_loop import reference_step
from tests.support.steps import (
    LATENT,
    Wrapper,
    adams,
    assert_states_close,
    batch_of,
    half,
    pair,
    reference_of,
    state_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
