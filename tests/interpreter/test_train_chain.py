"""A network in training on the Triton engine, compared with float64; all memory is guarded by NaN."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import gpu, ops, train_chain
from dcgan.kernels.gpu import aten, cost_model, launcher, tiles, tuning, up_block
from dcgan.kernels.gpu.launcher import Launch
from dcgan.kernels.reference import memory_format
from dcgan.kernels.spec import TrainCall
from tests.interpreter.cases import prologues, surrounded
from tests.interpreter.memory import guarded
from tests.support import chain_results
from tests.support.chain_results import (
    BOUNDS,
    Passes,
    call_of,
    cast,
    cotangent,
    draw,
    errors,
    in_float64,
    named,
    norm,
    passes_of,
)
from tests.support.train_chains import (
    AFFINE,
    LAST_ACTS,
    MIDDLE_ACTS,
    Engine,
    Layer,
    assert_matches_eager,
    chain_of,
    reference_input,
    reference_network,
    tensors_of,
    with_tensors,
)

UP, DOWN = True, False
NAN, INF = math.nan, math.inf
TRITON = Engine("triton", torch.float32, 1e-5)


def and_slowly(fast: list[tuple[Any, ...]], every: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the parameters of the fast tests, and the others of ``every`` for the slow tests."""
    slow = [pytest.param(*row, marks=pytest.mark.slow) for row in every if row not in fast]
    return [*fast, *slow]


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with guarded():
        yield


def assert_accurate(call: TrainCall, dy: Tensor | None = None, **options: Any) -> Passes:
    dy = cotangent(call) if dy is None else dy
    return chain_results.assert_accurate(call, dy, "triton", **options)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, t in found.items():
        assert torch.equal(t, expected[name]), name


def test_memory_is_guarded() -> None:
    """What is not written is NaN, and a write out of bounds is an error."""
    for make in (lambda: torch.empty(3, 5), lambda: torch.ones(1).new_empty((2, 4)).t()):
        assert bool(make().isnan().all())
        for offset in (-1, make().numel()):
            guard = guarded()
            guard.__enter__()
            t = make()
            t.as_strided((1,), (1,), t.storage_offset() + offset).zero_()
            with pytest.raises(AssertionError, match="written outside of a tensor"):
                guard.__exit__(None, None, None)


# --- networks -----------------------------------------------------------------------------------------------

CHAINS: dict[str, tuple[tuple[int, int, int], list[Layer]]] = {
    "small": (
        (3, 2, 3),
        [
            Layer(UP, 5, norm=True, act="relu"),
            Layer(DOWN, 6, norm=True, affine="gamma", act="leaky_relu"),
            Layer(UP, 3, act="tanh", bias=True),
        ],
    ),
    "odd maps down": (
        (1, 13, 9),
        [
            Layer(DOWN, 5, act="leaky_relu", bias=True),
            Layer(DOWN, 18, norm=True, act="leaky_relu"),
            Layer(DOWN, 1, (3, 2), 1, 0, act="sigmoid", bias=True),
        ],
    ),
    "odd maps up": (
        (20, 3, 5),
        [
            Layer(UP, 17, norm=True, act="relu"),
            Layer(UP, 9, norm=True, act="leaky_relu"),
            Layer(UP, 3, act="tanh"),
        ],
    ),
    "both kinds": (
        (6, 1, 1),
        [
            Layer(UP, 9, 3, 1, 0, norm=True, act="relu"),
            Layer(UP, 5, norm=True, affine="gamma", act="leaky_relu"),
            Layer(DOWN, 36, norm=True, affine="neither", act="none"),
            Layer(UP, 4, norm=True, affine="beta", act="relu"),
            Layer(DOWN, 7, act="leaky_relu", bias=True),
            Layer(UP, 3, act="tanh"),
        ],
    ),
    "an image in the middle": (  # narrow products with prologues, and gradients of few channels
        (17, 2, 3),
        [
            Layer(UP, 3, norm=True, act="relu"),
            Layer(DOWN, 20, norm=True, act="leaky_relu"),
            Layer(UP, 1, norm=True),
            Layer(DOWN, 2, bias=True),
        ],
    ),
    "maps of one pixel": (  # statistics over the images alone
        (5, 3, 4),
        [
            Layer(DOWN, 20, (3, 4), 1, 0, norm=True, act="leaky_relu"),
            Layer(UP, 6, (2, 3), 1, 0, norm=True, act="relu"),
            Layer(DOWN, 2, (2, 3), 1, 0, act="sigmoid", bias=True),
        ],
    ),
    "without BatchNorms": (
        (2, 9, 8),
        [
            Layer(DOWN, 6, act="leaky_relu", bias=True),
            Layer(DOWN, 33, act="none", bias=True),
            Layer(UP, 3, act="relu", bias=True),
        ],
    ),
    "one layer": ((3, 6, 7), [Layer(DOWN, 19, act="tanh", bias=True)]),
    "wide": (  # more channels than an up_block has
        (5, 3, 2),
        [
            Layer(DOWN, 66, act="leaky_relu", bias=True),
            Layer(UP, 70, norm=True, act="relu"),
            Layer(UP, 68, norm=True, affine="gamma", act="leaky_relu"),
            Layer(DOWN, 67, norm=True, act="relu"),
            Layer(DOWN, 1),
        ],
    ),
}
"""(C, H, W) of x, and the layers."""


