"""Changes of a network in eval mode, which every cache of weights must notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dcgan import models
from tests.support.native import NETWORK, eager64
from tests.support.networks import norms, randomise, results, sample
from tests.support.tolerance import relative


def step(
    make: Callable[[Any], torch.optim.Optimizer], which: type[nn.Module] = nn.Module
) -> Callable[[Any], None]:
    """Return a change that steps an optimizer on the parameters of the ``which`` modules."""

    def change(model: Any) -> None:
        chosen = [p for m in model.main if isinstance(m, which) for p in m.parameters()]
        for p in chosen:
            p.grad = torch.randn_like(p)
        make(chosen).step()

    return change


@torch.enable_grad()
def training_step(model: Any) -> None:
    results(model.train(), sample(model))
    torch.optim.Adam(model.parameters(), lr=0.05, fused=True).step()
    model.eval()


@torch.enable_grad()
def step_in_eval(model: Any) -> None:
    """Step without ever entering training mode: the running statistics stay, the weights change."""
    results(model, sample(model))
    torch.optim.SGD(model.parameters(), lr=1e-3, fused=True).step()


def load(model: Any) -> None:
    other = copy.deepcopy(model)
    randomise(other)
    model.load_state_dict(other.state_dict())


def load_one_layer(model: Any) -> None:
    model.main[0].load_state_dict({"weight": torch.randn_like(model.main[0].weight) / 10})


def load_assigning(model: Any) -> None:
    other = copy.deepcopy(model)
    randomise(other)
    model.load_state_dict(other.state_dict(), assign=True)


def each(edit: Callable[[nn.Parameter], Any]) -> Callable[[Any], None]:
    @torch.no_grad()
    def change(model: Any) -> None:
        for p in model.parameters():
            edit(p)

    return change


def initialize(model: Any) -> None:
    """weights_init edits ``.data``, which does not advance the version counter."""
    model.apply(models.weights_init)
    with torch.no_grad():
        for m in model.main:
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
                m.weight.data.mul_(5)


def replace_parameter(model: Any) -> None:
    for m in model.main:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            m.weight = nn.Parameter(torch.randn_like(m.weight) / 10)


def replace_layer(model: Any) -> None:
    old = model.main[0]
    model.main[0] = type(old)(old.in_channels, old.out_channels, 4, old.stride, old.padding, bias=False)


def to_float64_and_back(model: Any) -> None:
    model.to(torch.float64)
    model.main[0].weight.data.neg_()
    model.to(torch.float32)


def to_16_bit_and_back(model: Any) -> None:
    """Round the weights to bfloat16; the forward in between has separate packed weights."""
    model.to(torch.bfloat16)
    x = sample(model)
    assert relative(model(x), eager64(model, x)) < 2**-8 + NETWORK
    model.to(torch.float32)


def data_edited(model: Any) -> None:
    model.main[0].weight.data.neg_()


def moving_average(model: Any) -> None:
    """Update all parameters in place through ``.data``, as training loops do."""
    other = copy.deepcopy(model)
    randomise(other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data.mul_(0.999).add_(q.data, alpha=0.001)


def numpy_view(model: Any) -> None:
    model.main[3 if isinstance(model, models.Generator) else 2].weight.detach().numpy()[:] *= -1.5


def plain_attribute(model: Any) -> None:
    """Replace parameters by plain tensors, new ones each time, as adapted weights in meta-learning are."""
    for m in model.main:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            weight = m.weight.detach() * -1.1
            m._parameters.pop("weight", None)
            m.weight = weight


def swap_weights(model: Any) -> None:
    conv = model.main[0]
    torch.utils.swap_tensors(conv.weight, nn.Parameter(torch.randn_like(conv.weight) / 10))


def edit_data_in_training(model: Any) -> None:
    model.train()
    for p in model.parameters():
        p.data.mul_(-1.25)
    model.eval()


def other_layout(model: Any) -> None:
    """Assign data of the same shape with another address, strides and values."""
    for m in model.main:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            m.weight.data = (-m.weight).contiguous(memory_format=torch.channels_last)


def each_norm(edit: Callable[[nn.BatchNorm2d], Any]) -> Callable[[Any], None]:
    @torch.no_grad()
    def change(model: Any) -> None:
        for _, norm in norms(model):
            edit(norm)

    return change


@torch.enable_grad()
def running_statistics(model: Any) -> None:
    model.train()
    model(sample(model))
    model.eval()


def one_norm_temporarily_in_training(model: Any) -> None:
    _, norm = norms(model)[0]
    norm.train()
    model(sample(model))
    norm.eval()


def smaller_first_map(model: Any) -> None:
    """The Generator's first layer returns 2×2 instead of 4×4, as the Discriminator's last: still native."""
    conv = model.main[0] if isinstance(model, models.Generator) else model.main[-2]
    unpadded = conv.stride == (1, 1)
    conv.stride, conv.padding = ((2, 2), (1, 1)) if unpadded else ((1, 1), (0, 0))


def other_slope(model: Any) -> None:
    for m in model.main:
        if isinstance(m, nn.LeakyReLU):
            m.negative_slope = 0.9 - m.negative_slope


def other_activation(model: Any) -> None:
    for i, m in enumerate(model.main):
        if isinstance(m, nn.ReLU | nn.LeakyReLU | nn.Sigmoid) and i > 0:
            model.main[i] = nn.LeakyReLU(0.4) if isinstance(m, nn.ReLU | nn.Sigmoid) else nn.ReLU()
            break


def doubled(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return 2 * y


def hooked(model: Any) -> None:
    model.main[0].register_forward_hook(doubled)


def norm_removed(model: Any) -> None:
    i, _ = norms(model)[-1]
    model.main[i] = nn.Identity()


def parametrized(model: Any) -> None:
    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    nn.utils.parametrize.register_parametrization(model.main[0], "weight", Negated())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "Adam": step(lambda p: torch.optim.Adam(p, lr=0.1)),
    "Adam fused": step(lambda p: torch.optim.Adam(p, lr=0.1, fused=True)),
    "AdamW foreach": step(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "SGD": step(lambda p: torch.optim.SGD(p, lr=0.1)),
    "SGD fused": step(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, fused=True)),
    "Adam fused, norms alone": step(lambda p: torch.optim.Adam(p, lr=0.1, fused=True), nn.BatchNorm2d),
    "SGD, norms alone": step(lambda p: torch.optim.SGD(p, lr=0.1), nn.BatchNorm2d),
    "a training step": training_step,
    "a step in eval": step_in_eval,
    "load_state_dict": load,
    "load_state_dict of a layer": load_one_layer,
    "load_state_dict assign": load_assigning,
    "copy_": each(lambda p: p.copy_(torch.randn_like(p) / 10)),
    "data =": each(lambda p: setattr(p, "data", torch.randn_like(p) / 10)),
    "weights_init, refresh": initialize,
    "parameter replaced": replace_parameter,
    "layer replaced": replace_layer,
    "to float64, edited, and back": to_float64_and_back,
    "to bfloat16 and back": to_16_bit_and_back,
    "data edited": data_edited,
    "moving average": moving_average,
    "numpy view": numpy_view,
    "plain attribute": plain_attribute,
    "swap_tensors": swap_weights,
    "data edited in training": edit_data_in_training,
    "data = in other strides": other_layout,
    "running statistics in place": each_norm(lambda n: (n.running_mean.add_(0.5), n.running_var.mul_(2))),
    "running statistics' data in place": each_norm(
        lambda n: (n.running_mean.data.add_(0.5), n.running_var.data.mul_(2))
    ),
    "running statistics' data =": each_norm(
        lambda n: (
            setattr(n.running_mean, "data", n.running_mean + 0.5),
            setattr(n.running_var, "data", n.running_var * 2),
        )
    ),
    "running statistics replaced": each_norm(lambda n: setattr(n, "running_var", n.running_var * 3)),
    "running statistics updated by a forward": running_statistics,
    "one norm temporarily in training": one_norm_temporarily_in_training,
    "reset_running_stats": each_norm(lambda n: (n.running_mean.add_(1), n.reset_running_stats())),
    "gamma and beta in place": each_norm(lambda n: (n.weight.mul_(-2), n.bias.add_(1))),
    "gamma and beta's data in place": each_norm(lambda n: (n.weight.data.mul_(-2), n.bias.data.add_(1))),
    "gamma replaced": each_norm(lambda n: setattr(n, "weight", nn.Parameter(torch.randn_like(n.weight)))),
    "affine map removed": each_norm(lambda n: (setattr(n, "weight", None), setattr(n, "bias", None))),
    "eps": each_norm(lambda n: setattr(n, "eps", n.eps + 0.5)),
    "stride and padding": smaller_first_map,
    "another activation": other_activation,
    "hook added": hooked,
    "norm removed": norm_removed,
    "parametrized": parametrized,
}
NOT_REPEATABLE = {
    "reset_running_stats",
    "affine map removed",
    "norm removed",
    "another activation",
    "to bfloat16 and back",
}
