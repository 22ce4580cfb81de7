"""The launches of BatchNorm in training, one by one, against float64.

Inputs are surrounded by NaN; outputs start as NaN and are surrounded by a sentinel that no launch may change.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from dcgan.kernels import reference
from dcgan.kernels.gpu import batchnorm
from dcgan.kernels.gpu.launcher import INT32_MAX
from dcgan.kernels.reference import activate
from tests.interpreter import repair
from tests.interpreter.cases import DTYPES, NAN, surrounded
from tests.interpreter.test_training_kernels import (
    COUNTS,
    SENTINEL,
    assert_merged,
    contiguous_output,
    partial_statistics,
    written,
)

VECTOR_DTYPES = (None, *DTYPES)
EPS = 1e-3


def bordered(t: Tensor, value: float = NAN) -> Tensor:
    """Return a copy of t, with its strides, in memory that is filled with ``value`` before and after it."""
    memory = torch.full((t.numel() + 128,), value, dtype=t.dtype)
    return memory.as_strided(t.shape, t.stride(), 64).copy_(t)


def nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def vector(dtype: torch.dtype | None, channels: int) -> Tensor | None:
    return None if dtype is None else surrounded(torch.randn(channels).to(dtype))


def stats_of(groups: int, channels: int) -> Tensor:
    """Return random stats [4, groups, C]; the scale is not that of the variance and ``EPS``."""
    stats = torch.randn(4, groups, channels)
    stats[1].abs_()
    return bordered(stats)


# --- forward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 1e4])
@pytest.mark.parametrize(
    ("counts", "groups", "channels"),
    [*zip(COUNTS, (1, 3, 2, 1, 3, 2, 2, 2), (1, 3, 20, 8, 9, 17, 3, 3), strict=True)],
)
def test_forward(counts: str, groups: int, channels: int, ratio: float) -> None:
    """The mean is ``ratio`` standard deviations; each group has its own mean and order of tiles."""
    each = COUNTS[counts]
    center = ratio / (1 + torch.arange(groups)).view(-1, 1, 1)
    values = 3.0 * (center + torch.randn(groups, sum(each), channels, dtype=torch.float64))
    of_groups = [partial_statistics(own, each[g:] + each[:g]) for g, own in enumerate(values)]
    partial = bordered(torch.cat(of_groups, 1))
    for dtypes in itertools.product(VECTOR_DTYPES, repeat=2) if channels == 9 else [VECTOR_DTYPES[:2]]:
        gamma, beta = (vector(dtype, channels) for dtype in dtypes)
        stats = contiguous_output(4, groups, channels)
        batchnorm.forward_launch(partial, gamma, beta, EPS, stats)()
        mean, var, scale, shift = written(stats).double()
        for own_mean, own_var, own in zip(mean, var, values, strict=True):
            assert_merged(own_mean, own_var, own, ratio)
        expected = (var + EPS).rsqrt() * (1 if gamma is None else gamma.double())
        torch.testing.assert_close(scale, expected, rtol=5e-7, atol=0)
        assert torch.equal(
            shift, (torch.zeros_like(shift) if beta is None else beta.double()).expand_as(shift)
        )


# --- backward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiles", "groups", "channels", "pixels"),
    [(1, 1, 1, 2), (4, 3, 20, 7), (16, 2, 9, 5), (1024, 1, 8, 4096), (1500, 2, 3, 10**6)],
)
def test_backward(tiles: int, groups: int, channels: int, pixels: int) -> None:
    sums = bordered(torch.randn(2, groups * tiles, channels))
    stats = stats_of(groups, channels)
    first, second = sums.double().unflatten(1, (groups, tiles)).sum(2)
    root = (stats[1].double() + EPS).rsqrt()
    dgamma, dbeta = (second * root).sum(0), first.sum(0)
    of_terms = 1e-6 * float(sums.abs().unflatten(1, (groups, tiles)).sum(2).max())
    for dtypes in itertools.product(VECTOR_DTYPES, repeat=2) if tiles == 16 else [VECTOR_DTYPES[:2]]:
        vectors = [
            None if dtype is None else contiguous_output(channels).to(dtype) if dtype == torch.float32
            else surrounded(torch.full((channels,), NAN, dtype=dtype), SENTINEL)
            for dtype in dtypes
        ]  # fmt: skip
        coefficients = contiguous_output(2, groups, channels)
        batchnorm.backward_launch(sums, stats, coefficients, *vectors, pixels, EPS)()
        factor, offset = written(coefficients).double()
        bound = of_terms / pixels
        torch.testing.assert_close(factor, -root.square() * second / pixels, rtol=1e-6, atol=bound / EPS)
        torch.testing.assert_close(offset, -first / pixels, rtol=1e-6, atol=bound)
        for got, want in zip(vectors, (dgamma, dbeta), strict=True):
            if got is not None:
                rounding = torch.finfo(got.dtype).eps / 2 if got.dtype.itemsize == 2 else 0.0
                size = groups * of_terms * (EPS**-0.5 if want is dgamma else 1.0)
                torch.testing.assert_close(written(got).double(), want, rtol=rounding + 1e-6, atol=size)


# --- apply --------------------------------------------------------------------------------------------------


def expected_apply(
    g: Tensor, y: Tensor, stats: Tensor, coefficients: Tensor, act: str, slope: float
) -> tuple[Tensor, Tensor]:
    """Return (du, x̂) in float64."""
    images = y.shape[0]
    mean, _, scale, shift = (reference._per_image(v.double(), images) for v in stats)
    factor, offset = (reference._per_image(v.double(), images) for v in coefficients)
    centred = y.double() - mean
    du = scale * (g.double() + offset + centred * factor)
    return du, activate(centred * scale + shift, act, slope)


APPLIED = [  # [N, C, H, W], groups
    ((2, 20, 15, 7), 1),  # several tiles in both directions
    ((4, 70, 6, 5), 2),
    ((6, 3, 37, 20), 3),  # 1480 pixels in a group: tiles of 1024
    ((3, 1, 40, 10), 3),
    ((2, 5, 1, 1), 2),
    ((1, 1, 1, 1), 1),
]


@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", ["both", "du", "x̂"])
def test_apply(wanted: str, dtype: torch.dtype, act: str) -> None:
    for size, groups in APPLIED:
        check_apply(size, groups, wanted, dtype, act)


def check_apply(
    size: tuple[int, int, int, int], groups: int, wanted: str, dtype: torch.dtype, act: str, **changed: Any
) -> None:
    given, y = (nhwc(torch.randn(size).to(dtype)) for _ in range(2))
    stats = stats_of(groups, size[1])
    coefficients = bordered(torch.randn(2, groups, size[1]))
    du, x_hat = expected_apply(given, y, stats, coefficients, act, 0.2)
    g = bordered(given, SENTINEL) if wanted != "x̂" else None
    x = bordered(torch.full_like(y, NAN), SENTINEL) if wanted != "du" else None
    launch = batchnorm.apply_launch(
        g, bordered(y), stats, coefficients if g is not None else None, x, act, 0.2
    )
    launch.constants.update(changed)
    launch()
    # Sums of a few terms of order one in float32, then one rounding to the dtype.
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for got, want in ((g, du), (x, x_hat)):
        if got is not None:
            torch.testing.assert_close(written(got).double(), want, rtol=rounding + 1e-6, atol=2e-6)


def test_apply_with_64_bit_indices() -> None:
    for size, groups in APPLIED:
        check_apply(size, groups, "both", torch.float32, "relu", WIDE=True)


@pytest.mark.parametrize("groups", [1, 2])
def test_indices_are_64_bits_wide_where_needed(groups: int) -> None:
    """Indices of a tile's rows beyond the last are computed, too."""
    stats = torch.empty(4, groups, 64, device="meta")
    for images, wide in ((32768, True), (32766, False)):
        y = torch.empty(images, 64, 32, 32, dtype=torch.bfloat16, device="meta")
        assert (y.numel() > INT32_MAX) == wide
        launch = batchnorm.apply_launch(y, y, stats, stats, y, "relu", 0.2)
        assert launch.constants["WIDE"] == wide
    y = torch.empty(32767, 64, 32, 32, device="meta")[:, :, :, :31]
    assert batchnorm.apply_launch(y, y, stats, stats, y, "relu", 0.2).constants["WIDE"] is False