def chain(name: str, batch: int, groups: int = 1) -> TrainCall:
    """Draw a call of CHAINS[name] in float32."""
    size, layers = CHAINS[name]
    return draw(lambda: call_of(layers, torch.randn(batch, *size), groups))


def networks(kind: str, channels: int, features: int, batch: int, groups: int = 1) -> TrainCall:
    """Draw a call of a thin Generator or Discriminator in float32."""

    def make() -> TrainCall:
        network = reference_network(kind, channels, features)
        return chain_of(network).call(reference_input(kind, batch, channels))._replace(groups=groups)

    return draw(make)


DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "autocast-float16": (torch.float16, torch.float32),
    "autocast-bfloat16": (torch.bfloat16, torch.float32),
}
"""Of x, and of the parameters."""
SIZES = ((1, 2, 1), (3, 4, 2), (3, 6, 3), (1, 5, 1), (1, 4, 2), (3, 1, 1))  # channels, batch, groups


@pytest.mark.parametrize(
    ("kind", "dtype", "channels", "batch", "groups"),
    and_slowly(
        [
            ("G", "autocast-bfloat16", 3, 4, 2),
            ("D", "float32", 3, 6, 3),
            ("D", "float16", 1, 5, 1),
        ],
        ((kind, dtype, *sizes) for kind in "GD" for dtype in DTYPES for sizes in SIZES),
    ),
)
def test_reference_networks(kind: str, dtype: str, channels: int, batch: int, groups: int) -> None:
    assert_accurate(cast(networks(kind, channels, 4, batch, groups), *DTYPES[dtype]))


@pytest.mark.parametrize(
    ("name", "batch", "groups", "dtype"),
    and_slowly(
        [
            ("odd maps down", 6, 3, "float32"),
            ("odd maps up", 2, 2, "float32"),
            ("both kinds", 4, 2, "autocast-float16"),
            ("an image in the middle", 3, 1, "bfloat16"),
            ("an image in the middle", 4, 2, "float32"),
            ("maps of one pixel", 6, 2, "float32"),
            ("maps of one pixel", 5, 1, "float16"),
            ("without BatchNorms", 2, 1, "bfloat16"),
            ("one layer", 3, 3, "float32"),
        ],
        ((n, *sizes, dtype) for n in CHAINS for sizes in ((2, 1), (6, 2), (6, 3)) for dtype in DTYPES),
    ),
)
def test_chains(name: str, batch: int, groups: int, dtype: str) -> None:
    assert_accurate(cast(chain(name, batch, groups), *DTYPES[dtype]))


