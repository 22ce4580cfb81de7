"""A planned launch passes the GPU the same arguments as Triton's launcher; a recording driver checks this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor

from dcgan.kernels import gpu, ops
from dcgan.kernels.gpu import dense, down, executor, launcher, offline, tuning, up
from dcgan.kernels.gpu.launcher import Kernel, Launch, Pointers
from dcgan.kernels.gpu.tiles import Problem, Tile
from dcgan.kernels.gpu.tools.simulated_gpu import Driver
from dcgan.kernels.spec import Backward, Call, ConvSpec


class Launched(NamedTuple):
    """What the driver received."""

    kernel: str
    constants: dict[Any, Any]
    warps: int
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    contents: list[Tensor]
    """Copies of the tensor arguments at launch time."""


launched: list[Launched] = []


class Recorder(Driver):
    class launcher_cls:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.kernel = source.fn.__name__, source.constants, metadata.num_warps

        def __call__(self, *arguments: Any) -> None:
            # The grid, then stream, handles and metadata, then the kernel's declared arguments.
            flat = [t for v in arguments[9:] for t in (v if isinstance(v, Pointers) else (v,))]
            contents = [v.clone() for v in flat if isinstance(v, Tensor)]
            launched.append(Launched(*self.kernel, arguments[:3], tuple(flat), contents))


@pytest.fixture(autouse=True)
def _recorder() -> Iterator[None]:
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Recorder())
    launched.clear()
    launcher._plans.clear()
    yield
    launcher._plans.clear()
    triton.runtime.driver._active = before


def call(transposed: bool, c_in: int, c_out: int, size: int, vectors: bool) -> Call:
    x = torch.randn(2, c_in, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(*((c_in, c_out) if transposed else (c_out, c_in)), 4, 4)
    stride, padding = (1, 0) if size in (1, 4) and (transposed == (size == 1)) else (2, 1)
    vector = torch.randn(c_out) if vectors else None
    return Call(x, weight, out_scale=vector, out_shift=vector, out_act="relu", stride=stride, padding=padding)


def run_forward(it: Call, transposed: bool) -> ops.Outputs:
    return gpu.forward(ops.check(it, transposed), it)


def described(launch: Launched) -> list[Any]:
    """Return a launch with each tensor replaced by its shape, strides and dtype."""
    return [
        *launch[:4],
        *((tuple(v.shape), v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in launch.arguments),
    ]


def pointers(launches: list[Launched]) -> set[int]:
    return {v.data_ptr() for launch in launches for v in launch.arguments if isinstance(v, Tensor)}


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize(
    ("transposed", "c_in", "c_out", "size"),
    [
        (True, 32, 16, 8),
        (True, 32, 1, 8),
        (True, 20, 16, 1),
        (False, 16, 32, 8),
        (False, 3, 32, 8),
        (False, 32, 1, 4),
    ],
    ids=["up", "up_narrow", "dense_up", "down", "down_narrow", "dense_narrow"],
)
def test_the_second_launch_equals_the_first(
    transposed: bool, c_in: int, c_out: int, size: int, vectors: bool
) -> None:
    first = call(transposed, c_in, c_out, size, vectors)
    second = first._replace(x=first.x.clone(), weight=first.weight.clone())
    run_forward(first, transposed)
    y = run_forward(second, transposed)[0]
    assert len(launcher._plans) == 1
    assert len(launched) == 2
    assert described(launched[0]) == described(launched[1])
    taken = pointers(launched[1:])
    assert second.x.data_ptr() in taken
    assert first.x.data_ptr() not in taken
    assert y.data_ptr() in taken


def test_a_new_layout_alignment_or_activation_gets_a_new_plan() -> None:
    first = call(True, 32, 16, 8, True)
    run_forward(first, True)
    unaligned = torch.randn(1 + first.x.numel())[1:].view(2, 8, 8, 32).permute(0, 3, 1, 2)
    for other in (
        first._replace(x=first.x.contiguous()),
        first._replace(x=unaligned),
        first._replace(out_act="tanh"),
        first._replace(out_scale=None),
        first._replace(slope=0.5),
        first._replace(channels_last=False),
        first._replace(x=first.x[:1]),
    ):
        before = len(launcher._plans)
        run_forward(other, True)
        assert len(launcher._plans) == before + 1


def test_the_plan_key_includes_the_alignment_of_each_tensor() -> None:
    """Code for an unaligned x and an aligned scale would fault on an aligned x and an unaligned scale."""
    first = call(True, 32, 16, 8, True)
    assert first.out_scale is not None
    x = torch.randn(1 + first.x.numel())[1:].view(2, 8, 8, 32).permute(0, 3, 1, 2)
    scale = torch.randn(17)[1:]
    assert x.stride() == first.x.stride()
    run_forward(first._replace(x=x), True)
    run_forward(first._replace(out_scale=scale), True)
    assert len(launcher._plans) == 2


@pytest.mark.parametrize("c_in", [3, 32], ids=["down_narrow", "down"])
def test_an_unaligned_weight_that_needs_no_packing_gets_a_new_plan(c_in: int) -> None:
    """Code that assumes 16-byte alignment would fault on it."""
    first = call(False, c_in, 32, 8, True)
    nhwc = torch.contiguous_format if c_in == 3 else torch.channels_last
    aligned = first.weight.to(memory_format=nhwc)
    memory = torch.empty(1 + aligned.numel())[1:]
    unaligned = memory.as_strided(aligned.shape, aligned.stride()).copy_(aligned)
    assert unaligned.data_ptr() % 16
    run_forward(first._replace(weight=aligned), False)
    run_forward(first._replace(weight=unaligned), False)
    assert len(launcher._plans) == 2


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "MAX_PLANS", 3)
    for slope in range(7):
        run_forward(call(True, 32, 16, 8, True)._replace(slope=float(slope)), True)
    assert len(launcher._plans) <= 3


# --- training -----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A training call and its backward."""

    forward: Call
    backward: Backward

    def run(self, transposed: bool) -> None:
        run_forward(self.forward, transposed)
        gpu.backward(self.backward, transposed)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Step:
        """Replace every tensor by ``change(name, tensor)``, consistently in both calls."""
        given = self.backward._asdict() | self.forward._asdict()
        made = {name: change(name, t) for name, t in given.items() if isinstance(t, Tensor)}
        return Step(
            self.forward._replace(**{name: t for name, t in made.items() if name in Call._fields}),
            self.backward._replace(**{name: t for name, t in made.items() if name in Backward._fields}),
        )


