"""Every tile of every kernel, for equality: a loop miscompiled at one size, a race, a border, all show here.

Above all of prologues inside the products, which leave the operand in registers: ptxas has been seen to reuse
these before an asynchronous matrix instruction has read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import integers
import pytest
import real
import torch
from triton.runtime.errors import OutOfResources

from bench import shortlist
from bench.cases import DTYPES
from bench.layers import Layer
from dcgan.kernels.gpu import model, tiles

pytestmark = pytest.mark.gpu

REPEATS = 3  # a race need not be lost each time
ONE = "bfloat16"


def capability() -> int:
    if real.DEVICE != "cuda":
        return 90
    return 90 if torch.cuda.get_device_capability()[0] >= 9 else 80


@pytest.fixture
def out(request: pytest.FixtureRequest) -> Path | None:
    """The stage's folder, in which that of the processes lies; tuned tiles in it are tested too."""
    folder: Path | None = request.config.getoption("--deal", default=None)
    return None if folder is None else folder.parent


def tuned(problem: tiles.Problem, out: Path | None) -> Iterator[tiles.Tile]:
    """Tiles that tuning has found for the problem's kernel and precision, on any GPU."""
    folders = [tiles.DIRECTORY, *([] if out is None else [out])]
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        if path.name in ("default.json", tiles.REFUSED):
            continue
        try:
            found = tiles.read(path)
        except ValueError:  # something else of a stage's
            continue
        for key, tile in found.items():
            if key.startswith(f"{problem.kernel}/{problem.precision}/"):
                yield tiles.fit(tile, problem)


def listed(layer: Layer, out: Path | None) -> list[tiles.Tile]:
    """Every candidate and every tuned tile, with the prologues inside and as passes of their own."""
    problem, limit = layer.problem, tiles.SHARED_LIMIT[capability()]
    more = [
        way
        for tile in tuned(problem, out)
        for way in (tile._replace(fused=True), tile._replace(fused=False))
        if way.fused or set(model.prologues(problem)) != {"none"}
    ]
    fitting = [tile for tile in more if tiles.allowed(problem, tile) and model.fits(problem, tile, limit)]
    return list(dict.fromkeys([*shortlist.every(layer, limit), *fitting]))


# float16's code is bfloat16's but for the type's name, and takes the same tiles. A prologue of an activation
# alone is tested in one precision.
PAIRS = [
    pytest.param(layer, precision, marks=[pytest.mark.check] if precision == ONE else [])
    for layer in integers.SHAPES
    for precision in DTYPES
    if precision == ONE or (precision != "float16" and not layer.endswith("-act"))
]


@pytest.mark.parametrize(("layer", "precision"), PAIRS, indirect=["precision"])
def test_every_tile(layer: str, precision: str, out: Path | None) -> None:
    """Each a few times, over several waves of programs and many steps of their loops.

    What is wrong goes to refused.json in the stage's folder, to be copied into ``kernels/gpu/configs``.
    """
    processors = tiles.multiprocessors(torch.device(real.DEVICE))
    wrong: dict[str, str] = {}
    for case in integers.cases(layer, integers.SHAPES[layer], DTYPES[precision], real.DEVICE):
        problem = case.layer.problem
        if case.layer.phase == "eval" and precision != ONE:
            continue  # no prologue, and the epilogue is the same code in every precision
        found = listed(case.layer, out)
        assert found
        for tile in found:
            differences = (integers.difference(case, tile, processors) for _ in range(REPEATS))
            try:
                difference = next(filter(None, differences), "")
            except OutOfResources:  # more than was reckoned: it is never chosen
                continue
            if difference:
                wrong[tiles.refusal(problem, tile)] = f"{case.layer.phase} {tuple(tile)}: {difference}"
    if wrong and out is not None:
        tiles.refuse(out / tiles.REFUSED, *wrong)
    assert not wrong, "\n".join(wrong.values())
