"""A network in training on the native engine, compared with float64 and with the single ops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import cpu, ops, reference, train_chain
from dcgan.kernels.cpu import library
from dcgan.kernels.reference import empty_gradient, memory_format
from dcgan.kernels.spec import TrainBackward, TrainCall
from tests.kernels.cpu.test_threads import in_a_child
from tests.support import native
from tests.support.native import ISAS, NETWORK, SPATIAL, instruction_set
from tests.support.native_training import forced, strided
from tests.support.networks import NETWORKS
from tests.support.train_chains import (
    AFFINE,
    LAST_ACTS,
    MIDDLE_ACTS,
    Layer,
    build,
    chain_of,
    reference_input,
    reference_network,
    tensors_of,
    with_tensors,
)

pytestmark = [native.NEEDED, pytest.mark.usefixtures("nan_in_new_memory", "threads_restored")]

UP, DOWN = True, False
MIXED = (
    Layer(UP, 9, 3, 1, 0, norm=True, act="relu"),
    Layer(UP, 5, norm=True, affine="gamma", act="leaky_relu"),
    Layer(DOWN, 6, act="leaky_relu", bias=True),
    Layer(UP, 17, norm=True, affine="neither", act="none"),
    Layer(DOWN, 4, norm=True, affine="beta", act="relu"),
    Layer(UP, 3, act="tanh", bias=True),
)
"""From one pixel; both kinds of convolution, with every kind of BatchNorm and with biases."""
ODD = (
    Layer(DOWN, 7, act="leaky_relu", bias=True),
    Layer(DOWN, 18, norm=True, act="leaky_relu"),
    Layer(DOWN, 1, 3, 1, 0, act="none"),
)
"""From 14×15 pixels."""
WITHOUT_NORMS = (
    Layer(DOWN, 5, act="leaky_relu", bias=True),
    Layer(DOWN, 19, act="none", bias=True),
    Layer(UP, 6, act="relu"),
    Layer(UP, 3, act="sigmoid", bias=True),
)


# --- calls --------------------------------------------------------------------------------------------------


def draw(make: Callable[[], TrainCall]) -> TrainCall:
    """Draw a call until no activation's input is so near the kink that rounding decides its sign."""
    for _ in range(100):
        call = make()
        if not near_a_kink(call):
            return call
    raise AssertionError("every draw is near a kink")


def near_a_kink(call: TrainCall) -> bool:
    wide = in_float64(call)
    with torch.no_grad():
        y, saved, stats, _ = reference.train_forward(train_chain.specs(wide), wide)
    vectors = iter(stats)
    for stage, z in zip(wide.stages, (*saved, y), strict=True):
        if stage.norm:
            z = reference._normalised(z, next(vectors))
        # A leaky ReLU scales both sides by at most 1; what a ReLU clears without a BatchNorm is unknown.
        if stage.act in ("relu", "leaky_relu") and bool(((z.abs() < 2e-6) & (z != 0)).any()):
            return True
    return False


def mixed(batch: int = 6, groups: int = 1) -> TrainCall:
    return call_of(MIXED, torch.randn(batch, 5, 1, 1), groups)


def call_of(layers: Iterable[Layer], x: Tensor, groups: int = 1) -> TrainCall:
    return chain_of(build(x.shape[1], tuple(layers))).call(x)._replace(groups=groups)


def in_float64(call: TrainCall) -> TrainCall:
    return with_tensors(call, {name: t.double() for name, t in tensors_of(call).items()})


def cotangent(call: TrainCall) -> Tensor:
    return torch.randn(train_chain.specs(call)[-1].shape)


def results(
    call: TrainCall,
    dy: Tensor,
    engine: str = "native",
    wanted: Iterable[str] | None = None,
    run: Callable[[TrainCall], tuple[Tensor, list[Tensor]]] = train_chain.train_chain,
) -> dict[str, Tensor]:
    """Return y, the statistics and the gradients of the tensors ``wanted``, by default of all."""
    given = {name: t.detach() for name, t in tensors_of(call).items()}
    chosen = list(given if wanted is None else wanted)
    for name in chosen:
        given[name] = given[name].requires_grad_()
    with ops.use_engine(engine), ops.recording() as choices:
        y, stats = run(with_tensors(call, given))
        gradients = torch.autograd.grad(y, [given[name] for name in chosen], dy.to(y.dtype))
    assert {choice.engine for choice in choices} == {engine}
    found = {"y": y.detach(), **{f"stats {i}": t.detach() for i, t in enumerate(stats)}}
    return found | {f"d{name}": t for name, t in zip(chosen, gradients, strict=True)}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return each error relative to the norm, at least 1% of the norm of all gradients for a gradient."""
    assert found.keys() == expected.keys()
    squares = [float(t.square().sum()) for name, t in expected.items() if name.startswith("d")]
    floor = 1e-2 * sum(squares) ** 0.5
    relative = {}
    for name, want in expected.items():
        size = max(float(want.norm()), floor if name.startswith("d") else 0.0)
        relative[name] = float((found[name].double() - want).norm()) / size
    return relative


def assert_accurate(call: TrainCall, wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Compare with float64; check dtypes and strides as well."""
    dy = cotangent(call)
    found = results(call, dy, wanted=wanted)
    expected = results(in_float64(call), dy, "reference", wanted)
    for name, error in errors(found, expected).items():
        assert error <= NETWORK, f"{name}: relative error {error:.2e}"  # a NaN fails too
    given = tensors_of(call)
    for name, t in found.items():
        if name == "y":
            assert t.stride() == train_chain.specs(call)[-1].y.stride
        elif name.startswith("d"):
            like = empty_gradient(call.x) if name == "dx" else torch.empty_like(given[name[1:]])
            assert (t.dtype, t.stride()) == (like.dtype, like.stride()), name
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, t in found.items():
        assert torch.equal(t, expected[name]), name


