"""A planned launch passes the GPU the same arguments as Triton's launcher; a recording driver checks this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dcgan.kernels import gpu, ops, train_chain
from dcgan.kernels.gpu import dense, down, executor, launcher, offline, packing, tuning, up, up_block
from dcgan.kernels.gpu.launcher import Launch, Pointers
from dcgan.kernels.gpu.tiles import Problem, Tile
from dcgan.kernels.gpu.tools.simulated_gpu import Driver
from dcgan.kernels.spec import Backward, Call, TrainBackward, TrainCall
from tests.support.chain_results import call_of
from tests.support.recorded_launches import active
from tests.support.train_chains import Layer, tensors_of, with_tensors


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


def flattened(argument: Any) -> tuple[Any, ...]:
    """Return the pointers of a tuple of tensors, or else the argument alone."""
    return argument if isinstance(argument, tuple) and isinstance(argument[0], Tensor) else (argument,)


class Recorder(Driver):
    class launcher_cls:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.kernel = source.fn.__name__, source.constants, metadata.num_warps

        def __call__(self, *arguments: Any) -> None:
            # The grid, then stream, handles and metadata, then the kernel's declared arguments.
            flat = [t for v in arguments[9:] for t in flattened(v)]
            contents = [v.clone() for v in flat if isinstance(v, Tensor)]
            launched.append(Launched(*self.kernel, arguments[:3], tuple(flat), contents))


@pytest.fixture(autouse=True)
def _recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Record launches; small maps run as up_block, too."""
    monkeypatch.setattr(up_block, "MIN_BLOCKS", 0)
    launched.clear()
    with active(Recorder()):
        yield


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
        (True, 32, 72, 8),
        (True, 32, 16, 8),
        (True, 32, 1, 8),
        (True, 20, 16, 1),
        (True, 4, 16, 1),
        (False, 16, 32, 8),
        (False, 3, 32, 8),
        (False, 32, 1, 4),
    ],
    ids=["up", "up_block", "up_narrow", "dense_up", "dense_outer", "down", "down_narrow", "dense_narrow"],
)
def test_the_second_launch_equals_the_first(
    transposed: bool, c_in: int, c_out: int, size: int, vectors: bool
) -> None:
    first = call(transposed, c_in, c_out, size, vectors)
    second = first._replace(x=first.x.clone(), weight=first.weight.clone())
    run_forward(first, transposed)
    y = run_forward(second, transposed)[0]
    count = 1 if c_in == 3 else 2  # with the packing of its weight, unless that needs none
    assert len(launcher._plans) == count
    assert len(launched) == 2 * count
    assert [described(launch) for launch in launched[:count]] == [
        described(launch) for launch in launched[count:]
    ]
    taken = pointers(launched[count:])
    assert {second.x.data_ptr(), second.weight.data_ptr(), y.data_ptr()} <= taken
    assert not {first.x.data_ptr(), first.weight.data_ptr()} & taken


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
    assert len(launcher._plans) == 3  # with that of the packing


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
        (True, 32, 72, 8, "_up_kernel", "_down_kernel"),
        (True, 32, 16, 8, "_up_block_kernel", "_down_kernel"),
        (False, 72, 32, 8, "_down_kernel", "_up_kernel"),
        (True, 20, 16, 1, "_dense_kernel", "_dense_kernel"),
        (False, 3, 32, 8, "_down_narrow_kernel", "_up_block_kernel"),
    ],
    ids=["up", "up_block", "down", "dense", "narrow"],
)


def packings(kernel: str) -> list[str]:
    """Return the launches that pack the weight for a kernel: narrow convolutions read it as it is."""
    return [] if kernel == "_down_narrow_kernel" else ["_pack_kernel"]


def use_prologues(monkeypatch: pytest.MonkeyPatch, fused: bool) -> list[Problem]:
    """Fuse prologues from now on, or use standalone kernels.

    Returns the list of problems that tiles are chosen for, filled as they are.
    """
    chosen_for: list[Problem] = []
    choose = tuning.choose

    def chosen(problem: Problem, *others: Any) -> Tile:
        chosen_for.append(problem)
        return replace(choose(problem, *others), fused=fused or not problem.has_prologue)

    monkeypatch.setattr(tuning, "choose", chosen)
    return chosen_for


