"""A prologue inside a product, or as a pass of its own before: the same bits either way."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    DTYPES,
    NAN,
    SHAPES,
    TAILS,
    assert_right,
    cotangents,
    exact,
    prologues,
    surrounded,
    training_call,
    triton_results,
)
from statement import column, pairwise
from torch import Tensor

from dcgan.kernels.call import Call
from dcgan.kernels.gpu import passes
from dcgan.kernels.gpu.launch import Launch, Prologue
from dcgan.kernels.reference import ACTIVATIONS, activate, activation_backward, normalise

SOME = [  # every kernel, every kind of prologue, du written for two products and for one
    ("up_few", "affine_relu", "statistics"),
    ("up_narrow_3", "relu", "scale_shift_tanh"),
    ("down_odd", "affine_leaky_relu", "statistics"),
    ("down_narrow_1", "sigmoid", "tanh"),
    ("down_narrow_3", "as_it_is", "statistics"),
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
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the passes that have run."""
    kinds: list[str] = []
    launch = passes.launch

    def recorded(x: Tensor, made_by: Prologue, slope: float, out: Tensor) -> Launch:
        kinds.append(made_by.kind)
        return launch(x, made_by, slope, out)

    monkeypatch.setattr(passes, "launch", recorded)
    return kinds


def expected_passes(call: Call) -> list[str]:
    """x̂ once for the product and once for the weight gradient; du once for both, if it is the same for both.

    It is not where there is an ``out_scale``, which multiplies the weight's gradient afterwards.
    """
    of_x = "affine" if call.scale is not None else "none" if call.in_act == "none" else "act"
    of_y = ["statistics"] if call.stats else ["gradient"] * (call.out_act != "none")
    if call.out_scale is not None:
        of_y = ["gradient"] * (1 if call.out_act == "none" else 2)
    return sorted([of_x] * (0 if of_x == "none" else 2) + of_y)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [*SOME, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE if row not in SOME)],
)
def test_either_way(name: str, before: str, after: str, written: list[str]) -> None:
    shape = SHAPES[name]
    dtype = DTYPES[(list(SHAPES).index(name) + list(TAILS).index(after)) % 3]
    call = training_call(shape, before, after, dtype)
    given = cotangents(call, shape.transposed)
    with prologues(products=True, gradients=True):
        inside = triton_results(call, shape.transposed, given)
    assert not written
    assert_right(inside, call, shape.transposed, given)
    for products, gradients in ((True, False), (False, True), (False, False)):
        written.clear()
        with prologues(products, gradients):
            apart = triton_results(call, shape.transposed, given)
        for key, result in apart.items():
            assert torch.equal(result, inside[key]), f"{key}, {products=}, {gradients=}"
    assert sorted(written) == expected_passes(call)


def made(prologue: Prologue, x: Tensor, slope: float) -> Tensor:
    """What the prologue makes of x, in float64."""
    center, scale, shift, other = (
        None if t is None else t.double()
        for t in (prologue.center, prologue.scale, prologue.shift, prologue.other)
    )
    x, count = x.double(), x.numel() // x.shape[1]
    if prologue.kind == "act":
        return activate(x, prologue.act, slope)
    if prologue.kind == "gradient":
        assert other is not None
        g = activation_backward(x, other, prologue.act, slope)
        return g if scale is None else g * column(scale)
    assert center is not None
    assert scale is not None
    assert shift is not None
    if prologue.kind == "affine":
        return activate(normalise(x, center, scale, shift), prologue.act, slope)
    assert other is not None
    return x + column(shift) / count + 2 * column(scale) / count * (other - column(center))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "act"),
    [
        *itertools.product(["act", "affine", "gradient", "scaled gradient"], ACTIVATIONS),
        ("statistics", "none"),
    ],
)
def test_every_pass(kind: str, act: str, dtype: torch.dtype) -> None:
    """Of several tiles in both directions, and of one pixel; between strides, with nothing else touched."""
    for n, c, h, w in ((2, 20, 15, 7), (1, 70, 3, 2), (3, 1, 40, 10), (1, 1, 1, 1)):
        x, other = (surrounded(exact(n, c, h, w).to(dtype)) for _ in range(2))
        center, scale, shift = (surrounded(exact(c)) for _ in range(3))
        prologue = {
            "act": Prologue("act", act),
            "affine": Prologue("affine", act, center, scale, shift),
            "gradient": Prologue("gradient", act, other=other),
            "scaled gradient": Prologue("gradient", act, None, scale, None, other),
            "statistics": Prologue("statistics", "none", center, scale, shift, other),
        }[kind]
        out = surrounded(passes.output(x).fill_(NAN), 7.0)
        passes.launch(x, prologue, 0.1, out)()
        expected = made(prologue, x, 0.1)
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        # Sums of a few terms of order one in float32, then one rounding to the dtype.
        torch.testing.assert_close(out.double(), expected, rtol=rounding + 1e-6, atol=2e-6)
        out.fill_(7.0)
        assert out._base is not None
        assert (out._base == 7.0).all()


def test_the_output_is_channels_last() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert passes.output(x).is_contiguous(memory_format=torch.channels_last)
