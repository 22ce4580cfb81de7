"""On a real GPU, in eval: every layer at its real shape and both networks, against float64 and eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast, models
from dcgan.kernels import gpu, ops, weight_cache
from dcgan.kernels.gpu import executor, tiles, tuning
from dcgan.kernels.gpu.tools.layers import DTYPES
from dcgan.kernels.spec import specify
from dcgan.training import TrainStep
from dcgan.training.captured_step import WARM_UP
from tests.gpu import matrix
from tests.gpu.full_size import (
    NETWORK,
    ROLES,
    TOLERANCE,
    call_of,
    error,
    in_float64,
    networks,
    reference_copy,
)

pytestmark = pytest.mark.gpu

# Every kernel once, and the layer where TF32 truncation shows most.
CHECKED = [*(("bfloat16", layer) for layer in ROLES), ("tf32", "G5")]


@pytest.mark.parametrize(matrix.LAYER, matrix.layers(CHECKED), indirect=["precision"])
def test_layer(layer: str, batch: int, precision: str) -> None:
    call, transposed = call_of(layer, batch, DTYPES[precision])
    with ops.use_engine("triton"):
        y = (ops.conv_transpose2d_fused if transposed else ops.conv2d_fused)(*call)[0]
    assert error(y, in_float64(call, transposed)) <= TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"], indirect=True)
@pytest.mark.parametrize("layer", ["G1", "G2", "G5", "D1", "D2", "D5"])  # one per kernel
def test_every_tile(layer: str, precision: str) -> None:
    """Each tile writes every element correctly, which detects a loop that is miscompiled for one size."""
    call, transposed = call_of(layer, 5, DTYPES[precision])
    exact = in_float64(call, transposed)
    spec = specify(call, transposed)
    y = torch.empty_strided(spec.shape, spec.y.stride, dtype=spec.dtype, device=spec.device)
    product = executor.fprop(spec, call, y)
    kernel = gpu.kernel_for(product.spec)
    assert kernel is not None
    assert kernel.layout is not None
    packed = kernel.layout.pack(call.weight, spec.dtype)
    problem = kernel.problem(product.spec)
    for tile in tiles.candidates(problem.kernel, problem.precision):
        y.fill_(float("nan"))
        kernel.launch(product, packed, None, tiles.fit(tile, problem))()
        assert error(y, exact) <= TOLERANCE[precision], tile


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "precision"), [*((64, name) for name in DTYPES), (1, "bfloat16")], indirect=["precision"]
)
def test_networks(batch: int, precision: str) -> None:
    """The error is at most twice eager's, and only Triton kernels run."""
    dtype = DTYPES[precision]
    generator, discriminator = networks(dtype)
    z = torch.randn(batch, 100, device="cuda").to(dtype)
    image = reference_copy(generator)(z.double()).to(dtype)
    for network, x in ((generator, z), (discriminator, image)):
        exact = reference_copy(network)(x.double())
        eager = reference_copy(network, dtype)(x)
        with ops.recording() as choices:
            y = network(x)
        assert {choice.engine for choice in choices} == {"triton"}
        assert y.stride() == eager.stride()
        assert error(y, exact) <= max(2 * error(eager, exact), NETWORK[precision])


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@torch.no_grad()
@pytest.mark.check
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled(mode: str) -> None:
    """Repeated calls, also as CUDA graph replays, stay correct and use the current weights."""
    generator, discriminator = networks(torch.bfloat16)
    compiled = [torch.compile(network, fullgraph=True, mode=mode) for network in (generator, discriminator)]
    for call in range(6):
        if call == 4:
            for network, position in ((generator, 3), (discriminator, 2)):
                network.main[position].weight.mul_(-1.5)
        z = torch.randn(64, 100, device="cuda", dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        image = compiled[0](z).clone()
        assert error(image, generator(z).double()) <= 2**-8, f"call {call}"
        torch.compiler.cudagraph_mark_step_begin()
        probability = compiled[1](image).clone()
        assert error(probability, discriminator(image).double()) <= 2**-8, f"call {call}"


def _edits() -> dict[str, Callable[[fast.Generator], None]]:
    def optimizer_step(kind: type, **options: bool) -> Callable[[fast.Generator], None]:
        def step(network: fast.Generator) -> None:
            for parameter in network.parameters():
                parameter.grad = torch.randn_like(parameter)
            kind(network.parameters(), lr=0.02, **options).step()

        return step

    def load(network: fast.Generator) -> None:
        network.load_state_dict({k: v * 0.9 for k, v in network.state_dict().items()})

    def assign(network: fast.Generator) -> None:
        weight = network.main[3].weight
        weight.data = weight.data * 1.5

    def copy(network: fast.Generator) -> None:
        with torch.no_grad():
            network.main[6].weight.copy_(network.main[6].weight * 0.5)

    def flat(network: fast.Generator) -> None:
        """Make all convolution weights views of one tensor, and take an optimizer step on that tensor."""
        parameters = [p for p in network.parameters() if p.ndim == 4]
        whole = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        for p, part in zip(parameters, whole.data.split([p.numel() for p in parameters]), strict=True):
            p.data = part.view(p.shape)
        with torch.no_grad():
            network(torch.randn(8, 100, device="cuda"))
        whole.grad = torch.randn_like(whole)
        torch.optim.Adam([whole], lr=0.02, fused=True).step()

    def replay(network: fast.Generator) -> None:
        """Train a copy by a captured step whose moving average is the network."""
        trained = reference_copy(network, torch.float32).train()
        discriminator = models.Discriminator().cuda()
        pair = [torch.optim.SGD(n.parameters(), lr=0.5) for n in (trained, discriminator)]
        step = TrainStep(trained, discriminator, *pair, capture=True, ema=network, ema_decay=0.5)
        for _ in range(WARM_UP + 2):
            step(torch.randn(8, 1, 64, 64, device="cuda").tanh(), torch.randn(8, 100, device="cuda"))

    def untracked(network: fast.Generator) -> None:
        network.main[6].weight.data.mul_(0.5)

    def replace(network: fast.Generator) -> None:
        network.main[9].weight = nn.Parameter(network.main[9].weight.detach() * 2)

    return {
        "Adam": optimizer_step(torch.optim.Adam),
        "fused Adam": optimizer_step(torch.optim.Adam, fused=True),
        "fused AdamW": optimizer_step(torch.optim.AdamW, fused=True),
        "fused SGD": optimizer_step(torch.optim.SGD, fused=True),
        "load_state_dict": load,
        ".data =": assign,
        "copy_": copy,
        "a flat tensor": flat,
        "a replay": replay,
        ".data.mul_": untracked,
        "replaced parameter": replace,
    }


def _callers() -> dict[str, Callable[[fast.Generator], Callable[[Tensor], Tensor]]]:
    """Functions that run a network, each caching something derived from its weights."""

    def shared(network: fast.Generator) -> fast.Generator:
        """Return another network that shares the modules; the edit goes through the first."""
        other = fast.Generator.__new__(fast.Generator)
        nn.Module.__init__(other)
        other.main, other.latent_dim = network.main, network.latent_dim
        return other.eval()

    def under_autocast(network: fast.Generator) -> Callable[[Tensor], Tensor]:
        """The cast weight is cached, and so is its packed form."""

        def run(z: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.float16):
                return network(z)

        return run

    return {
        "eager": lambda network: network,
        "graphed": lambda network: fast.graphed(network, 8),
        "shared": shared,
        "autocast": under_autocast,
        "compiled": lambda network: torch.compile(network, mode="reduce-overhead"),
    }


COMBINATIONS = [(caller, edit) for caller in _callers() for edit in _edits() if caller != "compiled"]
# A compiled network caches nothing; three edits are enough to verify this, as each takes long.
COMBINATIONS += [("compiled", edit) for edit in ("fused Adam", ".data =", "a replay")]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(("caller", "edit"), COMBINATIONS)
def test_weights_are_never_stale(caller: str, edit: str) -> None:
    """Every kind of weight update, with every kind of caller that caches something derived from weights."""
    generator, _ = networks(torch.float32)
    run = _callers()[caller](generator)
    z = torch.randn(8, 100, device="cuda")
    with torch.no_grad():
        for _ in range(3):  # the third call of a compiled network is its first replay
            before = run(z).clone()
    _edits()[edit](generator)
    with torch.no_grad():
        after = run(z)
        exact = reference_copy(generator)(z.double())
    assert error(before, exact) > 1e-2
    assert error(after, exact) <= NETWORK["tf32"]


@torch.no_grad()
def test_packed_weights_are_cached_and_freed() -> None:
    """Of a network that runs layer by layer, because of a hook."""
    generator, _ = networks(torch.float16)
    generator.main[1].register_forward_hook(lambda module, args, output: None)
    z = torch.randn(4, 100, device="cuda", dtype=torch.float16)
    generator(z)
    packed = {id(t) for entry in weight_cache._entries.values() for t in entry.derived.values()}
    generator(z)
    assert packed == {id(t) for entry in weight_cache._entries.values() for t in entry.derived.values()}
    assert packed
    del generator
    assert not weight_cache._entries


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_graphed(rows: int) -> None:
    generator, discriminator = networks(torch.float32)
    z = torch.randn(rows, 100, device="cuda")
    image = fast.graphed(generator, 8)(z)
    torch.testing.assert_close(image, generator(z))
    torch.testing.assert_close(fast.graphed(discriminator, 8)(image), discriminator(image))


@torch.no_grad()
def test_graphed_follows_running_statistics() -> None:
    generator, _ = networks(torch.float32)
    run = fast.graphed(generator, 4)
    z = torch.randn(4, 100, device="cuda")
    before = run(z)
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.add_(1.0)
    after = run(z)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, generator(z))


