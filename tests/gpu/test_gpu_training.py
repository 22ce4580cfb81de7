"""On a real GPU, in training: every layer at its real shape and both networks, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcgan.kernels import ops
from dcgan.kernels.gpu.tools.layers import DTYPES
from tests.gpu import matrix
from tests.gpu.full_size import (
    LAYERS,
    ROLES,
    TOLERANCE,
    TRAINING,
    assert_within_bounds,
    chain_call,
    cotangent_of,
    error,
    exact,
    networks,
    reference_copy,
    run,
    samples,
    training_call,
)
from tests.support.chain_results import BOUNDS, Bounds, assert_accurate

pytestmark = pytest.mark.gpu

# Bounds beyond twice eager's error. Where rounding flips a sign before a ReLU, an element of a gradient
# changes by its full size; in float32 this sometimes happens to one of the smallest map's 2¹⁷ elements, which
# is 2^-8.5 of its norm.
FLIPS = {"float32": 2**-8, "tf32": 5e-2, "float16": 5e-2, "bfloat16": 2e-1}


@pytest.mark.parametrize(
    matrix.LAYER, matrix.layers([("bfloat16", layer) for layer in ROLES]), indirect=["precision"]
)
def test_layer(layer: str, batch: int, precision: str) -> None:
    """Output, statistics and every gradient against float64; only Triton kernels run."""
    call, transposed = training_call(layer, batch, DTYPES[precision])
    found, given, choices = run(call, transposed)
    assert [choice.engine for choice in choices] == ["triton", "triton"]
    assert [choice.op for choice in choices] == [choices[0].op, f"{choices[0].op}_backward"]
    assert_within_bounds(found, exact(call, transposed, found["y"], given), precision, layer)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"], indirect=True)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_same_bits_twice(layer: str, precision: str) -> None:
    """There are no atomics and sums have a fixed order, so scheduling does not change the bits."""
    call, transposed = training_call(layer, 64, DTYPES[precision])
    first, given, _ = run(call, transposed)
    second, _, _ = run(call, transposed, given)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


WHICH = pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])


def chain_bounds(precision: str) -> Bounds:
    """Return the bounds of a network as one operator.

    Where it is computed from the engine's own maps, only the last bit of float32 may flip a sign. Statistics
    are those of the products before they are rounded; in TF32 these are truncated, all in one direction.
    """
    layer, flips = TOLERANCE[precision], FLIPS[precision]
    if precision == "float32":
        return Bounds(layer, 2 * layer, flips, flips)
    if precision == "tf32":
        return Bounds(layer, 4 * layer, 8 * layer, flips)
    of_dtype = BOUNDS[DTYPES[precision]]
    statistics = of_dtype.statistics + 2 * TOLERANCE["float32"]
    return of_dtype._replace(statistics=statistics, whole=flips)


@WHICH
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("precision", "parameters"),
    [
        *(pytest.param(name, dtype, id=name) for name, dtype in DTYPES.items()),
        pytest.param("float16", torch.float32, id="autocast-float16"),
        pytest.param("bfloat16", torch.float32, id="autocast-bfloat16", marks=pytest.mark.check),
    ],
    indirect=["precision"],
)
def test_chain(which: int, groups: int, precision: str, parameters: torch.dtype) -> None:
    """A network as one operator: each layer, the statistics and every gradient, against float64."""
    call, dy = chain_call(which, 64, groups, DTYPES[precision], parameters)
    assert_accurate(call, dy, "triton", chain_bounds(precision))


@WHICH
@pytest.mark.parametrize("groups", [1, 3])
def test_chain_of_ragged_groups(which: int, groups: int) -> None:
    """Of three images each, which leave most row tiles of the small maps partially filled."""
    call, dy = chain_call(which, 3 * groups, groups, torch.bfloat16, torch.float32)
    assert_accurate(call, dy, "triton", chain_bounds("bfloat16"))


def step(
    network: nn.Module, x: Tensor, cotangent: Tensor, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Run a training forward, optionally under autocast, and backward; return output, gradients, buffers."""
    network.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        y = network.train()(x)
    y.backward(cotangent.to(y.dtype))
    assert x.grad is not None
    found = {"output": y.detach(), "gradient of the input": x.grad}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        found[f"gradient of {name}"] = parameter.grad
    return found | {f"buffer {name}": buffer.clone() for name, buffer in network.named_buffers()}


