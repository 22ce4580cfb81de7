"""Faults in the sources of both chains, one at a time: the tests of this folder must find each of them.

The tests run in a process of their own, in a copy of the sources with the fault in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TRAINING_TESTS = ("tests/interpreter/test_batchnorm.py", "tests/interpreter/test_train_chain.py")
INFERENCE_TESTS = (
    "tests/interpreter/test_inference.py",
    "tests/interpreter/test_inference_weights.py",
    "tests/interpreter/test_inference_currency.py",
)


class Mutant(NamedTuple):
    """A fault: ``new`` in place of every ``old``, of which there are ``count``."""

    file: str
    old: str
    new: str
    count: int = 1


BATCHNORM, DEVICE = "kernels/gpu/batchnorm.py", "kernels/gpu/device_functions.py"
INFERENCE, PREPARE = "kernels/gpu/inference.py", "kernels/gpu/prepare.py"
REDUCE, TRAINING = "kernels/gpu/reduce.py", "kernels/gpu/training.py"
UP, UP_BLOCK, DOWN = "kernels/gpu/up.py", "kernels/gpu/up_block.py", "kernels/gpu/down.py"
MUTANTS = {
    # the merge of statistics
    "a lane counts its last tile alone": Mutant(REDUCE, "count += added", "count = added"),
    "a lane keeps its first mean": Mutant(REDUCE, "mean += difference * share", "mean += 0.0 * share"),
    "tiles of a lane weigh the same": Mutant(
        REDUCE, "share = added / tl.maximum(count + added, 1.0)", "share = tl.where(added > 0, 0.5, 0.0)"
    ),
    "no deviations between the tiles of a lane": Mutant(
        REDUCE, " + difference * difference * count * share", ""
    ),
    "no deviations between lanes": Mutant(REDUCE, "squares + count * deviation * deviation", "squares"),
    "lanes weigh the same": Mutant(
        REDUCE, "tl.sum(mean * count, axis=0) / tl.maximum(rows, 1.0)", "tl.sum(mean, axis=0)"
    ),
    "counts from the squares": Mutant(REDUCE, "at + 2 * plane", "at + plane"),
    "statistics of the first group": Mutant(
        BATCHNORM, "own = partial_ptr + group * tiles * C\n    mean", "own = partial_ptr\n    mean"
    ),
    "statistics of all groups": Mutant(
        BATCHNORM, "tiles = TILES // GROUPS\n    own", "tiles = TILES\n    own"
    ),
    "gamma needs beta": Mutant(BATCHNORM, "if AFFINE[0]:", "if AFFINE[0] and AFFINE[1]:"),
    "no eps in the forward": Mutant(
        BATCHNORM, "scale = _reciprocal_root(var + eps)", "scale = _reciprocal_root(var)"
    ),
    # the sums of the backward
    "sums of the first group": Mutant(
        BATCHNORM, "own = partial_ptr + group * tiles * C\n        first", "own = partial_ptr\n        first"
    ),
    "factor's sign": Mutant(BATCHNORM, "-(second * root * per_count)", "second * root * per_count"),
    "factor without one root": Mutant(BATCHNORM, "-(second * root * per_count)", "-(second * per_count)"),
    "offset's sign": Mutant(BATCHNORM, "-(first * per_count)", "first * per_count"),
    "dgamma of the last group": Mutant(BATCHNORM, "dgamma += second", "dgamma = second"),
    "dbeta of the last group": Mutant(BATCHNORM, "dbeta += first", "dbeta = first"),
    "the pixels of all groups": Mutant(TRAINING, "// y.shape[1] // self.forward.groups", "// y.shape[1]"),
    # du and x̂
    "the mean for y - mean": Mutant(BATCHNORM, "centred * factor[None, :]", "(mean * factor)[None, :]"),
    "du without its scale": Mutant(BATCHNORM, "du = scale[None, :] * (g", "du = (g"),
    "x̂ without its shift": Mutant(BATCHNORM, "scale[None, :] + shift[None, :]", "scale[None, :]"),
    "x̂ without its slope": Mutant(BATCHNORM, "shift[None, :], slope, ACT)", "shift[None, :], 1.0, ACT)"),
    "mean and scale of the first group": Mutant(
        BATCHNORM, "vectors = stats_ptr + group * C + c", "vectors = stats_ptr + c"
    ),
    "shift of the first group": Mutant(
        BATCHNORM, "stats_ptr + 3 * GROUPS * C + group * C + c", "stats_ptr + 3 * GROUPS * C + c"
    ),
    "coefficients of the first group": Mutant(
        BATCHNORM, "vectors = coefficients_ptr + group * C + c", "vectors = coefficients_ptr + c"
    ),
    # running statistics
    "a cumulative weight for all groups": Mutant(BATCHNORM, "(seen + group + 1)", "(seen + 1)"),
    "the biased variance is tracked": Mutant(BATCHNORM, "other=0.0) * (COUNT / (COUNT - 1))", "other=0.0)"),
    "the momentum of the old mean": Mutant(
        BATCHNORM, "_lerp(mean.to(tl.float32), values,", "_lerp(values, mean.to(tl.float32),"
    ),
    "a momentum of 1 is not exact": Mutant(
        BATCHNORM, "end - (1.0 - weight) * difference", "start + weight * difference"
    ),
    "groups count as one batch": Mutant(BATCHNORM, "seen + GROUPS)", "seen + 1)"),
    # blocks of outputs
    "a block's rows from its columns": Mutant(UP_BLOCK, "kh = i + 2 - 2 * u", "kh = j + 2 - 2 * u"),
    "a block's columns from its rows": Mutant(UP_BLOCK, "kw = j + 2 - 2 * v", "kw = i + 2 - 2 * v"),
    "taps in reverse": Mutant(UP_BLOCK, "kh = i + 2 - 2 * u", "kh = 1 - i + 2 * u"),
    "channels are not padded": Mutant(UP_BLOCK, "co = column % PADDED", "co = column % C_OUT"),
    "positions of a block in C_OUT columns": Mutant(
        UP_BLOCK, "j = column // PADDED % (2 * S)", "j = column // C_OUT % (2 * S)"
    ),
    "no row above the map": Mutant(UP_BLOCK, "top = S * p - 1", "top = S * p"),
    "padding left of the map": Mutant(UP_BLOCK, "& (left + v >= 0) ", ""),
    "outputs above the map": Mutant(UP_BLOCK, " & (h >= 0) & (h < Y.size[1])", " & (h < Y.size[1])"),
    "outputs below the map": Mutant(UP_BLOCK, " & (h >= 0) & (h < Y.size[1])", " & (h >= 0)"),
    "products that are no outputs have statistics": Mutant(
        UP_BLOCK, "of_slice = tl.where(written, slices[s], 0.0)", "of_slice = slices[s]"
    ),
    "all rows count at the border": Mutant(
        DEVICE, "count = tl.sum(inside.to(tl.float32))", "count = tl.sum(inside.to(tl.float32) * 0.0 + 1.0)"
    ),
    "a tile's positions share a row of partials": Mutant(
        UP_BLOCK, "tile = row_tile * (4 * S * S) + position", "tile = row_tile * (4 * S * S) + 0 * position"
    ),
    "one row of blocks too few": Mutant(
        UP_BLOCK, "spec.images * (h // (2 * s) + 1)", "spec.images * (h // (2 * s))"
    ),
    # column slices
    "slices out of order": Mutant(
        DEVICE, "slices = (first, second, third, fourth)", "slices = (first, third, second, fourth)"
    ),
    "halves out of order": Mutant(DEVICE, "left, right = _halves(", "right, left = _halves("),
    "all of up's slices are the first": Mutant(UP, "co = column + i * WIDTH + tl", "co = column + tl"),
    "all of down's slices are the first": Mutant(DOWN, "co = column + i * WIDTH + tl", "co = column + tl"),
    # groups of rows
    "tiles take turns among groups": Mutant(DEVICE, "group = tile // tiles", "group = tile % GROUPS"),
    "a tile too many where groups fill theirs": Mutant(
        DEVICE, "(of_group + BLOCK_M - 1)", "(of_group + BLOCK_M)"
    ),
    "a tile straddles groups": Mutant(DEVICE, "inside = m < of_group", "inside = group * of_group + m < M"),
    "rows of the first group": Mutant(DEVICE, "m = group * of_group + m", "m = m"),
    "vectors of the first group": Mutant(DEVICE, "ptr + group * C + channel", "ptr + channel"),
    "the head's vectors of the first group": Mutant(
        "kernels/gpu/dense.py", "group = n // (M // SPEC.groups)", "group = 0 * n"
    ),
    "tiles as if there were no groups": Mutant(
        "kernels/gpu/tiles.py", "return groups * -(-rows // groups // block_m)", "return -(-rows // block_m)"
    ),
    "a standalone prologue without groups": Mutant(
        "kernels/gpu/prologue_kernel.py", '"GROUPS": spec.groups', '"GROUPS": 1'
    ),
    # the products of the backward
    "g times its scale": Mutant(
        DEVICE, 'acc = g if Y.function == "gradient" else g * scale', "acc = g * scale"
    ),
    "dgamma's sum over x̂": Mutant(DEVICE, "tl.sum(g * x, axis=ROWS)", "tl.sum(g * x * scale, axis=ROWS)"),
    "a weight's gradient from raw y": Mutant(
        TRAINING,
        "        del y\n        if x_hat is not None:\n            self._wgrad(i, x_hat, du)",
        "        if x_hat is not None:\n            self._wgrad(i, y, du)",
    ),
    "du is not applied": Mutant(TRAINING, "batchnorm.apply(g, y,", "batchnorm.apply(None, y,"),
    "no derivative of the last activation": Mutant(
        TRAINING, 'if call.y is None or act == "none":', "if True:"
    ),
    "no derivative without a BatchNorm": Mutant(
        TRAINING, 'strides, "adjoint", before.act, other_stride=strides)', 'strides, "affine")'
    ),
    # inference: folding
    "the mean's sign": Mutant(PREPARE, "offset -= tl.load(", "offset += tl.load("),
    "no eps is folded": Mutant(PREPARE, "tl.sqrt_rn(var + EPS)", "tl.sqrt_rn(var)"),
    "an offset without its scale": Mutant(PREPARE, "shift + offset * scale", "shift + offset"),
    "vectors are contiguous": Mutant(PREPARE, "+ c * STRIDE[1]", "+ c"),
    # inference: currency of packed weights
    "the same lines in every launch": Mutant(PREPARE, "_scrambled(seed * 4096 +", "_scrambled(0 * seed +"),
    "weights of 16 bits are not compared": Mutant(
        PREPARE, "of_16_bits = of_16_bits | difference", "of_16_bits = of_16_bits"
    ),
    "only the last weight is compared": Mutant(
        PREPARE, "of_32_bits = of_32_bits | difference", "of_32_bits = difference"
    ),
    "a launch that finds a difference renews the copy": Mutant(
        PREPARE, "            if renews:\n", "            if CHECKED:\n"
    ),
    "the copy is never renewed": Mutant(
        PREPARE, "tl.where(renews, launch, launch + 1)", "tl.where(renews, launch, launch)"
    ),
    "programs number launches by themselves": Mutant(
        PREPARE, "tl.load(state_ptr + 1) // tl.num_programs(0)", "tl.load(state_ptr + 1)"
    ),
    "versions are not followed": Mutant(PREPARE, "versions != self._versions or ", ""),
    "steps are not followed": Mutant(PREPARE, " or epoch != self._epoch", ""),
    "compared although not constant any more": Mutant(
        PREPARE, "return may_be_checked(self._weights)", "return True"
    ),
    "moved vectors are not seen": Mutant(
        PREPARE, "found += [(t.data_ptr(), t.dtype, t.stride()) for t in vectors]", "found += []"
    ),
    # inference: maps
    "a map overwrites the one it is made from": Mutant(INFERENCE, "odd * (i % 2)", "0 * odd * (i % 2)"),
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources."""
    to = tmp_path_factory.mktemp("sources")
    for name in ("dcgan", "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def run(sources: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run the fast tests until one fails, but for one that needs gigabytes."""
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-k", "not beyond_int32", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found(name: str, copied: Path) -> None:
    file, old, new, count = MUTANTS[name]
    source = copied / file
    text = source.read_text()
    assert text.count(old) == count, "the sources have changed: update the fault"
    source.write_text(text.replace(old, new))
    try:
        done = run(copied, INFERENCE_TESTS if file in (INFERENCE, PREPARE) else TRAINING_TESTS)
    finally:
        source.write_text(text)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:]


@pytest.mark.slow
def test_the_copy_passes_without_a_fault(copied: Path) -> None:
    done = run(copied, TRAINING_TESTS + INFERENCE_TESTS)
    assert done.returncode == pytest.ExitCode.OK, done.stdout[-3000:]