def step(transposed: bool, c_in: int, c_out: int, size: int) -> Step:
    """Return a step with statistics, a BatchNorm prologue, and all of their gradients."""
    forward = call(transposed, c_in, c_out, size, False)
    center, scale, shift = (torch.randn(c_in) for _ in range(3))
    forward = forward._replace(
        center=center, scale=scale, shift=shift, in_act="relu", out_act="none", stats=True
    )
    y = torch.randn_like(ops.empty(ops.check(forward, transposed))[0])
    mean, dmean, dvar = (torch.randn(c_out) for _ in range(3))
    backward = Backward(
        torch.randn_like(y), dmean, dvar, forward.x, forward.weight, center, scale, shift, "relu", None,
        "none", y, mean, True, forward.slope, forward.stride, forward.padding,
        (True, True, True, False, False),
    )  # fmt: skip
    return Step(forward, backward)


def copied(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.preserve_format)


def unaligned(t: Tensor) -> Tensor:
    """Copy with the same values and strides, one element off a 16-byte address."""
    memory = torch.empty(1 + t.numel(), dtype=t.dtype)[1:]
    moved = memory.as_strided(t.shape, t.stride()).copy_(t)
    assert moved.data_ptr() % 16
    return moved


TRAINED = pytest.mark.parametrize(
    ("transposed", "c_in", "c_out", "size", "kernel", "adjoint"),
    [
        (True, 32, 16, 8, "_up_kernel", "_down_kernel"),
        (False, 16, 32, 8, "_down_kernel", "_up_kernel"),
        (True, 20, 16, 1, "_dense_kernel", "_dense_kernel"),
        (False, 3, 32, 8, "_down_narrow_kernel", "_up_kernel"),
    ],
    ids=["up", "down", "dense", "narrow"],
)


