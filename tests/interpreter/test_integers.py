"""The exact-equality test of tiles that runs on a GPU, at small sizes in the interpreter."""

from __future__ import annotations

import pytest
import torch

from dcgan.kernels.gpu import aten, tiles, tuning
from dcgan.kernels.gpu.launcher import Launch
from dcgan.kernels.gpu.tools.layers import DTYPES
from tests.support import integers

BATCH = 3
FACTOR = 16


def fused_and_standalone(problem: tiles.Problem) -> list[tiles.Tile]:
    """Return the first tile with fused and, if there are prologues, the first with standalone prologues."""
    found = tuning.variants(problem)
    return [next(tile for tile in found if tile.fused == fused) for fused in {tile.fused for tile in found}]


@pytest.mark.parametrize(
    "precision", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", integers.SHAPES)
def test_results_are_equal(name: str, precision: str) -> None:
    shape = integers.shrunk(integers.SHAPES[name], BATCH, FACTOR)
    found = list(integers.cases(shape, DTYPES[precision], "cpu"))
    after_batchnorm = ["gradient"] if shape.in_act and shape.centered else []
    assert [case.phase for case in found] == ["eval", "forward", "dgrad", "wgrad", *after_batchnorm]
    for case in found:
        for tile in fused_and_standalone(case.problem):
            assert integers.difference(case, tile, 4) == "", (case.phase, tile)


@pytest.mark.parametrize("name", ["G2", "D3"])
def test_one_wrong_operand_is_detected(name: str) -> None:
    """One element of one tensor is off by one, where its prologue does not hide it."""
    shape = integers.shrunk(integers.SHAPES[name], BATCH, FACTOR)
    for case in integers.cases(shape, torch.bfloat16, "cpu"):
        (tile, *_) = fused_and_standalone(case.problem)
        spec, pointers = case.product.spec, case.product.x
        x = pointers.ptr
        at = tuple(aten.apply_prologue(spec.x, pointers, spec.slope).gt(0).nonzero()[7].tolist())
        x[at] += 1
        assert "numbers: " in integers.difference(case, tile, 4), case.phase
        x[at] -= 1


def test_outputs_that_are_not_written_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NaN, whatever the memory held before; including a missing split-K partial."""
    shape = integers.shrunk(integers.SHAPES["G2"], BATCH, FACTOR)
    for case in integers.cases(shape, torch.bfloat16, "cpu"):
        (tile, *_) = fused_and_standalone(case.problem)
        assert integers.difference(case, tile, 4) == ""
        with monkeypatch.context() as patch:
            patch.setattr(Launch, "__call__", lambda self: None)
            assert "numbers: nan for" in integers.difference(case, tile, 4)


def test_the_cases_cover_every_kernel_prologue_and_epilogue() -> None:
    """At the sizes used on a GPU: several waves of programs, partially filled row tiles, many K steps."""
    kernels, prologues, epilogues = set(), set(), set()
    for shape in integers.SHAPES.values():
        small = integers.shrunk(shape, BATCH, FACTOR)
        for case in integers.cases(small, torch.bfloat16, "cpu"):
            problem = case.problem
            kernels.add(problem.kernel)
            prologues |= set(problem.prologues)
            if case.phase != "wgrad":
                epilogues.add(problem.epilogue)
        pixels = shape.size * 2 if shape.transposed and shape.size > 1 else shape.size // 2
        assert integers.divides(shape.batch * max(pixels, 1) ** 2) or not shape.stats
        assert shape.batch % 2, "the last row tile must be partially filled"
    assert kernels == set(tiles.KERNELS)
    assert prologues == {"none", "act", "affine", "gradient", "statistics"}
    assert epilogues == {"affine", "statistics", "derivative", "adjoint", "gradient"}
