"""The arguments of the fused convolutions: layouts, dtypes and autocast, errors, and the engine forced."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from tests.support.float64_reference import BOTH, Problem, gradients, leaves, op
from tests.support.native_training import strided
from tests.support.tolerance import relative

pytestmark = pytest.mark.usefixtures("one_thread")

# --- layouts -----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("c_out", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (1, 4)], ids=str)
@pytest.mark.parametrize("stats", [False, True])
def test_strides_are_those_of_a_new_tensor(
    transposed: bool, channels_last: bool, c_out: int, size: tuple[int, int], stats: bool
) -> None:
    """Exactly, including size-1 dimensions, whatever the input's strides are."""
    problem = Problem(transposed, size=size, c_out=c_out, kernel=(3, 3), stride=1, stats=stats)
    call = problem.with_(channels_last=channels_last, dtype=torch.float32).call()
    for x in (call.x, call.x.contiguous(memory_format=torch.channels_last)):
        y = op(transposed)(*call._replace(x=x))[0]
        _, c, h, w = y.shape
        expected = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
        assert y.stride() == expected
        assert y.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )


def with_other_strides(t: Tensor) -> dict[str, Tensor]:
    """Copies of ``t`` with other strides: a slice, a step of 2, a transposed view, a storage offset."""
    big = torch.zeros([s + 3 for s in t.shape], dtype=t.dtype)
    big[tuple(slice(1, s + 1) for s in t.shape)] = t
    return {
        "slice": big[tuple(slice(1, s + 1) for s in t.shape)],
        "step": strided(t),
        "transposed": t.transpose(0, 3).contiguous().transpose(0, 3),
        "offset": torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape),
    }


@BOTH
@pytest.mark.parametrize("kind", ["slice", "step", "transposed", "offset"])
@pytest.mark.parametrize("stats", [False, True])
def test_inputs_of_any_strides(transposed: bool, kind: str, stats: bool) -> None:
    problem = Problem(transposed, prologue=True, in_act="relu", stats=stats, size=(4, 5))
    call = problem.call()
    expected = op(transposed)(*call)
    x, weight = with_other_strides(call.x)[kind], with_other_strides(call.weight)[kind]
    vectors = {name: torch.stack([t, t], 1)[:, 0] for name, t in leaves(call).items() if t.ndim == 1}
    odd = call._replace(x=x, weight=weight, **vectors)
    assert torch.equal(odd.x, call.x)
    odd = ops.Call(*[v.requires_grad_() if isinstance(v, Tensor) else v for v in odd])
    dy = problem.cotangents(call)
    for a, b in zip(op(transposed)(*odd), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)
    same = ops.Call(*[v.detach().clone().requires_grad_() if isinstance(v, Tensor) else v for v in call])
    got, want = (gradients(op(transposed)(*c), dy, leaves(c)) for c in (odd, same))
    for name, gradient in want.items():
        assert relative(got[name], gradient) < 1e-13


@BOTH
def test_gradients_of_any_strides(transposed: bool) -> None:
    problem = Problem(transposed, prologue=True, in_act="leaky_relu", out_act="tanh")
    call = problem.call(requires_grad=True)
    dy = problem.cotangents(call)[0]
    y = op(transposed)(*call)[0]
    want = torch.autograd.grad(y, call.x, dy, retain_graph=True)[0]
    for odd in with_other_strides(dy).values():
        assert relative(torch.autograd.grad(y, call.x, odd, retain_graph=True)[0], want) < 1e-13
    expanded = torch.autograd.grad(y, call.x, torch.ones(()).double().expand_as(y), retain_graph=True)[0]
    assert relative(expanded, torch.autograd.grad(y.sum(), call.x)[0]) < 1e-13


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_are_not_modified(transposed: bool, dtype: torch.dtype) -> None:
    """In-place activations must not reach the caller's tensors, and no output shares memory with them."""
    for problem in (
        Problem(transposed, in_act="relu", dtype=dtype),
        Problem(transposed, prologue=True, in_act="tanh", out_scale=True, out_act="relu", dtype=dtype),
        Problem(transposed, kernel=(1, 1), stride=1, padding=0, dtype=dtype, stats=True),
    ):
        call = problem.call()
        before = {name: t.clone() for name, t in leaves(call).items()}
        y, mean, var = op(transposed)(*call)
        given = {t.untyped_storage().data_ptr() for t in before.values()}
        y.zero_(), mean.zero_(), var.zero_()
        assert not given & {t.untyped_storage().data_ptr() for t in (y, mean, var) if t.numel()}
        for name, t in leaves(call).items():
            assert torch.equal(t, before[name]), name


