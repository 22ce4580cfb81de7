"""conv_chain is its ops one after the other: values, derivatives, transforms; and what a Chain keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import native
import pytest
import torch
from native import LAYER, allowed
from statement import Problem, state
from tolerance import relative, unit
from torch import Tensor, nn

from dcgan.kernels import chain, ops, weights
from dcgan.kernels.call import Stage
from dcgan.kernels.chain import conv_chain

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = pytest.mark.parametrize("kind", ["up", "down"])
OP = torch.ops.dcgan.conv_chain.default
VECTORS = ("scale", "shift", "mean", "var")


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_entries", {})


# --- chains, and what they mean ----------------------------------------------------------------------------


def stage(transposed: bool, c_in: int, c_out: int, kernel: int = 4, given: str = "", **options: Any) -> Stage:
    """A layer with weights of about 1/√K and the vectors ``given``: s scale, b shift, n mean and var."""
    order = (c_in, c_out) if transposed else (c_out, c_in)
    dtype = options.pop("dtype", torch.float32)
    weight = torch.randn(*order, kernel, kernel) / (c_in * kernel**2 / (4 if transposed else 1)) ** 0.5
    vectors = {
        "scale": torch.randn(c_out) if "s" in given else None,
        "shift": torch.randn(c_out) if "b" in given else None,
        "mean": torch.randn(c_out) if "n" in given else None,
        "var": torch.rand(c_out) + 0.5 if "n" in given else None,
    }
    return Stage(transposed, weight.to(dtype), **vectors, eps=1e-5 if "n" in given else 0.0, **options)


def made(kind: str, dtype: torch.dtype = torch.float32, batch: int = 3) -> tuple[Tensor, list[Stage]]:
    """A small network: BatchNorms with and without their affine map, layers with a part of an epilogue."""
    wide = {"stride": 1, "padding": 0, "dtype": dtype}
    if kind == "up":
        x = torch.randn(batch, 6, 1, 1)
        stages = [
            stage(True, 6, 12, given="sbn", act="relu", **wide),
            stage(True, 12, 9, given="n", act="leaky_relu", slope=0.3, dtype=dtype),
            stage(True, 9, 6, given="sb", act="sigmoid", dtype=dtype),
            stage(True, 6, 3, given="b", act="tanh", dtype=dtype),
        ]
    else:
        x = torch.randn(batch, 3, 16, 16)
        stages = [
            stage(False, 3, 7, act="leaky_relu", slope=0.2, dtype=dtype),
            stage(False, 7, 10, given="sbn", act="leaky_relu", slope=0.05, dtype=dtype),
            stage(False, 10, 8, given="s", act="tanh", **wide),
            stage(False, 8, 1, kernel=1, given="bn", act="sigmoid", **wide),
        ]
    return x.to(dtype), stages


def wide(stages: list[Stage]) -> list[Stage]:
    """In float64."""
    return [Stage(*[v.double() if isinstance(v, Tensor) else v for v in s]) for s in stages]


def stated(x: Tensor, stages: list[Stage]) -> Tensor:
    """The module's formula in float64, differentiable."""
    y = x.double()
    for s in wide(stages):
        call = ops.Call(y, s.weight, stride=s.stride, padding=s.padding)
        u = state(call, s.transposed)[0]
        scale = torch.ones(s.c_out, dtype=torch.float64) if s.scale is None else s.scale
        if s.mean is not None and s.var is not None:
            u = u - s.mean[:, None, None]
            scale = scale / (s.var + s.eps).sqrt()
        u = u * scale[:, None, None]
        if s.shift is not None:
            u = u + s.shift[:, None, None]
        act = {"none": u, "relu": u.relu(), "tanh": u.tanh(), "sigmoid": u.sigmoid()}
        y = nn.functional.leaky_relu(u, s.slope) if s.act == "leaky_relu" else act[s.act]
    return y


