"""Networks split into blocks, and blocks run by a chosen algorithm."""

import itertools

import pytest
import torch

from bench.blocks import Chain, blocks, require_engine
from bench.cases import Case, float64, relative_error
from bench.options import UsageError
from dcgan import fast
from dcgan.kernels.cpu import algorithm_selection, library
from tests.support.native import NEEDED

SIZES = {"features": 6, "image_size": 32}
CASES = [
    Case(command, 3, "float32", "cpu", 1, SIZES | {"channels": channels})
    for command, channels in itertools.product(("generate", "discriminate"), (1, 3))
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command}-{case.sizes['channels']}")
def test_the_blocks_compose_the_network(case: Case) -> None:
    network = case.network()
    found = blocks(network)
    x = case.inputs()[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        y = x
        for block in found:
            assert y.shape[1:] == block.input_shape
            y = block.modules(y)
        assert torch.equal(y.flatten(), network(x).flatten())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_names_and_flops() -> None:
    found = blocks(Case("generate", 1, "float32", "cpu", 1).network())
    assert [block.name for block in found] == [
        "100→512 @1→4",
        "512→256 @4→8",
        "256→128 @8→16",
        "128→64 @16→32",
        "64→1 @32→64",
    ]
    assert found[2].flops == 2 * found[2].geometry.macs == 2 * 256 * 128 * 16 * 64
    assert [block.stage.act for block in found] == [*4 * ["relu"], "tanh"]
    assert [block.stage.mean is None for block in found] == [*4 * [False], True]


def test_blocks_of_a_network_in_training_update_no_statistics() -> None:
    network = Case("generate", 1, "float32", "cpu", 1, SIZES).network().train()
    tracked = [m for name, m in network.named_buffers() if name.endswith("num_batches_tracked")]
    before = [int(count) for count in tracked]
    assert all(block.modules.training for block in blocks(network))
    assert [int(count) for count in tracked] == before


@NEEDED
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command}-{case.sizes['channels']}")
def test_the_chosen_algorithms_match_the_drop_in(case: Case) -> None:
    network = case.network().requires_grad_(False)
    x = case.inputs()[0]
    chain = Chain([block.stage for block in blocks(network)], x.shape, threads=case.threads)
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.no_grad():
            expected = fast.convert(network)(x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(chain(x).view(expected.shape), expected)


@NEEDED
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command}-{case.sizes['channels']}")
def test_every_algorithm_of_every_block(case: Case) -> None:
    x = case.inputs()[0]
    with torch.no_grad():
        for block in blocks(case.network()):
            expected = float64(block.modules, x)
            results = {
                algorithm: Chain([block.stage], x.shape, [algorithm])(x)
                for algorithm in algorithm_selection.candidates(block.geometry)
            }
            assert results
            assert all(relative_error(y, expected) < 5e-6 for y in results.values())
            for (a, y), (b, z) in itertools.combinations(results.items(), 2):
                assert not torch.equal(y, z), f"{a} and {b} are the same algorithm"
            x = block.modules(x.clone())


@NEEDED
def test_sizes_are_available_without_running() -> None:
    stages = [block.stage for block in blocks(Case("generate", 1, "float32", "cpu", 1).skeleton().eval())]
    chain = Chain(stages, (64, 100, 1, 1), ["dense", "f4", "f2", "direct", "narrow"])
    assert chain.algorithms == ("dense", "f4", "f2", "direct", "narrow")
    weights = [100 * 512 * 16, 512 * 256 * 100, 256 * 128 * 36, 128 * 64 * 16, 64 * 16]
    assert chain.packed_bytes >= 4 * sum(weights)
    assert chain.packed_bytes == pytest.approx(4 * sum(weights), rel=0.05), "apart from padding to panels"
    assert chain.workspace > 0


def test_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "problem", lambda: "csrc was not built: no compiler")
    with pytest.raises(UsageError, match="no compiler"):
        require_engine()
