"""Drop-ins with modules changed by the user: other norms and activations, parametrizations, hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.utils import prune

from dcgan import fast, models
from tests.support.networks import (
    EXACT,
    MODES,
    NETWORKS,
    assert_agree,
    drop_in,
    norms,
    reference,
    replace,
    replace_norms,
    sample,
    set_on_norms,
    with_bias,
)
from tests.support.tolerance import relative

pytestmark = pytest.mark.usefixtures("one_thread", "reference_engine")


# --- changed modules ---------------------------------------------------------------------------------------


def replace_activations(*activations: nn.Module) -> Callable[[Any], None]:
    """Replace the hidden layers' activations, cycling through ``activations``."""

    def change(model: Any) -> None:
        hidden = [i for i, m in enumerate(model.main) if isinstance(m, nn.ReLU | nn.LeakyReLU)]
        for n, i in enumerate(hidden):
            model.main[i] = copy.deepcopy(activations[n % len(activations)])

    return change


def half_frozen(model: Any) -> None:
    """Give the first norm the opposite of the network's mode, as when only some layers are fine-tuned."""
    _, norm = norms(model)[0]
    norm.train(not norm.training)


def frozen_parameters(model: Any) -> None:
    for module in list(model.main)[:4]:
        module.requires_grad_(False)


def spectral(model: Any) -> None:
    for module in model.main:
        if isinstance(module, nn.Conv2d):
            nn.utils.parametrizations.spectral_norm(module)


def old_spectral(model: Any) -> None:
    nn.utils.spectral_norm(model.main[0])


def weight_norm(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.main[0])


def dilated(conv: Any) -> nn.Module:
    # Kernel 2 with dilation 3 has the extent of kernel 4.
    return type(conv)(
        conv.in_channels, conv.out_channels, 2, conv.stride, conv.padding, dilation=3, bias=False
    )


def inner_convolution(model: Any) -> nn.Module:
    return model.main[3 if isinstance(model, models.Generator) else 2]


def dropout(model: Any) -> None:
    model.main.append(nn.Dropout(0.0))
    model.main.insert(3, nn.Dropout(0.0))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "momentum None": set_on_norms(momentum=None),
    "momentum 1": set_on_norms(momentum=1.0),
    "eps": set_on_norms(eps=0.1),
    "track_running_stats turned off": set_on_norms(track_running_stats=False),
    "no statistics": replace_norms(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    "no affine": replace_norms(lambda c: nn.BatchNorm2d(c, affine=False)),
    "no affine, no statistics": replace_norms(
        lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False)
    ),
    "GroupNorm": replace_norms(lambda c: nn.GroupNorm(1, c)),
    "Identity for BatchNorm": replace_norms(lambda c: nn.Identity()),
    "half frozen": half_frozen,
    "parameters frozen": frozen_parameters,
    "another slope": replace_activations(nn.LeakyReLU(0.01)),
    "slope 0": replace_activations(nn.LeakyReLU(0.0)),
    "negative slope": replace_activations(nn.LeakyReLU(-0.5)),
    "mixed slopes": replace_activations(nn.LeakyReLU(0.3), nn.LeakyReLU(0.05)),
    "mixed activations": replace_activations(nn.Tanh(), nn.LeakyReLU(0.4), nn.Sigmoid()),
    "unsupported activations": replace_activations(nn.ELU(), nn.GELU()),
    "no activations": replace_activations(nn.Identity()),
    "spectral_norm": spectral,
    "old spectral_norm": old_spectral,
    "weight_norm": weight_norm,
    "bias": replace(0, with_bias),
    "bias at the end": replace(-2, with_bias),
    "dilated": replace(0, dilated),
    "no head": replace(-1, lambda _: nn.Identity()),
    "dropout": dropout,
}