@pytest.fixture
def only_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the kernel for many channels or small maps run every transposed convolution."""
    for limit in ("MAX_CHANNELS", "NARROW"):
        monkeypatch.setattr(up_block, limit, 0)
    launcher.kernel_for.cache_clear()
    yield
    monkeypatch.undo()
    launcher.kernel_for.cache_clear()


@pytest.mark.usefixtures("only_up")
@pytest.mark.parametrize(
    ("name", "batch", "groups", "dtype"),
    and_slowly(
        [("odd maps down", 2, 1, "bfloat16"), ("an image in the middle", 4, 2, "float32")],
        ((n, *sizes, dtype) for n in CHAINS for sizes in ((2, 1), (6, 3)) for dtype in DTYPES),
    ),
)
def test_chains_by_parities(launched: list[str], name: str, batch: int, groups: int, dtype: str) -> None:
    assert_accurate(cast(chain(name, batch, groups), *DTYPES[dtype]))
    assert not {"up_block", "up_narrow"} & {*launched}


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_precision_settings(setting: str) -> None:
    """Both are spelled in the products' specs; the interpreter computes both in float32."""
    conv: Any = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = setting
    try:
        call = chain("odd maps down", 4, 2)
        specs = gpu.training.forward_specs(train_chain.specs(call))
        assert {spec.precision for spec in specs} == {setting}
        assert_accurate(call)
    finally:
        conv.fp32_precision = before


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 80))]
)
def test_random_chains(seed: int) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    call = draw(lambda: random_call(generator))
    dtype = generator.choice(list(DTYPES))
    assert_accurate(cast(call, *DTYPES[dtype])._replace(channels_last=generator.random() < 0.5))


def random_call(generator: random.Random) -> TrainCall:
    """Draw one to four layers that the engine covers, and x of up to three groups."""
    one_of = generator.choice
    groups = one_of([1, 1, 2, 3])
    images = groups * one_of([1, 2, 3])
    h, w = one_of([(1, 1), (one_of(range(1, 8)), one_of(range(1, 8)))])
    c_in = one_of([1, 3, 5, 20])
    x = torch.randn(images, c_in, h, w)
    layers: list[Layer] = []
    count = one_of([1, 2, 3, 4])
    for i in range(count):
        kinds = []
        if h * w <= 64:
            kinds.append((UP, 4, 2, 1, 2 * h, 2 * w))
        if min(h, w) >= 2:
            kinds.append((DOWN, 4, 2, 1, h // 2, w // 2))
        if max(h, w) <= 4:
            kinds.append((DOWN, (h, w), 1, 0, 1, 1))
        if h == w == 1:
            k_h, k_w = one_of([1, 2, 3, 4]), one_of([2, 3, 4])
            kinds.append((UP, (k_h, k_w), 1, 0, k_h, k_w))
        transposed, kernel, stride, padding, h, w = one_of(kinds)
        last = i + 1 == count
        norm = not last and images // groups * h * w > 1 and generator.random() < 0.7
        layers.append(
            Layer(
                transposed,
                one_of([1, 2, 3, 5, 8, 17, 20, 33]),
                kernel,
                stride,
                padding,
                norm=norm,
                affine=one_of(AFFINE),
                act=one_of(LAST_ACTS if last else MIDDLE_ACTS),
                eps=one_of([1e-5, 1e-3, 0.1]),
                bias=not norm and generator.random() < 0.5,
            )
        )
    return call_of(layers, x, groups)._replace(slope=one_of([0.0, 0.2, 1.0]))


@pytest.mark.parametrize(
    ("affine", "act"),
    and_slowly(
        [("both", "none"), ("gamma", "leaky_relu"), ("beta", "relu"), ("neither", "none")],
        itertools.product(AFFINE, MIDDLE_ACTS),
    ),
)
def test_batchnorms(affine: str, act: str) -> None:
    """With an activation of a layer without one beside it, and each last activation in turn."""
    last = LAST_ACTS[(AFFINE.index(affine) + MIDDLE_ACTS.index(act)) % len(LAST_ACTS)]
    layers = [
        Layer(DOWN, 5, act=act, bias=True),
        Layer(UP, 6, norm=True, affine=affine, act=act, eps=0.1),
        Layer(DOWN, 2, act=last),
    ]
    assert_accurate(draw(lambda: call_of(layers, torch.randn(4, 3, 4, 6), 2)))


# --- arguments ----------------------------------------------------------------------------------------------


def strided(t: Tensor) -> Tensor:
    """Return a copy surrounded by NaN whose last dimension is the slowest."""
    return surrounded(t.movedim(-1, 0)).movedim(0, -1)


X_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": torch.Tensor.contiguous,
    "nhwc": lambda x: x.contiguous(memory_format=memory_format(True)),
    "surrounded": surrounded,
    "strided": strided,
    "expanded": lambda x: x[:1, :, :, :1].expand_as(x),
}


@pytest.mark.parametrize(
    ("layout", "name"),
    and_slowly(
        [(layout, "odd maps down") for layout in X_LAYOUTS] + [("nhwc", "small")],
        itertools.product(X_LAYOUTS, ["small"]),
    ),
)
def test_layouts_of_x(layout: str, name: str) -> None:
    """And of y; the gradient of an expanded x is dense."""
    size, layers = CHAINS[name]

    def make() -> TrainCall:
        call = call_of(layers, X_LAYOUTS[layout](torch.randn(4, *size)), 1 if layout == "expanded" else 2)
        return call._replace(channels_last=name == "small")

    assert_accurate(draw(make))


DY_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": torch.Tensor.contiguous,
    "nhwc": lambda dy: dy.contiguous(memory_format=memory_format(True)),
    "surrounded": surrounded,
    "strided": strided,
    "of a sum": lambda dy: torch.ones((), dtype=dy.dtype).expand_as(dy),
    "of channels": lambda dy: dy[:1, :, :1, :1].expand_as(dy),
}