@BOTH
@pytest.mark.parametrize("stats", [False, True])
def test_an_empty_batch(transposed: bool, stats: bool) -> None:
    """y is empty, of the right shape; statistics are NaN, as torch.mean's; gradients are zero."""
    problem = Problem(transposed, batch=0, prologue=True, in_act="relu", stats=stats, dtype=torch.float32)
    problem = problem.with_(out_scale=not stats, out_shift=not stats)
    call = problem.call(requires_grad=True)
    y, mean, var = op(transposed)(*call)
    assert y.shape == (0, *op(transposed)(*problem.with_(batch=1).call())[0].shape[1:])
    if stats:
        assert bool(mean.isnan().all()) and bool(var.isnan().all())  # noqa: PT018
    y.sum().backward()
    assert call.x.grad is not None
    assert call.x.grad.shape == call.x.shape
    for name, t in leaves(call).items():
        assert t.grad is not None, name
        assert not bool(t.grad.any()), name


# --- autocast ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_only_x_and_weight(transposed: bool, dtype: torch.dtype) -> None:
    problem = Problem(transposed, prologue=True, in_act="relu", stats=True, dtype=torch.float32)
    call = problem.call(requires_grad=True)
    call.scale.data += 1e-4  # a difference that bfloat16 would lose
    with torch.autocast("cpu", dtype=dtype):
        y, mean, var = op(transposed)(*call)
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    by_hand = call._replace(x=call.x.to(dtype), weight=call.weight.to(dtype))
    for got, want in zip((y, mean, var), op(transposed)(*by_hand), strict=True):
        assert torch.equal(got, want)

    (y.float().sum() + var.sum()).backward()
    for name, t in leaves(call).items():
        assert t.grad is not None, name
        assert t.grad.dtype == torch.float32, name
    expected = torch.autograd.grad(
        (lambda o: o[0].float().sum() + o[2].sum())(op(transposed)(*by_hand)), list(leaves(call).values())
    )
    for t, want in zip(leaves(call).values(), expected, strict=True):
        assert t.grad is not None
        assert torch.equal(t.grad, want)


@BOTH
def test_autocast_does_not_apply_to_float64_or_where_disabled(transposed: bool) -> None:
    call = Problem(transposed, prologue=True).call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(transposed)(*call)[0]
        assert y.dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            call32 = Problem(transposed, dtype=torch.float32).call()
            assert op(transposed)(*call32)[0].dtype == torch.float32
    assert torch.equal(y, op(transposed)(*call)[0])


@BOTH
def test_autocast_of_mixed_dtypes(transposed: bool) -> None:
    """x is bfloat16 already and the weight float32, as in the middle of a network."""
    call = Problem(transposed, dtype=torch.float32).call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(transposed)(call.x.bfloat16(), call.weight)[0]
        z = op(transposed)(call.x, call.weight.bfloat16())[0]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, z)


# --- errors ------------------------------------------------------------------------------------------------


