"""What is made of frozen weights is made once, follows every change, and is freed."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from dcgan.kernels import weights
from dcgan.models import weights_init


class Still(nn.Module):
    """An owner as an engine has it: one convolution, whose weight negated is what it makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 4)
        self.made = 0

    def freeze(self) -> Still:
        weights.freeze(self, [self.conv.weight])
        return self

    def derived(self, key: str = "negated") -> Tensor:
        def make(weight: Tensor) -> Tensor:
            self.made += 1
            return -weight

        return weights.transformed(self.conv.weight, key, make)

    def check(self) -> None:
        """Frozen again, as every forward in eval does, what is derived is of the present values."""
        self.freeze()
        assert torch.equal(self.derived(), -self.conv.weight)


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_entries", {})


@pytest.fixture
def still() -> Still:
    return Still().freeze()


# --- while nothing changes ---------------------------------------------------------------------------------


def test_made_once_while_still(still: Still) -> None:
    first = still.derived()
    assert all(still.freeze().derived() is first for _ in range(5))
    assert still.made == 1
    assert torch.equal(first, -still.conv.weight)


def test_made_each_time_unless_frozen() -> None:
    module = Still()
    assert module.derived() is not module.derived()
    assert module.made == 2


def test_one_for_each_key(still: Still) -> None:
    assert still.derived("a") is not still.derived("b")
    assert still.derived("a") is still.derived("a")
    assert still.made == 2


def test_a_derived_tensor_is_itself_frozen(still: Still) -> None:
    """A cast weight is packed once, too; both go together."""
    cast = still.derived()
    packed = weights.transformed(cast, "packed", lambda w: w.flatten() + 1)
    assert weights.transformed(still.derived(), "packed", lambda w: w.flatten() + 1) is packed
    assert len(weights._entries) == 3
    weights.thaw(still)
    assert not weights._entries
    assert weights.transformed(cast, "packed", lambda w: w.flatten() + 1) is not packed


def test_thawed_by_its_owner(still: Still) -> None:
    first, epoch = still.derived(), weights.epoch()
    weights.thaw(still)
    assert weights.epoch() > epoch
    assert still.derived() is not first
    assert still.made == 2
    weights.thaw(still)  # again, and of what was never frozen
    weights.thaw(Still())


def test_a_result_that_is_the_weight_is_not_kept(still: Still) -> None:
    assert weights.transformed(still.conv.weight, "same", lambda w: w) is still.conv.weight
    assert len(weights._entries) == 1
    same = weights.transformed(still.conv.weight, "view", lambda w: w.view(-1))
    assert same.data_ptr() == still.conv.weight.data_ptr()
    assert len(weights._entries) == 1


def test_nothing_derived_needs_a_gradient(still: Still) -> None:
    assert still.conv.weight.requires_grad
    assert not still.derived().requires_grad


def test_made_in_inference_mode_it_serves_a_differentiated_call(still: Still) -> None:
    with torch.inference_mode():
        derived = still.derived()
    assert not derived.is_inference()
    assert still.derived() is derived
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    nn.functional.conv2d(x, derived).square().sum().backward()
    assert x.grad is not None


# --- every way a weight changes ----------------------------------------------------------------------------


def step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[Still], None]:
    def change(module: Still) -> None:
        module.conv.weight.grad = torch.randn_like(module.conv.weight)
        make([module.conv.weight]).step()

    return change


def copy_under_no_grad(module: Still) -> None:
    with torch.no_grad():
        module.conv.weight.copy_(torch.randn_like(module.conv.weight))


def copy_in_inference_mode(module: Still) -> None:
    with torch.inference_mode():
        module.conv.weight.copy_(torch.randn(3, 2, 4, 4))


def assign_data(module: Still) -> None:
    module.conv.weight.data = torch.randn(3, 2, 4, 4)


def replace_parameter(module: Still) -> None:
    module.conv.weight = nn.Parameter(torch.randn(3, 2, 4, 4))


def replace_parameter_on_the_same_storage(module: Still) -> None:
    """Its version counter may come to stand where the old one's did."""
    old = module.conv.weight
    module.conv.weight = nn.Parameter(old.data)
    while module.conv.weight._version < max(old._version, 1):
        copy_under_no_grad(module)


