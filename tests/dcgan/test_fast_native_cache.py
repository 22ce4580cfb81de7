"""Packed weights follow every change of a network in eval, do not grow with calls, and go with it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import native
import pytest
import torch
from native import NETWORK, eager64, engines
from networks import drop_in, norms, randomise, reference, results, sample
from tolerance import relative
from torch import Tensor, nn

from dcgan import fast, models
from dcgan.kernels import chain, weights

pytestmark = [native.NEEDED, pytest.mark.usefixtures("one_thread")]
NETWORKS = pytest.mark.parametrize("kind", ["G", "D"])


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_entries", {})
    monkeypatch.setattr(fast, "_chains", weakref.WeakKeyDictionary())


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def network(kind: str) -> Any:
    return drop_in(reference(kind, dtype=torch.float32)).eval()


def assert_right(model: Any, x: Tensor) -> Tensor:
    """The next result is the eager network's in float64, and so is the one after, which keeps what it can."""
    exact = eager64(model, x)
    for _ in range(2):
        y = model(x)
        assert relative(y, exact) <= NETWORK
    return y


# --- every way a network changes ---------------------------------------------------------------------------


def step(
    make: Callable[[Any], torch.optim.Optimizer], which: type[nn.Module] = nn.Module
) -> Callable[[Any], None]:
    """A step on the parameters of the modules of that kind."""

    def change(model: Any) -> None:
        chosen = [p for m in model.main if isinstance(m, which) for p in m.parameters()]
        for p in chosen:
            p.grad = torch.randn_like(p)
        make(chosen).step()

    return change


@torch.enable_grad()
def training_step(model: Any) -> None:
    results(model.train(), sample(model))
    torch.optim.Adam(model.parameters(), lr=0.05, fused=True).step()
    model.eval()


@torch.enable_grad()
def step_in_eval(model: Any) -> None:
    """Never in training: the norms stand still, the weights do not."""
    results(model, sample(model))
    torch.optim.SGD(model.parameters(), lr=1e-3, fused=True).step()


def load(model: Any) -> None:
    other = copy.deepcopy(model)
    randomise(other)
    model.load_state_dict(other.state_dict())


def load_one_layer(model: Any) -> None:
    model.main[0].load_state_dict({"weight": torch.randn_like(model.main[0].weight) / 10})


def load_assigning(model: Any) -> None:
    other = copy.deepcopy(model)
    randomise(other)
    model.load_state_dict(other.state_dict(), assign=True)


