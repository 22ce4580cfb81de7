"""Layers and networks at full size for the GPU tests, their results in float64, and error bounds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcgan import fast, models
from dcgan.kernels import ops
from dcgan.kernels.spec import Call, TrainCall
from tests.support.chain_results import cast
from tests.support.float64_reference import act, expected_outputs, gradients, leaves, op
from tests.support.train_chains import stages

DEVICE = "cuda"

# Bounds of ‖error‖/‖result‖. float32: sums of up to 8192 terms of random sign, √8192·2⁻²⁴. tf32: the tensor
# cores truncate both operands to 11 bits, by up to 2⁻¹⁰ each and all in one direction. 16-bit types: operands
# are exact, the result is rounded once.
TOLERANCE = {"float32": 6e-6, "tf32": 2**-9, "float16": 2**-11, "bfloat16": 2**-8}

# Bounds in training. float32: a weight gradient sums up to 2¹⁶ pixels, √2¹⁶·2⁻²⁴. 16-bit types: x̂, du and
# the result are rounded; where a gradient depends on a single element of du (the last layer at batch 1) its
# rounding does not average out: two full half units in the last place.
TRAINING = {"float32": 2**-16, "tf32": 2**-9, "float16": 2**-10, "bfloat16": 2**-7}

# Bounds for a network in eval beyond twice eager's error: TF32 truncation accumulates over the layers,
# whereas cuDNN's rounding does not.
NETWORK = TOLERANCE | {"tf32": 5 * 2**-10}

LAYERS = {  # transposed, C_in, C_out, H, stride, padding
    "G1": (True, 100, 512, 1, 1, 0),
    "G2": (True, 512, 256, 4, 2, 1),
    "G3": (True, 256, 128, 8, 2, 1),
    "G4": (True, 128, 64, 16, 2, 1),
    "G5": (True, 64, 1, 32, 2, 1),
    "G5-rgb": (True, 64, 3, 32, 2, 1),
    "D1": (False, 1, 64, 64, 2, 1),
    "D1-rgb": (False, 3, 64, 64, 2, 1),
    "D2": (False, 64, 128, 32, 2, 1),
    "D3": (False, 128, 256, 16, 2, 1),
    "D4": (False, 256, 512, 8, 2, 1),
    "D5": (False, 512, 1, 4, 1, 0),
}

ROLES = {  # prologue's activation ('' without a prologue), statistics, epilogue's activation
    "G1": ("", True, "none"),
    "G2": ("relu", True, "none"),
    "G3": ("relu", True, "none"),
    "G4": ("relu", True, "none"),
    "G5": ("relu", False, "tanh"),
    "D1": ("", False, "leaky_relu"),
    "D2": ("", True, "none"),
    "D3": ("leaky_relu", True, "none"),
    "D4": ("leaky_relu", True, "none"),
    "D5": ("leaky_relu", False, "sigmoid"),
}


def error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def _operands(layer: str, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    transposed, c_in, c_out, size, _, _ = LAYERS[layer]
    x = torch.randn(batch, c_in, size, size, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    shape = (c_in, c_out) if transposed else (c_out, c_in)
    return x, (torch.randn(*shape, 4, 4, device=DEVICE) * 0.02).to(dtype)


# --- eval --------------------------------------------------------------------------------------------------


def call_of(layer: str, batch: int, dtype: torch.dtype) -> tuple[Call, bool]:
    """Return a layer in eval, with BatchNorm and activation in the epilogue.

    A shift is at most half as large as the products u. Rounding affects u, whereas y is compared with
    float64: if a single channel were shifted far below 0, a ReLU would leave almost nothing of y, and TF32's
    error of 8e-4 of u would be 5e-3 of y; shifted far above 0, errors of u would not show.
    """
    transposed, c_in, c_out, size, stride, padding = LAYERS[layer]
    x, weight = _operands(layer, batch, dtype)
    terms = c_in * (16 if not transposed else 1 if size == 1 else 4)
    scale = torch.rand(c_out, device=DEVICE) + 0.5
    shift = 0.02 * terms**0.5 * (torch.rand(c_out, device=DEVICE) - 0.5)
    act = "relu" if transposed else "leaky_relu"
    call = Call(x, weight, out_scale=scale, out_shift=shift, out_act=act, stride=stride, padding=padding)
    return call, transposed


def in_float64(call: Call, transposed: bool) -> Tensor:
    return expected_outputs(call, transposed)[0]


# --- training ----------------------------------------------------------------------------------------------


def training_call(layer: str, batch: int, dtype: torch.dtype) -> tuple[Call, bool]:
    """Return a layer in training, as :mod:`dcgan.fast` runs it, with the preceding BatchNorm as its prologue.

    No pre-activation of the prologue is so close to 0 that rounding could flip its sign, which would change
    an element of a gradient by its full size.
    """
    transposed, c_in, _, _, stride, padding = LAYERS[layer]
    in_act, stats, out_act = ROLES[layer.removesuffix("-rgb")]
    x, weight = _operands(layer, batch, dtype)
    vectors: dict[str, Any] = {}
    if in_act:
        center, shift = 0.5 * torch.randn(2, c_in, device=DEVICE)
        scale = torch.rand(c_in, device=DEVICE) + 0.5
        vectors = {"center": center, "scale": scale, "shift": shift, "in_act": in_act}
        c, s, b = (v.view(1, -1, 1, 1) for v in (center, scale, shift))
        near = ((x.float() - c) * s + b).abs() < 1e-3
        x = torch.where(near, ((0.5 - b) / s + c).to(dtype), x)
    call = Call(
        x.contiguous(memory_format=torch.channels_last),
        weight,
        **vectors,
        stats=stats,
        out_act=out_act,
        slope=models.LEAKY_SLOPE,
        stride=stride,
        padding=padding,
        channels_last=layer[:2] not in ("G5", "D5"),
    )
    return call, transposed


class Gradients(NamedTuple):
    """Gradients of a call's outputs, the inputs of its backward."""

    dy: Tensor
    dmean: Tensor | None
    dvar: Tensor | None