def vector(channels: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(channels, dtype=dtype, device=device)


X, W = torch.ones(2, 3, 4, 4), torch.ones(3, 3, 4, 4)
INVALID: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of 3 dimensions": (
        {"x": torch.ones(3, 4, 4)},
        ValueError,
        r"x must be \[N, C, H, W\], got \[3, 4, 4\]",
    ),
    "weight of 2 dimensions": (
        {"weight": torch.ones(3, 3)},
        ValueError,
        r"weight must have 4 dimensions, got \[3, 3\]",
    ),
    "integers": (
        {"x": X.int(), "weight": W.int()},
        TypeError,
        r"x must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    "complex": (
        {"x": X.cfloat(), "weight": W.cfloat()},
        TypeError,
        r"x must be float16, bfloat16, float32 or float64, got torch.complex64",
    ),
    "weight's dtype": (
        {"weight": W.double()},
        TypeError,
        r"weight must have x's dtype torch.float32, got torch.float64",
    ),
    "weight's device": (
        {"weight": W.to("meta")},
        ValueError,
        r"weight must be on x's device cpu, got meta",
    ),
    "x's device": ({"x": X.to("meta")}, ValueError, r"weight must be on x's device meta, got cpu"),
    "channels": (
        {"x": torch.ones(2, 5, 4, 4)},
        ValueError,
        r"x has 5 channels, but weight \[C_\w+, C_\w+, kH, kW\] = \[3, 3, 4, 4\] expects 3",
    ),
    "stride": (
        {"stride": 0},
        ValueError,
        r"stride must be at least 1 and padding at least 0, got 0 and 1",
    ),
    "padding": (
        {"padding": -1},
        ValueError,
        r"stride must be at least 1 and padding at least 0, got 2 and -1",
    ),
    "in_act": ({"in_act": "gelu"}, ValueError, r"in_act must be one of \(.*'leaky_relu'.*\), got 'gelu'"),
    "out_act": ({"out_act": ""}, ValueError, r"out_act must be one of \(.*'sigmoid'.*\), got ''"),
    "slope": ({"slope": -0.5}, ValueError, r"slope must not be negative, got -0.5"),
    "scale alone": (
        {"scale": vector(3)},
        ValueError,
        r"center, scale and shift must be given together or not at all",
    ),
    "no center": (
        {"scale": vector(3), "shift": vector(3)},
        ValueError,
        r"center, scale and shift must be given together or not at all",
    ),
    "stats with an affine map": (
        {"stats": True, "out_shift": vector(3)},
        ValueError,
        r"stats returns the raw convolution: out_scale, out_shift and out_act must be absent",
    ),
    "stats with an activation": (
        {"stats": True, "out_act": "relu"},
        ValueError,
        r"stats returns the raw convolution: out_scale, out_shift and out_act must be absent",
    ),
    "length of scale": (
        {"center": vector(3), "scale": vector(4), "shift": vector(3)},
        ValueError,
        r"scale must be \[3\], one value per channel, got \[4\]",
    ),
    "dimensions of center": (
        {"center": vector(3)[:, None], "scale": vector(3), "shift": vector(3)},
        ValueError,
        r"center must be \[3\], one value per channel, got \[3, 1\]",
    ),
    "dtype of shift": (
        {"center": vector(3), "scale": vector(3), "shift": vector(3, torch.bfloat16)},
        TypeError,
        r"shift must be torch.float32 for x of torch.float32, got torch.bfloat16",
    ),
    "dtype of out_scale": (
        {"x": X.bfloat16(), "weight": W.bfloat16(), "out_scale": vector(3, torch.bfloat16)},
        TypeError,
        r"out_scale must be torch.float32 for x of torch.bfloat16, got torch.bfloat16",
    ),
    "dtype with float64": (
        {"x": X.double(), "weight": W.double(), "out_shift": vector(3)},
        TypeError,
        r"out_shift must be torch.float64 for x of torch.float64, got torch.float32",
    ),
    "length of out_shift": (
        {"out_shift": vector(2)},
        ValueError,
        r"out_shift must be \[3\], one value per channel, got \[2\]",
    ),
    "device of out_scale": (
        {"out_scale": vector(3, device="meta")},
        ValueError,
        r"out_scale must be on x's device cpu, got meta",
    ),
    "a map too small": (
        {"x": torch.ones(2, 3, 1, 1), "padding": 0, "transposed": False},
        ValueError,
        r"x \[2, 3, 1, 1\] is too small for a 4×4 kernel with stride 2 and padding 0",
    ),
    "all padding": (
        {"x": torch.ones(2, 3, 1, 1), "padding": 2, "transposed": True},
        ValueError,
        r"x \[2, 3, 1, 1\] is too small for a 4×4 kernel with stride 2 and padding 2",
    ),
}


