"""The native engine in training: outputs and gradients of both ops by each algorithm, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.reference import memory_format
from tests.support import native
from tests.support.float64_reference import (
    BOTH,
    Problem,
    op,
    pairwise,
)
from tests.support.native import (
    ALGORITHMS,
    ISAS,
    SPATIAL,
    geometries,
    instruction_set,
    laid_out,
    layouts,
)
from tests.support.native_training import (
    DY,
    EPILOGUES,
    PROLOGUES,
    assert_correct,
    check,
    cotangents,
    forced,
    layer,
    native_results,
    random_call,
)

pytestmark = [native.NEEDED, pytest.mark.usefixtures("nan_in_new_memory", "threads_restored")]
# Both sides of every vector and panel width; maps of one pixel, of odd sizes, and others.
CHANNELS = [(1, 1), (3, 5), (5, 3), (16, 16), (17, 33), (33, 17), (1, 16), (16, 1)]
MAPS = [(1, 1), (2, 3), (4, 4), (5, 7), (1, 4), (9, 8)]


OPTIONS: dict[str, list[Any]] = {
    "algorithm": [*SPATIAL, "dense"],
    "transposed": [False, True],
    "prologue": list(PROLOGUES),
    "epilogue": list(EPILOGUES),
    "channels": CHANNELS,
    "size": MAPS,
    "layout": list(DY),
    "isa": list(ISAS),
    "batch": [1, 2, 5],
    "threads": [1, 2, 3],
    "x_nhwc": [True, False],
    "weight_nhwc": [True, False],
    "channels_last": [True, False],
}


def build(row: dict[str, Any], seed: int) -> Problem:
    """Build a problem; a convolution's map is about twice as large, and odd every second time."""
    transposed, (c_in, c_out), size = row["transposed"], row["channels"], row["size"]
    rest: dict[str, Any] = {"size": size}
    if row["algorithm"] == "dense":
        k = 1 + seed % 5
        rest = {"size": (1, 1) if transposed else (k, k), "kernel": (k, k), "padding": 0}
        rest["stride"] = 1 + seed % 2
    elif not transposed:
        rest = {"size": (2 * size[0] + seed % 2, 2 * size[1] + seed // 2 % 2)}
    return Problem(
        transposed, row["batch"], c_in, c_out, **rest,
        **PROLOGUES[row["prologue"]], **EPILOGUES[row["epilogue"]], dtype=torch.float32,
        channels_last=row["channels_last"], seed=seed,
    )  # fmt: skip


def run_row(row: dict[str, Any], seed: int) -> None:
    problem = build(row, seed)
    torch.set_num_threads(row["threads"])
    call = random_call(problem)
    call = call._replace(
        x=call.x.contiguous(memory_format=memory_format(row["x_nhwc"])),
        weight=call.weight.contiguous(memory_format=memory_format(row["weight_nhwc"])),
    )
    given = cotangents(call, problem.transposed, row["layout"])
    with instruction_set(row["isa"]), forced(row["algorithm"]):
        found = native_results(call, problem.transposed, given)
    assert_correct(found, call, problem.transposed, given)


ROWS = pairwise(**OPTIONS)


def row_name(row: dict[str, Any]) -> str:
    return "-".join(str(v).replace(" ", "") for v in row.values())


@pytest.mark.parametrize("row", ROWS, ids=map(row_name, ROWS))
def test_outputs_and_gradients(row: dict[str, Any]) -> None:
    """Each pair of options occurs at least once."""
    run_row(row, ROWS.index(row))


@pytest.mark.parametrize("prologue", PROLOGUES)
@ALGORITHMS
@BOTH
def test_every_prologue_and_epilogue_of_every_algorithm(
    transposed: bool, algorithm: str, prologue: str
) -> None:
    for epilogue in EPILOGUES:
        with forced(algorithm):
            check(layer(algorithm, transposed, prologue, epilogue))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@ALGORITHMS
@BOTH
def test_all_option_combinations(
    transposed: bool, algorithm: str, channels: tuple[int, int], isa: str
) -> None:
    """Maps, layouts, batch sizes, threads and formats alternate."""
    fixed = {"transposed": transposed, "algorithm": algorithm, "channels": channels, "isa": isa}
    for seed, (prologue, epilogue) in enumerate(itertools.product(PROLOGUES, EPILOGUES)):
        alternating = {
            name: OPTIONS[name][seed % len(OPTIONS[name])] for name in ("layout", "batch", "threads")
        }
        formats = dict.fromkeys(("x_nhwc", "weight_nhwc", "channels_last"), seed % 3 == 0)
        size = MAPS[seed // 3 % len(MAPS)]  # each with each batch
        row = {**fixed, "prologue": prologue, "epilogue": epilogue, "size": size, **alternating, **formats}
        run_row(row, seed)


@pytest.mark.parametrize("algorithm", SPATIAL)
@BOTH
def test_many_channels(transposed: bool, algorithm: str) -> None:
    """Many channels on either side: products take several K blocks and panels."""
    c_in, c_out = (260, 140) if transposed else (140, 260)
    size = (4, 4) if transposed else (8, 8)
    problem = layer(algorithm, transposed, "affine_relu", "statistics", c_in=c_in, c_out=c_out, size=size)
    with forced(algorithm):
        check(problem)


@pytest.mark.slow
@BOTH
def test_weights_too_large_to_cache_transformed(transposed: bool) -> None:
    """F(4×4) streams transformed weights of more than 16 MB."""
    size = (4, 4) if transposed else (9, 8)
    for prologue, epilogue in (("affine_relu", "statistics"), ("identity", "scale_shift_leaky_relu")):
        with forced("f4"):
            check(layer("f4", transposed, prologue, epilogue, c_in=512, c_out=320, size=size))


@BOTH
def test_the_selected_algorithm(transposed: bool) -> None:
    """For few and many images, narrow and wide layers; any choice must be correct."""
    for channels, batch in (((3, 20), 1), ((20, 3), 2), ((20, 24), 1), ((20, 24), 40)):
        for prologue, epilogue in (("affine_relu", "statistics"), ("identity", "tanh")):
            c_in, c_out = channels
            check(
                layer("f4", transposed, prologue, epilogue, c_in=c_in, c_out=c_out, batch=batch, size=(6, 6)),
            )


# --- statistics ---------------------------------------------------------------------------------------------


def copying(algorithm: str, transposed: bool, x_of: Callable[..., Tensor]) -> ops.Call:
    """Return a call whose output copies elements of x: all weights are 0 except at one tap of one channel."""
    problem = layer(algorithm, transposed, "identity", "statistics", batch=37)
    call = problem.call()
    weight, dense = torch.zeros_like(call.weight), algorithm == "dense"
    # Each output pixel of a transposed convolution depends on exactly one of these taps.
    taps = (slice(None) if transposed else slice(1)) if dense else slice(1, 3 if transposed else 2)
    for c_out in range(problem.c_out):
        one = (c_out % problem.c_in, c_out) if transposed else (c_out, c_out % problem.c_in)
        weight[(*one, taps, taps)] = 1
    return call._replace(x=x_of(*call.x.shape), weight=weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@ALGORITHMS
@BOTH
def test_statistics_where_the_mean_is_a_thousand_deviations(
    transposed: bool, algorithm: str, threads: int, isa: str
) -> None:
    torch.set_num_threads(threads)
    call = copying(algorithm, transposed, lambda *size: 1000 + torch.randn(*size))
    with instruction_set(isa), forced(algorithm), ops.use_engine("native"):
        y, mean, var = op(transposed)(*call)
    wide = y.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    # With κ = √(1 + mean²/var) = 1000, an error of some κ·2⁻²⁴ = 6e-5 is achievable; E[y²] - E[y]² has κ².
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)
    naive = y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()
    assert (naive.double() / wide.var((0, 2, 3), correction=0) - 1).abs().max() > 1e-3


@ALGORITHMS
@BOTH
def test_a_constant_channel_has_no_variance(transposed: bool, algorithm: str) -> None:
    """For any constant: with a negative variance, 1/√(var + eps) could be NaN."""
    # Winograd's transforms reproduce a constant to a few units in the last place.
    for value in (0.0, 1.0, -3.7, 1234.5):
        call = copying(algorithm, transposed, lambda *size, value=value: torch.full(size, value))
        with forced(algorithm), ops.use_engine("native"):
            _, mean, var = op(transposed)(*call)
        torch.testing.assert_close(mean, torch.full_like(mean, value), rtol=1e-5, atol=0)
        assert bool((var >= 0).all())
        assert bool((var <= (1e-5 * value) ** 2).all())


@BOTH
def test_statistics_of_few_pixels(transposed: bool) -> None:
    for size in ((1, 1), (1, 2)) if transposed else ((2, 2), (3, 3), (2, 4)):
        for algorithm in SPATIAL:
            with forced(algorithm):
                found = check(layer(algorithm, transposed, "affine_relu", "statistics", batch=1, size=size))
            if found["y"][:, 0].numel() == 1:
                assert bool((found["var"] == 0).all())
                assert torch.equal(found["mean"], found["y"].flatten())


# --- any size -----------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    return Problem(
        *draw(geometries()),
        **PROLOGUES[draw(st.sampled_from(list(PROLOGUES)))],
        **EPILOGUES[draw(st.sampled_from(list(EPILOGUES)))],
        slope=draw(st.sampled_from((0.0, 0.2, 2.0))),
        dtype=torch.float32,
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


ANY = given(
    problem=problems(),
    x_layout=layouts(4),
    weight_layout=layouts(4),
    dy=st.sampled_from(DY),
    algorithm=st.sampled_from(SPATIAL),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 4),
)


def any_layer(
    problem: Problem,
    x_layout: tuple[list[int], list[int], int],
    weight_layout: tuple[list[int], list[int], int],
    dy: str,
    algorithm: str,
    isa: str,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(problem.seed)
    call = random_call(problem)
    given = cotangents(call, problem.transposed, dy)
    odd = call._replace(x=laid_out(call.x, x_layout), weight=laid_out(call.weight, weight_layout))
    with instruction_set(isa), forced(algorithm):
        found = native_results(odd, problem.transposed, given)
    assert_correct(found, call, problem.transposed, given)


test_any_layer = settings(deadline=None, max_examples=60)(ANY(any_layer))
test_many_random_layers = pytest.mark.slow(settings(deadline=None, max_examples=1500)(ANY(any_layer)))