# --- accuracy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
@pytest.mark.parametrize("channels", [1, 3])
@NETWORKS
def test_reference_networks(kind: str, channels: int, batch: int) -> None:
    def make() -> TrainCall:
        network = reference_network(kind, channels, features=4)
        return chain_of(network).call(reference_input(kind, batch, channels))

    assert_accurate(draw(make))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (3, 1), (4, 2), (6, 3)])
def test_every_instruction_set(batch: int, groups: int, isa: str) -> None:
    with instruction_set(isa):
        assert_accurate(draw(lambda: mixed(batch, groups)))
        assert_accurate(draw(lambda: call_of(ODD, torch.randn(batch, 3, 14, 15), groups)))


@pytest.mark.parametrize("algorithm", SPATIAL)
def test_every_algorithm(algorithm: str) -> None:
    with forced(algorithm):
        assert_accurate(draw(mixed))
        assert_accurate(draw(lambda: call_of(ODD, torch.randn(3, 1, 15, 14))))


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("act", MIDDLE_ACTS)
def test_batchnorms(affine: str, act: str) -> None:
    layers = [
        Layer(UP, 6, norm=True, affine=affine, act=act, eps=0.1),
        Layer(DOWN, 5, norm=True, affine=affine, act=act),
        Layer(UP, 2, act="tanh"),
    ]
    assert_accurate(draw(lambda: call_of(layers, torch.randn(3, 4, 3, 5))))


@pytest.mark.parametrize("last", LAST_ACTS)
@pytest.mark.parametrize("act", MIDDLE_ACTS)
def test_layers_without_batchnorm(act: str, last: str) -> None:
    layers = [
        Layer(DOWN, 6, act=act, bias=True),
        Layer(DOWN, 5, norm=True),
        Layer(UP, 3, act=act),
        Layer(UP, 2, act=last, bias=True),
    ]
    assert_accurate(draw(lambda: call_of(layers, torch.randn(3, 2, 9, 8))))


def test_one_layer_and_one_pixel() -> None:
    assert_accurate(
        draw(lambda: call_of([Layer(DOWN, 3, act="sigmoid", bias=True)], torch.randn(2, 4, 7, 6)))
    )
    pixel = [Layer(DOWN, 5, 1, 1, 0, norm=True, act="relu"), Layer(UP, 2, 1, 1, 0)]
    assert_accurate(draw(lambda: call_of(pixel, torch.randn(6, 4, 1, 1))))


def test_another_slope() -> None:
    assert_accurate(draw(lambda: call_of(ODD, torch.randn(3, 3, 14, 15))._replace(slope=0.7)))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8, 64])
@NETWORKS
def test_full_networks(kind: str, batch: int) -> None:
    """Large enough for every algorithm, streamed weights and several blocks of images."""
    network, x = reference_network(kind, 1, features=128), reference_input(kind, batch, 1)
    call = chain_of(network).call(x)._replace(groups=2)
    dy = cotangent(call)
    exactly = results(in_float64(call), dy, "reference")
    chain, singly = (
        errors(results(call, dy, run=run), exactly)
        for run in (train_chain.train_chain, train_chain.one_by_one)
    )
    # Rounding decides the sign of some activation's input, in both.
    assert all(chain[name] <= max(NETWORK, 2 * error) for name, error in singly.items())


