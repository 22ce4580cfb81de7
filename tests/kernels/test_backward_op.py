"""The backward operators: schema, strides, needed gradients, and the tensors saved for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast
from dcgan.kernels import ops
from dcgan.kernels.reference import empty_gradient
from dcgan.kernels.spec import Backward
from tests.support.float64_reference import BOTH, op
from tests.support.native_training import backward_operator


def arguments(transposed: bool, stats: bool, prologue: bool, needs: tuple[bool, ...]) -> Backward:
    # float64, since a library's float32 sums may differ between calls by more than opcheck allows.
    def random(*shape: int) -> Tensor:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.randn(*shape, dtype=torch.float64).to(memory_format=layout)

    x = random(2, 3, 4, 6)
    weight = random(*((3, 5) if transposed else (5, 3)), 4, 4).contiguous()
    y = random(2, 5, *((8, 12) if transposed else (2, 3)))
    vector, other = random(5), random(3)
    given = other if prologue else None
    statistics = vector if stats else None
    return Backward(
        torch.randn_like(y), statistics, statistics, x, weight, given, given, given, "relu", None,
        "none" if stats else "tanh", y, statistics, stats, 0.2, 2, 1, needs,
    )  # type: ignore[arg-type]  # fmt: skip


@BOTH
@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize(
    "needs",
    [(True, True, True, False, False), (False, True, False, False, False), (True, False, True, False, True)],
)
def test_opcheck(transposed: bool, stats: bool, prologue: bool, needs: tuple[bool, ...]) -> None:
    needs = (*needs[:4], needs[4] and not stats)  # out_shift and statistics exclude each other
    call = arguments(transposed, stats, prologue, needs)
    torch.library.opcheck(backward_operator(transposed), tuple(call))


@BOTH
@pytest.mark.parametrize("nhwc", [True, False])
def test_gradients_have_the_strides_of_their_tensors(transposed: bool, nhwc: bool) -> None:
    call = arguments(transposed, True, True, (True, True, True, False, False))
    layout = torch.channels_last if nhwc else torch.contiguous_format
    call = call._replace(
        x=call.x.contiguous(memory_format=layout), weight=call.weight.contiguous(memory_format=layout)
    )
    dx, dweight, *vectors = backward_operator(transposed)(*call)
    assert dx.stride() == call.x.stride() == empty_gradient(call.x).stride()
    assert dweight.stride() == call.weight.stride()
    assert [v.numel() for v in vectors] == [3, 3, 3, 0, 0]


@BOTH
def test_gradients_not_needed_are_empty(transposed: bool) -> None:
    call = arguments(transposed, False, False, (False, True, False, False, False))
    dx, dweight, *vectors = backward_operator(transposed)(*call)
    assert dx.shape == (0,)
    assert dweight.shape == call.weight.shape
    assert all(v.shape == (0,) for v in vectors)


@BOTH
def test_the_engine_of_the_backward_is_recorded(transposed: bool) -> None:
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    weight = torch.randn(3, 3, 4, 4)
    with ops.use_engine("reference"), ops.recording() as choices:
        op(transposed)(x, weight, stats=True)[0].sum().backward()
    name = ops.NAMES[transposed]
    assert [choice.op for choice in choices] == [name, f"{name}_backward"]


def saved_activations(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the distinct activations that autograd saves, without parameters and the input."""
    known = {p.untyped_storage().data_ptr() for p in network.parameters()}
    known.add(x.untyped_storage().data_ptr())
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        address = t.untyped_storage().data_ptr()
        if t.ndim == 4 and address not in known:
            found[address] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(x).mean()
    return list(found.values())


def test_one_tensor_per_layer_is_saved() -> None:
    """The raw output of each convolution, which is the next one's input, and the image, for its tanh."""
    generator = fast.Generator(20, 3, features=8, image_size=32)
    saved = saved_activations(generator, torch.randn(4, 20, 1, 1))
    assert sorted(tuple(t.shape[1:]) for t in saved) == [(3, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4)]
    discriminator = fast.Discriminator(3, features=8, image_size=32)
    saved = saved_activations(discriminator, torch.randn(4, 3, 32, 32))
    assert sorted(tuple(t.shape[1:]) for t in saved) == [(1, 1, 1), (8, 16, 16), (16, 8, 8), (32, 4, 4)]


def test_create_graph_gives_the_same_first_derivatives() -> None:
    """create_graph uses another implementation, in aten, with the same first derivatives."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    y, mean, var = ops.conv2d_fused(x, weight, stats=True)
    loss = (y * y).sum() + mean.sum() + (var * var).sum()
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    twice = torch.autograd.grad(loss, (x, weight), create_graph=True)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b)
        assert b.requires_grad