@BOTH
@pytest.mark.parametrize("name", INVALID)
def test_invalid_arguments_are_named(transposed: bool, name: str) -> None:
    changes, error, message = INVALID[name]
    arguments = {"x": X, "weight": W, **changes}
    transposed = arguments.pop("transposed", transposed)
    with pytest.raises(error, match=message):
        op(transposed)(**arguments)


def test_the_error_names_the_weight_layout() -> None:
    with pytest.raises(ValueError, match=r"weight \[C_out, C_in, kH, kW\] = \[2, 3, 4, 4\] expects 3"):
        ops.conv2d_fused(torch.ones(1, 2, 4, 4), torch.ones(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"weight \[C_in, C_out, kH, kW\] = \[2, 3, 4, 4\] expects 2"):
        ops.conv_transpose2d_fused(torch.ones(1, 3, 4, 4), torch.ones(2, 3, 4, 4))


def test_an_invalid_call_under_autocast_and_with_gradients() -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="in_act must be one of"),
    ):
        ops.conv2d_fused(X.clone().requires_grad_(), W, in_act="gelu")


# --- engines -----------------------------------------------------------------------------------------------


def test_the_chosen_engine_is_recorded() -> None:
    with ops.recording() as choices:
        ops.conv2d_fused(X.double(), W.double())
        ops.conv_transpose2d_fused(X.double(), W.double())
    reason = "native: the kernels do not support float64"
    assert choices == [
        ops.Choice("conv2d_fused", "reference", reason),
        ops.Choice("conv_transpose2d_fused", "reference", reason),
    ]
    with ops.use_engine("reference"), ops.recording() as choices:
        ops.conv2d_fused(X, W)
    assert choices == [ops.Choice("conv2d_fused", "reference", "engine 'reference' is forced")]
    ops.conv2d_fused(X, W)
    assert len(choices) == 1


def test_an_unknown_engine() -> None:
    with pytest.raises(ValueError, match=r"engine must be one of \('auto', 'reference', .*\), got 'cuda'"):  # noqa: SIM117
        with ops.use_engine("cuda"):
            pass
    with ops.recording() as choices:
        ops.conv2d_fused(X, W)
    assert choices[0].engine == "reference"


def test_the_engine_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), ops.use_engine("reference"):
        raise KeyError
    with ops.recording() as choices:
        ops.conv2d_fused(X, W)
    assert "asked for" not in choices[0].reason


def in_a_new_process(engine: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DCGAN_ENGINE": engine}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_engine_of_the_environment() -> None:
    code = "import torch; from dcgan.kernels import ops\nwith ops.recording() as r: "
    code += "ops.conv2d_fused(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))\nprint(*r[0])"
    done = in_a_new_process("reference", code)
    assert done.stdout.strip() == "conv2d_fused reference engine 'reference' is forced", done.stderr
    done = in_a_new_process("fastest", code)
    assert done.returncode != 0
    assert "ValueError: DCGAN_ENGINE must be one of ('auto', 'reference'" in done.stderr
    assert "got 'fastest'" in done.stderr


def test_a_forced_engine_that_does_not_cover_the_call_is_an_error() -> None:
    """There is no fallback to another engine: Triton does not support float64."""
    with (
        ops.use_engine("triton"),
        pytest.raises(RuntimeError, match="engine 'triton' is forced, but does not cover this conv2d"),
    ):
        ops.conv2d_fused(X.double(), W.double())
