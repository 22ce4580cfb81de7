"""What Python takes for covered, the library takes; the choice is a candidate, and counts packing."""

from __future__ import annotations

import ctypes
import itertools

import native
import pytest
from statement import Problem

from dcgan.kernels.call import output_shape
from dcgan.kernels.cpu import library, select
from dcgan.kernels.cpu.select import Geometry

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
def test_the_library_takes_every_candidate() -> None:
    """Its limits are known before a call is made: what exceeds them is the reference's."""
    refused = {(g, a) for g in GEOMETRIES for a in select.candidates(g) if not supported(g, a)}
    assert not refused


@native.NEEDED
def test_there_is_a_candidate_for_all_that_the_library_takes() -> None:
    for g in GEOMETRIES:
        if any(supported(g, algorithm) for algorithm in library.ALGORITHMS):
            assert select.candidates(g), g


def test_outputs_are_the_ops() -> None:
    for g in GEOMETRIES:
        problem = Problem(g.transposed, 1, 1, 1, (g.height, g.width), (g.kernel, g.kernel))
        if g.height <= 65 and problem.with_(stride=g.stride, padding=g.padding).fits:
            call = problem.with_(stride=g.stride, padding=g.padding).call()
            assert g.output == output_shape(call, g.transposed)[2:]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("kept", [False, True])
def test_the_choice_is_a_candidate(isa: str, kept: bool) -> None:
    for g in GEOMETRIES:
        for images, threads in ((1, 1), (64, 8)):
            costs = select.costs(g, images, threads, isa, kept)
            assert set(costs) == set(select.candidates(g))
            assert all(0 < cost < float("inf") for cost in costs.values())
            if costs:
                assert select.algorithm(g, images, threads, isa, kept) in costs


def test_packing_counts_where_it_is_for_one_call() -> None:
    """A large layer's weights are not transformed for an image or two; of a large batch they are."""
    g = Geometry(True, 512, 256, 8, 8, 4, 2, 1)
    assert select.algorithm(g, 1, 1, "avx2", False) == "direct"
    assert select.algorithm(g, 256, 1, "avx2", True) != "direct"
    assert not select.worthwhile(g, 1, 1, "avx2")
    assert select.worthwhile(g, 256, 1, "avx2")