def test_apply_beyond_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last tile of a map of more than 2³¹ elements, of which no other memory is touched."""
    size, groups, rows = (2, 1024, 1024, 1025), 2, 64
    c, pixels = size[1], size[0] * size[2] * size[3]
    strides = (c * size[2] * size[3], 1, size[3] * c, c)
    g, y, x = (torch.empty(2**31 + 2**24, dtype=torch.float16).as_strided(size, strides) for _ in range(3))
    stats, coefficients = stats_of(groups, c), bordered(torch.randn(2, groups, c))
    last = slice((pixels // groups // rows * rows + pixels // groups) * c, None)
    of_last = [t.as_strided((pixels * c,), (1,))[last].view(-1, c) for t in (g, y, x)]
    for t in of_last:
        t.normal_()
    given = [t[None].movedim(-1, 1)[..., None].clone() for t in of_last]  # [1, C, rows, 1]
    du, x_hat = expected_apply(given[0], given[1], stats[:, 1:], coefficients[:, 1:], "relu", 0.2)

    launch = batchnorm.apply_launch(g, y, stats, coefficients, x, "relu", 0.2)
    assert (launch.constants["WIDE"], launch.constants["BLOCK_M"]) == (True, rows)
    count = c // launch.constants["BLOCK_N"]  # programs of the last row tile
    builder: Any = interpreter.interpreter_builder

    def set_grid_idx(first: int, *others: int) -> None:
        builder.grid_idx = (launch.programs - count + first, *others)

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    with repair.overflow_checked():
        batchnorm.Launch(launch.kernel, count, launch.tensors, launch.scalars, launch.constants)()
    for got, want in zip((of_last[0], of_last[2]), (du, x_hat), strict=True):
        torch.testing.assert_close(got.double(), want[0, :, :, 0].T, rtol=2**-11 + 1e-6, atol=2e-6)


# --- running statistics -------------------------------------------------------------------------------------


def expected_track(running: Tensor, new: Tensor, seen: int, momentum: float, dtype: torch.dtype) -> Tensor:
    """Update in float64, group after group, rounding to the dtype after each."""
    for group, values in enumerate(new.double()):
        weight = momentum if momentum >= 0 else 1 / (seen + group + 1)
        running = ((1 - weight) * running.double() + weight * values).to(dtype)
    return running.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("channels", [(1,), (3, 20, 8), (1500, 5)])
def test_track(channels: Sequence[int], groups: int, dtype: torch.dtype) -> None:
    """Layers of any size, each with its own momentum (-1 is cumulative), count and number of batches."""
    for momenta, counts, seen in (
        ((0.1, -1.0, 0.7), (2, 1000, 10**9), (0, 0, 2**40)),
        ((-1.0, 0.0, 1.0), (5, 2, 3), (7, 1, 0)),
    ):
        momenta, counts, seen = (row[: len(channels)] for row in (momenta, counts, seen))
        means, variances = (
            [bordered(torch.randn(c).abs().to(dtype), SENTINEL) for c in channels] for _ in "mv"
        )
        before = [[t.clone() for t in column] for column in (means, variances)]
        batches = [torch.tensor(n) for n in seen]
        stats = [stats_of(groups, c) for c in channels]
        batchnorm.track_launch(means, variances, batches, stats, momenta, counts)()
        rounding = torch.finfo(dtype).eps
        for i, vectors in enumerate(stats):
            assert int(batches[i]) == seen[i] + groups
            unbiased = vectors[1].double() * counts[i] / (counts[i] - 1)
            for column, old, new in zip((means, variances), before, (vectors[0], unbiased), strict=True):
                want = expected_track(old[i], new, seen[i], momenta[i], dtype)
                got = written(column[i]).double()
                torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)
                if momenta[i] == 0:
                    assert torch.equal(got, old[i].double())
                if momenta[i] == 1:
                    assert torch.equal(got, new[-1].float().to(dtype).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_track_as_the_reference(dtype: torch.dtype) -> None:
    """To the last bit but for fused multiplications and additions."""
    stats = [torch.randn(4, 2, c).abs() for c in (5, 20)]
    runs = []
    for track in (batchnorm.track, reference.track):
        torch.manual_seed(1)
        running = [[torch.randn(c).abs().to(dtype) for c in (5, 20)] for _ in range(2)]
        batches = [torch.tensor(3), torch.tensor(0)]
        for _ in range(3):
            track(*running, batches, stats, [0.1, -1.0], [10, 40])
        runs.append(([*running[0], *running[1]], batches))
    (found, counts), (expected, expected_counts) = runs
    assert counts == expected_counts
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=0)
