"""TrainStep with D's real and generated halves in one pass, as on a GPU, but on the reference engine."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dcgan import fast, models
from dcgan.kernels import coverage, ops, train_chain, weight_cache
from dcgan.training import Result, TrainStep, fast_step, train_step
from tests.support import launches
from tests.support.networks import norms
from tests.support.reference_loop import reference_step
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
    reference_of,
    sgds,
    simulated_step,
    state_of,
)

pytestmark = pytest.mark.usefixtures("one_thread", "reference_engine")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Let steps run both halves in one pass; list (images, groups) of D's passes as one operator."""
    monkeypatch.setattr(fast_step, "ONE_PASS_ENGINES", ("reference",))
    found: list[tuple[int, int]] = []
    original = train_chain.train_chain

    def record(call: Any) -> Any:
        if not call.stages[0].transposed:
            found.append((len(call.x), call.groups))
        return original(call)

    monkeypatch.setattr(train_chain, "train_chain", record)
    return found


def step_apart(*networks_and_optimizers: Any, **options: Any) -> TrainStep:
    """Return a step that runs the halves one after the other."""
    step = TrainStep(*networks_and_optimizers, **options)
    step._discriminator_of_both = lambda real: None  # type: ignore[method-assign]
    return step


def gradients_of(networks: Pair) -> list[Tensor]:
    return [p.grad.clone() for network in networks for p in network.parameters() if p.grad is not None]


# --- equivalence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [32, 64])
def test_float64_matches_the_reference_step(size: int, loss: str, passes: list[tuple[int, int]]) -> None:
    """Losses, weights, running statistics, counts and Adam's state, over several steps and batch sizes."""
    networks = pair("fast", torch.float64, image_size=size)
    reference = reference_of(networks)
    ours, theirs = adams(networks), adams(reference)
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
            assert got.shape == ()
        assert_states_close(state_of(networks, ours), state_of(reference, theirs), 1e-10)
        assert passes == [(2 * count, 2), (count, 1)]
        passes.clear()


