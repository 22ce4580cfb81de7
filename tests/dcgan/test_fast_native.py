"""The drop-ins run by the native engine in eval mode on a CPU: accuracy, explain, and what stays eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast, models
from dcgan.kernels import ops, weight_cache
from tests.support import native
from tests.support.native import NETWORK, allowed, eager64, engines, forced
from tests.support.networks import NETWORKS, drop_in, fast_network, norms, plain, sample
from tests.support.tolerance import relative, unit

pytestmark = [native.NEEDED, pytest.mark.usefixtures("one_thread", "no_grad")]
NATIVE = ["native"] * 4


# --- accuracy ----------------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [32, 64, 128])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_whole_network(kind: str, channels: int, image_size: int, batch: int) -> None:
    """The selected algorithms are accurate in NaN-initialized memory; strides match eager."""
    model = fast_network(kind, channels=channels, image_size=image_size, features=3)
    x = sample(model, batch)
    with native.fresh_memory_is_nan():
        assert engines(model, x) == ["native"] * (image_size.bit_length() - 2)
        y = model(x)
    assert relative(y, eager64(model, x)) <= NETWORK
    assert y.stride() == plain(model)(x).stride()


@pytest.mark.parametrize("algorithm", native.SPATIAL[:3])
def test_the_default_generator(algorithm: str) -> None:
    """Up to 1024 channels, by each algorithm: the longest sums of the default sizes."""
    model = drop_in(models.Generator(100, 3, 64, 64)).eval()
    model.apply(models.weights_init)
    z = torch.randn(1, 100)
    with forced(algorithm):
        assert relative(model(z), eager64(model, z)) <= NETWORK


@NETWORKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_16_bit_network(kind: str, dtype: torch.dtype, channels: int) -> None:
    """With 16-bit weights and inputs, the native engine rounds only the result; eager rounds every layer."""
    model = fast_network(kind, dtype, channels=channels)
    x = sample(model)
    assert engines(model, x) == NATIVE
    assert [row.engine for row in fast.explain(model, x)] == NATIVE
    y, exact = model(x), eager64(model, x)
    assert y.dtype == dtype
    assert relative(y, exact) <= allowed(dtype, NETWORK)
    with ops.use_engine("reference"):
        assert relative(model(x), exact) <= 4 * 4 * unit(dtype)  # four layers, each rounded
        assert model(x).stride() == y.stride()


@NETWORKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(kind: str, dtype: torch.dtype) -> None:
    """Autocast rounds weights and input, which the expected result includes."""
    model = fast_network(kind)
    x = sample(model)
    rounded = copy.deepcopy(model)
    for m in rounded.main:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            m.weight.copy_(m.weight.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert engines(model, x) == NATIVE
        y = model(x)
        assert native.packed() >= 4
        assert torch.equal(model(x), y)
    assert y.dtype == dtype
    assert relative(y, eager64(rounded, x.to(dtype))) <= allowed(dtype, NETWORK)


@NETWORKS
def test_inputs_with_any_strides(kind: str) -> None:
    model = fast_network(kind)
    x = sample(model)
    views: list[Tensor] = [
        x.expand(2, *x.shape)[1],
        torch.stack([x, x], -1)[..., 0],
        x[:1].expand_as(x),
        x.flip(0),
        torch._neg_view(x),
        torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    ]
    if kind == "D":
        views += [x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)]
    for view in views:
        assert engines(model, view) == NATIVE
        assert relative(model(view), eager64(model, view)) <= NETWORK


@NETWORKS
def test_a_channels_last_model(kind: str) -> None:
    model = fast_network(kind).to(memory_format=torch.channels_last)
    x = sample(model)
    assert relative(model(x), eager64(model, x)) <= NETWORK
    assert model(x).stride() == plain(model)(x).stride()


def test_a_latent_dim_beyond_the_native_limit() -> None:
    """A network larger than the native engine's limits still runs."""
    model = drop_in(models.Generator(70_000, 1, 1, 32)).eval()
    z = torch.randn(1, 70_000)
    assert relative(model(z), eager64(model, z)) <= NETWORK