def use_standalone_prologues(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Use standalone prologue kernels from now on; returns the list of problems that tiles are chosen for."""
    chosen_for: list[Problem] = []
    choose = tuning.choose

    def chosen(problem: Problem, *others: Any) -> Tile:
        chosen_for.append(problem)
        return replace(choose(problem, *others), fused=not problem.has_prologue)

    monkeypatch.setattr(tuning, "choose", chosen)
    return chosen_for


@TRAINED
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "standalone"])
def test_the_second_step_equals_the_first(
    monkeypatch: pytest.MonkeyPatch,
    transposed: bool,
    c_in: int,
    c_out: int,
    size: int,
    kernel: str,
    adjoint: str,
    fused: bool,
) -> None:
    """Two kernels forward and four backward; standalone prologues add one for each of x̂, du, and x̂ again."""
    chosen_for = [] if fused else use_standalone_prologues(monkeypatch)
    first = step(transposed, c_in, c_out, size)
    second = first.map(lambda name, t: copied(t))
    first.run(transposed)
    count, choices = len(launched), len(chosen_for)
    second.run(transposed)
    names = [launch.kernel for launch in launched]
    forward = [kernel, "_statistics_kernel"]
    backward = [adjoint, "_sums_kernel", "_wgrad_kernel", "_split_k_kernel"]
    if not fused:
        forward.insert(0, "_prologue_kernel")
        backward.insert(2, "_prologue_kernel")
        backward.insert(0, "_prologue_kernel")
        # Their products have their own keys.
        assert [plan.run for plan in launcher._plans.values()].count(None) == 3
        assert len(chosen_for) == choices == 6
    assert names == 2 * (forward + backward)
    assert [described(launch) for launch in launched[:count]] == [
        described(launch) for launch in launched[count:]
    ]
    taken = pointers(launched[count:])
    for name, t in (first.backward._asdict() | first.forward._asdict()).items():
        if isinstance(t, Tensor):
            assert t.data_ptr() not in taken, name
    for name, t in (second.backward._asdict() | second.forward._asdict()).items():
        if isinstance(t, Tensor) and name != "weight":  # kernels read its packed copy
            assert t.data_ptr() in taken, name


def test_the_product_reads_what_the_standalone_prologue_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """du is materialized once for both gradients, and also if only the weight gradient is needed."""
    use_standalone_prologues(monkeypatch)
    it = step(True, 32, 16, 8)
    gpu.backward(it.backward, True)
    by_name = {launch.kernel: launch for launch in launched}
    first, second = (launch for launch in launched if launch.kernel == "_prologue_kernel")
    du, x_hat = (launch.arguments[5] for launch in (first, second))
    assert du.shape == it.backward.dy.shape
    assert x_hat.shape == it.forward.x.shape
    assert du.data_ptr() in pointers([by_name["_down_kernel"]])
    assert {du.data_ptr(), x_hat.data_ptr()} <= pointers([by_name["_wgrad_kernel"]])
    launched.clear()
    gpu.backward(it.backward._replace(needs=(False, True, False, False, False)), True)
    names = [launch.kernel for launch in launched]
    assert names == ["_prologue_kernel", "_prologue_kernel", "_wgrad_kernel", "_split_k_kernel"]


@TRAINED
def test_every_training_call_packs_the_current_weight(
    transposed: bool, c_in: int, c_out: int, size: int, kernel: str, adjoint: str
) -> None:
    """Even if neither version nor address of the weight reveals that it has changed."""
    packs = {
        "_up_kernel": up.pack,
        "_down_kernel": down.pack,
        "_down_narrow_kernel": down.pack_narrow,
    }
    it = step(transposed, c_in, c_out, size)
    weight = it.forward.weight
    for _ in range(3):
        launched.clear()
        it.run(transposed)
        products = [launch for launch in launched if launch.kernel in (kernel, adjoint)]
        packings = (dense.pack_up, dense.pack_down) if size == 1 else (packs[kernel], packs[adjoint])
        for launch, pack in zip(products, packings, strict=True):
            expected = pack(weight)
            assert any(
                content.shape == expected.shape and torch.equal(content, expected)
                for content in launch.contents
            ), launch.kernel
        weight.data.copy_(torch.randn_like(weight))


@TRAINED
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "standalone"])
def test_a_weight_is_packed_once_per_product(
    monkeypatch: pytest.MonkeyPatch,
    transposed: bool,
    c_in: int,
    c_out: int,
    size: int,
    kernel: str,
    adjoint: str,
    fused: bool,
) -> None:
    """By the call that plans the product and by later calls, with fused and with standalone prologues."""
    packed: list[str] = []
    kernel_for = launcher.kernel_for

    def counting(spec: ConvSpec) -> Kernel:
        found = kernel_for(spec)
        assert found is not None

        def pack(weight: Tensor) -> Tensor:
            packed.append(found.name)
            return found.pack(weight)

        return replace(found, pack=pack if found.pack else None)

    monkeypatch.setattr(launcher, "kernel_for", counting)
    if not fused:
        use_standalone_prologues(monkeypatch)
    it = step(transposed, c_in, c_out, size)
    for _ in range(3):
        packed.clear()
        run_forward(it.forward, transposed)
        assert len(packed) == 1
        gpu.backward(it.backward, transposed)
        assert len(packed) == 2, "once more for dx; the weight gradient does not read the weight"


@pytest.fixture
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make launches no-ops without compilation, for tests that depend on plan keys alone."""

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: None

    monkeypatch.setattr(Launch, "__call__", lambda self: Compiled())


@pytest.mark.usefixtures("_no_compilation")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "standalone"])
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("x", 1, 2),  # dgrad's epilogue and wgrad
        ("center", 1, 2),
        ("scale", 1, 3),  # and the reduction of the sums
        ("shift", 1, 2),
        ("dy", 0, 2),
        ("y", 0, 2),
        ("mean", 0, 2),
        ("dmean", 0, 2),
        ("dvar", 0, 2),
        ("weight", 0, 0),  # the packed weight is aligned
    ],
)
def test_a_new_alignment_gets_a_new_plan(
    monkeypatch: pytest.MonkeyPatch, name: str, forward: int, backward: int, fused: bool
) -> None:
    """Code compiled for 16-byte aligned addresses would fault on others."""
    if not fused:
        use_standalone_prologues(monkeypatch)
    it = step(True, 32, 16, 8)
    it.run(True)
    off = it.map(lambda given, t: unaligned(t) if given == name else t)
    before = len(launcher._plans)
    run_forward(off.forward, True)
    between = len(launcher._plans)
    gpu.backward(off.backward, True)
    added = between - before, len(launcher._plans) - between
    if fused:
        assert added == (forward, backward)
    else:  # one prologue kernel more for each; the products after them keep their plans
        assert added[0] >= forward
        assert added[1] >= min(backward, 1)
    off.run(True)
    assert len(launcher._plans) == before + sum(added)


