"""Random layers and chains that the native engine covers: shapes, strides, alignment, threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcgan.kernels import chain, ops
from dcgan.kernels.reference import ACTIVATIONS
from dcgan.kernels.spec import Stage
from tests.support import native
from tests.support.chains import expected_output
from tests.support.float64_reference import Problem
from tests.support.native import (
    CHANNELS,
    LAYER,
    SIDES,
    SPATIAL,
    assert_correct,
    forced,
    geometries,
    instruction_set,
    laid_out,
    layouts,
)

pytestmark = [native.NEEDED, pytest.mark.usefixtures("nan_in_new_memory", "threads_restored")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = st.integers(0, 2**31)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    return Problem(
        *draw(geometries()),
        out_scale=draw(st.booleans()),
        out_shift=draw(st.booleans()),
        out_act=draw(st.sampled_from(ACTIVATIONS)),
        slope=draw(st.sampled_from((0.0, 0.2, 2.0))),
        dtype=draw(st.sampled_from(DTYPES)),
        channels_last=draw(st.booleans()),
        seed=draw(SEEDS),
    )


@settings(deadline=None, max_examples=60)
@given(
    problem=problems(),
    x_layout=layouts(4),
    weight_layout=layouts(4),
    algorithm=st.sampled_from(SPATIAL),
    isa=st.sampled_from(native.ISAS),
    threads=st.integers(1, 4),
)
def test_any_layer(
    problem: Problem,
    x_layout: tuple[list[int], list[int], int],
    weight_layout: tuple[list[int], list[int], int],
    algorithm: str,
    isa: str,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    call = problem.call()
    odd = call._replace(x=laid_out(call.x, x_layout), weight=laid_out(call.weight, weight_layout))
    assert torch.equal(odd.x, call.x)
    with instruction_set(isa), forced(algorithm):
        assert_correct(problem, odd)


@st.composite
def chains(draw: st.DrawFn) -> tuple[Tensor, list[Stage]]:
    """Draw chains of layers, with or without bias, BatchNorm and affine maps."""
    torch.manual_seed(draw(SEEDS))
    channels, height, width = draw(CHANNELS), draw(SIDES), draw(SIDES)
    if draw(st.booleans()):
        height = width = 1
    x = torch.randn(draw(st.integers(1, 4)), channels, height, width)
    stages: list[Stage] = []
    for _ in range(draw(st.integers(1, 4))):
        transposed = height * width < 40 if height == 1 or width == 1 else draw(st.booleans())
        stride, padding, kernel = 2, 1, 4
        if height == width and height <= 5 and draw(st.booleans()):
            kernel = draw(st.integers(1, 4)) if height == 1 and transposed else height
            transposed, stride, padding = transposed and height == 1, draw(st.integers(1, 2)), 0
        if height * width > 200:
            transposed = False
        c_out = draw(CHANNELS)
        weight = torch.randn((channels, c_out) if transposed else (c_out, channels), dtype=torch.float64)
        weight = weight[:, :, None, None] * torch.randn(kernel, kernel) / (channels * kernel**2) ** 0.5
        biased, normed, affine = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
        stages.append(
            Stage(
                transposed,
                weight.float(),
                bias=torch.randn(c_out) if biased else None,
                scale=torch.randn(c_out) if affine else None,
                shift=torch.randn(c_out) if affine else None,
                mean=torch.randn(c_out) if normed else None,
                var=torch.rand(c_out) + 0.5 if normed else None,
                eps=1e-5,
                act=draw(st.sampled_from(ACTIVATIONS)),
                slope=0.2,
                stride=stride,
                padding=padding,
            )
        )
        channels = c_out
        if transposed:
            height, width = ((s - 1) * stride - 2 * padding + kernel for s in (height, width))
        else:
            height, width = ((s + 2 * padding - kernel) // stride + 1 for s in (height, width))
    return x, stages


@settings(deadline=None, max_examples=60)
@given(
    layers=chains(),
    layout=layouts(4),
    algorithm=st.sampled_from(SPATIAL),
    isa=st.sampled_from(native.ISAS),
    threads=st.integers(1, 4),
    channels_last=st.booleans(),
)
def test_any_chain(
    layers: tuple[Tensor, list[Stage]],
    layout: tuple[list[int], list[int], int],
    algorithm: str,
    isa: str,
    threads: int,
    channels_last: bool,
) -> None:
    torch.set_num_threads(threads)
    x, stages = layers
    with instruction_set(isa), forced(algorithm), ops.use_engine("native"):
        y = chain.conv_chain(laid_out(x, layout), stages, channels_last)
    expected = expected_output(x, stages)
    assert y.shape == expected.shape
    # The weights are scaled so that y's elements are of order 1, unless an activation changes that.
    size = max(float(expected.norm()), expected.numel() ** 0.5)
    assert float((y.double() - expected).norm()) <= len(stages) * LAYER * size