@NETWORKS
@MODES
@pytest.mark.parametrize("name", CHANGES)
def test_changed_modules(kind: str, training: bool, name: str) -> None:
    """Supported layers run by the ops, the others eagerly; the result is the reference's."""
    model = reference(kind, features=2).train(training)
    CHANGES[name](model)
    model.double()
    if "BatchNorm" not in name and "norm" not in name:
        for module in model.modules():
            module.training = module.training if name == "half frozen" else training
    assert_agree(model, drop_in(model), sample(model))


@NETWORKS
@MODES
def test_pruned(kind: str, training: bool) -> None:
    """A hook computes the weight before each forward."""
    model = reference(kind).train(training)
    other = drop_in(model)
    for network in (model, other):
        prune.l1_unstructured(inner_convolution(network), "weight", 0.5)
    assert_agree(model, other, sample(model))


@NETWORKS
def test_modules_changed_after_conversion(kind: str) -> None:
    """Layers are inspected at every call, not only at conversion."""
    model = reference(kind).eval()
    other = drop_in(model)
    x = sample(model)
    other(x)
    for network in (model, other):
        CHANGES["another slope"](network)
        CHANGES["eps"](network)
        network.main[-1] = nn.Hardtanh()
    assert_agree(model, other, x)


@NETWORKS
def test_mode_changes(kind: str) -> None:
    model = reference(kind)
    other = drop_in(model)
    x = sample(model)
    for training in (True, False, True, True, False, False, True):
        model.train(training)
        other.train(training)
        assert_agree(model, other, x, steps=1)


def test_one_value_per_channel_raises_batch_norms_error() -> None:
    for training, tracking in ((True, True), (True, False), (False, False)):
        model = reference("G")
        norm = model.main[1]
        model.main[0] = nn.ConvTranspose2d(6, norm.num_features, 1, bias=False)  # a 1×1 map
        model.main[1] = nn.BatchNorm2d(norm.num_features, track_running_stats=tracking)
        model.double().train(training)
        other = drop_in(model)
        z = sample(model, 1)
        messages = []
        for network in (model, other):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel") as raised:
                network(z)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    model.eval()
    assert other.train()(sample(model, 2)).shape[0] == 2


# --- hooks -------------------------------------------------------------------------------------------------


@NETWORKS
@MODES
@pytest.mark.parametrize("index", range(-2, 4))
def test_hooks_see_eagers_values(kind: str, training: bool, index: int) -> None:
    model = reference(kind).train(training)
    other = drop_in(model)
    seen: dict[Any, list[Tensor]] = {model: [], other: []}
    for network in (model, other):

        def hook(_: nn.Module, args: tuple[Tensor], y: Tensor, network: Any = network) -> None:
            seen[network] += [args[0].detach().clone(), y.detach().clone()]

        network.main[index].register_forward_hook(hook)
    assert_agree(model, other, sample(model), steps=1)
    assert len(seen[other]) == len(seen[model]) == 2
    for a, b in zip(seen[other], seen[model], strict=True):
        assert relative(a, b) < EXACT


@NETWORKS
def test_backward_and_pre_hooks_fire(kind: str) -> None:
    model = reference(kind)
    for module in model.main:
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.inplace = False  # full backward hooks do not support in-place modules
    other = drop_in(model)
    fired: list[int] = []
    for network in (model, other):
        for i, module in enumerate(network.main):
            module.register_full_backward_hook(lambda m, g_in, g_out, i=i: fired.append(i))
        network.main[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    assert_agree(model, other, sample(model), steps=1)
    assert sorted(fired) == sorted(list(range(len(model.main))) * 2)


@NETWORKS
def test_removing_a_hook_restores_the_op(kind: str) -> None:
    other = drop_in(reference(kind))
    x = sample(other)
    handle = other.main[0].register_forward_hook(lambda m, args, y: None)
    assert fast.explain(other, x)[0].engine == "eager"
    handle.remove()
    assert fast.explain(other, x)[0].engine == "reference"
