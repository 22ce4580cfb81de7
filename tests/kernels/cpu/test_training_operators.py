"""The native engine in training, as operators: schema, autograd modes, and calls that it does not cover."""

from __future__ import annotations

import pytest
import torch

from dcgan.kernels import ops
from dcgan.kernels.cpu import library, products
from dcgan.kernels.spec import specify
from tests.support import native
from tests.support.engine_results import requiring_grad
from tests.support.float64_reference import (
    BOTH,
    leaves,
    op,
)
from tests.support.native_training import (
    backward_of,
    backward_operator,
    layer,
    random_call,
)

pytestmark = [native.NEEDED, pytest.mark.usefixtures("nan_in_new_memory", "threads_restored")]


@pytest.mark.parametrize(
    ("prologue", "epilogue"),
    [
        *(("affine_relu", "statistics"), ("leaky_relu", "tanh"), ("identity", "statistics")),
        *(("affine_relu", "scale_shift_tanh"), ("identity", "scale")),
    ],
)
@BOTH
def test_opcheck(transposed: bool, prologue: str, epilogue: str) -> None:
    call = random_call(layer("direct", transposed, prologue, epilogue))
    forward = getattr(torch.ops.dcgan, ops.NAMES[transposed]).default
    with ops.use_engine("native"):
        torch.library.opcheck(forward, tuple(requiring_grad(call)))
        torch.library.opcheck(backward_operator(transposed), tuple(backward_of(call, transposed)))


def test_grad_mode_does_not_change_outputs() -> None:
    """The same outputs under no_grad and inference mode, with weights frozen or not."""
    for epilogue in ("statistics", "scale_shift_leaky_relu"):
        call = random_call(layer("direct", True, "affine_relu", epilogue))
        with ops.use_engine("native"):
            expected = [t.detach() for t in op(True)(*requiring_grad(call))]
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    for now in (call, requiring_grad(call)):
                        assert all(map(torch.equal, op(True)(*now), expected))


# --- calls not covered --------------------------------------------------------------------------------------


def uncovered() -> dict[str, tuple[ops.Call, str]]:
    call = layer("direct", False, "affine_relu", "statistics").call()
    half = call._replace(x=call.x.half(), weight=call.weight.half())
    wide = call._replace(**{name: t.double() for name, t in leaves(call).items()})
    square, map_ = "kernel is not square", "neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
    return {
        "float64": (wide, "do not support float64"),
        "float16": (half, "do not support float16"),
        "bfloat16": (
            half._replace(x=half.x.bfloat16(), weight=half.weight.bfloat16()),
            "do not support bfloat16",
        ),
        "tanh": (call._replace(in_act="tanh"), "do not support tanh in a prologue"),
        "sigmoid": (call._replace(in_act="sigmoid"), "do not support sigmoid in a prologue"),
        "kernel 3": (call._replace(weight=call.weight[..., :3, :3]), map_),
        "kernel 4×3": (call._replace(weight=call.weight[..., :3]), square),
        "stride 1": (call._replace(stride=1), map_),
        "padding 0": (call._replace(padding=0), map_),
    }


@pytest.mark.parametrize("name", uncovered())
def test_calls_not_covered(name: str) -> None:
    """A forced engine raises an error with the reason; otherwise the reference runs and records it."""
    call, reason = uncovered()[name]
    with ops.use_engine("native"), pytest.raises(RuntimeError, match=reason):
        ops.conv2d_fused(*call)
    call = requiring_grad(call)
    with ops.use_engine("auto"), ops.recording() as choices:
        ops.conv2d_fused(*call)[0].sum().backward()
    assert [choice.op for choice in choices] == ["conv2d_fused", "conv2d_fused_backward"]
    for choice in choices:
        assert choice.engine == "reference"
        assert reason in choice.reason
        assert choice.reason.startswith("native: ")


@BOTH
def test_autocast_uses_the_reference(transposed: bool) -> None:
    call = requiring_grad(random_call(layer("direct", transposed, "affine_relu", "statistics")))
    with torch.autocast("cpu", torch.bfloat16), ops.recording() as choices:
        op(transposed)(*call)[0].float().sum().backward()
    assert [choice.engine for choice in choices] == ["reference", "reference"]
    assert "do not support bfloat16" in choices[0].reason


def test_an_unsupported_algorithm_is_an_error() -> None:
    """The library raises an error if a forced algorithm does not support the product."""
    call = random_call(layer("direct", False, "affine_relu", "statistics"))
    it = backward_of(call, False)
    spec, backward_spec = (specify(arguments, False) for arguments in (call, it))
    with pytest.raises(library.NativeError, match="padding"):
        products.fprop(spec, call, "dense")
    with pytest.raises(library.NativeError, match="narrow"):
        products.backward(backward_spec, it, dgrad="narrow")
    with pytest.raises(library.NativeError, match="wgrad"):
        products.backward(backward_spec, it, wgrad="f2")