@pytest.mark.parametrize("layout", DY_LAYOUTS)
@pytest.mark.parametrize("act", ["none", "tanh"])
def test_layouts_of_dy(layout: str, act: str) -> None:
    """A last activation's derivative is applied in a launch of its own."""
    layers = [Layer(DOWN, 5, norm=True, act="relu"), Layer(UP, 3, act=act)]
    call = draw(lambda: call_of(layers, torch.randn(2, 4, 5, 6), 2))
    assert_accurate(call, DY_LAYOUTS[layout](cotangent(call)))


def test_strides_of_parameters() -> None:
    """Gradients have the strides of what they belong to."""
    call = chain("small", 4, 2)
    dy = cotangent(call)
    expected = named(assert_accurate(call, dy))
    for change in (surrounded, strided, lambda t: t.contiguous(memory_format=memory_format(t.ndim == 4))):
        given = {
            name: t.detach() if name == "x" else change(t.detach()) for name, t in tensors_of(call).items()
        }
        odd = with_tensors(call, given)
        own = passes_of("triton", odd, dy)
        chain_results.assert_metadata(odd, own)
        assert_same(named(own), expected)


def test_dtypes_of_vectors() -> None:
    """gamma and beta may have any dtype, and their gradients have the same."""
    call = chain("small", 4, 2)
    for dtype in (torch.bfloat16, torch.float64):
        given = {name: t.detach() for name, t in tensors_of(call).items()}
        given = {name: t.to(dtype) if t.ndim == 1 else t for name, t in given.items()}
        changed = with_tensors(call, given)
        dy = cotangent(changed)
        own = passes_of("triton", changed, dy)
        chain_results.assert_metadata(changed, own)
        rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
        whole = BOUNDS[torch.float32]._replace(gradients=rounding + 2e-6)
        chain_results.assert_own_accuracy(changed, dy, own, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_what_a_backward_needs(dtype: str) -> None:
    call = cast(chain("small", 4, 2), *DTYPES[dtype])
    with ops.use_engine("triton"), torch.no_grad():
        y, stats = train_chain.train_chain(call)
        bare, saved, bare_stats, packed = train_chain._OP(*chain_results.arguments(call._replace(keep=False)))
    assert (saved, packed.numel()) == ([], 0)
    assert torch.equal(bare, y)
    assert all(torch.equal(a, b) for a, b in zip(bare_stats, stats, strict=True))


@pytest.mark.parametrize("kind", ["D", pytest.param("G", marks=pytest.mark.slow)])
def test_modules_in_training(kind: str) -> None:
    """By autograd, two steps, with the running statistics, as PyTorch's modules compute them in float64."""
    network = reference_network(kind, 1, 4)
    network.groups = 2
    call = networks(kind, 1, 4, 4)
    with ops.use_engine("triton"):
        assert_matches_eager(network, call.x, TRITON, steps=2)


def test_a_kept_graph_and_two_forwards_before_their_backwards() -> None:
    """The same bits as the operators give; what a second backward reads is still there."""
    calls = [chain("small", 4, 2) for _ in range(2)]
    dys = [cotangent(call) for call in calls]
    expected = [passes_of("triton", call, dy).gradients for call, dy in zip(calls, dys, strict=True)]
    with ops.use_engine("triton"):
        given = [{n: t.detach().requires_grad_() for n, t in tensors_of(call).items()} for call in calls]
        ys = [train_chain.train_chain(with_tensors(c, g))[0] for c, g in zip(calls, given, strict=True)]
        for y, dy, tensors, want in zip(ys, dys, given, expected, strict=True):
            for retain in (True, False):
                found = torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=retain)
                assert_same(dict(zip(tensors, found, strict=True)), want)