def assert_as_good_as_eager(
    found: dict[str, Tensor], eager: dict[str, Tensor], expected: dict[str, Tensor], precision: str
) -> None:
    squares = [t.double().square().sum() for name, t in expected.items() if name.startswith("gradient")]
    # The error of a gradient that is 0 except for rounding is taken relative to all gradients.
    floor = 1e-2 * torch.stack(squares).sum().sqrt()
    for name, want in expected.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(found[name], want)
            continue
        norm = torch.maximum(want.norm(), floor if name.startswith("gradient") else want.new_zeros(()))
        off, plain = (((t.double() - want).norm() / norm).item() for t in (found[name], eager[name]))
        minimum = FLIPS[precision] if name.startswith("gradient") else 2 * TRAINING[precision]
        assert off <= max(2 * plain, minimum), f"{name}: error {off:.1e}, eager {plain:.1e}"


@pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])
@pytest.mark.parametrize(
    ("batch", "precision"), [*((64, name) for name in DTYPES), (16, "bfloat16")], indirect=["precision"]
)
def test_network(which: int, batch: int, precision: str) -> None:
    """Forward, backward and running statistics have at most twice eager's error."""
    dtype = DTYPES[precision]
    network = networks(dtype)[which].train()
    x, cotangent = samples(network, batch, dtype), cotangent_of(network, batch)
    wide, plain = reference_copy(network), reference_copy(network, dtype)
    expected, eager = step(wide, x.double(), cotangent), step(plain, x, cotangent)
    with ops.recording() as choices:
        found = step(network, x, cotangent)
    assert {choice.engine for choice in choices} == {"triton"}
    assert len([choice for choice in choices if choice.op.endswith("_backward")]) == 5
    assert_as_good_as_eager(found, eager, expected, precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"], indirect=True)
@pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])
def test_network_gives_the_same_bits_twice(which: int, precision: str) -> None:
    dtype = DTYPES[precision]
    network = networks(dtype)[which].train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    x, cotangent = samples(network, 64, dtype), cotangent_of(network, 64)
    first = {name: value.clone() for name, value in step(network, x, cotangent).items()}
    network.load_state_dict(state)
    second = step(network, x, cotangent)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])
def test_autocast(which: int) -> None:
    """Compute in bfloat16 with float32 parameters and gradients."""
    network = networks(torch.float32)[which].train()
    x, cotangent = samples(network, 64, torch.float32), cotangent_of(network, 64)
    wide, plain = reference_copy(network), reference_copy(network, torch.float32)
    expected = step(wide, x.double(), cotangent)
    eager = step(plain, x, cotangent, torch.bfloat16)
    with ops.recording() as choices:
        found = step(network, x, cotangent, torch.bfloat16)
    assert {choice.engine for choice in choices} == {"triton"}
    assert found["output"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for name, t in found.items() if name.startswith("gradient"))
    assert_as_good_as_eager(found, eager, expected, "bfloat16")


def test_grad_scaler() -> None:
    """float16 with a scaled loss: the SGD step agrees with float64, and nothing overflows."""
    network = networks(torch.float32)[0].train()
    reference = reference_copy(network)
    z, cotangent = samples(network, 32, torch.float32), cotangent_of(network, 32)
    before = {name: p.detach().double() for name, p in network.named_parameters()}
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with torch.autocast("cuda", torch.float16):
        loss = (network(z).float() * cotangent.float()).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**8
    (reference(z.double()) * cotangent).sum().backward()
    for name, parameter in network.named_parameters():
        wanted = reference.get_parameter(name).grad
        assert wanted is not None
        moved = (before[name] - parameter.detach().double()) / 0.1
        assert error(moved, wanted) <= 0.1, name  # rounding may flip signs before a ReLU