@pytest.mark.usefixtures("_no_compilation")
def test_a_new_geometry_of_a_step_gets_a_new_plan() -> None:
    it = step(True, 32, 16, 8)
    it.run(True)
    for other in (
        Step(it.forward._replace(in_act="tanh"), it.backward._replace(in_act="tanh")),
        Step(it.forward._replace(slope=0.5), it.backward._replace(slope=0.5)),
        it.map(lambda name, t: t.contiguous()),
        it.map(lambda name, t: t[:1] if name in ("x", "y", "dy") else t),
        it.map(lambda name, t: t.bfloat16() if name in ("x", "y", "dy", "weight") else t),
        Step(it.forward._replace(stats=False), it.backward._replace(dmean=None, dvar=None)),
    ):
        before = len(launcher._plans)
        run_forward(other.forward, True)
        between = len(launcher._plans)
        gpu.backward(other.backward, True)
        assert between > before
        assert len(launcher._plans) >= between + 2


@pytest.mark.usefixtures("_no_compilation")
def test_kernels_for_unneeded_gradients_are_not_launched() -> None:
    ran: list[str] = []
    it = step(False, 16, 32, 8)
    original = Launch.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", lambda self: (ran.append(self.kernel.__name__), original(self))[1])
        for needs, expected in (
            ((True, False, False, False, False), ["_up_kernel"]),
            ((False, False, True, False, False), ["_up_kernel", "_sums_kernel"]),
            ((False, True, False, False, False), ["_wgrad_kernel", "_split_k_kernel"]),
            ((False, False, False, False, False), []),
        ):
            launcher._plans.clear()
            ran.clear()
            gpu.backward(it.backward._replace(needs=needs), False)
            assert ran == expected


# --- registers ----------------------------------------------------------------------------------------------


def up_launch(tile: Tile) -> Launch:
    """Return a launch of 512→256 with statistics."""
    it = call(True, 512, 256, 4, False)._replace(stats=True, out_act="none")
    spec = ops.check(it, True)
    product = executor.fprop(spec, it, ops.empty(spec)[0])
    return up.UP.launch(product, up.pack(it.weight), torch.empty(2, 4, 256), tile)


@pytest.mark.parametrize(
    ("spilled", "expected", "tile"), [(0, False, Tile(64, 64, 32, 4, 2)), (3, True, Tile(64, 64, 32, 4, 3))]
)
def test_spills_are_read_from_the_compiled_code(
    monkeypatch: pytest.MonkeyPatch, spilled: int, expected: bool, tile: Tile
) -> None:
    """The driver loads the code but launches nothing; a later launch reuses the compiled code."""
    loaded: list[str] = []

    def load(name: str, *binary: Any) -> tuple[int, ...]:
        loaded.append(name)
        return 0, 0, 255, spilled, 1024

    monkeypatch.setattr(Recorder.utils, "load_binary", load, raising=False)
    launch = up_launch(tile)
    assert launch.spills() is expected
    assert launched == []
    assert loaded == ["_up_kernel"]
    launch()
    assert len(launched) == 1
    assert loaded == ["_up_kernel"]


def test_a_launch_out_of_resources_counts_as_spilling() -> None:
    """float32 at 128×256×64 and four stages: 393 KB of shared memory."""
    assert up_launch(Tile(128, 256, 64, 8, 4)).spills()


def test_offline_compilation_agrees_on_spills() -> None:
    """Checked on a tile too large for its warps, a suitable one, and one that exceeds shared memory."""
    assert offline.spills(up_launch(Tile(128, 128, 16, 1, 2)), 90)
    assert not offline.spills(up_launch(Tile(64, 64, 32, 4, 2)), 90)
    assert offline.spills(up_launch(Tile(128, 256, 64, 8, 4)), 90), "exceeds shared memory"
