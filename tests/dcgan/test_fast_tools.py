"""The drop-ins under PyTorch's tools: tracing and export by the user, FLOP counts, invalid inputs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dcgan import fast, models
from dcgan.kernels import chain, coverage, ops
from dcgan.kernels.cpu import products
from tests.support import train_chains
from tests.support.native import NEEDED
from tests.support.networks import MODES, NETWORKS, drop_in, reference, sample
from tests.support.tolerance import relative

pytestmark = [NEEDED, pytest.mark.usefixtures("one_thread")]


# --- tracing and export ------------------------------------------------------------------------------------


def change_slopes(model: Any) -> None:
    """Make the network differ from the default one."""
    for i, module in enumerate(model.main):
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            model.main[i] = nn.LeakyReLU(0.4)


def traced(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), file)
    file.seek(0)
    return torch.jit.load(file)  # type: ignore[no-any-return]


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert "dcgan" not in str(program.graph)
    return program.module()  # type: ignore[no-any-return]


def strictly_exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (x,), strict=True)
    assert "dcgan" not in str(program.graph)
    return program.module()  # type: ignore[no-any-return]


def to_onnx(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@NETWORKS
@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("how", [traced, exported, strictly_exported, to_onnx])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_only_pytorchs_own_operators_are_recorded(how: Any, kind: str, called_before: bool) -> None:
    """The recorded program runs without this package and includes the user's changes."""
    model = reference(kind, dtype=torch.float32).eval()
    change_slopes(model)
    other = drop_in(model)
    x = sample(model)
    with torch.no_grad():
        if called_before:
            other(x)
        run = how(other, x)
        x = sample(model)
        assert relative(run(x), model(x)) < 1e-5
        assert relative(other(x), model(x)) < 1e-5
    assert [row.engine for row in fast.explain(other, x)] == ["native"] * 4


# --- FLOPs -------------------------------------------------------------------------------------------------


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@NETWORKS
@MODES
def test_flops_match_the_reference(kind: str, training: bool) -> None:
    model = reference(kind, dtype=torch.float32).train(training)
    other = drop_in(model)
    x = sample(model)

    def inference(network: Any) -> Callable[[], Any]:
        return torch.no_grad()(lambda: network(x))

    def both(network: Any) -> Callable[[], Any]:
        return lambda: network(x.clone().requires_grad_()).sum().backward()

    assert flops(inference(other)) == flops(inference(model)) > 0
    assert flops(both(other)) == flops(both(model)) == 3 * flops(inference(model))


CONVOLUTIONS = pytest.mark.parametrize("transposed", [False, True])


@CONVOLUTIONS
@pytest.mark.parametrize(("stride", "padding", "kernel"), [(2, 1, 4), (1, 0, 4), (1, 1, 3)])
def test_flops_of_the_ops(transposed: bool, stride: int, padding: int, kernel: int) -> None:
    """fprop, dgrad and wgrad count as in aten; prologues, epilogues and statistics count nothing."""
    op = ops.conv_transpose2d_fused if transposed else ops.conv2d_fused
    aten = nn.functional.conv_transpose2d if transposed else nn.functional.conv2d
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    weight = torch.randn(*((3, 7) if transposed else (7, 3)), kernel, kernel, requires_grad=True)
    vectors = {n: torch.randn(3, requires_grad=True) for n in ("center", "scale", "shift")}
    geometry = {"stride": stride, "padding": padding}

    def forward() -> Tensor:
        return op(x, weight, **vectors, stats=True, **geometry)[0]

    forward_flops = flops(lambda: aten(x, weight, **geometry))
    assert flops(forward) == forward_flops > 0
    assert flops(lambda: forward().sum().backward()) == 3 * forward_flops
    weight.requires_grad_(False)
    assert flops(lambda: forward().sum().backward()) == 2 * forward_flops
    with torch.no_grad():
        stage = chain.Stage(transposed, weight, stride=stride, padding=padding)
        assert flops(lambda: chain.conv_chain(x, [stage])) == forward_flops