def test_as_accurate_as_single_ops() -> None:
    """Over many tensors and draws, in the mean."""
    totals = [0.0, 0.0]
    for make in (mixed, lambda: call_of(ODD, torch.randn(5, 3, 14, 15))):
        for _ in range(8):
            call = draw(make)
            dy = cotangent(call)
            exactly = results(in_float64(call), dy, "reference")
            for i, run in enumerate((train_chain.train_chain, train_chain.one_by_one)):
                totals[i] += sum(errors(results(call, dy, run=run), exactly).values())
    assert totals[0] <= 1.1 * totals[1]


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_the_bits_of_single_ops(isa: str) -> None:
    """All without a BatchNorm; y and the moments of the first one otherwise, whose scale is rounded once."""
    with instruction_set(isa):
        call = call_of(WITHOUT_NORMS, torch.randn(5, 3, 9, 10))
        dy = cotangent(call)
        assert_same(results(call, dy), results(call, dy, run=train_chain.one_by_one))
        call = mixed()
        stats = [
            results(call, cotangent(call), run=run)["stats 0"]
            for run in (train_chain.train_chain, train_chain.one_by_one)
        ]
        assert torch.equal(stats[0][:2], stats[1][:2])


def test_many_layers() -> None:
    """Unlike a chain in inference, one in training has no maximum length."""
    call = call_of([Layer(UP, 8, 1, 1, 0, bias=True)] * (cpu.MAX_LAYERS + 1), torch.randn(2, 8, 1, 1))
    dy = cotangent(call)
    assert_same(results(call, dy), results(call, dy, run=train_chain.one_by_one))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("groups", [2, 3])
def test_groups_are_calls_in_order(groups: int, threads: int) -> None:
    torch.set_num_threads(threads)
    call = mixed(6, groups)
    dy = cotangent(call)
    found = results(call, dy)
    parts = [
        results(call._replace(x=x, groups=1), part)
        for x, part in zip(call.x.chunk(groups), dy.chunk(groups), strict=True)
    ]
    for name, t in found.items():
        each = [part[name] for part in parts]
        if name in ("y", "dx"):
            assert torch.equal(t, torch.cat(each)), name
        elif name.startswith("stats"):
            assert torch.equal(t, torch.cat(each, 1)), name
        elif "weight" in name:
            assert torch.equal(t, sum(each[1:], each[0])), name
        else:
            torch.testing.assert_close(t, sum(each[1:], each[0]), rtol=1e-5, atol=1e-6)


def test_every_subset_of_gradients() -> None:
    call = mixed()
    dy = cotangent(call)
    full = results(call, dy)
    names = list(tensors_of(call))
    subsets = [[name] for name in names] + [[n for n in names if n != name] for name in names]
    for wanted in (*subsets, [n for n in names if "weight" in n], [n for n in names if "weight" not in n]):
        found = results(call, dy, wanted=wanted)
        assert {name[1:] for name in found if name.startswith("d")} == set(wanted)
        assert_same(found, full)


def test_any_strides_and_dtypes_of_vectors() -> None:
    call = mixed()
    dy = cotangent(call)
    expected = results(call, dy)
    given = {name: t.detach() for name, t in tensors_of(call).items()}
    for change in (
        strided,
        torch._neg_view,
        lambda t: t.contiguous(memory_format=memory_format(t.ndim == 4)),
        lambda t: t.double() if t.ndim == 1 else t,
    ):
        odd = {name: change(-t if change is torch._neg_view else t) for name, t in given.items()}
        found = results(with_tensors(call, odd), change(-dy if change is torch._neg_view else dy).float())
        for name, t in found.items():
            assert torch.equal(t, expected[name].to(t.dtype)) or t.dtype == torch.float64, name
            if name[1:] in odd:
                assert t.dtype == odd[name[1:]].dtype


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_formats(channels_last: bool) -> None:
    """Of y, x, and dy; the same bits."""
    for call in (
        call_of(WITHOUT_NORMS, torch.randn(2, 3, 9, 10)),
        mixed(),
        call_of(ODD, torch.randn(4, 2, 14, 15)),
    ):
        dy = cotangent(call)
        expected = results(call, dy)
        for x_last in (True, False):
            changed = call._replace(
                x=call.x.contiguous(memory_format=memory_format(x_last)), channels_last=channels_last
            )
            found = results(changed, dy.contiguous(memory_format=memory_format(not x_last)))
            assert_same(found, expected)
            assert found["y"].stride() == train_chain.specs(changed)[-1].y.stride
            assert found["dx"].stride() == empty_gradient(changed.x).stride()


# --- what is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs(groups: int) -> None:
    call = mixed(4, groups)._replace(channels_last=False)
    found = train_chain.specs(call)
    with torch.no_grad():
        y, saved, stats, packed = cpu.train_forward(found, call)
        bare = cpu.train_forward(found, call._replace(keep=False))
    for t, spec in zip((*saved, y), found, strict=True):
        assert (t.shape, t.dtype, t.stride()) == (spec.shape, torch.float32, spec.y.stride)
    shapes = [(4, groups, stage.c_out) for stage in call.stages if stage.norm]
    assert [t.shape for t in stats] == shapes
    assert packed.numel() == 0
    assert torch.equal(bare[0], y)
    assert bare[1] == []
    assert all(torch.equal(a, b) for a, b in zip(bare[2], stats, strict=True))