def cotangents(call: Call, y: Tensor, var: Tensor) -> Gradients:
    """Return random gradients, scaled to contribute equally to du and not to overflow float16."""
    dy = (0.05 * torch.randn(y.shape, device=y.device)).to(y.dtype)
    if not call.stats:
        return Gradients(dy, None, None)
    count = y.numel() // y.shape[1]
    dmean, dvar = 0.02 * count * torch.randn(2, y.shape[1], device=y.device)
    return Gradients(dy, dmean, (dvar / var.double().sqrt()).float())


def exact(call: Call, transposed: bool, y: Tensor, given: Gradients | None) -> dict[str, Tensor]:
    """Return outputs ('y', 'mean', 'var') and gradients (by argument name) in float64.

    The derivative of the output's activation is computed from ``y``, the output that the engine saved: after
    rounding it may be on the other side of a kink.
    """
    wide = Call(*[v.detach().double().requires_grad_() if isinstance(v, Tensor) else v for v in call])
    raw, mean, var = expected_outputs(wide._replace(out_act="none"), transposed)
    found = {"y": act(raw, call.out_act, call.slope).detach(), "mean": mean.detach(), "var": var.detach()}
    if given is None:
        return found
    saved = y.detach().double()
    slope = {
        "none": lambda: torch.ones_like(saved),
        "leaky_relu": lambda: torch.where(saved > 0, 1.0, call.slope).to(saved),
        "tanh": lambda: 1 - saved * saved,
        "sigmoid": lambda: saved * (1 - saved),
    }[call.out_act]()
    dmean, dvar = (None if v is None else v.double() for v in given[1:])
    return found | gradients((raw, mean, var), (given.dy.double() * slope, dmean, dvar), leaves(wide))


def run(
    call: Call, transposed: bool, given: Gradients | None = None
) -> tuple[dict[str, Tensor], Gradients, list[ops.Choice]]:
    """Run the operators; return results as :func:`exact` does, the outputs' gradients, the engine choices."""
    call = Call(*[v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in call])
    with ops.recording() as choices:
        outputs = op(transposed)(*call)
        y, mean, var = (t.detach() for t in outputs)
        if given is None:
            given = cotangents(call, y, var)
        found = {"y": y, "mean": mean, "var": var} | gradients(outputs, given, leaves(call))
    return found, given, list(choices)


def assert_within_bounds(
    found: dict[str, Tensor], expected: dict[str, Tensor], precision: str, what: object
) -> None:
    """Check each error against TRAINING[precision]; a mean's is relative to its standard deviation too."""
    assert found.keys() == expected.keys()
    for name, got in found.items():
        want = expected[name]
        assert got.shape == want.shape, name
        if not want.numel():
            continue
        norm = want.norm()
        if name == "mean":
            norm = (want.square() + expected["var"]).sum().sqrt()
        off = ((got.double() - want).norm() / norm).item()
        allowed = TRAINING[precision] * (2 if name == "var" else 1)
        assert off <= allowed, f"{what}: relative error of {name} is {off:.1e}, allowed {allowed:.1e}"


# --- networks ----------------------------------------------------------------------------------------------


def networks(dtype: torch.dtype, **sizes: int) -> tuple[fast.Generator, fast.Discriminator]:
    """Return both networks in eval mode, with running statistics as after training."""
    made = fast.Generator(**sizes), fast.Discriminator(**sizes)
    for network in made:
        network.apply(models.weights_init)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        network.eval().to(DEVICE, dtype)
    return made


def reference_copy(network: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the reference network with the same state and mode, in float64 or ``dtype``."""
    assert isinstance(network, models.Generator | models.Discriminator)
    kind = models.Generator if isinstance(network, models.Generator) else models.Discriminator
    reference = kind(**network.sizes()).to(DEVICE, dtype).train(network.training)
    reference.load_state_dict(network.state_dict())
    return reference


def cotangent_of(network: nn.Module, batch: int) -> Tensor:
    """Return a gradient of a network's output in float64, small enough for float16."""
    image = isinstance(network, models.Generator)
    assert isinstance(network, models.Generator | models.Discriminator)
    size = network.image_size
    shape = (batch, network.channels, size, size) if image else (batch,)
    return 0.05 * torch.randn(shape, device=DEVICE, dtype=torch.float64)


def chain_call(
    which: int, batch: int, groups: int, dtype: torch.dtype, parameters: torch.dtype, **sizes: int
) -> tuple[TrainCall, Tensor]:
    """Return the Generator (0) or Discriminator (1) in training as one operator, and a gradient of its y."""
    network: Any = networks(torch.float32, **sizes)[which]
    x = samples(network, batch, dtype)
    call = TrainCall(
        x[:, :, None, None] if which == 0 else x,
        stages(network.main),
        models.LEAKY_SLOPE,
        groups,
        channels_last=False,
    )
    dy = cotangent_of(network, batch).to(dtype)
    return cast(call, dtype, parameters), dy if which == 0 else dy[:, None, None, None]


def samples(network: nn.Module, batch: int, dtype: torch.dtype) -> Tensor:
    """Return random inputs of a network."""
    if isinstance(network, models.Generator):
        return torch.randn(batch, network.latent_dim, device=DEVICE).to(dtype)
    assert isinstance(network, models.Discriminator)
    size = network.image_size
    return torch.randn(batch, network.channels, size, size, device=DEVICE).tanh().to(dtype)
