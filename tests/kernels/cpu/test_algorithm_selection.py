"""The candidates match what the library supports; the choice is a candidate and accounts for packing."""

from __future__ import annotations

import ctypes
import itertools

import pytest

from dcgan.kernels.cpu import algorithm_selection, library
from dcgan.kernels.cpu.algorithm_selection import Geometry
from dcgan.kernels.spec import specify
from tests.support import native
from tests.support.float64_reference import Problem

GEOMETRIES = [
    Geometry(transposed, c_in, c_out, side, side + wider, kernel, stride, padding)
    for transposed, (c_in, c_out), side, wider, (kernel, stride, padding) in itertools.product(
        (False, True),
        ((1, 1), (3, 64), (64, 3), (512, 256), (70_000, 1), (1, 70_000)),
        (1, 2, 3, 4, 5, 16, 65, 20_000),
        (0, 3),
        ((4, 2, 1), (4, 1, 0), (1, 1, 0), (3, 2, 0), (65, 1, 0), (5, 2, 2), (4, 2, 0), (2, 2, 1)),
    )
]


def supported(g: Geometry, algorithm: str) -> bool:
    layer = library.Layer(g.transposed, library.ALGORITHMS.index(algorithm), *g[1:])
    return library.library().dcgan_supports(ctypes.addressof(layer)) == 0  # type: ignore[no-any-return]


@native.NEEDED
def test_the_library_supports_every_candidate() -> None:
    """The library's limits are known before a call; the reference runs layers that exceed them."""
    unsupported = {
        (g, a) for g in GEOMETRIES for a in algorithm_selection.candidates(g) if not supported(g, a)
    }
    assert not unsupported


@native.NEEDED
def test_every_layer_that_the_library_supports_has_a_candidate() -> None:
    for g in GEOMETRIES:
        if any(supported(g, algorithm) for algorithm in library.ALGORITHMS):
            assert algorithm_selection.candidates(g), g


def test_output_sizes_match_the_ops() -> None:
    for g in GEOMETRIES:
        problem = Problem(g.transposed, 1, 1, 1, (g.height, g.width), (g.kernel, g.kernel))
        if g.height <= 65 and problem.with_(stride=g.stride, padding=g.padding).fits:
            call = problem.with_(stride=g.stride, padding=g.padding).call()
            assert g.output == specify(call, g.transposed).shape[2:]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("cached", [False, True])
def test_the_choice_is_a_candidate(isa: str, cached: bool) -> None:
    for g in GEOMETRIES:
        for images, threads in ((1, 1), (64, 8)):
            costs = algorithm_selection.costs(g, images, threads, isa, cached)
            assert set(costs) == set(algorithm_selection.candidates(g))
            assert all(0 < cost < float("inf") for cost in costs.values())
            if costs:
                assert algorithm_selection.algorithm(g, images, threads, isa, cached) in costs


def test_packing_for_one_call_is_part_of_the_cost() -> None:
    """A large layer's weights are transformed for a large batch, but not for an image or two."""
    g = Geometry(True, 512, 256, 8, 8, 4, 2, 1)
    assert algorithm_selection.algorithm(g, 1, 1, "avx2", False) == "direct"
    assert algorithm_selection.algorithm(g, 256, 1, "avx2", True) != "direct"
    assert not algorithm_selection.worthwhile(g, 1, 1, "avx2")
    assert algorithm_selection.worthwhile(g, 256, 1, "avx2")