@pytest.mark.usefixtures("passes")
def test_gradients_match_the_reference_step() -> None:
    """With learning rates of 0, G's gradients and D's of its own phase; and the public step's result."""
    networks = pair("fast", torch.float64)
    reference = reference_of(networks)
    real, noise = batch_of(networks, 5, torch.float64)
    result = TrainStep(*networks, *sgds(networks))(real, noise)
    kept: list[Tensor] = []
    expected = reference_step(
        *reference,
        *sgds(reference),
        real,
        noise[:, :, None, None],
        between=lambda: kept.extend(p.grad.clone() for p in reference[1].parameters()),
    )
    wanted = [p.grad for p in reference[0].parameters()] + kept
    for got, want in zip(gradients_of(networks), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for network, other in zip(networks, reference, strict=True):
        other.load_state_dict(network.state_dict())
        for module in other.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
    again = train_step(*reference, *sgds(reference), real, noise[:, :, None, None])
    for name in Result._fields:
        assert abs(getattr(result, name) - getattr(again, name)) <= 1e-10, name
    assert abs(result.loss_d - expected[0]) <= 1e-10
    assert_states_close(networks[1].state_dict(), reference[1].state_dict(), 1e-12)


def clipped(networks: Pair) -> dict[str, Any]:
    return {"clip": (0.02, 0.1)}


def averaged(networks: Pair) -> dict[str, Any]:
    return {"ema": copy.deepcopy(networks[0]), "ema_decay": 0.9}


OPTIONS: dict[str, Callable[[Pair], dict[str, Any]]] = {
    "none": lambda _: {},
    "real label 1": lambda _: {"real_label": 1.0},
    "minimax": lambda _: {"loss": "minimax", "real_label": 0.7},
    "clip": clipped,
    "clip D": lambda _: {"clip": (None, 0.05)},
    "ema": averaged,
    "bfloat16": lambda _: {"autocast": torch.bfloat16},
    "float16": lambda _: {"autocast": torch.float16},
    "scaler": lambda _: half(),
    "scaler, clip": lambda networks: half() | clipped(networks),
    "scaler that overflows": lambda _: half(2.0**60),
    "scaler, minimax, ema": lambda networks: half() | averaged(networks) | {"loss": "minimax"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("frozen", ["", "G", "D", "both", "some"])
def test_every_option_gives_the_result_of_halves_apart(
    name: str, frozen: str, passes: list[tuple[int, int]]
) -> None:
    """Up to the order of float32 sums over both halves.

    Under autocast, weights that differ by this much after D's update may be cast to different 16-bit numbers,
    so each step starts from the same weights.
    """
    networks = pair()
    if frozen == "some":
        for i in (0, 3, 4):
            networks[0].main[i].requires_grad_(False)
        for i in (2, 3):
            networks[1].main[i].requires_grad_(False)
    for which in {"G": (0,), "D": (1,), "both": (0, 1)}.get(frozen, ()):
        networks[which].requires_grad_(False)
    copies = copy.deepcopy(networks)
    ours, theirs = sgds(networks, 0.05), sgds(copies, 0.05)
    options, others = OPTIONS[name](networks), OPTIONS[name](copies)
    step, apart = TrainStep(*networks, *ours, **options), step_apart(*copies, *theirs, **others)
    for i in range(3):
        real, noise = batch_of(networks, 6)
        result, expected = step(real, noise), apart(real, noise)
        cast = "autocast" in options
        for field, got, want in zip(Result._fields, result, expected, strict=True):
            assert got.dtype == torch.float32
            assert abs(got - want) <= (1e-2 if cast and field == "loss_g" else 1e-4), f"{field}, step {i}"
        for which, (network, other) in enumerate(zip(networks, copies, strict=True)):
            tolerance = 0.1 if cast and which == 0 else 1e-5
            for (parameter, p), q in zip(network.named_parameters(), other.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                if p.grad is None or not q.grad.isfinite().all():  # the scaler has skipped the step
                    assert p.grad is None or not p.grad.isfinite().all()
                    continue
                error = float((p.grad - q.grad).norm())
                assert error <= tolerance * float(q.grad.norm()), f"{parameter}, step {i}"
        sides = [
            state_of(n, o, s.get("scaler"))
            for n, o, s in ((networks, ours, options), (copies, theirs, others))
        ]
        assert_states_close(*sides, 1e-2 if cast else 1e-5)  # type: ignore[misc]
        if "ema" in options:
            sides = [s["ema"].state_dict() for s in (options, others)]
            assert_states_close(*sides, 1e-2 if cast else 1e-5)  # type: ignore[misc]
        if cast:
            for network, other in zip(networks, copies, strict=True):
                other.load_state_dict(network.state_dict())
    of_both = [(12, 2), (6, 1)]
    assert passes == [*of_both, (6, 1), (6, 1), (6, 1)] * 3


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_networks(dtype: torch.dtype) -> None:
    networks = pair(dtype=dtype)
    copies = copy.deepcopy(networks)
    real, noise = batch_of(networks, 4, dtype)
    found = TrainStep(*networks, *sgds(networks))(real, noise)
    expected = step_apart(*copies, *sgds(copies))(real, noise)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert abs(got - want) <= 1e-3
    for p, q in zip(gradients_of(networks), gradients_of(copies), strict=True):
        assert p.dtype == dtype
        assert float((p.double() - q.double()).norm()) <= 8 * torch.finfo(dtype).eps * float(
            q.double().norm()
        )


def test_under_an_outer_autocast(passes: list[tuple[int, int]]) -> None:
    networks = pair()
    copies = copy.deepcopy(networks)
    batches = [batch_of(networks, 4) for _ in range(2)]
    outside = TrainStep(*networks, *sgds(networks, 0.05))
    with torch.autocast("cpu", torch.bfloat16):
        found = [outside(*batch) for batch in batches]
    inside = TrainStep(*copies, *sgds(copies, 0.05), autocast=torch.bfloat16)
    for batch, result in zip(batches, found, strict=True):
        assert result == inside(*batch)
    assert passes == [(8, 2), (4, 1)] * 4


@pytest.mark.usefixtures("passes")
def test_replayed_graphs() -> None:
    """A simulated graph of the step with both halves in one pass gives the eager steps' bits."""
    networks = pair()
    copies = copy.deepcopy(networks)
    ours, theirs = sgds(networks, 0.05), sgds(copies, 0.05)
    step, backend = simulated_step(*networks, *ours)
    eager = TrainStep(*copies, *theirs)
    for _ in range(6):
        batch = batch_of(networks, 4)
        assert step(*batch) == eager(*batch)
    assert "replay" in backend.log
    assert_states_close(state_of(networks, ours), state_of(copies, theirs), 0.0)


# --- which discriminators run both halves in one pass -------------------------------------------------------


class OwnForward(fast.Discriminator):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) * 0.5


class OwnLogits(fast.Discriminator):
    def logits(self, image: Tensor) -> Tensor:
        return super().logits(image) * 0.5


class Subclass(fast.Discriminator):
    """It changes nothing that a step uses."""


def of_class(kind: type[fast.Discriminator]) -> Callable[[Any], nn.Module]:
    def change(d: Any) -> nn.Module:
        d.__class__ = kind
        return d  # type: ignore[no-any-return]

    return change


def changed(change: Callable[[Any], Any]) -> Callable[[Any], nn.Module]:
    def apply(d: Any) -> nn.Module:
        change(d)
        return d  # type: ignore[no-any-return]

    return apply


def halved(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.5


def forward_on_the_instance(d: Any) -> None:
    d.forward = lambda image: type(d).forward(d, image) * 0.5


def logits_on_the_instance(d: Any) -> None:
    d.logits = lambda image: type(d).logits(d, image) * 0.5


ONE_PASS: dict[str, Callable[[Any], nn.Module]] = {
    "fast": lambda d: d,
    "subclass": of_class(Subclass),
    "momentum None": changed(lambda d: [setattr(n, "momentum", None) for _, n in norms(d)]),
    "no statistics": changed(lambda d: [setattr(n, "track_running_stats", False) for _, n in norms(d)]),
    "bias": changed(lambda d: d.main.__setitem__(2, nn.Conv2d(8, 16, 4, 2, 1).double())),
    "hook of a parameter": changed(lambda d: d.main[0].weight.register_hook(lambda g: 2 * g)),
}
TWO_PASSES: dict[str, Callable[[Any], nn.Module]] = {
    "subclass with a forward": of_class(OwnForward),
    "subclass with logits": of_class(OwnLogits),
    "forward on the instance": changed(forward_on_the_instance),
    "logits on the instance": changed(logits_on_the_instance),
    "wrapper": Wrapper,
    "hook": changed(lambda d: d.register_forward_hook(halved)),
    "pre-hook": changed(lambda d: d.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))),
    "hook of main": changed(lambda d: d.main.register_forward_hook(halved)),
    "hook of a layer": changed(lambda d: d.main[2].register_forward_hook(halved)),
    "hook of the Sigmoid": changed(lambda d: d.main[-1].register_forward_hook(halved)),
    "no Sigmoid": changed(lambda d: d.main.__setitem__(-1, nn.Hardsigmoid())),
    "spectral_norm": changed(lambda d: parametrizations.spectral_norm(d.main[2])),
    "one norm in eval mode": changed(lambda d: norms(d)[0][1].eval()),
    "eval mode": changed(lambda d: d.eval()),
}


@pytest.mark.parametrize("name", [*ONE_PASS, *TWO_PASSES])
def test_which_discriminators_run_in_one_pass(name: str, passes: list[tuple[int, int]]) -> None:
    """Any other runs on one half after the other; results are the reference step's either way."""
    generator, discriminator = pair("fast", torch.float64)
    change = {**ONE_PASS, **TWO_PASSES}[name]
    reference = copy.deepcopy(generator), change(copy.deepcopy(discriminator))
    networks = generator, change(discriminator)
    networks[1].load_state_dict(reference[1].state_dict())
    ours, theirs = sgds(networks, 0.05), sgds(reference, 0.05)
    step = TrainStep(*networks, *ours)
    for _ in range(2):
        real, noise = batch_of((generator, discriminator), 4, torch.float64)
        passes.clear()
        result = step(real, noise)
        assert [groups for _, groups in passes if groups > 1] == [2] * (name in ONE_PASS)
        if name in ("subclass with logits", "logits on the instance"):
            continue  # the step trains D on its logits, of which its forward knows nothing
        expected = reference_step(*reference, *theirs, real, noise)
        for got, want in zip(result, expected, strict=True):
            assert abs(got - want) <= 1e-10
    if "logits" not in name:
        assert_states_close(state_of(networks, ours), state_of(reference, theirs), 1e-10)


@pytest.mark.parametrize("kind", ["reference", "mlp"])
def test_other_networks_run_in_two_passes(kind: str, passes: list[tuple[int, int]]) -> None:
    networks = pair(kind)
    real, noise = torch.randn(4, 1, 32, 32), torch.randn(4, LATENT)
    assert all(value.isfinite() for value in TrainStep(*networks, *sgds(networks))(real, noise))
    assert not passes


def test_a_compiled_discriminator_runs_in_two_passes(passes: list[tuple[int, int]]) -> None:
    networks = pair()
    seen = []

    def compiler(module: Any, inputs: Any) -> Any:
        seen.append(len(inputs))
        return module.forward

    networks[1].compile(backend=compiler)
    TrainStep(*networks, *sgds(networks))(*batch_of(networks, 2))
    whole = networks[0], torch.compile(pair()[1], backend=compiler)
    TrainStep(*whole, *sgds(whole))(*batch_of(networks, 2))
    assert seen
    assert all(groups == 1 for _, groups in passes)
    torch._dynamo.reset()


def test_large_batches_run_in_two_passes(
    passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "MAX_IMAGES_TOGETHER", 4)
    networks = pair()
    step = TrainStep(*networks, *sgds(networks))
    for count in (4, 5):
        step(*batch_of(networks, count))
    assert passes == [(8, 2), (4, 1), (5, 1), (5, 1), (5, 1)]


@pytest.mark.parametrize("count", [1, 4, 7])
def test_the_native_engine_gives_both_orders_the_same_bits(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(limit: int) -> list[Tensor]:
        monkeypatch.setattr(coverage, "MAX_IMAGES_TOGETHER", limit)
        torch.manual_seed(0)
        networks = pair()
        step = TrainStep(*networks, *adams(networks))
        results = [t for _ in range(3) for t in step(*batch_of(networks, count))]
        for network in networks:
            results += [*network.state_dict().values(), *(p.grad for p in network.parameters())]
        return results

    calls: list[int] = []
    of_groups = fast.Discriminator.logits_of_groups

    def counted(self: fast.Discriminator, image: Tensor, groups: int) -> Tensor:
        if groups > 1:
            calls.append(groups)
        return of_groups(self, image, groups)

    monkeypatch.setattr(fast.Discriminator, "logits_of_groups", counted)
    with ops.use_engine("native"):
        apart = steps(0)
        assert not calls
        together = steps(256)
        assert calls == [2] * 3
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)


def test_the_reference_runs_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass it would sum weight gradients in another order."""
    networks = pair()
    found: list[int] = []
    of_groups = fast.Discriminator.logits_of_groups

    def counted(self: fast.Discriminator, image: Tensor, groups: int) -> Tensor:
        found.append(groups)
        return of_groups(self, image, groups)

    monkeypatch.setattr(fast.Discriminator, "logits_of_groups", counted)
    with ops.use_engine("reference"):
        TrainStep(*networks, *sgds(networks))(*batch_of(networks, 4))
    assert found == [1] * 3


# --- errors -------------------------------------------------------------------------------------------------


def test_images_of_another_shape_than_the_generators(passes: list[tuple[int, int]]) -> None:
    """Both halves are one batch; D is not updated."""
    generator = pair(image_size=64)[0]
    discriminator = pair()[1]
    networks = generator, discriminator
    step = TrainStep(*networks, *adams(networks))
    before = copy.deepcopy(discriminator.state_dict())
    with pytest.raises(
        ValueError,
        match=r"real must be \[4, 1, 64, 64\], as the generator's images, got \[4, 1, 32, 32\]",
    ):
        step(torch.randn(4, 1, 32, 32), torch.randn(4, LATENT))
    for name, value in discriminator.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not passes


@pytest.mark.usefixtures("passes")
def test_images_that_d_rejects_change_no_state() -> None:
    networks = pair()
    step = TrainStep(*networks, *adams(networks))
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    with pytest.raises(ValueError, match=r"image must be \[N, 1, 32, 32\], got \[4, 1, 16, 16\]"):
        step(torch.randn(4, 1, 16, 16), torch.randn(4, LATENT))
    for network, state in zip(networks, before, strict=True):
        for name, value in network.state_dict().items():
            assert torch.equal(value, state[name]), name


@pytest.mark.usefixtures("passes")
def test_one_value_per_channel_changes_no_state_of_d() -> None:
    """Of one image in each half, although the pass has two."""
    generator, discriminator = pair()
    last = nn.Conv2d(32, 3, 4, 1, 0, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1, bias=False)
    discriminator.main = nn.Sequential(*discriminator.main[:-2], *last, nn.Sigmoid())
    networks = generator, discriminator
    step = TrainStep(*networks, *adams(networks))
    before = copy.deepcopy(discriminator.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        step(*batch_of(networks, 1))
    for name, value in discriminator.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(value.isfinite() for value in step(*batch_of(networks, 2)))


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("where", ["real", "noise", "weight"])
def test_nan_stays_in_its_half(where: str) -> None:
    networks = pair()
    real, noise = batch_of(networks, 4)
    if where == "weight":
        with torch.no_grad():
            next(networks[1].parameters())[0, 0, 0, 0] = torch.nan
    else:
        (real if where == "real" else noise)[0, 0] = torch.nan
    result = TrainStep(*networks, *adams(networks))(real, noise)
    assert result.loss_d.isnan()
    assert result.d_x.isnan() == (where != "noise")
    assert result.d_g_z.isnan() == (where != "real")


# --- packed weights -----------------------------------------------------------------------------------------


def packings(batch: int, steps: int = 1) -> int:
    """Return how often steps on the Triton engine pack weights."""
    networks = pair()
    step = TrainStep(*networks, *adams(networks))
    found: list[launches.Launched] = []
    with launches.recording(found):
        for _ in range(steps):
            step(*(torch.zeros_like(t) for t in batch_of(networks, batch)))
    return sum("packing" in launch.name for launch in found)


@pytest.mark.parametrize("together", [True, False])
def test_weights_are_packed_once_in_each_phase(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """G's once; D's once for both halves, and once more after its update."""
    if not together:
        monkeypatch.setattr(coverage, "MAX_IMAGES_TOGETHER", 0)
    assert packings(2) == 3
    assert packings(2, steps=3) == 9


class Failure(Exception):
    pass


@pytest.mark.parametrize("phase", [1, 2, 3], ids=["D(x)", "D(G(z))", "G's"])
def test_weights_are_not_held_constant_after_an_exception(phase: int) -> None:
    networks = pair()
    calls: list[bool] = []

    def fail(module: Any, args: Any, output: Any) -> None:
        calls.append(getattr(weight_cache._local, "constant", None) is not None)
        if len(calls) == phase:
            raise Failure

    networks[1].main[2].register_forward_hook(fail)
    with pytest.raises(Failure):
        TrainStep(*networks, *adams(networks))(*batch_of(networks, 4))
    assert calls == [True, True, False][:phase]
    assert getattr(weight_cache._local, "constant", None) is None


def test_constant_weights_may_be_nested_and_end() -> None:
    """What was made for constant weights is not used outside the context, nor for other weights."""
    weights = [torch.ones(3) for _ in range(2)]
    made: list[int] = []

    def make(which: int) -> tuple[Tensor, ...]:
        made.append(which)
        return (weights[which].clone(),)

    def get(which: int) -> Tensor:
        with weight_cache.called_from_python():
            return weight_cache.make_once(weights[which : which + 1], which, functools.partial(make, which))[
                0
            ]

    with weight_cache.constant_weights(weights[:1]):
        get(0), get(0), get(1), get(1)
        with weight_cache.constant_weights(weights[1:]):
            get(0), get(1), get(1)
        get(0)
    weights[0].mul_(2)
    assert torch.equal(get(0), weights[0])
    with weight_cache.constant_weights(weights[:1]):
        assert torch.equal(get(0), weights[0])
    assert made == [0, 1, 1, 0, 1, 0, 0]


def test_models_without_the_drop_in_are_unaffected(passes: list[tuple[int, int]]) -> None:
    """A fast generator with a reference discriminator, and the other way round."""
    g, d = pair()
    plain = models.Generator(**g.sizes()), models.Discriminator(**d.sizes())
    for networks in ((g, plain[1]), (plain[0], d)):
        step = TrainStep(*networks, *sgds(networks))
        real, noise = batch_of((g, d), 4)
        step(real, noise if networks[0] is g else noise[:, :, None, None])
    assert passes == [(8, 2), (4, 1)]