def one_by_one(x: Tensor, stages: list[Stage], channels_last: bool = True) -> Tensor:
    """By the two public ops, each with the BatchNorm folded by hand."""
    for i, s in enumerate(stages):
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        vectors = {n: v.to(acc) for n in VECTORS if (v := getattr(s, n)) is not None}
        scale, shift = vectors.get("scale"), vectors.get("shift")
        if "var" in vectors:
            inverse = torch.rsqrt(vectors["var"] + s.eps)
            scale = inverse if scale is None else inverse * scale
            shift = -vectors["mean"] * scale if shift is None else shift - vectors["mean"] * scale
        op = ops.conv_transpose2d_fused if s.transposed else ops.conv2d_fused
        x, _, _ = op(
            x,
            s.weight,
            out_scale=scale,
            out_shift=shift,
            out_act=s.act,
            slope=s.slope,
            stride=s.stride,
            padding=s.padding,
            channels_last=channels_last or i + 1 < len(stages),
        )
    return x


def kept(stages: list[Stage]) -> nn.Module:
    """Their weights frozen, as a network in eval has them, as long as this lives."""
    owner = nn.Module()
    weights.freeze(owner, [s.weight for s in stages])
    return owner


def leaves(x: Tensor, stages: list[Stage]) -> list[Tensor]:
    return [x, *(t for s in stages for t in s[1:6] if t is not None)]


def arguments(x: Tensor, stages: list[Stage], channels_last: bool = True) -> tuple[Any, ...]:
    """As the operator takes them, after its schema."""
    transposed, *columns = (list(column) for column in zip(*stages, strict=True))
    return (x, *columns, transposed, channels_last)


# --- values ------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("channels_last", [True, False])
def test_reference_is_the_ops_one_after_the_other(kind: str, channels_last: bool) -> None:
    x, stages = made(kind, torch.float64)
    y = conv_chain(x, stages, channels_last)
    expected = one_by_one(x, stages, channels_last)
    assert relative(y, expected) < 1e-14
    assert relative(y, stated(x, stages)) < 1e-13
    assert y.stride() == expected.stride()


@native.NEEDED
@KINDS
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", native.SPATIAL)
def test_native_is_the_formula(kind: str, channels_last: bool, dtype: torch.dtype, algorithm: str) -> None:
    """16-bit tensors are rounded once, at the end; strides are the composition's."""
    x, stages = made(kind, dtype)
    with native.forced(algorithm), native.fresh_memory_is_nan():
        with ops.use_engine("native"), ops.recording() as choices:
            y = conv_chain(x, stages, channels_last)
        assert [c.engine for c in choices] == ["native"] * len(stages)
    assert y.dtype == dtype
    assert relative(y, stated(x, stages)) <= allowed(dtype, 2 * LAYER)
    with ops.use_engine("reference"):
        assert y.stride() == one_by_one(x, stages, channels_last).stride()


@native.NEEDED
@KINDS
def test_every_way_in_gives_the_same_bits(kind: str) -> None:
    """The function, the operator and a Chain."""
    x, stages = made(kind)
    with ops.use_engine("native"), torch.no_grad():
        expected = conv_chain(x, stages)
        assert torch.equal(OP(*arguments(x, stages)), expected)
        assert torch.equal(OP(*arguments(x, stages)[:-1]), expected)
        assert torch.equal(chain.Chain(stages)(x), expected)
    with ops.use_engine("native"):
        assert torch.equal(chain.Chain(stages)(x), expected)


@native.NEEDED
def test_a_layer_that_is_not_native_is_run_by_the_reference_and_the_rest_natively() -> None:
    x, stages = made("down")
    stages[1:1] = [stage(False, 7, 7, kernel=5, given="sbn", act="relu", stride=1, padding=2)]
    owner = kept(stages)
    with ops.recording() as choices:
        y = conv_chain(x, stages)
    assert relative(y, stated(x, stages)) <= 2 * LAYER
    assert [c.engine for c in choices] == ["native", "reference", "native", "native", "native"]
    assert choices[1].reason == "native: neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
    with torch.no_grad():
        assert relative(chain.Chain(stages)(x), stated(x, stages)) <= 2 * LAYER
    with (
        ops.use_engine("native"),
        pytest.raises(RuntimeError, match="engine 'native' was asked for, but does not cover this conv2d"),
    ):
        conv_chain(x, stages)
    del owner


