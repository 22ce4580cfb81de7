"""The drop-ins under autograd and torch.func: gradient penalties, saved tensors, transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.networks import (
    EXACT,
    MODES,
    NETWORKS,
    assert_equal_results,
    drop_in,
    norms,
    reference,
    sample,
    set_on_norms,
)
from tests.support.tolerance import relative

pytestmark = pytest.mark.usefixtures("one_thread", "reference_engine")


# --- autograd ----------------------------------------------------------------------------------------------


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def r1(d: nn.Module, real: Tensor) -> Tensor:
    """R1: ½‖∇D(x)‖² on real images (Mescheder et al., 2018)."""
    real = real.clone().requires_grad_()
    gradient = torch.autograd.grad(d(real).log().sum(), real, create_graph=True)[0]
    return gradient.square().sum((1, 2, 3)).mean() / 2


def wgan_gp(d: nn.Module, real: Tensor) -> Tensor:
    """WGAN-GP: (‖∇D(x)‖ - 1)² between real and generated images (Gulrajani et al., 2017)."""
    mixed = torch.lerp(real, real.flip(0), torch.linspace(0, 1, len(real)).to(real)[:, None, None, None])
    mixed.requires_grad_()
    gradient = torch.autograd.grad(d(mixed).sum(), mixed, create_graph=True)[0]
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean() + d(real).mean()


@pytest.mark.parametrize("penalty", [r1, wgan_gp])
@MODES
def test_gradient_penalties(penalty: Callable[[nn.Module, Tensor], Tensor], training: bool) -> None:
    model = reference("D").train(training)
    other = drop_in(model)
    x = sample(model)
    expected, actual = penalty(model, x), penalty(other, x)
    assert relative(actual, expected) < EXACT
    assert_equal_results(gradients_of(actual, other), gradients_of(expected, model), 10 * EXACT)


@MODES
def test_second_derivatives_of_the_generator(training: bool) -> None:
    """A path-length penalty: the norm of the gradient with respect to z."""
    model = reference("G").train(training)
    other = drop_in(model)

    def penalty(g: nn.Module, z: Tensor) -> Tensor:
        z = z.clone().requires_grad_()
        return torch.autograd.grad(g(z).square().sum(), z, create_graph=True)[0].norm()

    z = sample(model)
    expected, actual = penalty(model, z), penalty(other, z)
    assert relative(actual, expected) < EXACT
    assert_equal_results(gradients_of(actual, other), gradients_of(expected, model), 10 * EXACT)


def saved_maps(model: nn.Module, x: Tensor) -> set[int]:
    """Return the storage addresses of the [N, C, H, W] tensors that a forward saves for its backward."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.ndim == 4 and t.shape[0] == len(x) and not isinstance(t, nn.Parameter):
            saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    found = {t.untyped_storage().data_ptr() for t in saved}
    y.sum().backward()
    return found


@NETWORKS
@pytest.mark.parametrize("channels", [1, 3])
def test_training_saves_one_map_per_layer(kind: str, channels: int) -> None:
    """The input and each layer's raw output are saved; eager also saves BatchNorm's outputs."""
    model = reference(kind, channels, 64, torch.float32)
    layers = sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.main)
    x = sample(model, 17)  # no weight has a dimension of 17
    assert len(saved_maps(drop_in(model), x)) <= layers + 1
    assert len(saved_maps(model, x)) > layers + 1


@NETWORKS
def test_a_frozen_norm_saves_no_more_maps(kind: str) -> None:
    model = reference(kind, dtype=torch.float32)
    norms(model)[0][1].eval()
    layers = sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.main)
    assert len(saved_maps(drop_in(model), sample(model, 17))) <= layers + 1


@NETWORKS
@MODES
def test_no_graph_under_no_grad(kind: str, training: bool) -> None:
    model = drop_in(reference(kind)).train(training)
    x = sample(model)
    with torch.no_grad():
        y = model(x.requires_grad_())
    assert not y.requires_grad
    assert y.grad_fn is None
    with torch.inference_mode():
        assert model(x).is_inference()
    assert all(p.grad is None for p in model.parameters())
    assert all(b.grad_fn is None and not b.requires_grad for b in model.buffers())
    assert model(x).requires_grad


@NETWORKS
def test_running_statistics_have_no_graph(kind: str) -> None:
    model = drop_in(reference(kind)).train()
    for _ in range(3):
        model(sample(model))
    assert all(b.grad_fn is None and not b.requires_grad for b in model.buffers())


@NETWORKS
def test_a_network_constructed_in_inference_mode(kind: str) -> None:
    with torch.inference_mode():
        model = reference(kind).eval()
        other = drop_in(model)
        x = sample(model)
        assert relative(other(x), model(x)) < EXACT
        for network in (model, other):
            torch.manual_seed(1)
            network.main[0].weight.copy_(torch.randn_like(network.main[0].weight))
        assert relative(other(x), model(x)) < EXACT


@NETWORKS
def test_retained_graphs_and_accumulation(kind: str) -> None:
    model = reference(kind)
    other = drop_in(model)
    x = sample(model)
    for network in (model, other):
        y = network(x)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert relative(q.grad, p.grad) < EXACT, name


# --- transforms --------------------------------------------------------------------------------------------


@NETWORKS
@MODES
def test_forward_mode(kind: str, training: bool) -> None:
    """An operator without a jvp rule would return zeros."""
    model = reference(kind).train(training)
    other = drop_in(model)
    x = sample(model)
    v = torch.randn_like(x)
    if training:
        for network in (model, other):
            set_on_norms(track_running_stats=False)(network)
    expected, actual = (torch.func.jvp(m, (x,), (v,)) for m in (model, other))
    assert float(expected[1].detach().norm()) > 0
    assert relative(actual[0], expected[0]) < EXACT
    assert relative(actual[1], expected[1]) < EXACT


@NETWORKS
def test_per_sample_gradients(kind: str) -> None:
    """vmap of grad over functional_call, in eval mode, as BatchNorm requires."""
    model = reference(kind).eval()
    other = drop_in(model)
    x = sample(model)

    def gradients(network: nn.Module) -> dict[str, Tensor]:
        parameters = {n: p.detach() for n, p in network.named_parameters()}

        def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(network, p, (x[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    assert_equal_results(gradients(other), gradients(model))


@NETWORKS
@MODES
def test_functional_call_with_other_parameters(kind: str, training: bool) -> None:
    model, wanted = reference(kind).train(training), reference(kind).train(training)
    other = drop_in(model)
    x = sample(model)
    other(x)
    state = {n: t.detach().clone() for n, t in wanted.state_dict().items()}
    assert relative(torch.func.functional_call(other, state, (x,)), wanted(x)) < EXACT


@NETWORKS
def test_export(kind: str) -> None:
    model = drop_in(reference(kind, dtype=torch.float32)).eval()
    x = sample(model)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
