"""On a real GPU: a network in eval as one operator, its dependent launches, its graphs and its weights."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dcgan import fast, layers, models
from dcgan.fusing import Sequential
from dcgan.kernels import chain, ops
from dcgan.kernels.gpu import inference
from dcgan.kernels.gpu.tools.layers import DTYPES
from tests.gpu.full_size import NETWORK, error, networks, reference_copy

pytestmark = pytest.mark.gpu

LAUNCHES = 6  # prepare and five products


@pytest.fixture(autouse=True)
def _no_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DCGAN_GRAPHS", raising=False)
    monkeypatch.setattr(inference, "_capture_failed", False)
    with torch.no_grad():
        yield


def samples(network: models.Generator | models.Discriminator, batch: int, dtype: torch.dtype) -> Tensor:
    shape = (100,) if isinstance(network, models.Generator) else (1, 64, 64)
    return torch.randn(batch, *shape, device="cuda").to(dtype)


def network_of(model: fast.Generator | fast.Discriminator) -> inference.Network:
    """Return what the model has prepared for its forward."""
    assert isinstance(model.main, Sequential)
    (part,) = model.main._fused_pipeline()._parts.values()
    assert part.state.chain is not None
    found = part.state.chain._network
    assert isinstance(found, inference.Network)
    return found


def graphs(model: fast.Generator | fast.Discriminator) -> int:
    return sum(one.graph is not None for one in network_of(model)._prepared.values())


@pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])
@pytest.mark.parametrize(
    "batch", [1, 7, pytest.param(64, marks=pytest.mark.check), pytest.param(1024, marks=pytest.mark.check)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dependent_launches_give_the_same_bits(
    which: int, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that did not wait would read what an earlier call has left in the workspace."""
    monkeypatch.setenv("DCGAN_GRAPHS", "0")
    model = networks(dtype)[which]
    inputs = [samples(model, batch, dtype) for _ in range(20)]
    found = [model(x) for x in inputs]
    modules = list(model.main._modules.items())
    with monkeypatch.context() as patched:
        patched.setattr(inference, "starts_early", lambda device: False)
        separate = chain.Chain(layers.stages(modules))
        for x, y in zip(inputs, found, strict=True):
            x = x[:, :, None, None] if x.ndim == 2 else x
            expected = separate(x, False)
            torch.cuda.synchronize()
            assert torch.equal(y.flatten(), expected.flatten())


@pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])
@pytest.mark.parametrize("precision", DTYPES, indirect=True)
@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_the_error_is_at_most_eagers(which: int, precision: str, batch: int) -> None:
    """In 16 bits; TF32 truncates where cuDNN rounds, and has a bound of its own."""
    dtype = DTYPES[precision]
    model = networks(dtype)[which]
    x = samples(model, batch, dtype).tanh()
    exact = reference_copy(model)(x.double())
    eager = error(reference_copy(model, dtype)(x), exact)
    bound = 1.05 * eager if dtype.itemsize == 2 and batch > 8 else max(2 * eager, NETWORK[precision])
    assert error(model(x), exact) <= bound