@native.NEEDED
@pytest.mark.parametrize("layers", [1, 64, 65, 150])
@pytest.mark.parametrize("engine", ["auto", "native"])
def test_a_very_long_chain(layers: int, engine: str) -> None:
    x = torch.randn(2, 5, 1, 1)
    stages = [
        stage(bool(i % 2), 5, 5, kernel=1, given="b", act="leaky_relu", slope=0.9, stride=1, padding=0)
        for i in range(layers)
    ]
    owner = kept(stages)
    with ops.use_engine(engine), torch.no_grad():
        assert relative(conv_chain(x, stages), stated(x, stages)) <= layers * LAYER
        assert relative(chain.Chain(stages)(x), stated(x, stages)) <= layers * LAYER
    del owner


@native.NEEDED
def test_more_images_than_a_block_holds() -> None:
    """What is between two layers is made for some 30 images at a time here: all come out, and the same."""
    stages = [
        stage(True, 3, 64, given="sbn", act="relu"),
        stage(True, 64, 1, act="tanh"),
    ]
    x = torch.randn(75, 3, 32, 32)
    with native.forced("direct"), ops.use_engine("native"):
        y = conv_chain(x, stages)
        for i in (0, 29, 31, 37, 63, 74):
            assert torch.equal(y[i : i + 1], conv_chain(x[i : i + 1], stages))


@KINDS
@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_an_empty_batch(kind: str, engine: str, channels_last: bool) -> None:
    x, stages = made(kind)
    owner = kept(stages)
    with ops.use_engine(engine), torch.no_grad():
        whole = conv_chain(x, stages, channels_last)
        for f in (conv_chain, lambda x, s, c: chain.Chain(s)(x, c)):
            y = f(x[:0], stages, channels_last)
            assert y.shape == (0, *whole.shape[1:])
            assert y.dtype == x.dtype
    del owner


OTHER_VECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda v: v.bfloat16(),  # as a network in bfloat16 has its BatchNorms
    "float64": lambda v: v.double(),
    "strided": lambda v: torch.stack([v, torch.full_like(v, float("nan"))], 1)[:, 0],
    "expanded": lambda v: v[:1].expand_as(v),
    "negated by a flag": lambda v: torch._neg_view(-v),
}


@native.NEEDED
@pytest.mark.parametrize("name", OTHER_VECTORS)
def test_vectors_of_other_dtypes_and_strides(name: str) -> None:
    x, stages = made("up")
    changed = [
        s._replace(**{n: OTHER_VECTORS[name](v) for n in VECTORS if (v := getattr(s, n)) is not None})
        for s in stages
    ]
    owner = kept(changed)
    with torch.no_grad():
        for y in (conv_chain(x, changed), chain.Chain(changed)(x)):
            assert relative(y, stated(x, changed)) <= 2 * LAYER
    del owner