# --- explain and engine selection --------------------------------------------------------------------------


@NETWORKS
def test_explain_in_eval(kind: str) -> None:
    model = fast_network(kind)
    rows = fast.explain(model, sample(model))
    op = "conv_transpose2d_fused" if kind == "G" else "conv2d_fused"
    ranges = ["0-2", "3-5", "6-8", "9-10"] if kind == "G" else ["0-1", "2-4", "5-7", "8-9"]
    assert [row.modules for row in rows] == [f"main.{found}" for found in ranges]
    assert {row[1:] for row in rows} == {(op, "native", "")}
    assert torch.equal(model(sample(model)[:0]), model(sample(model)[:0]))


@NETWORKS
def test_explain_in_training(kind: str) -> None:
    model = fast_network(kind).train()
    rows = fast.explain(model, sample(model))
    if kind == "D":
        rows.pop(0)  # its engine depends on whether the batch pays for packing in one call
    assert {row.engine for row in rows} == {"native"}


@NETWORKS
def test_explain_in_float64(kind: str) -> None:
    model = fast_network(kind, torch.float64)
    rows = fast.explain(model, sample(model))
    assert {row[2:] for row in rows} == {("eager", "native: the kernels do not support float64")}


def five_by_five(model: Any) -> None:
    old = model.main[3]
    model.main[3] = nn.ConvTranspose2d(old.in_channels, old.out_channels, 5, 2, 2, 1, bias=False)


def three_by_three(model: Any) -> None:
    old = model.main[0]
    model.main[0] = nn.Conv2d(old.in_channels, old.out_channels, 3, 2, 1, bias=False)


def not_square(model: Any) -> None:
    old = model.main[0]
    model.main[0] = nn.Conv2d(old.in_channels, old.out_channels, (4, 3), 2, 1, bias=False)


def four_by_four_unpadded(model: Any) -> None:
    """Map 3×3 to 4×4 with stride 1 and no padding: the right size, but an unsupported geometry."""
    old = model.main[0]
    model.main[0] = nn.ConvTranspose2d(old.in_channels, old.out_channels, 2, 1, 0, bias=False)
    after = model.main[3]
    model.main[3] = nn.ConvTranspose2d(after.in_channels, after.out_channels, 4, 2, 0, bias=False)