def use_standalone_prologues(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Use standalone prologue kernels, as :func:`use_prologues` does."""
    return use_prologues(monkeypatch, fused=False)


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
    """Two kernels forward and four backward; standalone prologues add one for each of x̂, du, and x̂ again.

    Packing adds one for each layout of the weight.
    """
    chosen_for = use_prologues(monkeypatch, fused)
    first = step(transposed, c_in, c_out, size)
    second = first.map(lambda name, t: copied(t))
    first.run(transposed)
    count, choices = len(launched), len(chosen_for)
    second.run(transposed)
    names = [launch.kernel for launch in launched]
    forward = [*packings(kernel), kernel, "_statistics_kernel"]
    wgrad = "_wgrad_narrow_kernel" if c_in <= launcher.NARROW else "_wgrad_kernel"
    backward = ["_pack_kernel", adjoint, "_sums_kernel", wgrad, "_split_k_kernel"]
    if not fused:
        forward.insert(len(packings(kernel)), "_prologue_kernel")
        backward.insert(3, "_prologue_kernel")
        backward.insert(1, "_prologue_kernel")
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
        if isinstance(t, Tensor):
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
    monkeypatch: pytest.MonkeyPatch,
    transposed: bool,
    c_in: int,
    c_out: int,
    size: int,
    kernel: str,
    adjoint: str,
) -> None:
    """Even if neither version nor address of the weight reveals that it has changed."""
    use_prologues(monkeypatch, True)
    layouts = {
        "_up_kernel": up.LAYOUT,
        "_up_block_kernel": up_block.LAYOUT,
        "_down_kernel": down.LAYOUT,
        "_down_narrow_kernel": down.NARROW_LAYOUT,
    }
    it = step(transposed, c_in, c_out, size)
    weight = it.forward.weight
    wanted = (dense.UP_LAYOUT, dense.DOWN_LAYOUT) if size == 1 else (layouts[kernel], layouts[adjoint])
    for _ in range(3):
        launched.clear()
        it.run(transposed)
        products = [i for i, launch in enumerate(launched) if launch.kernel in (kernel, adjoint)]
        for i, layout in zip(products, wanted, strict=True):
            packed = launched[i].arguments[len(Pointers._fields)]
            assert packed.shape == layout.shape(weight.shape)
            source = weight
            if packings(launched[i].kernel):
                assert launched[i - 1].kernel == "_pack_kernel"
                read, source = launched[i - 1].arguments[:2]
                assert read.data_ptr() == weight.data_ptr()
                assert torch.equal(launched[i - 1].contents[0], weight)
            assert packed.data_ptr() == source.data_ptr()
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
    use_prologues(monkeypatch, fused)
    it = step(transposed, c_in, c_out, size)
    for _ in range(3):
        launched.clear()
        run_forward(it.forward, transposed)
        gpu.backward(it.backward, transposed)
        packed = [launch.kernel for launch in launched if launch.kernel == "_pack_kernel"]
        assert packed == packings(kernel) + packings(adjoint), "the weight gradient does not read the weight"


def test_packing_reuses_its_plan() -> None:
    """For weights of the same shapes, strides, dtypes, layouts and alignment, packed in the same dtype."""

    def weights() -> list[packing.Job]:
        wide, narrow = torch.randn(16, 8, 4, 4), torch.randn(8, 3, 4, 4).bfloat16()
        return [(wide, up.LAYOUT), (wide, down.LAYOUT), (narrow, up_block.LAYOUT)]

    def buffer(jobs: list[packing.Job]) -> Tensor:
        return torch.empty(packing.offsets([(weight.shape, layout) for weight, layout in jobs])[1])

    first, second = weights(), weights()
    buffers = [buffer(first), buffer(first)]
    packing.pack_into(buffers[:1], [first])
    packing.pack_into(buffers[1:], [second])
    assert len(launcher._plans) == 1
    assert described(launched[0]) == described(launched[1])
    assert pointers(launched[1:]) == {buffers[1].data_ptr(), *(weight.data_ptr() for weight, _ in second)}

    wide = first[0][0]
    for changed in (
        [*first[:2], (first[2][0].float(), up_block.LAYOUT)],
        [*first[:2], (unaligned(first[2][0]), up_block.LAYOUT)],
        [(wide, down.LAYOUT), *first[1:]],
        [(wide.contiguous(memory_format=torch.channels_last), up.LAYOUT), *first[1:]],
        first[:2],
    ):
        before = len(launcher._plans)
        packing.pack_into([buffer(changed)], [changed])
        assert len(launcher._plans) == before + 1
    before = len(launcher._plans)
    packing.pack_into([buffers[0].bfloat16()], [first])
    packing.pack_into([buffer(first[:1]), buffer(first[1:])], [first[:1], first[1:]])
    packing.pack_into([buffer(first[:2]), buffer(first[2:])], [first[:2], first[2:]])
    assert len(launcher._plans) == before + 3


def test_an_empty_buffer_is_not_passed() -> None:
    """A forward without a backward packs nothing for it; nothing at all is not a launch."""
    job = (torch.randn(16, 8, 4, 4), up.LAYOUT)
    buffer = torch.empty(16 * 8 * 16)
    packing.pack_into([torch.empty(0), buffer], [[], [job]])
    packing.pack_into([torch.empty(0)], [[]])
    assert [launch.kernel for launch in launched] == ["_pack_kernel"]
    assert pointers(launched) == {job[0].data_ptr(), buffer.data_ptr()}


@pytest.fixture
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make launches no-ops without compilation, for tests that depend on plan keys alone."""

    class Compiled:
        function = packed_metadata = None

        def run(self, *arguments: Any) -> None: ...

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
        ("weight", 1, 1),  # its packing; the packed weight is aligned
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
def test_kernels_for_unneeded_gradients_are_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    use_prologues(monkeypatch, True)
    ran: list[str] = []
    it = step(False, 16, 32, 8)
    original = Launch.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", lambda self: (ran.append(self.kernel.__name__), original(self))[1])
        for needs, expected in (
            ((True, False, False, False, False), ["_pack_kernel", "_up_block_kernel"]),
            ((False, False, True, False, False), ["_pack_kernel", "_up_block_kernel", "_sums_kernel"]),
            ((False, True, False, False, False), ["_wgrad_kernel", "_split_k_kernel"]),
            ((False, False, False, False, False), []),
        ):
            launcher._plans.clear()
            ran.clear()
            gpu.backward(it.backward._replace(needs=needs), False)
            assert ran == expected


# --- a network in training ----------------------------------------------------------------------------------


def chain_call(groups: int = 1) -> TrainCall:
    """Return a call of three layers, of which one has a BatchNorm."""
    layers = [
        Layer(False, 16, act="leaky_relu"),
        Layer(False, 32, norm=True, act="leaky_relu"),
        Layer(True, 3, act="tanh"),
    ]
    call = call_of(layers, torch.randn(4, 3, 8, 8), groups)
    return with_tensors(call, {name: t.detach() for name, t in tensors_of(call).items()})


CHAIN = [
    *("_pack_kernel", "_down_narrow_kernel", "_down_kernel", "_forward_kernel", "_up_narrow_kernel"),
    *("_prologue_kernel", "_down_narrow_kernel", "_backward_kernel", "_apply_kernel"),
    *("_wgrad_narrow_kernel", "_split_k_kernel"),
    *("_wgrad_kernel", "_split_k_kernel", "_up_block_kernel"),
    *("_wgrad_narrow_kernel", "_split_k_kernel", "_up_narrow_kernel"),
    "_track_kernel",
]
"""The launches of a step with fused prologues."""
PRODUCTS = ("_down_narrow_kernel", "_down_kernel", "_up_narrow_kernel", "_up_block_kernel")


class ChainStep(NamedTuple):
    """A step of a network: the arguments of its passes and the running statistics that it updates."""

    call: TrainCall
    dy: Tensor
    running: list[Tensor]
    """The mean, the variance and the number of batches of its BatchNorm."""

    def run(self, change: Callable[[str, Tensor], Tensor] = lambda name, t: t) -> dict[str, Tensor]:
        """Run both passes, with ``change(name, tensor)`` in place of what the forward keeps.

        Returns what it keeps, and the gradients.
        """
        found = train_chain.specs(self.call)
        y, saved, stats, packed = gpu.train_forward(found, self.call)
        kept = {"y": y, "stats": stats[0], "packed": packed}
        kept |= {f"saved {i}": t for i, t in enumerate(saved)}
        kept = {name: change(name, t) for name, t in kept.items()}
        every, norm = [True] * 3, [False, True, False]
        back = TrainBackward(
            self.dy, kept["y"], [kept["saved 0"], kept["saved 1"]], [kept["stats"]], kept["packed"],
            True, every, norm, norm, self.call,
        )  # fmt: skip
        gradients = train_chain.empty_gradients(back)
        gpu.train_backward(found, back, gradients)
        mean, var, batches = self.running
        gpu.track([mean], [var], [batches], stats, [0.1], [16 // self.call.groups])
        names = {"x": gradients.x, "gamma": gradients.gamma[1], "beta": gradients.beta[1]}
        names |= {f"weight {i}": t for i, t in enumerate(gradients.weight)}
        return kept | {f"d{name}": t for name, t in names.items()}

    def tensors(self) -> dict[str, Tensor]:
        running = dict(zip(("mean", "var", "batches"), self.running, strict=True))
        return tensors_of(self.call) | {"dy": self.dy} | running

    def map(self, change: Callable[[str, Tensor], Tensor]) -> ChainStep:
        """Return the step with ``change(name, tensor)`` in place of each tensor."""
        made = {name: change(name, t) for name, t in self.tensors().items()}
        running = [made[name] for name in ("mean", "var", "batches")]
        return ChainStep(with_tensors(self.call, made), made["dy"], running)


def chain_step(groups: int = 1) -> ChainStep:
    return ChainStep(
        chain_call(groups), torch.randn(4, 3, 4, 4), [torch.randn(32), torch.rand(32), torch.tensor(0)]
    )


@pytest.mark.parametrize(("groups", "fused"), [(1, False), (2, True)])
def test_the_second_step_of_a_network_equals_the_first(
    monkeypatch: pytest.MonkeyPatch, groups: int, fused: bool
) -> None:
    """No new plan; all arguments are the second step's, whose forward packs the weights of both passes."""
    use_prologues(monkeypatch, fused)
    first = chain_step(groups)
    second = first.map(lambda name, t: copied(t))
    first_results = first.run()
    count, plans = len(launched), len(launcher._plans)
    results = second.run()
    names = CHAIN if fused else [*CHAIN[:4], "_prologue_kernel", *CHAIN[4:]]
    assert [launch.kernel for launch in launched] == names + names
    assert len(launcher._plans) == plans
    assert [described(launch) for launch in launched[:count]] == [
        described(launch) for launch in launched[count:]
    ]
    taken = pointers(launched[count:])
    for name, t in (first.tensors() | first_results).items():
        assert t.data_ptr() not in taken, name
    for name, t in (second.tensors() | results).items():
        assert t.data_ptr() in taken, name
    packed, *others = launched[count:]
    buffers = [t for t in packed.arguments if isinstance(t, Tensor)][-2:]
    products = [launch for launch in others if launch.kernel in PRODUCTS]
    read = [launch.arguments[len(Pointers._fields)] for launch in products]
    storages = [t.untyped_storage().data_ptr() for t in read]
    assert storages == [t.untyped_storage().data_ptr() for t in buffers for _ in range(3)]


@pytest.mark.usefixtures("_no_compilation")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "standalone"])
def test_each_number_of_groups_has_its_plans(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """All but those of the packing, and of weight gradients, which are sums over all images."""
    use_prologues(monkeypatch, fused)
    counts = []
    steps = [chain_step(groups) for groups in (1, 2, 4)]
    for it in steps * 2:
        it.run()
        counts.append(len(launcher._plans))
    each = (
        len(CHAIN) if fused else len(CHAIN) + 2
    )  # the prologue of the last layer, and its product's own plan
    shared = 1 + 2 * 3
    assert counts == [each, 2 * each - shared, *[3 * each - 2 * shared] * 4]


@pytest.mark.usefixtures("_no_compilation")
@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("x", 2),  # the first product, and its wgrad
        ("weight 1", 1),  # its packing
        ("gamma 1", 1),
        ("beta 1", 1),
        ("dy", 1),  # of the last activation's derivative
        ("mean", 1),
        ("batches", 1),
        ("y", 1),
        ("stats", 3),  # dgrad, the merge of its sums, and apply
        ("saved 0", 2),  # dgrad and wgrad
        ("saved 1", 2),  # dgrad and apply
        ("packed", 3),
    ],
)
def test_each_alignment_of_a_network_has_its_plans(name: str, plans: int) -> None:
    it = chain_step()

    def change(given: str, t: Tensor) -> Tensor:
        return unaligned(t) if given == name else t

    it.run()
    before = len(launcher._plans)
    for _ in range(2):
        it.map(change).run(change)
        assert len(launcher._plans) == before + plans