# --- what is refused ---------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "act": ({"act": "gelu"}, ValueError, r"act must be one of \(.*'sigmoid'.*\), got 'gelu'"),
    "slope": ({"slope": -0.5}, ValueError, r"slope must not be negative, got -0.5"),
    "stride": ({"stride": 0}, ValueError, r"stride must be at least 1 .* got 0 and 1"),
    "padding": ({"padding": -1}, ValueError, r"padding at least 0, got 2 and -1"),
    "weight's dimensions": ({"weight": torch.ones(7, 7)}, ValueError, r"weight must have 4 dimensions"),
    "weight's dtype": (
        {"weight": torch.ones(10, 7, 4, 4).double()},
        TypeError,
        r"weight must have x's dtype",
    ),
    "weight's device": (
        {"weight": torch.ones(10, 7, 4, 4, device="meta")},
        ValueError,
        r"weight must be on x's",
    ),
    "channels": ({"weight": torch.ones(10, 6, 4, 4)}, ValueError, r"x has 7 channels, but weight .* takes 6"),
    "map": ({"weight": torch.ones(10, 7, 9, 9), "padding": 0}, ValueError, r"is too small for a 9×9 kernel"),
    **{
        f"{name} of {what}": ({name: vector}, ValueError, rf"{name} must be \[10\].*got {got}")
        for name in VECTORS
        for what, vector, got in (
            ("1 channel", torch.ones(1), r"\[1\]"),
            ("11 channels", torch.ones(11), r"\[11\]"),
            ("2 dimensions", torch.ones(10, 1), r"\[10, 1\]"),
            ("no dimension", torch.ones(()), r"\[\]"),
        )
    },
    **{
        f"{name} on another device": (
            {name: torch.ones(10, device="meta")},
            ValueError,
            rf"{name} must be on x's device cpu, got meta",
        )
        for name in VECTORS
    },
    "mean alone": ({"var": None}, ValueError, r"mean and var must be given together"),
    "var alone": ({"mean": None}, ValueError, r"mean and var must be given together"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_what_is_refused_is_named(name: str, engine: str) -> None:
    """Whichever engine runs: none reads past a vector's end, nor stretches it."""
    changes, error, message = REFUSED[name]
    x, stages = made("down")
    stages[1] = stages[1]._replace(**changes)
    owner = kept([stages[0], *stages[2:]])
    for run in (lambda x: conv_chain(x, stages), chain.Chain(stages)):
        with ops.use_engine(engine), torch.no_grad(), pytest.raises(error, match=message):
            run(x)
    del owner


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_wrong_x_and_no_stages(engine: str) -> None:
    x, stages = made("down")
    with ops.use_engine(engine), torch.no_grad():
        for run in (lambda x: conv_chain(x, stages), chain.Chain(stages)):
            for wrong, error, message in (
                (x[0], ValueError, r"x must be \[N, C, H, W\], got \[3, 16, 16\]"),
                (x.int(), TypeError, r"x must be float16, bfloat16, float32 or float64, got torch.int32"),
                (x[:, :2], ValueError, r"x has 2 channels, but weight .* takes 3"),
                (x.double(), TypeError, r"weight must have x's dtype torch.float64, got torch.float32"),
                (x.to("meta"), ValueError, r"weight must be on x's device meta, got cpu"),
            ):
                with pytest.raises(error, match=message):
                    run(wrong)
    with pytest.raises(ValueError, match="stages must hold one layer or more, got none"):
        conv_chain(x, [])


# --- as PyTorch sees the operator --------------------------------------------------------------------------


@native.NEEDED
@pytest.mark.parametrize(("kind", "gradients"), [("up", False), ("down", True)])
def test_opcheck(kind: str, gradients: bool) -> None:
    """With gradients it is its ops, and the native ones of those have the reference's backward."""
    x, stages = made(kind)
    for t in leaves(x, stages):
        t.requires_grad_(gradients)
    with ops.use_engine("native"):
        torch.library.opcheck(OP, arguments(x, stages, channels_last=not gradients))


def test_opcheck_of_bfloat16() -> None:
    torch.library.opcheck(OP, arguments(*made("up", torch.bfloat16)))


@native.NEEDED
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_the_ops_on_the_native_engine(transposed: bool) -> None:
    overload = torch.ops.dcgan.conv_transpose2d_fused if transposed else torch.ops.dcgan.conv2d_fused
    for problem in (
        Problem(transposed, c_in=6, c_out=5, out_scale=True, out_shift=True, out_act="tanh"),
        Problem(transposed, size=(1, 1), kernel=(1, 1), stride=1, padding=0, channels_last=False),
        Problem(transposed, c_in=7, c_out=1, out_act="sigmoid", channels_last=False),
    ):
        with ops.use_engine("native"):
            call = problem.with_(dtype=torch.float32).call(requires_grad=True)
            torch.library.opcheck(overload.default, tuple(call))


@KINDS
@pytest.mark.parametrize("engine", [pytest.param("native", marks=native.NEEDED), "reference"])
def test_gradients_are_the_compositions(kind: str, engine: str) -> None:
    x, stages = made(kind)
    inputs = [t.requires_grad_() for t in leaves(x, stages)]
    with ops.use_engine(engine):
        y, expected = conv_chain(x, stages), one_by_one(x, stages)
        dy = torch.randn_like(y)
        actual, wanted = (torch.autograd.grad(t, inputs, dy) for t in (y, expected))
    exact = torch.autograd.grad(stated(x, stages), inputs, dy.double())
    assert relative(y, expected) < 1e-6
    for a, b, c in zip(actual, wanted, exact, strict=True):
        assert relative(a, b) < 1e-5
        assert relative(a, c) < 1e-4


@KINDS
def test_first_and_second_derivatives(kind: str) -> None:
    """In float64, by differences, along random directions and forward too; of everything but eps."""
    x, stages = made(kind, torch.float64, batch=2)
    stages = wide(stages)
    inputs = [t.requires_grad_() for t in leaves(x, stages)]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        rest = iter(values)
        return conv_chain(
            x, [Stage(s[0], *[None if t is None else next(rest) for t in s[1:6]], *s[6:]) for s in stages]
        )

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_one_gradient_alone() -> None:
    """A running statistic may want one as well as a weight; what wants none gets none."""
    x, stages = made("up", torch.float64)
    stages = wide(stages)
    for wanted in leaves(x, stages):
        wanted.requires_grad_()
        conv_chain(x, stages).square().sum().backward()
        (exact,) = torch.autograd.grad(stated(x, stages).square().sum(), wanted)
        assert relative(wanted.grad, exact) < 1e-10
        wanted.requires_grad_(False)
        wanted.grad = None


@KINDS
def test_nothing_is_kept_without_gradients(kind: str) -> None:
    x, stages = made(kind)
    for t in leaves(x, stages):
        t.requires_grad_()
    with torch.no_grad():
        assert not conv_chain(x, stages).requires_grad
    with torch.inference_mode():
        assert conv_chain(x, stages).is_inference()
        assert chain.Chain(stages)(x).is_inference()
    assert conv_chain(x, stages).requires_grad
    assert chain.Chain(stages)(x).requires_grad


@native.NEEDED
def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode(), ops.use_engine("native"):
        x, stages = made("up")
        assert relative(conv_chain(x, stages), stated(x, stages)) <= 2 * LAYER
        run = chain.Chain(stages)
        assert relative(run(x), stated(x, stages)) <= 2 * LAYER
        stages[0].weight.mul_(-0.5)  # without a version that would tell
        assert relative(run(x), stated(x, stages)) <= 2 * LAYER


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", [pytest.param("native", marks=native.NEEDED), "auto"])
def test_autocast_casts_x_and_weights_alone(kind: str, dtype: torch.dtype, engine: str) -> None:
    x, stages = made(kind)
    by_hand = [s._replace(weight=s.weight.to(dtype)) for s in stages]
    with ops.use_engine(engine), torch.no_grad():
        expected = conv_chain(x.to(dtype), by_hand)
        with torch.autocast("cpu", dtype=dtype):
            found = [conv_chain(x, stages), chain.Chain(stages)(x), OP(*arguments(x, stages))]
    with torch.autocast("cpu", dtype=dtype):
        assert conv_chain(x.double(), wide(stages)).dtype == torch.float64
    for y in found:
        assert y.dtype == dtype
        assert torch.equal(y, expected)
    # One rounding a layer at most, if not natively: each is of order 1 and grows no more than twofold.
    assert relative(expected, stated(x.to(dtype), by_hand)) <= 4 * len(stages) * unit(dtype)


def test_autocast_with_gradients() -> None:
    x, stages = made("up")
    inputs = [t.requires_grad_() for t in leaves(x, stages)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_chain(x, stages)
    assert y.dtype == torch.bfloat16
    exact = torch.autograd.grad(stated(x, stages).sum(), inputs)
    for got, want in zip(torch.autograd.grad(y.float().sum(), inputs), exact, strict=True):
        assert got.dtype == torch.float32
        assert relative(got, want) < 0.1


@KINDS
def test_function_transforms(kind: str) -> None:
    """torch.func: vmap over chains of examples and over weights, grad, jvp; as of the formula."""
    x, stages = made(kind, torch.float64)
    stages = wide(stages)
    first = stages[0].weight

    def run(chain_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(x: Tensor, weight: Tensor) -> Tensor:
            x = x[None] if x.ndim == 3 else x
            return chain_of(x, [stages[0]._replace(weight=weight), *stages[1:]])

        return function

    def gradients(f: Callable[..., Tensor]) -> Callable[..., Any]:
        return torch.func.grad(lambda x, weight: f(x, weight).square().sum(), argnums=(0, 1))

    both = torch.stack([first, -2 * first])
    for transform, given in (
        (lambda f: torch.func.vmap(f, (0, None)), (x, first)),
        (lambda f: torch.func.vmap(f, (None, 0)), (x, both)),
        (gradients, (x, first)),
        (lambda f: lambda x, weight: torch.func.jvp(f, (x, weight), (x, -weight)), (x, first)),
    ):
        got, want = (transform(run(f))(*given) for f in (conv_chain, stated))
        got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 1e-11


@native.NEEDED
def test_a_transform_is_no_native_call() -> None:
    """The operator has no rule for tangents: it would give zeros, silently."""
    x, stages = made("up")
    run = chain.Chain(stages)
    with torch.no_grad():
        for f in (run, lambda x: conv_chain(x, stages)):
            with ops.recording() as choices:
                _, tangent = torch.func.jvp(f, (x,), (torch.randn_like(x),))
            assert bool(tangent.any())
            assert {c.engine for c in choices} == {"reference"}
            assert all("forward-mode" in c.reason for c in choices)
    with ops.use_engine("native"), pytest.raises(RuntimeError, match="engine 'native' was asked for"):
        torch.func.vmap(lambda x: conv_chain(x[None], stages))(x)


@native.NEEDED
def test_compiled_whole() -> None:
    x, stages = made("up")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor, stages: list[Stage]) -> Tensor:
        return 2 * conv_chain(x + 0, stages)

    torch._dynamo.reset()
    with ops.use_engine("native"), torch.no_grad():
        assert torch.equal(run(x, stages), 2 * conv_chain(x, stages))
        assert run(x, stages).stride() == conv_chain(x, stages).stride()
    inputs = [t.requires_grad_() for t in leaves(x, stages)]
    for got, want in zip(
        torch.autograd.grad(run(x, stages).sum(), inputs),
        torch.autograd.grad(2 * conv_chain(x, stages).sum(), inputs),
        strict=True,
    ):
        assert relative(got, want) < 1e-5
    torch._dynamo.reset()


def test_fake_and_meta_tensors_have_the_outputs_shape_and_strides() -> None:
    for kind in ("up", "down"):
        for channels_last in (True, False):
            x, stages = made(kind)
            real = conv_chain(x, stages, channels_last)
            there = [Stage(*[v.to("meta") if isinstance(v, Tensor) else v for v in s]) for s in stages]
            meta = conv_chain(x.to("meta"), there, channels_last)
            assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


# --- what a Chain keeps ------------------------------------------------------------------------------------


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@native.NEEDED
@KINDS
@pytest.mark.usefixtures("no_grad")
def test_batches_of_many_sizes_in_turn(kind: str) -> None:
    """Each has its own plan, some their own packed weights; both stay bounded."""
    x, stages = made(kind, batch=40)
    owner, run = kept(stages), chain.Chain(stages)
    for _ in range(2):
        for batch in (1, 7, *range(1, 41), 1):
            assert relative(run(x[:batch]), stated(x[:batch], stages)) <= 2 * LAYER
            assert 1 <= len(run._prepared) <= chain.Chain._MOST
            assert len(stages) <= native.packed() <= 3 * len(stages)
    del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_other_threads_engines_layouts_and_dtypes_in_turn() -> None:
    """What a Chain remembers of one call is not taken for another."""
    x, stages = made("up")
    owner, run = kept(stages), chain.Chain(stages)
    y = run(x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(x), y)
    torch.set_num_threads(1)
    assert run(x, False).is_contiguous()
    assert torch.equal(run(x, False), y)
    with ops.use_engine("reference"), ops.recording() as choices:
        assert relative(run(x), y) < 1e-5
    assert {c.engine for c in choices} == {"reference"}
    with ops.recording() as choices:
        assert torch.equal(run(x), y)
    assert [c.engine for c in choices] == ["native"] * 4
    with pytest.raises(TypeError, match="weight must have x's dtype"):
        run(x.bfloat16())
    del owner


@native.NEEDED
@pytest.mark.skipif(len(native.ISAS) < 2, reason="one instruction set here")
@pytest.mark.usefixtures("no_grad")
def test_another_instruction_set_is_another_packing() -> None:
    x, stages = made("up")
    owner, run = kept(stages), chain.Chain(stages)
    for isa in (*native.ISAS, *native.ISAS):
        with native.instruction_set(isa):
            assert relative(run(x), stated(x, stages)) <= 2 * LAYER
            assert relative(conv_chain(x, stages), stated(x, stages)) <= 2 * LAYER
    del owner


def make_room(t: Tensor) -> None:
    """Room for twice as many elements, of which the first half is t."""
    t.set_(torch.stack([t.flip(0), t.square() + 0.5], 1).flatten(), 0, t.shape)


VECTOR_EDITS: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda t: t.mul_(1.5),
    "data in place": lambda t: t.data.add_(0.25),
    "set_": lambda t: t.set_(t.clone() * 0.5),
    "data =": lambda t: setattr(t, "data", t.flip(0)),
    "data = of another dtype": lambda t: setattr(t, "data", t.double() * 2),
    "other strides at the same address": lambda t: t.set_(t.untyped_storage(), 0, t.shape, (2,)),
}


@native.NEEDED
@pytest.mark.parametrize("name", VECTOR_EDITS)
@pytest.mark.usefixtures("no_grad")
def test_vectors_are_read_at_every_call(name: str) -> None:
    x, stages = made("up")
    vectors = [t for s in stages for t in (s.scale, s.shift, s.mean, s.var) if t is not None]
    for t in vectors:
        make_room(t)
    owner, run = kept(stages), chain.Chain(stages)
    previous = run(x)
    for t in vectors:
        VECTOR_EDITS[name](t)
        assert relative(run(x), stated(x, stages)) <= 2 * LAYER
        assert not torch.equal(run(x), previous)
        previous = run(x)
    del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_a_weight_that_is_negated_by_a_flag() -> None:
    """Its memory holds other values; the operator's dispatcher settles that, which a Chain goes around."""
    x, stages = made("up")
    stages[1] = stages[1]._replace(weight=torch._neg_view(stages[1].weight))
    for owner in (None, kept(stages)):
        with ops.use_engine("native"):
            assert relative(conv_chain(x, stages), stated(x, stages)) <= 2 * LAYER
            assert relative(chain.Chain(stages)(x), stated(x, stages)) <= 2 * LAYER
        del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_weights_are_seen_to_change() -> None:
    """Those that are kept, and those that are not: the latter are packed at every call."""
    x, stages = made("up")
    owner, run = kept(stages[:2]), chain.Chain(stages)
    with ops.use_engine("native"):
        for s in stages:
            for edit in (
                lambda w: w.mul_(1.25),
                lambda w: setattr(w, "data", w.flip(2)),
                lambda w: setattr(w, "data", w.contiguous(memory_format=torch.channels_last) * -1),
                lambda w: w.set_(w.transpose(2, 3).clone()),
            ):
                edit(s.weight)
                assert relative(run(x), stated(x, stages)) <= 2 * LAYER
    del owner


@native.NEEDED
@pytest.mark.usefixtures("no_grad")
def test_what_was_packed_of_old_weights_is_freed() -> None:
    """Even where the batch sizes that it served do not come again."""
    x, stages = made("up", batch=8)
    owner, run = kept(stages), chain.Chain(stages)
    packed = []
    for batch in range(1, 9):
        run(x[:batch])
    for entry in weights._entries.values():
        packed += [weakref.ref(t) for t in entry.derived.values()]
    assert len(packed) >= len(stages)
    for s in stages:
        s.weight.mul_(2)
    run(x)
    gc.collect()
    assert [ref() for ref in packed if ref() is not None] == []
    del owner