def test_an_empty_result_is_not_needed() -> None:
    """Nor is a y that no derivative needs."""
    call = call_of(ODD, torch.randn(3, 3, 14, 15))
    found = train_chain.specs(call)
    with torch.no_grad():
        _, saved, stats, packed = cpu.train_forward(found, call)
        n = len(call.stages)
        none = [False] * n
        one = [i == 1 for i in range(n)]
        back = TrainBackward(cotangent(call), None, saved, stats, packed, False, none, one, none, call)
        gradients = train_chain.empty_gradients(back)
        cpu.train_backward(found, back, gradients)
    assert bool(gradients.gamma[1].isfinite().all())


def test_two_forwards_before_their_backwards() -> None:
    """What one forward keeps survives the other, as D's real and generated halves do."""
    calls = [mixed(), mixed()]
    dys = [cotangent(call) for call in calls]
    expected = [results(call, dy)["dx"] for call, dy in zip(calls, dys, strict=True)]
    with ops.use_engine("native"):
        xs = [call.x.clone().requires_grad_() for call in calls]
        ys = [train_chain.train_chain(call._replace(x=x))[0] for call, x in zip(calls, xs, strict=True)]
        for y, dy, x, dx in zip(ys, dys, xs, expected, strict=True):
            assert torch.equal(torch.autograd.grad(y, x, dy)[0], dx)


# --- values that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["x", "dy", "weight 1", "gamma 0", "beta 0", "beta 2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_where_eager_is(place: str, value: float) -> None:
    """No NaN or infinity is hidden, and none spreads to another group."""
    call = mixed(4, 2)
    given = {name: t.detach().clone() for name, t in tensors_of(call).items()} | {"dy": cotangent(call)}
    given[place].view(-1)[given[place].numel() // 2 + 1] = value  # of x and dy, in the second group
    dy = given.pop("dy")
    call = with_tensors(call, given)
    found = results(call, dy)
    expected = results(in_float64(call), dy, "reference")
    for name, want in expected.items():
        assert not bool((found[name].isfinite() & ~want.isfinite()).any()), name
    if place in ("x", "dy"):
        for name in ("y", "dx"):
            assert bool(found[name][:2].isfinite().all()), name


# --- threads ------------------------------------------------------------------------------------------------


def test_a_thread_limit_does_not_change_the_bits() -> None:
    """For each number of threads, with new and with reused memory."""
    call = mixed(9)
    dy = cotangent(call)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        library.release()
        first = results(call, dy)
        for limit in (0, 1, 2):
            library.library().dcgan_limit_threads(limit)
            assert_same(results(call, dy), first)
        library.library().dcgan_limit_threads(0)


def test_concurrent_callers() -> None:
    """Each caller uses a different number of threads."""
    calls = [mixed(5), call_of(ODD, torch.randn(4, 3, 14, 15), 2)]
    tasks = [(call, cotangent(call)) for call in calls]
    expected: dict[int, Any] = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        expected[threads] = [passes(*task) for task in tasks]
    start = threading.Barrier(4)

    def work(index: int) -> bool:
        threads = 1 + index % 3
        torch.get_num_threads()  # a new thread's first use sets its count to the last set by any thread
        start.wait(60)
        torch.set_num_threads(threads)
        equal = True
        for i in range(8):
            which = (i + index) % 2
            equal &= all(map(torch.equal, passes(*tasks[which]), expected[threads][which]))
        return equal

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def passes(call: TrainCall, dy: Tensor) -> list[Tensor]:
    """Return the results of both passes, without autograd."""
    found = train_chain.specs(call)
    with torch.no_grad():
        y, saved, stats, packed = cpu.train_forward(found, call)
        n = len(call.stages)
        given = [[getattr(s, name) is not None for s in call.stages] for name in ("gamma", "beta")]
        back = TrainBackward(dy, y, saved, stats, packed, True, [True] * n, *given, call)
        gradients = train_chain.empty_gradients(back)
        cpu.train_backward(found, back, gradients)
    return [y, *stats, gradients.x, *gradients.weight, *gradients.gamma, *gradients.beta]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_in_a_forked_child() -> None:
    """It runs on one thread, whatever number is set."""
    call = mixed(5, 1)
    dy = cotangent(call)

    def as_bytes() -> bytes:
        return b"".join(t.contiguous().numpy().tobytes() for t in passes(call, dy))

    torch.set_num_threads(2)
    before = as_bytes()
    torch.set_num_threads(1)
    alone = as_bytes()
    torch.set_num_threads(2)
    assert in_a_child(as_bytes) == alone
    assert as_bytes() == before
