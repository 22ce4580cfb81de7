"""On a real GPU: training steps captured in a CUDA graph, and compiled training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from dcgan import fast
from dcgan.kernels import ops
from dcgan.kernels.train_chain import specs, track_, train_chain
from tests.gpu.full_size import NETWORK, chain_call, networks, samples
from tests.support.train_chains import tensors_of, with_tensors

pytestmark = pytest.mark.gpu

SMALL = {"features": 16, "image_size": 32}
RATE = 0.05


def training_step(network: nn.Module, x: Tensor, cotangent: Tensor) -> Tensor:
    """Run forward, backward and an SGD step; return the loss."""
    network.zero_grad(set_to_none=True)
    loss = (network(x).float() * cotangent).sum()
    loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.sub_(parameter.grad, alpha=RATE)
    return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_uses_the_current_weights(dtype: torch.dtype) -> None:
    """Weights are packed inside the graph: a replay uses their current values, whatever changed them."""
    network = networks(dtype, **SMALL)[0].train()
    x, cotangent = samples(network, 16, dtype), 0.01 * torch.randn(16, 1, 32, 32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and plan
            training_step(network, x, cotangent)
    torch.cuda.current_stream().wait_stream(stream)
    network.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training_step(network, x, cotangent)

    eager = fast.Generator(**SMALL).to("cuda", dtype).train()
    eager.load_state_dict(network.state_dict())
    losses = []
    for replay in range(4):
        x.copy_(samples(network, 16, dtype))
        if replay == 2:  # edit between two replays
            with torch.no_grad():
                for edited in (network, eager):
                    edited.main[3].weight.mul_(-0.5)
                    edited.main[0].weight.add_(0.01)
        graph.replay()
        wanted = training_step(eager, x, cotangent)
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
        for (name, value), other in zip(
            network.state_dict().items(), eager.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(
                value, other, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )
        losses.append(loss.item())
    assert len(set(losses)) == len(losses)


def test_a_captured_step_with_torch_sgd() -> None:
    """The graph includes the step of torch.optim.SGD."""
    network = networks(torch.float32, **SMALL)[0].train()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    x = samples(network, 16, torch.float32)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = network(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    seen = []
    for _ in range(5):
        graph.replay()
        seen.append(loss.item())
    assert seen == sorted(seen, reverse=True), "each replay continues downhill from the previous one"
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_captured_chain(which: int, groups: int) -> None:
    """A network as one operator, with its running statistics: replays give the same bits as launches."""
    call, dy = chain_call(which, 16, groups, torch.bfloat16, torch.float32)
    given = {name: t.requires_grad_() for name, t in tensors_of(call).items()}
    call = with_tensors(call, given)
    norms = [(stage, spec) for stage, spec in zip(call.stages, specs(call), strict=True) if stage.norm]
    counts = [16 // groups * spec.y.size[1] * spec.y.size[2] for _, spec in norms]
    means, variances = ([torch.ones(stage.c_out, device="cuda") for stage, _ in norms] for _ in range(2))
    batches = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in norms]
    running = [*means, *variances, *batches]

    def step() -> list[Tensor]:
        with ops.use_engine("triton"):
            y, stats = train_chain(call)
            track_(means, variances, batches, stats, [None, *[0.1] * (len(norms) - 1)], counts)
            return [y.detach(), *stats, *torch.autograd.grad(y, list(given.values()), dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    seen: list[Tensor] = []
    for _ in range(2):
        with torch.no_grad():
            for t in (dy, *given.values()):
                t.mul_(-0.9).add_(0.01 * torch.randn_like(t))
        before = [t.clone() for t in running]
        graph.replay()
        found = [t.clone() for t in (*captured, *running)]
        for t, value in zip(running, before, strict=True):
            t.copy_(value)
        for got, want in zip(found, (*step(), *running), strict=True):
            assert torch.equal(got, want)
        seen.append(found[0])
    assert not torch.equal(*seen)


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients_of(run: Callable[[Tensor], Tensor], network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return output, parameter gradients and buffers after a forward and backward."""
    network.zero_grad(set_to_none=True)
    y = run(x)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum().backward()
    found = {"output": y.detach().clone()}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found | {name: buffer.clone() for name, buffer in network.named_buffers()}


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("which", [0, 1], ids=["generator", "discriminator"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.check)], ids=str
)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training(which: int, dtype: torch.dtype, mode: str) -> None:
    """One graph for forward and backward, the same results as uncompiled, no recompilation between steps."""
    network = networks(dtype, features=16, image_size=32)[which].train()
    compiled = torch.compile(network, fullgraph=True, mode=mode)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    # In bfloat16, rounding may flip signs before a ReLU.
    bound = {torch.float32: NETWORK["tf32"], torch.bfloat16: 0.2}[dtype]
    for step in range(4):  # the CUDA graph is warmed up, captured, and replayed
        torch.compiler.cudagraph_mark_step_begin()
        x = samples(network, 32, dtype)
        network.load_state_dict(state)
        expected = gradients_of(network, network, x)
        network.load_state_dict(state)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            found = gradients_of(compiled, network, x)
        squares = [
            t.double().square().sum() for n, t in expected.items() if n in dict(network.named_parameters())
        ]
        floor = 1e-2 * torch.stack(squares).sum().sqrt()
        for name, want in expected.items():
            off = (found[name].double() - want.double()).norm()
            assert off <= bound * torch.maximum(want.double().norm(), floor), f"step {step}: {name}"
        with torch.no_grad():  # update in place, as an optimizer does
            for value in state.values():
                if value.is_floating_point() and value.ndim == 4:
                    value.mul_(1.1)
