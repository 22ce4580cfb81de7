"""NaN and infinities propagate wherever they do in eager, and to no other image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcgan.kernels import ops
from dcgan.kernels.reference import ACTIVATIONS
from tests.support import native
from tests.support.float64_reference import BOTH, Problem, op
from tests.support.native import ALGORITHMS, forced, small

pytestmark = [native.NEEDED, pytest.mark.usefixtures("one_thread", "nan_in_new_memory")]
NONFINITE = (float("nan"), float("inf"), float("-inf"))


def native_and_reference(call: ops.Call, problem: Problem, algorithm: str) -> tuple[Tensor, Tensor]:
    with forced(algorithm):
        actual = native.run_native(call, problem.transposed)
    with ops.use_engine("reference"):
        return actual, op(problem.transposed)(*call)[0]


def with_elements_set_to(t: Tensor, value: float, count: int = 3) -> Tensor:
    """Copy t with a few elements replaced: of its middle image, or of all of it."""
    t = t.clone()
    part = t[1] if t.ndim == 4 and t.shape[0] == 3 else t
    for index in torch.randperm(part.numel())[:count].tolist():
        part.view(-1)[index] = value
    return t


def assert_nonfinite_where_eager_is(actual: Tensor, expected: Tensor) -> None:
    assert not bool((actual.isfinite() & ~expected.isfinite()).any())
    assert not bool((~actual.isnan() & expected.isnan()).any())


@BOTH
@ALGORITHMS
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("value", NONFINITE)
def test_nonfinite_x(transposed: bool, algorithm: str, act: str, value: float) -> None:
    """Winograd may turn ∞ into NaN within a tile, but no other image is affected; the others match eager."""
    problem = small(algorithm, transposed, out_act=act)
    call = problem.call()
    clean, _ = native_and_reference(call, problem, algorithm)
    actual, expected = native_and_reference(
        call._replace(x=with_elements_set_to(call.x, value)), problem, algorithm
    )
    assert_nonfinite_where_eager_is(actual, expected)
    assert torch.equal(actual[[0, 2]], clean[[0, 2]])
    if algorithm not in ("f2", "f4"):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())


@BOTH
@ALGORITHMS
@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("name", ["weight", "out_scale", "out_shift"])
def test_nonfinite_weights_and_vectors(transposed: bool, algorithm: str, name: str, value: float) -> None:
    problem = small(algorithm, transposed)
    call = problem.call()
    clean, _ = native_and_reference(call, problem, algorithm)
    nonfinite = with_elements_set_to(getattr(call, name), value, 1)
    actual, expected = native_and_reference(call._replace(**{name: nonfinite}), problem, algorithm)
    assert_nonfinite_where_eager_is(actual, expected)
    untouched = [c for c in range(problem.c_out) if bool(expected[:, c].isfinite().all())]
    assert torch.equal(actual[:, untouched], clean[:, untouched])


@BOTH
@ALGORITHMS
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_an_infinite_shift_saturates_as_in_eager(transposed: bool, algorithm: str, act: str) -> None:
    problem = small(algorithm, transposed, out_act=act)
    call = problem.call()
    shift = call.out_shift.clone()
    shift[0], shift[-1] = float("inf"), float("-inf")
    actual, expected = native_and_reference(call._replace(out_shift=shift), problem, algorithm)
    for channel in (0, -1):
        assert torch.allclose(actual[:, channel], expected[:, channel], atol=1e-30, rtol=0)


@BOTH
@ALGORITHMS
def test_overflowing_sums(transposed: bool, algorithm: str) -> None:
    problem = small(algorithm, transposed, out_act="none")
    call = problem.call()
    call = call._replace(x=call.x.abs() * 1e25, weight=call.weight.abs() * 1e25)
    actual, expected = native_and_reference(call, problem, algorithm)
    assert not bool(expected.isfinite().any())
    assert not bool(actual.isfinite().any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_overflow_of_16_bit_results_gives_infinity(dtype: torch.dtype) -> None:
    large = torch.finfo(dtype).max
    x = torch.tensor([large, -large, large / 4, float("nan")], dtype=dtype)[:, None, None, None]
    call = ops.Call(x, torch.full((1, 1, 1, 1), 2.0, dtype=dtype), stride=1, padding=0)
    y = native.run_native(call, False).flatten()
    assert torch.equal(y[:3], torch.tensor([float("inf"), float("-inf"), large / 2], dtype=dtype))
    assert bool(y[3].isnan())
