"""The launches that the tools build for a network's layers: all of them run, and their results are right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcgan.kernels import reference
from dcgan.kernels.gpu import aten, tuning
from dcgan.kernels.gpu.launcher import Product
from dcgan.kernels.gpu.tools.layers import (
    EPS,
    discriminator,
    evaluation,
    generator,
    launches,
    outputs,
    stats_of,
    training,
)

SMS = 4
NETWORKS = {"G": generator(3, 6, 4, 32), "D": discriminator(1, 4, 32)}


def after(it: Product, exact: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the expected results of the launches after a product, from its exact results."""
    function = it.spec.y.function
    if it.spec.kind == "wgrad":
        return list(exact)
    if function != "gradient":
        return list(exact[1:])
    g, first, second = exact
    mean, var, scale, shift = stats = stats_of(it).double()
    count = g[:, 0].numel() // it.spec.groups
    factor, offset = -second.view_as(mean) / (var + EPS) / count, -first.view_as(mean) / count
    y = it.y.other.double()
    image = [
        v.repeat_interleave(len(y) // it.spec.groups, 0)[:, :, None, None] for v in (*stats, factor, offset)
    ]
    mean, _, scale, shift, factor_of_image, offset_of_image = image
    du = scale * (g + offset_of_image + (y - mean) * factor_of_image)
    x_hat = reference.activate((y - mean) * scale + shift, it.spec.y.act, it.spec.slope)
    return [factor, offset, du, x_hat]


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_training_step(network: str, dtype: str, groups: int) -> None:
    """The products of a network's forward and backward, and the kernels between them."""
    torch.manual_seed(0)
    found = training(NETWORKS[network], 2, dtype, input_gradient=True, groups=groups)
    assert {layer.phase for layer in found} == {"forward", "dgrad", "wgrad"}
    for layer in found:
        it, allowed = layer.product("cpu"), tuning.TOLERANCE[layer.problem.precision] / 2
        tile = tuning.estimate(layer.problem, SMS)
        exact = aten.exact(it)
        got = [t.clone() for t in outputs(it, tile, SMS)]  # as du overwrites g
        made = launches(it, tile, SMS)
        made.poison()
        made()
        assert aten.error([*got, *made.results], [*exact, *after(it, exact)]) <= allowed, layer


def test_a_backward_without_weight_gradients_does_not_compute_x_hat() -> None:
    found = training(NETWORKS["D"], 2, "float32", input_gradient=True, weight_gradients=False)
    assert {layer.phase for layer in found} == {"forward", "dgrad"}
    for layer in found:
        it, tile = layer.product("cpu"), tuning.estimate(layer.problem, SMS)
        made = launches(it, tile, SMS, x_hat=layer.x_hat)
        made.poison()
        made()
        if it.spec.y.function == "gradient":
            assert len(made.results) == 3
            expected = after(it, aten.exact(it))[:3]
            assert aten.error(made.results, expected) <= tuning.TOLERANCE["ieee"] / 2


def test_evaluation() -> None:
    for shapes in NETWORKS.values():
        for layer in evaluation(shapes, 2, "float32"):
            it, tile = layer.product("cpu"), tuning.estimate(layer.problem, SMS)
            assert aten.error(outputs(it, tile, SMS), aten.exact(it)) <= tuning.TOLERANCE["ieee"] / 2
