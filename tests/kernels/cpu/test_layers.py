"""One layer by each algorithm on each instruction set, compared with float64, in NaN-filled memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.reference import ACTIVATIONS
from tests.support import native
from tests.support.float64_reference import Problem, pairwise
from tests.support.native import ISAS, SPATIAL, assert_correct, forced, instruction_set

pytestmark = [native.NEEDED, pytest.mark.usefixtures("one_thread", "nan_in_new_memory")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Channels on both sides of every vector and panel width; maps of one pixel, of odd sizes, and others.
CHANNELS = [(1, 1), (3, 5), (5, 3), (16, 8), (17, 33), (9, 20), (64, 40), (6, 130), (40, 4)]
MAPS = [(1, 1), (2, 2), (2, 3), (4, 4), (5, 7), (3, 9), (8, 8), (7, 1), (11, 10)]
EPILOGUES: list[dict[str, Any]] = [
    {},
    {"out_scale": True},
    {"out_shift": True},
    {"out_scale": True, "out_shift": True},
]
OPTIONS: dict[str, list[Any]] = {
    "isa": list(ISAS),
    "algorithm": list(SPATIAL),
    "channels": CHANNELS,
    "size": MAPS,
    "transposed": [False, True],
    "out_act": list(ACTIVATIONS),
    "epilogue": EPILOGUES,
    "dtype": DTYPES,
    "channels_last": [True, False],
    "batch": [1, 2, 5],
    "slope": [0.2, 0.0, 1.5],
}
DENSE: dict[str, list[Any]] = {
    **{k: v for k, v in OPTIONS.items() if k not in ("algorithm", "size")},
    "kernel": [1, 2, 3, 4, 5],
    "stride": [1, 2, 3],
    "batch": [1, 2, 7, 33],
}


def build(rows: list[dict[str, Any]]) -> list[tuple[str, str, Problem]]:
    """Build (instruction set, algorithm, problem) per row; a convolution's map is about twice as large."""
    cases = []
    for seed, row in enumerate(rows):
        rest = {k: v for k, v in row.items() if k not in ("isa", "algorithm", "channels", "epilogue")}
        if "kernel" in rest:
            k = rest["kernel"]
            rest |= {"kernel": (k, k), "padding": 0, "size": (1, 1) if rest["transposed"] else (k, k)}
        elif not rest["transposed"]:
            rest["size"] = tuple(2 * side + seed % 2 for side in rest["size"])
        c_in, c_out = row["channels"]
        problem = Problem(**rest, **row["epilogue"], c_in=c_in, c_out=c_out, seed=seed)
        cases.append((row["isa"], row.get("algorithm", "dense"), problem))
    return cases


def name(value: Any) -> str:
    return f"{value}-{value.c_in}to{value.c_out}" if isinstance(value, Problem) else str(value)


@pytest.mark.parametrize(
    ("isa", "algorithm", "problem"), build(pairwise(**OPTIONS)) + build(pairwise(**DENSE)), ids=name
)
def test_against_float64(isa: str, algorithm: str, problem: Problem) -> None:
    """Values and strides, for every pair of options."""
    with instruction_set(isa), forced(algorithm):
        assert_correct(problem)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("algorithm", [*SPATIAL, "dense"])
def test_against_float64_for_all_combinations(algorithm: str, channels: tuple[int, int], isa: str) -> None:
    options = DENSE if algorithm == "dense" else OPTIONS
    here = {**options, "isa": [isa], "channels": [channels], "slope": [0.2], "batch": [3]}
    # Options that only concern the Python side are left to the sample above.
    here |= {"dtype": [torch.float32], "channels_last": [True], "epilogue": [EPILOGUES[0], EPILOGUES[-1]]}
    if algorithm != "dense":
        here["algorithm"] = [algorithm]
    rows = [dict(zip(here, values, strict=True)) for values in itertools.product(*here.values())]
    with instruction_set(isa), forced(algorithm):
        for _, _, problem in build(rows):
            assert_correct(problem)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("c_in", "c_out"), [(100, 1024), (1024, 512), (512, 256), (256, 128), (128, 64)])
def test_channel_counts_of_the_networks(c_in: int, c_out: int, isa: str) -> None:
    """The input channels of the Generator for 64×64 images, with at most 24 output channels per layer."""
    problem = Problem(True, 1, c_in, min(c_out, 24), dtype=torch.float32)
    if c_in == 100:
        problem = problem.with_(size=(1, 1), stride=1, padding=0)
    for algorithm in SPATIAL[:3]:
        with instruction_set(isa), forced(algorithm):
            assert_correct(problem)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_over_the_whole_range(act: str, isa: str) -> None:
    """A 1×1 identity convolution, which activates x itself: subnormal to overflowing, ±0, ±∞ and NaN.

    The error is within a few units in the last place of the activation's range.
    """
    steps = torch.cat([torch.linspace(-20, 20, 4001), torch.logspace(-45, 38, 800), torch.tensor([0.0])])
    edges = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.35, -0.35, 87.0, 88.0, 104.0])
    x = torch.cat([steps, -steps, edges])[:, None, None, None]
    call = ops.Call(x, torch.ones(1, 1, 1, 1), out_act=act, stride=1, padding=0)
    with instruction_set(isa):
        actual = native.run_native(call, False).double()
    expected = native.expected_outputs(call, False)[0]
    assert torch.equal(actual.isnan(), expected.isnan())
    unbounded = expected.isinf() | expected.isnan()
    assert torch.equal(actual[unbounded].nan_to_num(), expected[unbounded].float().double().nan_to_num())
    error = (actual - expected).abs()[~unbounded]
    size = expected.abs()[~unbounded]
    # Sigmoid's and tanh's results are below 1; tanh and the identities keep their relative accuracy near 0.
    bound = 8 * 2.0**-24 * (size.clamp_min(2.0**-20) if act == "sigmoid" else size) + 2.0**-126
    assert bool((error <= bound).all()), f"{act}: {float((error / bound).max()):.1f} times the bound"


def cast(call: ops.Call, dtype: torch.dtype) -> ops.Call:
    return call._replace(x=call.x.to(dtype), weight=call.weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", SPATIAL)
def test_16_bit_is_float32_rounded_once(algorithm: str, dtype: torch.dtype) -> None:
    """Bit for bit: the sums are those of float32."""
    call = Problem(True, 2, 12, 6, (5, 4), out_scale=True, out_act="tanh", dtype=dtype).call()
    with forced(algorithm):
        y = native.run_native(call, True)
        assert torch.equal(y, native.run_native(cast(call, torch.float32), True).to(dtype))


def test_requires_grad_and_grad_mode_do_not_change_results() -> None:
    """A parameter, no_grad and inference mode give the same bits."""
    problem = Problem(True, 2, 8, 6, dtype=torch.float32)
    call = problem.call()
    expected = native.run_native(call, True)
    leaf = call._replace(weight=torch.nn.Parameter(call.weight))
    found: list[Tensor] = [native.run_native(leaf, True).detach()]
    with torch.no_grad():
        found.append(native.run_native(leaf, True))
    with torch.inference_mode():
        found.append(native.run_native(leaf, True))
    assert all(torch.equal(y, expected) for y in found)