def each(edit: Callable[[nn.Parameter], Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for p in model.parameters():
            edit(p)

    return change


def initialise(model: Any) -> None:
    """weights_init edits ``.data``, which changes no version."""
    model.apply(models.weights_init)
    with torch.no_grad():
        for m in model.main:
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
                m.weight.data.mul_(5)


def replace_parameter(model: Any) -> None:
    for m in model.main:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            m.weight = nn.Parameter(torch.randn_like(m.weight) / 10)


def replace_layer(model: Any) -> None:
    old = model.main[0]
    model.main[0] = type(old)(old.in_channels, old.out_channels, 4, old.stride, old.padding, bias=False)


def there_and_back(model: Any) -> None:
    model.to(torch.float64)
    model.main[0].weight.data.neg_()
    model.to(torch.float32)


def to_16_bit_and_back(model: Any) -> None:
    """The weights are rounded by it; a forward between keeps packings of its own."""
    model.to(torch.bfloat16)
    x = sample(model)
    assert relative(model(x), eager64(model, x)) < 2**-8 + NETWORK
    model.to(torch.float32)


def data_edited(model: Any) -> None:
    model.main[0].weight.data.neg_()


def moving_average(model: Any) -> None:
    """As every training loop writes it: parameters' data in place, all of them."""
    other = copy.deepcopy(model)
    randomise(other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data.mul_(0.999).add_(q.data, alpha=0.001)


def numpy_view(model: Any) -> None:
    model.main[3 if isinstance(model, models.Generator) else 2].weight.detach().numpy()[:] *= -1.5


def plain_attribute(model: Any) -> None:
    """The adapted weight of meta-learning: a tensor in the place of a parameter, exchanged each time."""
    for m in model.main:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            weight = m.weight.detach() * -1.1
            m._parameters.pop("weight", None)
            m.weight = weight


def swapped(model: Any) -> None:
    conv = model.main[0]
    torch.utils.swap_tensors(conv.weight, nn.Parameter(torch.randn_like(conv.weight) / 10))


def edited_between_modes(model: Any) -> None:
    model.train()
    for p in model.parameters():
        p.data.mul_(-1.25)
    model.eval()


def other_layout(model: Any) -> None:
    """The same shape at another address, in other strides, and with other values."""
    for m in model.main:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            m.weight.data = (-m.weight).contiguous(memory_format=torch.channels_last)


def of_norms(edit: Callable[[nn.BatchNorm2d], Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for _, norm in norms(model):
            edit(norm)

    return change


@torch.enable_grad()
def running_statistics(model: Any) -> None:
    model.train()
    model(sample(model))
    model.eval()


def one_norm_in_training_a_while(model: Any) -> None:
    _, norm = norms(model)[0]
    norm.train()
    model(sample(model))
    norm.eval()


def smaller_first_map(model: Any) -> None:
    """The Generator's first layer gives 2×2 and not 4×4, the Discriminator's last too: still native."""
    conv = model.main[0] if isinstance(model, models.Generator) else model.main[-2]
    other = conv.stride == (1, 1)
    conv.stride, conv.padding = ((2, 2), (1, 1)) if other else ((1, 1), (0, 0))


def other_slope(model: Any) -> None:
    for m in model.main:
        if isinstance(m, nn.LeakyReLU):
            m.negative_slope = 0.9 - m.negative_slope


def other_activation(model: Any) -> None:
    for i, m in enumerate(model.main):
        if isinstance(m, nn.ReLU | nn.LeakyReLU | nn.Sigmoid) and i > 0:
            model.main[i] = nn.LeakyReLU(0.4) if isinstance(m, nn.ReLU | nn.Sigmoid) else nn.ReLU()
            break


def doubled(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return 2 * y


def hooked(model: Any) -> None:
    model.main[0].register_forward_hook(doubled)


def norm_removed(model: Any) -> None:
    i, _ = norms(model)[-1]
    model.main[i] = nn.Identity()


def parametrized(model: Any) -> None:
    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    nn.utils.parametrize.register_parametrization(model.main[0], "weight", Negated())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "Adam": step(lambda p: torch.optim.Adam(p, lr=0.1)),
    "Adam fused": step(lambda p: torch.optim.Adam(p, lr=0.1, fused=True)),
    "AdamW foreach": step(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
    "SGD": step(lambda p: torch.optim.SGD(p, lr=0.1)),
    "SGD fused": step(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, fused=True)),
    "Adam fused, norms alone": step(lambda p: torch.optim.Adam(p, lr=0.1, fused=True), nn.BatchNorm2d),
    "SGD, norms alone": step(lambda p: torch.optim.SGD(p, lr=0.1), nn.BatchNorm2d),
    "a training step": training_step,
    "a step in eval": step_in_eval,
    "load_state_dict": load,
    "load_state_dict of a layer": load_one_layer,
    "load_state_dict assign": load_assigning,
    "copy_": each(lambda p: p.copy_(torch.randn_like(p) / 10)),
    "data =": each(lambda p: setattr(p, "data", torch.randn_like(p) / 10)),
    "weights_init, refresh": initialise,
    "parameter replaced": replace_parameter,
    "layer replaced": replace_layer,
    "to float64, edited, and back": there_and_back,
    "to bfloat16 and back": to_16_bit_and_back,
    "data edited": data_edited,
    "moving average": moving_average,
    "numpy view": numpy_view,
    "plain attribute": plain_attribute,
    "swap_tensors": swapped,
    "data edited in training": edited_between_modes,
    "data = in other strides": other_layout,
    "running statistics in place": of_norms(lambda n: (n.running_mean.add_(0.5), n.running_var.mul_(2))),
    "running statistics' data in place": of_norms(
        lambda n: (n.running_mean.data.add_(0.5), n.running_var.data.mul_(2))
    ),
    "running statistics' data =": of_norms(
        lambda n: (
            setattr(n.running_mean, "data", n.running_mean + 0.5),
            setattr(n.running_var, "data", n.running_var * 2),
        )
    ),
    "running statistics replaced": of_norms(lambda n: setattr(n, "running_var", n.running_var * 3)),
    "running statistics of a forward": running_statistics,
    "one norm in training a while": one_norm_in_training_a_while,
    "reset_running_stats": of_norms(lambda n: (n.running_mean.add_(1), n.reset_running_stats())),
    "gamma and beta in place": of_norms(lambda n: (n.weight.mul_(-2), n.bias.add_(1))),
    "gamma and beta's data in place": of_norms(lambda n: (n.weight.data.mul_(-2), n.bias.data.add_(1))),
    "gamma replaced": of_norms(lambda n: setattr(n, "weight", nn.Parameter(torch.randn_like(n.weight)))),
    "no affine map any more": of_norms(lambda n: (setattr(n, "weight", None), setattr(n, "bias", None))),
    "eps": of_norms(lambda n: setattr(n, "eps", n.eps + 0.5)),
    "stride and padding": smaller_first_map,
    "another activation": other_activation,
    "a hook": hooked,
    "a norm removed": norm_removed,
    "parametrized": parametrized,
}
ONCE = {
    "reset_running_stats",
    "no affine map any more",
    "a norm removed",
    "another activation",
    "to bfloat16 and back",
}


@NETWORKS
@pytest.mark.parametrize("name", CHANGES)
def test_never_stale(kind: str, name: str) -> None:
    """The very next result is the changed network's, for batches of two sizes, each with its own plan."""
    model = network(kind)
    batches = [sample(model, n) for n in (1, 6)]
    assert engines(model, batches[0]) == ["native"] * 4
    for _ in range(1 if name in ONCE else 3):
        previous = [assert_right(model, x) for x in batches]
        CHANGES[name](model)
        for x, before in zip(batches, previous, strict=True):
            y = assert_right(model, x)
            assert y.shape != before.shape or not torch.equal(y, before)


def test_a_slope_changed() -> None:
    model = network("D")
    x = sample(model)
    for _ in range(3):
        before = assert_right(model, x)
        other_slope(model)
        assert not torch.equal(assert_right(model, x), before)


@NETWORKS
def test_an_edit_of_one_weight_makes_all_of_them_anew(kind: str) -> None:
    """Samples may miss a part of what is being edited: no layer is to be of another time than the rest."""
    model = network(kind)
    x = sample(model)
    model(x)
    made = [t for entry in weights._entries.values() for t in entry.derived.values()]
    model.main[0].weight.data.neg_()
    assert_right(model, x)
    anew = [t for entry in weights._entries.values() for t in entry.derived.values()]
    assert len(anew) == len(made) == 4
    assert not any(new is old for new in anew for old in made)


@NETWORKS
@pytest.mark.parametrize("batch", [1, 6])
def test_a_moving_average_step_by_step(kind: str, batch: int) -> None:
    """Of steps that change each weight by a few roundings of float32: every one of them is seen."""
    model = network(kind)
    x = sample(model, batch)
    with torch.no_grad():
        for _ in range(20):
            for p in model.parameters():
                p.data.mul_(1 - 1e-6).add_(torch.randn_like(p) * 1e-8)
            seen = model(x)
            model.refresh()
            assert torch.equal(seen, model(x))


def test_few_elements_edited_behind_the_versions_back_need_refresh() -> None:
    """What samples may miss, as refresh() documents: here one weight of 2 million."""
    model = fast.Generator().eval()
    z = torch.randn(1, 100)
    missed = []
    for i in range(3):
        stale = model(z)
        model.main[3].weight.data[0, i, 0, 0] += 100
        missed.append(torch.equal(model(z), stale))  # with a probability of 1 - 32/131,072
        model.refresh()
        assert not torch.equal(model(z), stale)
    assert any(missed)


def test_written_by_another_process() -> None:
    model = network("G").share_memory()
    z = sample(model)
    before = assert_right(model, z)
    process = torch.multiprocessing.get_context("spawn").Process(
        target=_negate, args=(model.main[0].weight.data,)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not torch.equal(assert_right(model, z), before)


def _negate(weight: Tensor) -> None:
    weight.neg_()


@NETWORKS
@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_hook_fires_and_when_removed_the_network_is_whole_again(kind: str, index: int) -> None:
    model = network(kind)
    x = sample(model)
    before = assert_right(model, x)
    seen: list[Tensor] = []
    handle = model.main[index].register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    y = model(x)
    assert relative(y, before) < 1e-6
    assert len(seen) == 1
    row = next(row for row in fast.explain(model, x) if row.modules == str(index))
    assert (row.engine, row.reason) == ("eager", "the module has hooks")
    handle.remove()
    assert torch.equal(assert_right(model, x), before)
    assert engines(model, x) == ["native"] * 4


@pytest.mark.skipif(len(native.ISAS) < 2, reason="one instruction set here")
@NETWORKS
def test_another_instruction_set(kind: str) -> None:
    """Its packing is another: what was packed for the one before must not be read by it."""
    model = network(kind)
    x = sample(model)
    for isa in (*native.ISAS, *native.ISAS):
        with native.instruction_set(isa):
            assert_right(model, x)


def test_two_drop_ins_around_one_network() -> None:
    model = reference("G", dtype=torch.float32).eval()
    first, second = fast.convert(model), fast.convert(model)
    z = sample(model)
    assert torch.equal(assert_right(first, z), assert_right(second, z))
    CHANGES["copy_"](first)
    assert torch.equal(assert_right(second, z), assert_right(first, z))
    first.main[3].weight.data.neg_()
    first.refresh()  # which is of the weights, whoever has packed them
    assert_right(second, z)
    first.train()
    CHANGES["Adam fused"](first)
    first.eval()
    assert_right(second, z)
    del first
    gc.collect()
    assert_right(second, z)


@NETWORKS
def test_functional_call_with_other_tensors_and_back(kind: str) -> None:
    """Tensors that live for one call only: neither their addresses nor their ids are taken for later ones."""
    model = network(kind)
    x = sample(model)
    before = assert_right(model, x)
    for _ in range(6):
        other = copy.deepcopy(model)
        randomise(other)
        state = {n: t.clone() for n, t in other.state_dict().items()}
        y = torch.func.functional_call(model, state, (x,))
        assert relative(y, eager64(other, x)) <= NETWORK
        del state, y
        assert torch.equal(model(x), before)
        fast.explain(model, x)
        assert torch.equal(model(x), before)


@NETWORKS
def test_a_copy_has_its_own(kind: str) -> None:
    model = network(kind)
    x = sample(model)
    before = assert_right(model, x)
    for clone in (copy.deepcopy(model), copy.copy(model)):
        assert torch.equal(assert_right(clone, x), before)
    clone = copy.deepcopy(model)
    CHANGES["copy_"](clone)
    assert_right(clone, x)
    assert torch.equal(assert_right(model, x), before)


# --- how much is kept, and how long ------------------------------------------------------------------------


class Packings:
    """Every packed weight that was made, as long as it lives."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Tensor]] = []

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.made)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Packings:
    found, pack = Packings(), native.run.pack

    def watched(*args: Any, **options: Any) -> Tensor:
        packed: Tensor = pack(*args, **options)
        found.made.append(weakref.ref(packed))
        return packed

    monkeypatch.setattr(native.run, "pack", watched)
    return found


@NETWORKS
def test_not_with_the_number_of_calls(kind: str, packings: Packings) -> None:
    """Made once, whoever calls."""
    model = network(kind)
    x = sample(model)
    for _ in range(20):
        model(x)
        fast.explain(model, x)
    assert native.packed() == packings.alive() == len(packings.made) == 4


@NETWORKS
def test_not_with_the_sizes_of_batches(kind: str, packings: Packings) -> None:
    """A layer has as many packings at most as it has algorithms; plans are thrown away when they are many."""
    model = network(kind)
    for _ in range(2):
        for batch in range(1, 2 * chain.Chain._MOST + 3):
            assert_right(model, sample(model, batch))
    assert 4 <= native.packed() == packings.alive() == len(packings.made) <= 4 * 3
    kept = fast._chains[model.main][False][1]
    assert kept is not None
    assert len(kept._prepared) <= chain.Chain._MOST


@NETWORKS
@pytest.mark.parametrize(
    "name", ["Adam fused", "copy_", "data =", "load_state_dict assign", "parameter replaced"]
)
def test_not_with_changes(kind: str, name: str, packings: Packings) -> None:
    """What was packed of old weights is freed, even for batches of sizes that do not come again."""
    model = network(kind)
    for batch in range(1, 7):
        model(sample(model, batch))
    for _ in range(3):
        CHANGES[name](model)
        model(sample(model, 3))
        assert native.packed() == packings.alive() == 4


@NETWORKS
def test_going_to_training_lets_go(kind: str, packings: Packings) -> None:
    """All of it: the memory is what training needs."""
    model = network(kind)
    for batch in (1, 5, 9):
        model(sample(model, batch))
    assert packings.alive() >= 4
    model.train()
    assert native.packed() == packings.alive() == 0


@NETWORKS
def test_freed_with_the_network(kind: str, packings: Packings) -> None:
    model = network(kind)
    for batch in (1, 5, 9):
        model(sample(model, batch))
    assert native.packed() >= 4
    assert len(fast._chains) == 1
    gone = weakref.ref(model.main)
    del model
    gc.collect()
    assert gone() is None
    assert packings.alive() == len(fast._chains) == len(weights._entries) == 0


class Watcher:
    """What holds a network and hangs a hook of its own on it, as an extractor of features does."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, 0
        model.main[4].register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.seen += 1


@NETWORKS
def test_freed_where_a_hook_refers_to_the_network(kind: str) -> None:
    """A cycle, which the garbage collector sees only if nothing outside holds a part of it."""
    watcher = Watcher(network(kind))
    watcher.model(sample(watcher.model))
    assert watcher.seen == 1
    gone = weakref.ref(watcher.model)
    del watcher
    gc.collect()
    assert gone() is None
    assert len(fast._chains) == 0


@NETWORKS
def test_freed_where_a_layer_refers_to_the_network(kind: str) -> None:
    model = network(kind)
    model.main[0].parents = [model]
    model(sample(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not weights._entries


def test_many_networks_come_and_go(packings: Packings) -> None:
    for i in range(10):
        model = network("GD"[i % 2])
        assert_right(model, sample(model))
    del model
    gc.collect()
    assert len(packings.made) >= 40
    assert packings.alive() == len(weights._entries) == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bits_what_is_packed_is_kept_too(autocast: bool, packings: Packings) -> None:
    """Of a bfloat16 network, and of a float32 one under autocast, whose cast weights are kept as well."""
    model = network("G") if autocast else network("G").bfloat16()
    z = sample(model)
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(z)
    assert packings.alive() == len(packings.made) == 4


def test_a_call_prepares_nothing_after_the_first() -> None:
    """Plan, pointers and packed weights are of the first call."""
    model = network("G")
    z = sample(model)
    model(z)
    kept = fast._chains[model.main][False][1]
    assert kept is not None
    (first,) = kept._prepared.values()
    model(z)
    assert fast._chains[model.main][False][1] is kept
    assert list(kept._prepared.values()) == [first]
