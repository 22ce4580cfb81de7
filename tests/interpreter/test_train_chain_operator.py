"""train_chain as an operator on the Triton engine, whose fake tensors know the packed weights' sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from dcgan.kernels import ops
from dcgan.kernels.spec import TrainCall
from tests.support.networks import assert_equal_results, results
from tests.support.train_chains import (
    BACKWARD_OP,
    OP,
    Layer,
    arguments,
    build,
    chain_of,
    tensors_of,
    with_tensors,
)

UP, DOWN = True, False
NETWORKS = {
    "up": ([Layer(UP, 4, norm=True, act="relu"), Layer(UP, 3, act="tanh")], (4, 5, 2, 2)),
    "down": (
        [
            Layer(DOWN, 4, act="leaky_relu"),
            Layer(DOWN, 5, norm=True, act="leaky_relu"),
            Layer(DOWN, 1, 2, 1, 0),
        ],
        (4, 3, 8, 8),
    ),
}
BOTH = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with ops.use_engine("triton"):
        yield


def call_of(name: str, dtype: torch.dtype = torch.float32) -> TrainCall:
    layers, shape = NETWORKS[name]
    return chain_of(build(shape[1], layers)).to(dtype).call(torch.randn(shape, dtype=dtype).requires_grad_())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    call = call_of(name, dtype)
    torch.library.opcheck(OP, arguments(call))
    call = with_tensors(call, {n: t.detach() for n, t in tensors_of(call).items()})
    y, saved, stats, packed = OP(*arguments(call))
    assert packed.numel()
    needs = [True] * (1 + 3 * len(call.stages))
    torch.library.opcheck(BACKWARD_OP, (y, y, saved, stats, packed, needs, *arguments(call)))


@BOTH
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("batch", [4, 0])
def test_fake_tensors_have_the_results_shapes_and_strides(name: str, keep: bool, batch: int) -> None:
    call = call_of(name)
    call = call._replace(x=call.x[:batch], keep=keep)
    with torch.no_grad(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        meta = with_tensors(call, {n: mode.from_tensor(t) for n, t in tensors_of(call).items()})
        fake = OP(*arguments(meta))
    with torch.no_grad():
        real = OP(*arguments(call))
    for a, b in zip(real, fake, strict=True):
        for t, f in zip(*(v if isinstance(v, list) else [v] for v in (a, b)), strict=True):
            assert (t.shape, t.stride(), t.dtype) == (f.shape, f.stride(), f.dtype)


@BOTH
def test_a_dynamic_batch_size(name: str) -> None:
    """With dynamic=True, one graph serves every batch size above 1."""
    layers, shape = NETWORKS[name]
    network = build(shape[1], layers)
    network.groups = 2
    eager = chain_of(network)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for step, batch in enumerate((4, 6, 2)):
        x = torch.randn(batch, *shape[1:])
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            actual = results(compiled, x)
        actual = {n.replace("_orig_mod.", ""): t for n, t in actual.items()}
        assert_equal_results(actual, results(eager, x), 1e-6)