def load(module: Still) -> None:
    module.load_state_dict(Still().state_dict())


def load_assigning(module: Still) -> None:
    module.load_state_dict(Still().state_dict(), assign=True)


def to_vector_and_back(module: Still) -> None:
    nn.utils.vector_to_parameters(torch.randn(99), module.parameters())


def initialise_and_refresh(module: Still) -> None:
    module.apply(weights_init)
    weights.thaw(module)  # on a GPU nothing else sees it


def other_dtype(module: Still) -> None:
    module.to(torch.float64)


def foreach(module: Still) -> None:
    with torch.no_grad():
        torch._foreach_mul_([module.conv.weight], 2.0)


def behind_its_back(module: Still) -> None:
    """As a replayed CUDA graph does, which tells: no version, no hook."""
    module.conv.weight.data.copy_(torch.randn_like(module.conv.weight))
    weights.written([module.conv.weight])


def through_another_parameter(module: Still) -> None:
    """The optimizer holds another tensor in the same memory, with a version of its own."""
    alias = nn.Parameter(module.conv.weight.data)
    alias.grad = torch.randn_like(alias)
    torch.optim.Adam([alias], lr=0.1, fused=True).step()


def through_a_flat_parameter(module: Still) -> None:
    """The optimizer holds one tensor, of which the weight is a view that begins somewhere inside."""
    whole = module.conv.weight.untyped_storage()
    flat = nn.Parameter(torch.empty(0).set_(whole))  # type: ignore[call-overload]
    assert len(flat) > module.conv.weight.numel()
    flat.grad = torch.randn_like(flat)
    torch.optim.SGD([flat], lr=0.1).step()