NO_KERNELS = "neither a 4×4 kernel with stride 2 and padding 1 nor a 1×1 map"
EAGER = "eager", "no engine has kernels for this kernel size, stride and padding"
# Network, change, the engine that runs the layer and its reason, and the native engine's reason.
OTHERS: dict[str, tuple[str, Callable[[Any], None], tuple[str, str], str]] = {
    "3×3": ("D", three_by_three, EAGER, NO_KERNELS),
    "4×3": ("D", not_square, EAGER, "the kernel is not square"),
    "padding 0": ("G", four_by_four_unpadded, ("eager", f"{EAGER[1]} on a map of 2×2"), NO_KERNELS),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_unsupported_geometry(name: str) -> None:
    """The layer is left to another engine, which explain reports; the other layers remain native."""
    kind, change, instead, reason = OTHERS[name]
    model = fast_network(kind)
    change(model)
    x = sample(model)
    rows = fast.explain(model, x)
    odd = {row[2:] for row in rows if row.engine != "native"}
    assert instead in odd
    others = ("LeakyReLU", "BatchNorm2d", "ReLU")
    after = {("eager", f"{kind} does not follow a convolution that the fused ops support") for kind in others}
    assert odd <= {instead, *after}
    assert sum(row.engine == "native" for row in rows) == 3
    assert relative(model(x), eager64(model, x)) <= NETWORK
    with (
        ops.use_engine("native"),
        pytest.raises(RuntimeError, match=f"engine 'native' is forced, but does not cover .*: {reason}"),
    ):
        model(x)


def test_a_layer_with_output_padding_is_eager() -> None:
    model = fast_network("G")
    five_by_five(model)
    z = sample(model)
    rows = {row.modules: row for row in fast.explain(model, z)}
    assert rows["main.3"].reason == "the transposed convolution has output padding"
    assert relative(model(z), eager64(model, z)) <= NETWORK


@NETWORKS
def test_uncached_weights(kind: str) -> None:
    """A small op is left to the reference, unless the weights are cached or the native engine is forced."""
    model = fast_network(kind)
    op = ops.conv_transpose2d_fused if kind == "G" else ops.conv2d_fused
    conv = model.main[3 if kind == "G" else 2]
    x = torch.randn(1, conv.in_channels, 4, 4)
    weight_cache.thaw(model.main)
    with ops.recording() as choices:
        op(x, conv.weight)
        model.eval()  # freezes them
        op(x, conv.weight)
        with ops.use_engine("native"):
            op(x, conv.weight.clone())
    assert [c.engine for c in choices] == ["reference", "native", "native"]
    assert choices[0].reason.startswith("native: the weights are not frozen, and packing them for one call")


def test_uncached_weights_with_a_large_batch() -> None:
    """A batch whose work outweighs packing runs natively even if the weights are not cached."""
    x, weight = torch.randn(64, 64, 16, 16), torch.randn(64, 32, 4, 4)
    with ops.recording() as choices:
        y = ops.conv_transpose2d_fused(x[:1].expand_as(x), weight)[0]
    assert choices[0] == ops.Choice("conv_transpose2d_fused", "native", "")
    expected = torch.nn.functional.conv_transpose2d(x[:1].double(), weight.double(), None, 2, 1)
    assert relative(y[63:], expected) <= native.LAYER


@NETWORKS
def test_forced_engines(kind: str) -> None:
    model = fast_network(kind)
    x = sample(model)
    with ops.use_engine("reference"):
        assert engines(model, x) == ["reference"] * 4
        assert {row.reason for row in fast.explain(model, x)} == {"engine 'reference' is forced"}
        assert relative(model(x), eager64(model, x)) <= NETWORK
    with ops.use_engine("native"):
        assert engines(model, x) == NATIVE
        assert engines(model.train(), x) == NATIVE
        wrong = model.double()
        with pytest.raises(RuntimeError, match="engine 'native' is forced, but does not cover this"):
            wrong(sample(wrong))


def test_forced_by_the_environment() -> None:
    code = """
import torch
from dcgan import fast
model = fast.Generator(4, 1, 2, 32).eval()
z = torch.ones(2, 4)
print(*{row.engine for row in fast.explain(model, z)})
with torch.no_grad():
    model(z)
try:
    model.double().train()(z.double())
except RuntimeError as error:
    print(error)
"""
    lines = native.in_a_new_process(code, DCGAN_ENGINE="native").stdout.splitlines()
    assert lines[0] == "native"
    assert lines[1].startswith("engine 'native' is forced, but does not cover this conv_transpose2d_fused: ")
    assert lines[1].endswith("the training kernels do not support float64")


# --- other execution modes ---------------------------------------------------------------------------------


@NETWORKS
def test_eval_mode_with_gradients(kind: str) -> None:
    """With gradients, also those of a folded BatchNorm, the native engine runs layer by layer."""
    model = fast_network(kind)
    x = sample(model)
    expected = model(x)
    with torch.enable_grad(), ops.recording() as choices:
        y = model(x)
        y.sum().backward()
    assert [c.engine for c in choices if not c.op.endswith("_backward")] == NATIVE
    backward = [c for c in choices if c.op.endswith("_backward")]
    assert {c.engine for c in backward} == {"native"}
    assert relative(y, expected) < 1e-6
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    with torch.enable_grad():
        plain(exact)(x.double()).sum().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert relative(p.grad, q.grad) < 1e-4, name


@NETWORKS
def test_a_network_without_trainable_parameters(kind: str) -> None:
    """In grad mode with nothing to differentiate, the chain runs through the dispatcher, bitwise equal."""
    model = fast_network(kind).requires_grad_(False)
    x = sample(model)
    expected = model(x)
    with torch.enable_grad():
        assert torch.equal(model(x), expected)
        assert engines(model, x) == NATIVE
        x = x.requires_grad_()
        assert relative(model(x), expected) < 1e-6
        assert model(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


@NETWORKS
def test_compiled(kind: str) -> None:
    """The graph has a single operator; the compiled network's weights are cached too."""
    model = fast_network(kind)
    x = sample(model)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    with ops.recording() as choices, torch.compiler.set_stance("fail_on_recompile"):
        y = compiled(x)
    assert [c.engine for c in choices] == NATIVE
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    torch._dynamo.reset()


@NETWORKS
def test_exported(kind: str) -> None:
    model = fast_network(kind)
    x = sample(model)
    exported = torch.export.export(model, (x,))
    assert relative(exported.module()(x), eager64(model, x)) <= NETWORK


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_traced() -> None:
    """torch.jit.trace records the network or raises; it must not record an empty tensor."""
    model = fast_network("G")
    z = sample(model)
    try:
        traced = torch.jit.trace(model, z, check_trace=False)
    except RuntimeError:
        return
    z = sample(model)
    assert relative(traced(z), eager64(model, z)) <= NETWORK


@NETWORKS
def test_under_another_default_dtype_and_device(kind: str) -> None:
    model = fast_network(kind)
    x = sample(model)
    expected = model(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model(x), expected)
        model.refresh()
        assert torch.equal(model(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(model(x), expected)
        model.refresh()
        assert torch.equal(model(x), expected)


class Wrapped(Tensor):
    """A tensor without storage that wraps another, as quantized or sharded weights do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return cls(result) if func is torch.ops.aten.detach.default else result


@NETWORKS
@pytest.mark.parametrize("name", ["weight", "gamma", "running_var"])
def test_a_tensor_without_storage(kind: str, name: str) -> None:
    """Such a weight or norm vector has no address for the native engine: the reference runs the layer."""
    model = fast_network(kind, features=8)
    x = sample(model, 64)
    expected = eager64(model, x)
    _, norm = norms(model)[0]
    if name == "running_var":
        norm.running_var = Wrapped(norm.running_var)
    else:
        owner = norm if name == "gamma" else model.main[3 if kind == "G" else 2]
        owner.weight = nn.Parameter(Wrapped(owner.weight.detach()), requires_grad=False)
    for _ in range(2):
        assert relative(model(x), expected) <= NETWORK


def test_norms_with_unusual_settings() -> None:
    """nn.BatchNorm2d's formula holds without an affine map, with another eps and with zero variance."""
    model = fast_network("G")
    (_, first), (i, second), *_ = norms(model)
    first.eps = 0.3
    first.running_var.zero_()
    model.main[i] = nn.BatchNorm2d(second.num_features, affine=False).eval()
    model.main[i].running_mean.normal_()
    z = sample(model)
    assert engines(model, z) == NATIVE
    assert relative(model(z), eager64(model, z)) <= NETWORK


@NETWORKS
def test_nan_and_infinity_propagate_as_in_eager(kind: str) -> None:
    model = fast_network(kind)
    x = sample(model, 6)
    expected = model(x)
    for i, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        x[2 * i].view(-1)[5] = value
    eager, y = plain(model)(x), model(x)
    assert not bool((y.isfinite() & ~eager.isfinite()).any())
    assert bool(y[0].isnan().any())
    assert torch.equal(y[1::2], expected[1::2])
