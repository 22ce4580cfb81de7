"""Small reference networks, their fast drop-ins with the same state, and assertions that the two agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast, fusing, models

NETWORKS = pytest.mark.parametrize("kind", ["G", "D"])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
EXACT = 1e-12  # relative; float64's 1.1e-16 with sums of up to some thousand terms, through all layers


def randomise(model: nn.Module) -> None:
    """Draw weights larger than weights_init's, and nontrivial affine maps and running statistics."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.1)
        elif isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
            if module.running_mean is not None and module.running_var is not None:
                nn.init.normal_(module.running_mean, 0.0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)


def reference(
    kind: str, channels: int = 3, image_size: int = 32, dtype: torch.dtype = torch.float64, features: int = 4
) -> Any:
    if kind == "G":
        model: Any = models.Generator(6, channels, features, image_size)
    else:
        model = models.Discriminator(channels, features, image_size)
    randomise(model)
    return model.to(dtype)


def drop_in(model: Any) -> Any:
    """Return a fast network with a copy of ``model``'s modules."""
    return fast.convert(copy.deepcopy(model))


def fast_network(kind: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """Return a fast network in eval mode."""
    return drop_in(reference(kind, dtype=dtype, **sizes)).eval()


def plain(module: Any) -> Any:
    """Return the network that PyTorch's own modules run: its layers are shared, its containers PyTorch's."""
    if not any(isinstance(inner, fusing.Fused) for inner in module.modules()):
        return module
    found = object.__new__(getattr(type(module), "_fused_from", type(module)))
    state = {name: value for name, value in module.__dict__.items() if name != "_fused_prepared"}
    found.__dict__.update(state)
    found.__dict__["_modules"] = {name: plain(child) for name, child in module._modules.items()}
    return found


def sample(model: Any, batch: int = 5) -> Tensor:
    dtype = next(model.parameters()).dtype
    if isinstance(model, models.Generator):
        return torch.randn(batch, model.latent_dim, dtype=dtype)
    return torch.randn(batch, model.channels, model.image_size, model.image_size, dtype=dtype)


def results(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Return the output, every gradient and every buffer after a forward and a backward."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    weighted = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() + y.square().sum()
    (weighted if loss is None else loss(y)).backward()
    found = {"output": y.detach(), "gradient of the input": x.grad}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    found |= {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()}
    assert all(v is not None for v in found.values())
    return found  # type: ignore[return-value]


def assert_equal_results(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT
) -> None:
    """Compare each tensor relative to its norm; gradients that are 0 but for rounding, to the norm of all."""
    assert actual.keys() == expected.keys()
    squares = [float(t.double().square().sum()) for n, t in expected.items() if n.startswith("gradient")]
    floor = 1e-2 * sum(squares) ** 0.5
    for name, want in expected.items():
        got = actual[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        if not want.dtype.is_floating_point:
            assert torch.equal(got, want), name
        else:
            error = float((got.double() - want.double()).norm())
            norm = max(float(want.double().norm()), floor if name.startswith("gradient") else 0.0)
            assert error <= tolerance * norm, f"{name}: {error:.2e} of {norm:.2e}"


def assert_agree(model: Any, other: Any, x: Tensor, steps: int = 2, tolerance: float = EXACT) -> None:
    """Check that outputs, output strides, gradients and buffers agree over ``steps`` forwards."""
    for _ in range(steps):
        expected, actual = results(model, x), results(other, x)
        assert_equal_results(actual, expected, tolerance)
        assert actual["output"].stride() == expected["output"].stride()


def norms(model: Any) -> list[tuple[int, nn.BatchNorm2d]]:
    return [(i, m) for i, m in enumerate(model.main) if isinstance(m, nn.BatchNorm2d)]


def replace_norms(make: Callable[[int], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for i, norm in norms(model):
            model.main[i] = make(norm.num_features)

    return change


def replace(index: int, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.main[index] = make(model.main[index])

    return change


def set_on_norms(**attributes: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for _, norm in norms(model):
            for name, value in attributes.items():
                setattr(norm, name, value)

    return change


def with_bias(conv: Any) -> nn.Module:
    return type(conv)(conv.in_channels, conv.out_channels, 4, conv.stride, conv.padding)
