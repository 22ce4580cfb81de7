"""conv_chain equals its ops in sequence, and names the argument at fault in errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import chain, ops
from dcgan.kernels.chain import conv_chain
from tests.support import native
from tests.support.chains import (
    KINDS,
    OP,
    VECTORS,
    arguments,
    expected_output,
    freeze_weights,
    run_separately,
    small_chain,
    stage,
)
from tests.support.native import LAYER, allowed
from tests.support.tolerance import relative

pytestmark = pytest.mark.usefixtures("one_thread", "empty_weight_cache")


@KINDS
@pytest.mark.parametrize("channels_last", [True, False])
def test_reference_equals_the_ops_in_sequence(kind: str, channels_last: bool) -> None:
    x, stages = small_chain(kind, torch.float64)
    y = conv_chain(x, stages, channels_last)
    expected = run_separately(x, stages, channels_last)
    assert relative(y, expected) < 1e-14
    assert relative(y, expected_output(x, stages)) < 1e-13
    assert y.stride() == expected.stride()


@native.NEEDED
@KINDS
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", native.SPATIAL)
def test_native_equals_the_formula(
    kind: str, channels_last: bool, dtype: torch.dtype, algorithm: str
) -> None:
    """16-bit tensors are rounded once, at the end; strides are those of the separate ops."""
    x, stages = small_chain(kind, dtype)
    with native.forced(algorithm), native.fresh_memory_is_nan():
        with ops.use_engine("native"), ops.recording() as choices:
            y = conv_chain(x, stages, channels_last)
        assert [c.engine for c in choices] == ["native"] * len(stages)
    assert y.dtype == dtype
    assert relative(y, expected_output(x, stages)) <= allowed(dtype, 2 * LAYER)
    with ops.use_engine("reference"):
        assert y.stride() == run_separately(x, stages, channels_last).stride()


@native.NEEDED
@pytest.mark.parametrize("given", ["c", "cs", "cb", "csb", "cn", "csbn"])
@pytest.mark.parametrize("algorithm", [*native.SPATIAL, "dense"])
@pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
def test_convolution_bias(transposed: bool, algorithm: str, given: str) -> None:
    """Alone, with an affine map and before a BatchNorm; every activation, on maps of odd sizes."""
    narrow, dense = algorithm == "narrow", algorithm == "dense"
    c_in, c_out = (9, 3 if narrow else 7) if transposed else (3 if narrow else 9, 7)
    shape = {"stride": 1, "padding": 0} if dense else {}
    size = (1, 1) if dense and transposed else (4, 4) if dense else (5, 7)
    for batch, act in ((1, "none"), (5, "relu"), (1, "leaky_relu"), (5, "tanh"), (1, "sigmoid")):
        x = torch.randn(batch, c_in, *size)
        stages = [stage(transposed, c_in, c_out, given=given, act=act, slope=0.3, **shape)]
        with native.forced(algorithm), native.fresh_memory_is_nan(), ops.use_engine("native"):
            found = conv_chain(x, stages), chain.Chain(stages)(x)
        with ops.use_engine("reference"):
            assert relative(conv_chain(x, stages), expected_output(x, stages)) <= LAYER
        for y in found:
            assert relative(y, expected_output(x, stages)) <= LAYER


@native.NEEDED
@KINDS
def test_all_entry_points_agree_bitwise(kind: str) -> None:
    """The function, the operator and a Chain."""
    x, stages = small_chain(kind)
    with ops.use_engine("native"), torch.no_grad():
        expected = conv_chain(x, stages)
        assert torch.equal(OP(*arguments(x, stages)), expected)
        assert torch.equal(OP(*arguments(x, stages)[:-1]), expected)
        assert torch.equal(chain.Chain(stages)(x), expected)
    with ops.use_engine("native"):
        assert torch.equal(chain.Chain(stages)(x), expected)


@native.NEEDED
def test_a_layer_without_native_kernels_falls_back_to_the_reference() -> None:
    x, stages = small_chain("down")
    stages[1:1] = [stage(False, 7, 7, kernel=5, given="sbn", act="relu", stride=1, padding=2)]
    owner = freeze_weights(stages)
    with ops.recording() as choices:
        y = conv_chain(x, stages)
    assert relative(y, expected_output(x, stages)) <= 2 * LAYER
    assert [c.engine for c in choices] == ["native", "reference", "native", "native", "native"]
    assert choices[1].reason == "native: neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
    with torch.no_grad():
        assert relative(chain.Chain(stages)(x), expected_output(x, stages)) <= 2 * LAYER
    with (
        ops.use_engine("native"),
        pytest.raises(RuntimeError, match="engine 'native' is forced, but does not cover this conv2d"),
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
    owner = freeze_weights(stages)
    with ops.use_engine(engine), torch.no_grad():
        assert relative(conv_chain(x, stages), expected_output(x, stages)) <= layers * LAYER
        assert relative(chain.Chain(stages)(x), expected_output(x, stages)) <= layers * LAYER
    del owner


@native.NEEDED
def test_more_images_than_a_block_holds() -> None:
    """Intermediate activations are computed for some 30 images at a time; results must not depend on it."""
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
    x, stages = small_chain(kind)
    owner = freeze_weights(stages)
    with ops.use_engine(engine), torch.no_grad():
        whole = conv_chain(x, stages, channels_last)
        for f in (conv_chain, lambda x, s, c: chain.Chain(s)(x, c)):
            y = f(x[:0], stages, channels_last)
            assert y.shape == (0, *whole.shape[1:])
            assert y.dtype == x.dtype
    del owner


OTHER_VECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda v: v.bfloat16(),  # as in the BatchNorms of a bfloat16 network
    "float64": lambda v: v.double(),
    "strided": lambda v: torch.stack([v, torch.full_like(v, float("nan"))], 1)[:, 0],
    "expanded": lambda v: v[:1].expand_as(v),
    "negated by a flag": lambda v: torch._neg_view(-v),
}


@native.NEEDED
@pytest.mark.parametrize("name", OTHER_VECTORS)
def test_vectors_of_other_dtypes_and_strides(name: str) -> None:
    x, stages = small_chain("up")
    changed = [
        s._replace(**{n: OTHER_VECTORS[name](v) for n in VECTORS if (v := getattr(s, n)) is not None})
        for s in stages
    ]
    owner = freeze_weights(changed)
    with torch.no_grad():
        for y in (conv_chain(x, changed), chain.Chain(changed)(x)):
            assert relative(y, expected_output(x, changed)) <= 2 * LAYER
    del owner


# --- errors ------------------------------------------------------------------------------------------------


INVALID: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
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
    "channels": (
        {"weight": torch.ones(10, 6, 4, 4)},
        ValueError,
        r"x has 7 channels, but weight .* expects 6",
    ),
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


@pytest.mark.parametrize("name", INVALID)
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_invalid_arguments_are_named(name: str, engine: str) -> None:
    """On any engine: none reads a vector out of bounds or broadcasts it."""
    changes, error, message = INVALID[name]
    x, stages = small_chain("down")
    stages[1] = stages[1]._replace(**changes)
    owner = freeze_weights([stages[0], *stages[2:]])
    for run in (lambda x: conv_chain(x, stages), chain.Chain(stages)):
        with ops.use_engine(engine), torch.no_grad(), pytest.raises(error, match=message):
            run(x)
    del owner


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_invalid_x_and_no_stages(engine: str) -> None:
    x, stages = small_chain("down")
    with ops.use_engine(engine), torch.no_grad():
        for run in (lambda x: conv_chain(x, stages), chain.Chain(stages)):
            for wrong, error, message in (
                (x[0], ValueError, r"x must be \[N, C, H, W\], got \[3, 16, 16\]"),
                (x.int(), TypeError, r"x must be float16, bfloat16, float32 or float64, got torch.int32"),
                (x[:, :2], ValueError, r"x has 2 channels, but weight .* expects 3"),
                (x.double(), TypeError, r"weight must have x's dtype torch.float64, got torch.float32"),
                (x.to("meta"), ValueError, r"bias must be on x's device meta, got cpu"),
            ):
                with pytest.raises(error, match=message):
                    run(wrong)
    with pytest.raises(ValueError, match="stages must hold at least one layer, got none"):
        conv_chain(x, [])