CHANGES: dict[str, Callable[[Still], None]] = {
    "Adam": step(lambda p: torch.optim.Adam(p, lr=0.1)),
    "Adam fused": step(lambda p: torch.optim.Adam(p, lr=0.1, fused=True)),
    "AdamW foreach": step(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "AdamW fused": step(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "SGD": step(lambda p: torch.optim.SGD(p, lr=0.1)),
    "SGD fused": step(lambda p: torch.optim.SGD(p, lr=0.1, fused=True)),
    "RMSprop": step(lambda p: torch.optim.RMSprop(p, lr=0.1)),
    "copy_": copy_under_no_grad,
    "copy_ in inference mode": copy_in_inference_mode,
    "foreach": foreach,
    "data =": assign_data,
    "parameter replaced": replace_parameter,
    "parameter replaced, same storage": replace_parameter_on_the_same_storage,
    "load_state_dict": load,
    "load_state_dict assign": load_assigning,
    "vector_to_parameters": to_vector_and_back,
    "weights_init, refresh": initialise_and_refresh,
    "behind its back": behind_its_back,
    "through another parameter": through_another_parameter,
    "through a flat parameter": through_a_flat_parameter,
    "to float64": other_dtype,
}


class Gpu:
    """A GPU as :mod:`weights` sees one: a current stream, and whether it is being captured."""

    stream, capturing = 0, False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(weights, "_is_cuda", lambda weight: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        current = type("Stream", (), {"cuda_stream": property(lambda _: self.stream)})()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)


@pytest.fixture(params=["CPU", "GPU"])
def _where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "GPU":
        Gpu(monkeypatch)
    with weights.eager():
        yield


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("refrozen", [False, True])
def test_made_anew_after_a_change(still: Still, name: str, refrozen: bool) -> None:
    """Whether a forward freezes again before the next use, or a captured or compiled one does not."""
    room = torch.randn(150)  # the weight lies inside of something larger
    still.conv.weight.data = room[17 : 17 + 96].view(3, 2, 4, 4)
    still.freeze()
    for _ in range(3):
        before = still.derived()
        CHANGES[name](still)
        if refrozen:
            still.freeze()
        after = still.derived()
        assert torch.equal(after, -still.conv.weight)
        assert before.dtype != after.dtype or not torch.equal(before, after) or name == "to float64"
        still.check()


@pytest.mark.parametrize("name", [n for n in CHANGES if "fused" in n])
def test_fused_optimizers_are_why_there_is_a_hook(still: Still, name: str) -> None:
    """They change values behind the version's back, or may: the hook alone must do."""
    derived = still.derived()
    identity = weights._entries[still.conv.weight.data_ptr()].identity
    CHANGES[name](still)
    assert weights._identity(still.conv.weight) == identity
    assert not weights._entries
    assert not torch.equal(derived, -still.conv.weight)
    still.check()


def test_on_a_gpu_only_calls_from_python_keep_anything(still: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiled program calls may lie in the memory of a CUDA graph: it is made there, each time."""
    gpu = Gpu(monkeypatch)
    assert still.derived() is not still.derived()
    with weights.eager():
        kept = still.derived()
        assert still.derived() is kept
        with weights.eager():
            assert still.derived() is kept
        gpu.capturing = True
        assert still.derived() is not kept, "a graph would hold the address of what may be freed"
        with weights.keeping() as held:
            assert still.derived() is kept
        assert held[0] is kept
        gpu.capturing = False
        gpu.stream = 7
        other = still.derived()
        assert other is not kept
        assert still.derived() is other
        gpu.stream = 0
        assert still.derived() is kept
    assert still.derived() is not kept
    assert all(torch.equal(still.derived(), t) for t in (kept, other))


def test_an_optimizer_of_other_parameters_forgets_nothing(still: Still) -> None:
    first = still.derived()
    step(lambda p: torch.optim.SGD(p, lr=0.1))(Still())
    assert still.derived() is first


def test_on_a_gpu_data_copy_needs_a_refresh(still: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented hole, where nothing samples the values: no version, no hook."""
    weights.thaw(still)
    Gpu(monkeypatch)
    still.freeze()
    with weights.eager():
        stale = still.derived()
        still.conv.weight.data.copy_(torch.randn(3, 2, 4, 4))
        assert still.derived() is stale
        weights.thaw(still)
        assert torch.equal(still.derived(), -still.conv.weight)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("scattered", [False, True], ids=["together", "scattered"])
def test_edits_of_a_share_are_missed_as_seldom_as_stated(share: float, scattered: bool) -> None:
    """Behind the version's back, by (1 - f)^32 where the edited elements lie together, ^512 where not."""
    module = Still()
    module.conv = nn.Conv2d(64, 64, 4, bias=False)
    count = module.conv.weight.numel()
    trials, missed = 300, 0
    for _ in range(trials):
        stale = module.freeze().derived()
        edited = torch.zeros(count, dtype=torch.bool)
        if scattered:
            edited[torch.randperm(count)[: int(share * count)]] = True
        else:
            start = int(torch.randint(count - int(share * count) + 1, ()))
            edited[start : start + int(share * count)] = True
        module.conv.weight.data.view(-1)[edited] += 1
        missed += module.derived() is stale
        weights.thaw(module)
    expected = (1 - share) ** (512 if scattered else 32)
    # Five standard deviations, and a few for lines that an edit touches in part.
    assert missed <= trials * expected + 5 * (trials * expected * (1 - expected)) ** 0.5 + 1
    if not scattered and share == 0.02:
        assert missed > 50, "fewer than stated: the statement is out of date"


def test_swap_tensors(still: Still) -> None:
    """It refuses tensors that somebody holds weak references to."""
    still.derived()
    torch.utils.swap_tensors(still.conv.weight, nn.Parameter(torch.randn(3, 2, 4, 4)))
    still.check()


def test_a_weight_with_gaps_is_not_kept_on_a_cpu() -> None:
    """Its memory is not all its own to be compared with a copy."""
    module = Still()
    module.conv.weight.data = torch.randn(3, 2, 4, 8)[..., ::2]
    assert module.freeze().derived() is not module.derived()
    module.conv.weight.data = torch.randn(2, 3, 4, 4).transpose(0, 1)  # dense, in another order
    assert module.freeze().derived() is module.derived()
    module.check()


def test_an_edit_between_two_uses_of_what_was_derived_twice(still: Still) -> None:
    packed = weights.transformed(still.derived(), "packed", lambda w: w + 1)
    copy_under_no_grad(still)
    anew = weights.transformed(still.derived(), "packed", lambda w: w + 1)
    assert not torch.equal(packed, anew)
    assert torch.equal(anew, 1 - still.conv.weight)
    assert len(weights._entries) == 3


# --- what is never cached ----------------------------------------------------------------------------------


def test_inference_tensors_are_not_cached() -> None:
    with torch.inference_mode():
        module = Still().freeze()
        assert module.derived() is not module.derived()
        module.conv.weight.copy_(torch.randn(3, 2, 4, 4))
        assert torch.equal(module.derived(), -module.conv.weight)
    assert not weights._entries


def test_fake_and_meta_weights_are_not_cached() -> None:
    with FakeTensorMode():
        fake = Still().freeze()
        assert fake.derived().shape == (3, 2, 4, 4)
    meta = Still().to("meta").freeze()
    assert meta.derived() is not meta.derived()
    assert not weights._entries


def test_a_transforms_parameters_are_not_cached(still: Still) -> None:
    def loss(weight: Tensor) -> Tensor:
        weights.freeze(still, [weight])
        return weights.transformed(weight, "negated", torch.neg).sum()

    gradient = torch.func.grad(loss)(still.conv.weight.detach())
    assert torch.equal(gradient, -torch.ones(3, 2, 4, 4))


def test_a_view_of_another_shape_at_the_same_address(still: Still) -> None:
    first = still.derived()
    view = weights.transformed(still.conv.weight.detach()[:1], "negated", torch.neg)
    assert view.shape[0] == 1
    assert still.derived() is first


# --- lifetime ----------------------------------------------------------------------------------------------


def test_freed_with_its_owner() -> None:
    module = Still().freeze()
    derived = weakref.ref(module.derived())
    storage = weakref.ref(module.conv.weight)
    assert len(weights._entries) == 2
    del module
    gc.collect()
    assert not weights._entries
    assert derived() is None
    assert storage() is None


def test_bounded_after_many_assignments(still: Still) -> None:
    for _ in range(20):
        assign_data(still)
        still.check()
        assert len(weights._entries) <= 2
        replace_parameter(still)
        still.check()
        assert len(weights._entries) <= 2


def test_bounded_after_many_versions(still: Still) -> None:
    for _ in range(20):
        copy_under_no_grad(still)
        still.check()
    assert len(weights._entries) == 2


def test_two_owners_of_the_same_weight(still: Still) -> None:
    other = Still()
    other.conv = still.conv
    other.freeze()
    shared = still.derived()
    assert other.derived() is shared
    copy_under_no_grad(other)
    still.check()
    weights.thaw(other)
    still.check()
    del other
    gc.collect()
    still.check()


def test_a_copied_owner_has_its_own(still: Still) -> None:
    still.derived()
    clone = copy.deepcopy(still).freeze()
    copy_under_no_grad(clone)
    assert torch.equal(clone.derived(), -clone.conv.weight)
    assert torch.equal(still.derived(), -still.conv.weight)
    assert not torch.equal(clone.derived(), still.derived())


def test_kept_tensors_are_listed_for_a_graphs_owner(still: Still) -> None:
    epoch = weights.epoch()
    with weights.keeping() as kept:
        derived = still.derived()
        still.derived()
    assert all(t is derived for t in kept)
    assert len(kept) == 2
    assert weights.epoch() == epoch
    still.derived()
    assert len(kept) == 2
    CHANGES["Adam fused"](still)
    assert weights.epoch() > epoch


def test_many_threads(still: Still) -> None:
    """Readers while the weight changes: each sees the values of before or after, never a mixture."""
    values = [torch.full((3, 2, 4, 4), float(i)) for i in range(50)]
    wrong: list[Tensor] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            derived = weights.transformed(still.conv.weight, "whole", lambda w: w.clone())
            if derived.min() != derived.max() and not done.is_set():
                wrong.append(derived)

    with torch.no_grad():
        still.conv.weight.zero_()
    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for value in values:  # not .data, which PyTorch itself does not let threads share
        still.conv.weight = torch.nn.Parameter(value)
        still.freeze()
    done.set()
    for thread in readers:
        thread.join()
    assert not wrong
    assert torch.equal(still.derived(), -values[-1])
