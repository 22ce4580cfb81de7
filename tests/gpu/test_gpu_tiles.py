"""Every tile of every kernel, tested for exact equality: detects miscompiled loops, races and mask errors.

Fused prologues need this most, because they pass operands in registers: ptxas is known to reuse these
registers before an asynchronous matrix instruction has read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from dcgan.kernels.gpu import cost_model, tiles, tuning
from dcgan.kernels.gpu.tools.layers import DTYPES
from dcgan.kernels.gpu.tools.predict import candidates
from tests.gpu import full_size
from tests.support import integers

pytestmark = pytest.mark.gpu

REPEATS = 3  # a race need not show every time
MAIN_PRECISION = "bfloat16"


def capability() -> int:
    if full_size.DEVICE != "cuda":
        return 90
    return 90 if torch.cuda.get_device_capability()[0] >= 9 else 80


@pytest.fixture
def out(request: pytest.FixtureRequest) -> Path | None:
    """Return the stage's output folder, the parent of --deal's; tuned tiles in it are tested too."""
    folder: Path | None = request.config.getoption("--deal", default=None)
    return None if folder is None else folder.parent


def tuned(problem: tiles.Problem, out: Path | None) -> Iterator[tiles.Tile]:
    """Yield the tuned tiles, of any GPU, for the problem's kernel and precision."""
    folders = [tiles.DIRECTORY, *([] if out is None else [out])]
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        if path.name in ("default.json", tiles.REFUSED):
            continue
        try:
            found = tiles.read(path)
        except ValueError:  # another file of the stage
            continue
        for key, tile in found.items():
            if key.startswith(f"{problem.kernel}/{problem.precision}/"):
                yield tiles.fit(tile, problem)


def listed(problem: tiles.Problem, out: Path | None) -> list[tiles.Tile]:
    """Return every candidate and every tuned tile, with fused and with standalone prologues."""
    limit = tiles.SHARED_LIMIT[capability()]
    more = [
        variant
        for tile in tuned(problem, out)
        for variant in (replace(tile, fused=True), replace(tile, fused=False))
        if variant.fused or problem.has_prologue
    ]
    fitting = [
        tile for tile in more if tiles.allowed(problem, tile) and cost_model.fits(problem, tile, limit)
    ]
    return list(dict.fromkeys([*candidates(problem, limit), *fitting]))


# float16 compiles to the same code as bfloat16 apart from the type, with the same tiles. Prologues that are
# only an activation are tested in one precision.
PAIRS = [
    pytest.param(layer, precision, marks=[pytest.mark.check] if precision == MAIN_PRECISION else [])
    for layer in integers.SHAPES
    for precision in DTYPES
    if precision == MAIN_PRECISION or (precision != "float16" and not layer.endswith("-act"))
]


@pytest.mark.parametrize(("layer", "precision"), PAIRS, indirect=["precision"])
def test_every_tile(layer: str, precision: str, out: Path | None) -> None:
    """Each tile runs a few times, over several waves of programs and many K steps.

    Tiles with wrong results are written to refused.json in the stage's folder, to be copied to
    ``kernels/gpu/configs``.
    """
    sms = tuning.sm_count(torch.device(full_size.DEVICE))
    wrong: dict[str, str] = {}
    for case in integers.cases(integers.SHAPES[layer], DTYPES[precision], full_size.DEVICE):
        problem = case.problem
        if case.phase == "eval" and precision != MAIN_PRECISION:
            continue  # no prologue, and the code of the epilogue is the same in every precision
        found = listed(problem, out)
        assert found
        for tile in found:
            differences = (integers.difference(case, tile, sms) for _ in range(REPEATS))
            try:
                difference = next(filter(None, differences), "")
            except OutOfResources:  # needs more than estimated, so it is never chosen
                continue
            if difference:
                wrong[tiles.refused_name(problem, tile)] = f"{case.phase} {tile}: {difference}"
    if wrong and out is not None:
        tiles.refuse(out / tiles.REFUSED, *wrong)
    assert not wrong, "\n".join(wrong.values())