@pytest.mark.parametrize("frozen", ["", "first", "first two", "norms", "all"])
@pytest.mark.parametrize("of_input", [True, False])
@NETWORKS
def test_flops_of_a_network_in_training(kind: str, of_input: bool, frozen: str) -> None:
    """Products that no gradient needs are not counted, as in aten, which counts layer by layer."""
    eager = train_chains.reference_network(kind)
    convolutions = [m for m in eager if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    for module in {
        "": [],
        "first": convolutions[:1],
        "first two": convolutions[:2],
        "norms": [m for m in eager if isinstance(m, nn.BatchNorm2d)],
        "all": eager if of_input else eager[:-2],
    }[frozen]:
        module.requires_grad_(False)
    x = train_chains.reference_input(kind, 2)

    def counts(network: nn.Module) -> tuple[int, int]:
        given = x.clone().requires_grad_(of_input)
        return flops(lambda: network(given)), flops(lambda: network(given).sum().backward())

    forward, both = counts(eager)
    assert both > forward > 0
    assert counts(train_chains.chain_of(eager)) == (forward, both)


# --- inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [models, fast])
@pytest.mark.parametrize("name", ["Generator", "Discriminator", "MLPGenerator", "MLPDiscriminator"])
def test_an_input_that_is_not_a_tensor(make: Any, name: str) -> None:
    if not hasattr(make, name):
        return
    network = getattr(make, name)(image_size=32)
    argument = "z" if name.endswith("Generator") else "image"
    shape = (2, 100) if argument == "z" else (2, 1, 32, 32)
    methods = [network] if argument == "z" else [network, network.logits]
    for method in methods:
        wanted = (
            rf"{argument} must be a torch.Tensor, got ndarray; convert it with torch.from_numpy\({argument}\)"
        )
        with pytest.raises(TypeError, match=wanted):
            method(np.zeros(shape, dtype=np.float32))
        with pytest.raises(TypeError, match=f"{argument} must be a torch.Tensor, got list$"):
            method([[0.0] * 100] * 2)


# --- bias before a BatchNorm -------------------------------------------------------------------------------


@NETWORKS
@MODES
@pytest.mark.parametrize("momentum", [0.1, None])
def test_biases_on_all_convolutions(kind: str, training: bool, momentum: float | None) -> None:
    """Biases may come from a folded BatchNorm; before a BatchNorm a bias shifts the running mean."""
    model = reference(kind, dtype=torch.float32).train(training)
    for i, m in enumerate(model.main):
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            torch.manual_seed(i)
            model.main[i] = type(m)(m.in_channels, m.out_channels, 4, m.stride, m.padding)
            nn.init.normal_(model.main[i].bias)
        elif isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    other = drop_in(model)
    exact = copy.deepcopy(model).double()
    assert [row.engine for row in fast.explain(other, sample(model))] == ["native"] * 4
    for _ in range(2):
        x = sample(model)
        for network, given in ((other, x), (exact, x.double())):
            network.zero_grad()
            network(given).square().sum().backward()
        with torch.no_grad():
            assert relative(other.eval()(x), exact.eval()(x.double())) < 1e-5
        for network in (other, exact):
            network.train(training)
    norm = max(float(p.grad.norm()) for p in exact.parameters())
    for (name, p), q in zip(other.named_parameters(), exact.parameters(), strict=True):
        assert float((p.grad - q.grad).norm()) < 1e-5 * max(norm, float(q.grad.norm())), name
    for (name, b), c in zip(other.named_buffers(), exact.buffers(), strict=True):
        assert relative(b.double(), c.double()) < 1e-5, name


# --- fallback to PyTorch's modules -------------------------------------------------------------------------


@NETWORKS
def test_training_a_small_network_is_left_to_pytorch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference(kind, dtype=torch.float32)
    other = drop_in(model)
    x = sample(model)
    macs = flops(torch.no_grad()(lambda: copy.deepcopy(model).eval()(x))) // 2
    for minimum, engine in ((macs, "native"), (macs + 1, "eager")):
        monkeypatch.setattr(coverage, "MIN_TRAINING_MACS", minimum / torch.get_num_threads())
        for network in (model, other):
            network.train()
        rows = fast.explain(other, x)
        assert {row.engine for row in rows} == {engine}
        if engine == "eager":
            assert "million multiply-adds per forward is faster with PyTorch" in rows[0].reason
            with ops.recording() as choices:
                assert torch.equal(other(x), model(x))  # PyTorch's kernels
                assert not choices
            with ops.use_engine("native"), ops.recording() as choices:
                other(x)
            assert {choice.engine for choice in choices} == {"native"}
        with torch.no_grad():
            other.eval()(x)
        assert {row.engine for row in fast.explain(other, x)} == {"native"}


@NETWORKS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_dtype_without_kernels_is_left_to_pytorch(
    kind: str, training: bool, dtype: torch.dtype, autocast: bool
) -> None:
    """Forward and backward equal the reference bitwise; the native engine runs only 16-bit inference."""
    if autocast and dtype == torch.float64:
        return
    model = reference(kind, dtype=torch.float32 if autocast else dtype).train(training)
    other = drop_in(model)
    x = sample(model)

    def gradients(network: Any) -> list[Tensor]:
        network.zero_grad()
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast), ops.recording() as choices:
            y = network(given)
        assert not choices
        y.float().square().mean().backward()
        return [y, given.grad, *(p.grad for p in network.parameters())]  # type: ignore[list-item]

    assert all(torch.equal(a, b) for a, b in zip(gradients(other), gradients(model), strict=True))
    with torch.autocast("cpu", dtype, enabled=autocast), ops.recording() as choices, torch.no_grad():
        other.eval()(x)
    assert [c.engine for c in choices] == ([] if dtype == torch.float64 else ["native"] * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amx", [False, True])
def test_large_16_bit_batches_on_amx_are_left_to_pytorch(
    dtype: torch.dtype, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "_on_amx", lambda dtype: amx)
    other = drop_in(reference("D", dtype=dtype)).eval()
    for batch in (coverage.AMX_MIN_IMAGES - 1, coverage.AMX_MIN_IMAGES):
        with torch.no_grad(), ops.recording() as choices:
            other(sample(other, batch))
        assert bool(choices) == (not amx or batch < coverage.AMX_MIN_IMAGES)


@NETWORKS
def test_only_requested_gradients_are_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizing a latent vector, for example, computes no weight gradients."""
    model = reference(kind, dtype=torch.float32).eval()
    other = drop_in(model)
    x = sample(model).requires_grad_()
    needs: list[tuple[bool, ...]] = []
    backward = products.backward

    def watched(spec: Any, call: Any) -> Any:
        needs.append(tuple(call.needs))
        return backward(spec, call)

    monkeypatch.setattr(products, "backward", watched)
    (gradient,) = torch.autograd.grad(other(x).square().sum(), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert relative(gradient, expected) < 1e-5
    assert needs == [(True, False, False, False, False)] * 4
    needs.clear()
    weight = other.main[0].weight  # a single parameter
    gradients = torch.autograd.grad(other(x.detach()).square().sum(), weight)
    exact = torch.autograd.grad(model(x.detach()).square().sum(), model.main[0].weight)
    assert relative(gradients[0], exact[0]) < 1e-5
    assert [need[1] for need in needs] == [False, False, False, True]
    needs.clear()
    other(x).square().sum().backward()
    assert all(need[:2] == (True, True) for need in needs)