def test_graphed_rejects_bad_input() -> None:
    generator, _ = networks(torch.float32)
    run = fast.graphed(generator, 4)
    with pytest.raises(ValueError, match="≤ 4"):
        run(torch.randn(5, 100, device="cuda"))
    with pytest.raises(TypeError, match="float32"):
        run(torch.randn(4, 100, device="cuda", dtype=torch.float16))
    generator.train()
    with pytest.raises(ValueError, match="eval mode"):
        run(torch.randn(4, 100, device="cuda"))


@torch.no_grad()
def test_a_second_stream_packs_separately() -> None:
    generator, _ = networks(torch.float32)
    z = torch.randn(4, 100, device="cuda")
    expected = generator(z)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = generator(z)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(y, expected)


@torch.no_grad()
def test_autocast() -> None:
    generator, _ = networks(torch.float32)
    z = torch.randn(8, 100, device="cuda")
    exact = reference_copy(generator)(z.double())
    with torch.autocast("cuda", torch.bfloat16):
        y = generator(z)
    assert y.dtype == torch.bfloat16
    assert error(y, exact) <= 2e-2


@torch.no_grad()
def test_autotuning_is_cached_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path))
    monkeypatch.setenv("DCGAN_AUTOTUNE", "1")
    tuning._tuned.cache_clear()
    call, transposed = call_of("G3", 3, torch.bfloat16)
    y = ops.conv_transpose2d_fused(*call)[0]
    assert error(y, in_float64(call, transposed)) <= TOLERANCE["bfloat16"]
    (path,) = tmp_path.rglob("*.json")
    assert len(tiles.read(path)) == 1
    tuning._tuned.cache_clear()


@torch.no_grad()
def test_empty_batch() -> None:
    generator, discriminator = networks(torch.float32)
    image = generator(torch.empty(0, 100, device="cuda"))
    assert image.shape == (0, 1, 64, 64)
    assert discriminator(image).shape == (0,)