@pytest.mark.check
@pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])
def test_launches_per_call(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCGAN_GRAPHS", "0")
    model = networks(torch.bfloat16)[which]
    x = samples(model, 64, torch.bfloat16)
    for _ in range(3):
        model(x)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        model(x)
        torch.cuda.synchronize()
    kernels = [event.name for event in profiled.events() if "Memset" not in event.name]
    assert sum("kernel" in name for name in kernels) == LAUNCHES, kernels


@pytest.mark.check
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_recurring_calls_become_a_graph(mode: Callable[[], torch.no_grad]) -> None:
    """The graph gives the same bits as the launches, for its batch size alone."""
    generator = networks(torch.bfloat16)[0]
    with mode():
        z = [samples(generator, 8, torch.bfloat16) for _ in range(inference.CAPTURED_CALL + 4)]
        before = [generator(one) for one in z[:4]]
        assert graphs(generator) == 0
        after = [generator(one) for one in z]
        assert graphs(generator) == 1
        for one, other in zip(before, after, strict=False):
            assert torch.equal(one, other)
        assert len({y.data_ptr() for y in after}) == len(after)
        generator(samples(generator, 9, torch.bfloat16))
        assert graphs(generator) == 1
    with torch.no_grad():  # outside of the mode in which it was captured
        assert torch.equal(generator(z[0]), before[0])


def test_graphs_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCGAN_GRAPHS", "0")
    generator = networks(torch.bfloat16)[0]
    z = samples(generator, 8, torch.bfloat16)
    for _ in range(2 * inference.CAPTURED_CALL):
        generator(z)
    assert graphs(generator) == 0


EDITS: dict[str, Callable[[Tensor], object]] = {
    "in place, without a version": lambda w: w.data.mul_(-1.5),
    "in place, with a version": lambda w: w.mul_(0.5),
    "one element, with a version": lambda w: w[0, 0, 0].fill_(30.0),
    "other memory": lambda w: setattr(w, "data", w.data * 0.7),
    "other strides": lambda w: setattr(w, "data", w.data.to(memory_format=torch.channels_last) * 1.2),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("how", ["launches", "recurring", "graphed"])
def test_weights_follow_every_edit(edit: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits between calls, several in a row, seen by launches and by replays alike."""
    monkeypatch.setenv("DCGAN_GRAPHS", "1" if how == "recurring" else "0")
    generator = networks(torch.float32)[0]
    run = fast.graphed(generator, 8) if how == "graphed" else generator
    z = samples(generator, 8, torch.float32)
    for _ in range(2 * inference.CAPTURED_CALL):
        run(z)
    assert how == "graphed" or graphs(generator) == (how == "recurring")
    for layer in (3, 6, 9, 3):
        EDITS[edit](generator.main[layer].weight)
        for _ in range(3):
            exact = reference_copy(generator)(z.double())
            assert error(run(z), exact) <= NETWORK["tf32"], layer


def test_a_replay_follows_weights_that_a_foreign_graph_writes() -> None:
    """Nothing that runs in Python tells of the edit; the device compares the weights in every replay."""
    generator = networks(torch.bfloat16)[0]
    run, z = fast.graphed(generator, 4), samples(generator, 4, torch.bfloat16)
    run(z)
    weight, source = generator.main[3].weight.data, torch.zeros_like(generator.main[3].weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight.copy_(source)
    for scale in (1.0, -0.5, 2.0):
        source.copy_(torch.randn_like(weight) * 0.02 * scale)
        graph.replay()
        for _ in range(2):
            assert error(run(z), reference_copy(generator)(z.double())) <= 2 * NETWORK["bfloat16"]


@pytest.mark.check
def test_a_foreign_capture_packs_at_every_replay() -> None:
    """A graph that somebody else captures owns its packed weights, and follows edits of one element."""
    generator = networks(torch.bfloat16)[0]
    z = samples(generator, 4, torch.bfloat16)
    generator(z)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = generator(z)
    expected = generator(z)
    graph.replay()
    assert torch.equal(y, expected)
    generator.main[6].weight.data[0, 0, 0, 0] = 40.0
    generator.refresh()
    graph.replay()
    assert torch.equal(y, generator(z))
    assert not torch.equal(y, expected)


def test_under_autocast() -> None:
    """Parameters are cast as they are packed: no cast of a weight is launched."""
    generator = networks(torch.float32)[0]
    z = samples(generator, 16, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        y = [generator(z) for _ in range(3)][-1]
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            generator(z)
            torch.cuda.synchronize()
    assert y.dtype == torch.bfloat16
    assert error(y, reference_copy(generator)(z.double())) <= 2 * NETWORK["bfloat16"]
    assert len([event for event in profiled.events() if "kernel" in event.name]) == LAUNCHES + 1  # z's cast


def test_threads_and_streams_do_not_mix() -> None:
    """Each of several threads, on streams of their own and on a common one, gets the images of its noise."""
    generator = networks(torch.bfloat16)[0]
    noise = [samples(generator, 4, torch.bfloat16) for _ in range(4)]
    with ops.use_engine("auto"):
        expected = [generator(z) for z in noise]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int, stream: torch.cuda.Stream) -> None:
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3 * inference.CAPTURED_CALL):
                y = generator(noise[i])
                stream.synchronize()
                if not torch.equal(y, expected[i]):
                    wrong.append(i)

    common = torch.cuda.Stream()
    streams = [common, common, torch.cuda.Stream(), torch.cuda.Stream()]
    threads = [threading.Thread(target=work, args=(i, stream)) for i, stream in enumerate(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_freed_with_the_network() -> None:
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    generator = networks(torch.bfloat16)[0]
    z = samples(generator, 8, torch.bfloat16)
    for _ in range(2 * inference.CAPTURED_CALL):
        generator(z)
    assert graphs(generator) == 1
    del generator, z
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
