"""Fused and standalone prologues give the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dcgan.kernels.gpu import prologue_kernel
from dcgan.kernels.gpu.launcher import Launch, Pointers
from dcgan.kernels.reference import ACTIVATIONS, activate, activation_backward, normalise
from dcgan.kernels.spec import Call, ConvSpec, Operand, specify
from tests.interpreter.cases import (
    DTYPES,
    NAN,
    SHAPES,
    TAILS,
    assert_accurate,
    cotangents,
    exact,
    prologues,
    surrounded,
    training_call,
    triton_results,
)
from tests.support.float64_reference import column, pairwise

SOME = [  # every kernel, every kind of prologue, du shared by dgrad and wgrad or not
    ("up_few", "affine_relu", "statistics"),
    ("up_narrow_3", "relu", "scale_shift_tanh"),
    ("down_odd", "affine_leaky_relu", "statistics"),
    ("down_narrow_1", "sigmoid", "tanh"),
    ("down_narrow_3", "plain", "statistics"),
    ("dense_up", "affine_tanh", "scale"),
    ("dense_down", "affine_sigmoid", "statistics"),
    ("dense_narrow_3", "affine_leaky_relu", "shift_sigmoid"),
]
MORE = [
    tuple(row.values())
    for row in pairwise(
        name=list(SHAPES),
        before=["relu", "affine_leaky_relu", "affine_sigmoid"],
        after=["statistics", "tanh", "scale", "scale_shift_leaky_relu"],
    )
]


@pytest.fixture
def standalone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of kinds of the standalone prologue kernels that have run, filled as they run."""
    kinds: list[str] = []
    launch = prologue_kernel.launch

    def recorded(spec: ConvSpec, operand: Operand, tensors: Pointers, out: Tensor) -> Launch:
        kinds.append(operand.function)
        return launch(spec, operand, tensors, out)

    monkeypatch.setattr(prologue_kernel, "launch", recorded)
    return kinds


def expected_standalone(call: Call) -> list[str]:
    """Return the expected kinds: x̂ for the product and again for wgrad, du once for dgrad and wgrad together.

    With an ``out_scale`` dgrad and wgrad need different du, because wgrad applies the scale to its result.
    """
    input_kind = "affine" if call.scale is not None else "none" if call.in_act == "none" else "act"
    output_kinds = ["statistics"] if call.stats else ["gradient"] * (call.out_act != "none")
    if call.out_scale is not None:
        output_kinds = ["gradient"] * (1 if call.out_act == "none" else 2)
    return sorted([input_kind] * (0 if input_kind == "none" else 2) + output_kinds)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [*SOME, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE if row not in SOME)],
)
def test_fused_and_standalone_prologues_give_the_same_bits(
    name: str, before: str, after: str, standalone: list[str]
) -> None:
    shape = SHAPES[name]
    dtype = DTYPES[(list(SHAPES).index(name) + list(TAILS).index(after)) % 3]
    call = training_call(shape, before, after, dtype)
    grad_outputs = cotangents(call, shape.transposed)
    with prologues(products=True, gradients=True):
        fused = triton_results(call, shape.transposed, grad_outputs)
    assert not standalone
    assert_accurate(fused, call, shape.transposed, grad_outputs)
    for products, gradients in ((True, False), (False, True), (False, False)):
        standalone.clear()
        with prologues(products, gradients):
            separate = triton_results(call, shape.transposed, grad_outputs)
        for key, result in separate.items():
            assert torch.equal(result, fused[key]), f"{key}, {products=}, {gradients=}"
    assert sorted(standalone) == expected_standalone(call)


def reference(operand: Operand, tensors: Pointers, slope: float) -> Tensor:
    """Return prologue(x) in float64."""
    x, other, center, scale, shift = (None if t is None else t.double() for t in tensors)
    count = x.numel() // x.shape[1]
    if operand.function == "act":
        return activate(x, operand.act, slope)
    if operand.function == "gradient":
        g = activation_backward(x, other, operand.act, slope)
        return g if scale is None else g * column(scale)
    if operand.function == "affine":
        return activate(normalise(x, center, scale, shift), operand.act, slope)
    return x + column(shift) / count + 2 * column(scale) / count * (other - column(center))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "act"),
    [
        *itertools.product(["act", "affine", "gradient", "scaled gradient"], ACTIVATIONS),
        ("statistics", "none"),
    ],
)
def test_standalone_prologue_kernel(kind: str, act: str, dtype: torch.dtype) -> None:
    """Several tiles in both directions, and a single pixel; strided tensors, with nothing else written."""
    for n, c, h, w in ((2, 20, 15, 7), (1, 70, 3, 2), (3, 1, 40, 10), (1, 1, 1, 1)):
        x, other = (surrounded(exact(n, c, h, w).to(dtype)) for _ in range(2))
        center, scale, shift = (surrounded(exact(c)) for _ in range(3))
        tensors = {
            "act": Pointers(x),
            "affine": Pointers(x, None, center, scale, shift),
            "gradient": Pointers(x, other),
            "scaled gradient": Pointers(x, other, None, scale),
            "statistics": Pointers(x, other, center, scale, shift),
        }[kind]
        other_stride = None if tensors.other is None else other.stride()
        operand = Operand(
            (c, h, w), x.stride(), kind.removeprefix("scaled "), act, tensors.scale is not None,
            tensors.shift is not None, other_stride,
        )  # fmt: skip
        spec = specify(Call(x, torch.zeros(c, 1, 4, 4, dtype=dtype), slope=0.1), True)
        out = surrounded(torch.full_like(x, NAN, memory_format=torch.channels_last), 7.0)
        prologue_kernel.launch(spec, operand, tensors, out)()
        expected = reference(operand, tensors, 0.1)
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        # Sums of a few terms of order one in float32, then one rounding to the dtype.
        torch.testing.assert_close(out.double(), expected, rtol=rounding + 1e-6, atol=2e-6)
        out.fill_(7.0)
        assert out._base is not None
        assert (out._base == 7.0).all()


def test_the_output_is_channels_last() -> None:
    x = torch.randn(2, 3, 4, 5)
    spec = specify(Call(x, torch.zeros(3, 1, 4, 4), in_act="relu"), True)
    operand, out = prologue_kernel.materialize(spec, spec.x, Pointers(x))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert operand == Operand((3, 4, 5), out.stride())