@pytest.mark.parametrize("dtype", ["autocast-bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_another_engine_runs_the_forward(dtype: str) -> None:
    """The backward then packs the weights itself; and another engine can run the backward of this one."""
    call = cast(chain("small", 4, 2), *DTYPES[dtype])
    dy = cotangent(call)
    given = {name: t.detach().requires_grad_() for name, t in tensors_of(call).items()}
    found = []
    for engines in itertools.product(("triton", "reference"), repeat=2):
        with ops.use_engine(engines[0]):
            y, _ = train_chain.train_chain(with_tensors(call, given))
        with ops.use_engine(engines[1]):
            gradients = torch.autograd.grad(y, list(given.values()), dy)
        found.append({f"d{name}": t for name, t in zip(given, gradients, strict=True)})
    bounds = BOUNDS[call.x.dtype]
    for others in found[1:]:
        assert max(errors(others, found[0]).values()) <= 4 * bounds.whole


# --- what is launched ---------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the kernels launched from now on, filled as they run."""
    names: list[str] = []
    run = Launch.__call__

    def record(launch: Launch) -> Any:
        names.append(launch.kernel.__name__.strip("_").removesuffix("_kernel"))
        return run(launch)

    monkeypatch.setattr(Launch, "__call__", record)
    return names


DISCRIMINATOR = [
    Layer(DOWN, 5, act="leaky_relu", bias=True),
    Layer(DOWN, 6, norm=True, act="leaky_relu"),
    Layer(DOWN, 7, norm=True, act="leaky_relu"),
    Layer(DOWN, 1, (2, 2), 1, 0, act="sigmoid", bias=True),
]
WGRAD, WGRAD_NARROW = ["wgrad", "split_k"], ["wgrad_narrow", "split_k"]
HEAD = ["prologue", "dense_outer", "backward", "apply"]
MIDDLE = ["up_block", "backward", "apply"]
BACKWARD = {
    "everything": [*HEAD, *WGRAD, *MIDDLE, *WGRAD, *WGRAD, "up_block", *WGRAD_NARROW, "up_narrow"],
    "x": [*HEAD, *MIDDLE, "up_block", "up_narrow"],
    "no weights": [*HEAD, *MIDDLE, "up_block", "up_narrow"],
    "weights": [*HEAD, *WGRAD, *MIDDLE, *WGRAD, *WGRAD, "up_block", *WGRAD_NARROW],
    "vectors": [*HEAD, *MIDDLE, "up_block"],
    "beta 3": ["prologue"],
    "gamma 2": HEAD[:-1],
    "beta 1": [*HEAD, "up_block", "backward"],
    "beta 0": [*HEAD, *MIDDLE, "up_block"],
    "weight 3": ["prologue", "apply", *WGRAD],
    "weight 3, gamma 2": [*HEAD, *WGRAD],
    "weight 2": [*HEAD, "apply", *WGRAD],
    "weight 1": [*HEAD, *MIDDLE, *WGRAD],
    "weight 0": [*HEAD, *MIDDLE, "up_block", *WGRAD_NARROW],
    "weight 3, weight 0": [*HEAD, *WGRAD, *MIDDLE, "up_block", *WGRAD_NARROW],
    "nothing": ["prologue"],
}
"""The launches of a backward by what it computes; 'weight 3, gamma 2' for those two."""


def needs(wanted: str) -> Callable[[str], bool]:
    return {
        "everything": lambda name: True,
        "nothing": lambda name: False,
        "no weights": lambda name: not name.startswith("weight"),
        "weights": lambda name: name.startswith("weight"),
        "vectors": lambda name: name.startswith(("gamma", "beta")),
    }.get(wanted, lambda name: name in wanted.split(", "))


@pytest.mark.parametrize("groups", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_only_what_is_needed_is_launched(launched: list[str], groups: int) -> None:
    """Gradients have the same bits, whatever else is computed."""
    call = draw(lambda: call_of(DISCRIMINATOR, torch.randn(2, 3, 16, 16), groups))
    dy = cotangent(call)
    with prologues(products=True, gradients=True):
        full = assert_accurate(call, dy).gradients
        for wanted, backward in BACKWARD.items():
            launched.clear()
            found = passes_of("triton", call, dy, needs(wanted)).gradients
            assert found.keys() == {name for name in full if needs(wanted)(name)}
            assert_same(found, full)
            forward = ["pack", "down_narrow", "down", "forward", "down", "forward", "dense_narrow"]
            assert launched == forward + backward, wanted


@pytest.mark.parametrize("name", ["small", pytest.param("both kinds", marks=pytest.mark.slow)])
def test_every_single_gradient_alone(name: str) -> None:
    """And all others without it."""
    call = chain(name, 4, 2)
    dy = cotangent(call)
    full = assert_accurate(call, dy).gradients
    for name in tensors_of(call):
        for choose in (operator.eq, operator.ne):
            found = passes_of("triton", call, dy, functools.partial(choose, name)).gradients
            assert found.keys() == {other for other in full if choose(name, other)}
            assert_same(found, full)


# --- tiles --------------------------------------------------------------------------------------------------


def use_tile(
    monkeypatch: pytest.MonkeyPatch, block_m: int, block_n: int, block_k: int, fused: bool, splits: int
) -> None:
    """Force a tile, where a kernel leaves the choice; prologues are fused or standalone."""

    def choose(problem: tiles.Problem, *_: Any) -> tiles.Tile:
        m, n, k = block_m, block_n, block_k
        if problem.kernel == "down_narrow":
            k = 16
        if problem.kernel in ("up_block", "up_narrow"):  # all columns in one tile
            n = problem.columns
        if problem.kernel == "dense_narrow":
            m, n, k = 1, 1, 8 * block_k
        tile = tiles.Tile(m, n, k, 4, 1, fused or not problem.has_prologue)
        return tiles.fit(tile, problem)

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(cost_model, "splits", lambda *_: splits)


TILES = [(16, 16, 16, 1), (32, 64, 32, 3), (128, 32, 16, 2), (256, 16, 64, 7)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    and_slowly(
        [("small", "float32")],
        ((name, dtype) for name in CHAINS for dtype in ("float32", "bfloat16")),
    ),
)
def test_any_tile(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str) -> None:
    """Fused and standalone prologues give the same bits; other tiles differ in the order of sums alone."""
    call = cast(chain(name, 6, 2), *DTYPES[dtype])
    dy = cotangent(call)
    own: list[dict[str, Tensor]] = []
    for i, (*blocks, splits) in enumerate(TILES):
        with monkeypatch.context() as patch:
            use_tile(patch, *blocks, True, splits)
            own.append(named(assert_accurate(call, dy)))
            if i % 2:
                use_tile(patch, *blocks, False, splits)
                assert_same(named(passes_of("triton", call, dy)), own[-1])
    if dtype == "float32":  # in 16 bits other maps are rounded differently, which may flip signs
        for others in own[1:]:
            assert max(errors(others, own[0]).values()) <= 2e-6


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_slices(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The epilogues of all products with more than 32 channels run over column slices."""
    monkeypatch.setattr(tiles, "SLICED_FROM", 1)
    use_tile(monkeypatch, 16, 64, 128, True, 1)
    assert_accurate(cast(chain("wide", 4, 2), *DTYPES[dtype]))


@pytest.mark.parametrize(
    ("name", "groups"),
    and_slowly([("small", 3)], itertools.product(CHAINS, (2, 3))),
)
def test_groups_are_calls_in_order(monkeypatch: pytest.MonkeyPatch, name: str, groups: int) -> None:
    """The same bits, with tiles of which each group has several, the last of them ragged."""
    use_tile(monkeypatch, 16, 16, 16, True, 2)
    call = chain(name, groups, groups)
    dy = cotangent(call)
    found = named(assert_accurate(call, dy))
    parts = [
        named(passes_of("triton", call._replace(x=x, groups=1), part))
        for x, part in zip(call.x.chunk(groups), dy.chunk(groups), strict=True)
    ]
    for key, t in found.items():
        each = [part[key] for part in parts]
        if key in ("y", "dx"):
            assert torch.equal(t, torch.cat(each)), key
        elif key.startswith("stats"):
            assert torch.equal(t, torch.cat(each, 1)), key
        else:
            torch.testing.assert_close(t, sum(each[1:], each[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    and_slowly(
        [("small", "float32"), ("small", "bfloat16"), ("maps of one pixel", "float32")],
        [("odd maps down", "float32"), ("both kinds", "float32")],
    ),
)
def test_trials_of_tuning(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str) -> None:
    """Tuning compares each product's outputs and sums, of all groups, with the expected ones."""
    trials: list[tuple[tiles.Problem, tuning.Trial]] = []

    def choose(problem: tiles.Problem, device: torch.device, spills: Any, trial: tuning.Trial) -> tiles.Tile:
        trials.append((problem, trial))
        return tuning.estimate(problem.without_prologue(), cost_model.SM_COUNT)

    monkeypatch.setattr(launcher, "_plans", {})
    monkeypatch.setattr(tuning, "choose", choose)
    call = cast(chain(name, 4, 2), *DTYPES[dtype])
    passes_of("triton", call, cotangent(call))
    assert len(trials) == 3 * len(call.stages)
    assert {problem.epilogue for problem, _ in trials} >= {"statistics", "gradient", "affine"}
    for problem, trial in trials:
        expected = trial.expected()
        for fused in (True, False):
            tile = next((tile for tile in tuning.variants(problem) if tile.fused == fused), None)
            if tile is None:
                continue
            got = trial.results(tile)
            assert [t.shape for t in got] == [t.shape for t in expected]
            allowed = tuning.TOLERANCE[problem.precision]
            assert aten.error(got, expected) <= allowed / 2, (problem, tile)
            *others, last = got
            assert aten.error([*others, 1.02 * last], expected) > allowed


# --- values that are not finite -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", ["odd maps down", pytest.param("small", marks=pytest.mark.slow)])
@pytest.mark.parametrize("value", [NAN, INF, pytest.param(-INF, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["x", "dy", "weight 1", "gamma 1", "beta 1"])
def test_nonfinite_where_the_reference_is(name: str, place: str, value: float) -> None:
    """No NaN or infinity is hidden; one in x or dy, in its second group, does not reach the first."""
    if (name, place) == ("small", "beta 1"):  # which has none
        place = "beta 0"
    call = chain(name, 2, 2)
    given = {key: t.detach().clone() for key, t in tensors_of(call).items()} | {"dy": cotangent(call)}
    given[place].view(-1)[-1 - given[place].numel() // 4] = value
    dy = given.pop("dy")
    call = with_tensors(call, given)
    found = named(passes_of("triton", call, dy))
    expected = named(passes_of("reference", in_float64(call), dy.double()))
    spoiled = 0
    for key, want in expected.items():
        assert not bool((found[key].isfinite() & ~want.isfinite()).any()), key
        if value != value:
            assert bool((found[key].isnan() >= want.isnan()).all()), key
        spoiled += int((~want.isfinite()).sum())
    assert spoiled
    if place in ("x", "dy"):
        for key in ("y", "dx"):
            assert bool(found[key][:1].isfinite().all()), key


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_an_infinity_that_a_relu_stops() -> None:
    """-∞ before a ReLU is 0, with derivative 0; the first weight's gradient has 0·∞, as the reference's."""
    call = draw(lambda: call_of([Layer(UP, 5, act="relu"), Layer(DOWN, 2)], torch.randn(2, 2, 3, 3)))
    x = call.x.clone()
    x[1, 1, 1, 1] = INF
    weight = call.stages[0].weight.detach()
    given = {name: t.detach() for name, t in tensors_of(call).items()}
    given |= {"x": x, "weight 0": -weight.abs()}
    call = with_tensors(call, given)
    dy = cotangent(call)
    own = passes_of("triton", call, dy)
    expected = passes_of("reference", call, dy)
    assert bool(own.y.isfinite().all())
    for key, want in named(expected).items():
        found = named(own)[key]
        assert torch.equal(found.isnan(), want.isnan()), key
        finite = want.isfinite()
        assert norm(found[finite] - want[finite]) <= 1e-5 * norm(want[finite]), key