@pytest.mark.usefixtures("_no_compilation")
def test_plans_depend_on_every_option_of_a_network() -> None:
    """Each new option needs another compile-time constant or scalar argument somewhere."""
    it = chain_step()
    stages = list(it.call.stages)
    it.run()
    for call in (
        it.call._replace(slope=0.5),
        it.call._replace(stages=[stages[0], stages[1]._replace(eps=0.5), stages[2]]),
        it.call._replace(stages=[stages[0], stages[1]._replace(act="relu"), stages[2]]),
        it.call._replace(stages=[*stages[:2], stages[2]._replace(act="sigmoid")]),
        it.call._replace(stages=[stages[0], stages[1]._replace(gamma=None), stages[2]]),
        it.call._replace(channels_last=False),
    ):
        before = len(launcher._plans)
        it._replace(call=call).run()
        assert len(launcher._plans) > before
    before = len(launcher._plans)
    for momentum, count in ((0.2, 16), (-1.0, 16), (0.1, 17)):
        mean, var, batches = it.running
        for _ in range(2):
            gpu.track([mean], [var], [batches], [torch.empty(4, 1, 32)], [momentum], [count])
        before += 1
        assert len(launcher._plans) == before


# --- registers ----------------------------------------------------------------------------------------------


def up_launch(tile: Tile) -> Launch:
    """Return a launch of 512→256 with statistics."""
    it = call(True, 512, 256, 4, False)._replace(stats=True, out_act="none")
    spec = ops.check(it, True)
    product = executor.fprop(spec, it, ops.empty(spec)[0])
    return up.UP.launch(product, torch.empty(up.LAYOUT.shape(it.weight.shape)), torch.empty(3, 4, 256), tile)


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
