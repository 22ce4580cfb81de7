"""FLOP counts, quartiles, ceilings, errors, and the weights of a case."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from bench import cases, machine
from bench.cases import Case, Materials, count, float64, load_state, relative_error
from bench.machine import Ceiling
from bench.timing import summarise
from bench.worker import load_tensors
from dcgan.kernels.cpu import library
from dcgan.models import Discriminator, Generator
from tests.support.native import NEEDED


def test_flops_of_the_reference_generator() -> None:
    layers = [100 * 512 * 16, 3 * [512 * 256 * 16 * 16], 64 * 16 * 32 * 32]
    macs = layers[0] + sum(layers[1]) + layers[2]
    work = count(Generator(), (100, 1, 1))
    assert work.flops == 2 * macs
    assert round(work.flops / 1e9, 3) == 0.205
    assert work.weights == sum(p.numel() for p in Generator().parameters() if p.ndim == 4)
    maps = [100, 512 * 4 * 4, 256 * 8 * 8, 128 * 16 * 16, 64 * 32 * 32, 64 * 64]
    assert work.activations == 2 * sum(maps) - maps[0] - maps[-1]


def test_flops_of_the_reference_discriminator() -> None:
    """Its layers match the Generator's except at the end: 512→1 on a 4×4 map instead of 100→512."""
    generator, discriminator = count(Generator(), (100, 1, 1)), count(Discriminator(), (1, 64, 64))
    assert discriminator.flops == generator.flops - 2 * 99 * 512 * 16


def test_counting_leaves_the_network_unchanged() -> None:
    network = Generator(features=2, image_size=32).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    count(network, (100, 1, 1))
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_weight_traffic_is_shared_by_the_batch() -> None:
    work = count(Generator(), (100, 1, 1))
    assert work.bytes_per_image(1, 4) - work.bytes_per_image(2, 4) == 2 * work.weights


def test_quartiles() -> None:
    spread = summarise([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.q1, spread.median, spread.q3, spread.count) == (2.0, 3.0, 4.0, 5)
    assert spread.relative == pytest.approx(1 / 3)
    assert summarise([2.0]).relative == 0
    with pytest.raises(ValueError, match="no times"):
        summarise([])


def test_the_better_of_two_ceilings() -> None:
    quiet, disturbed = Ceiling(2e9, 3e9, "a"), Ceiling(1e9, 4e9, "b")
    assert disturbed.or_better(quiet) == Ceiling(2e9, 4e9, "a")
    assert quiet.or_better(None) is quiet


@NEEDED
def test_cpu_ceiling_is_the_fma_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.02)
    used = library.isa()
    found = machine.measure("cpu", "float32")
    assert found.measure == "float32 FMA peak"
    assert found.flops > 1e9
    assert found.bandwidth > 1e8
    assert library.isa() == used


def test_cpu_ceiling_without_the_engine_is_the_gemm_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "problem", lambda: "csrc was not built")
    monkeypatch.setattr(machine, "_gemm", lambda device, dtype, n: float(n))
    monkeypatch.setattr(machine, "_copy", lambda device, size: 1.0)
    assert machine.measure("cpu", "float32") == Ceiling(2048.0, 1.0, "float32 GEMM peak")


@pytest.mark.parametrize(("rate", "measure"), [(3e9, "bfloat16 GEMM peak"), (1e8, "float32 FMA peak")])
def test_cpu_ceiling_uses_16_bit_gemm_only_if_faster(
    monkeypatch: pytest.MonkeyPatch, rate: float, measure: str
) -> None:
    """Large products are skipped on a CPU without 16-bit arithmetic, where each would take a minute."""
    sizes: list[int] = []

    def gemm(device: str, dtype: torch.dtype, n: int) -> float:
        sizes.append(n)
        return rate

    monkeypatch.setattr(library, "problem", lambda: None)
    monkeypatch.setattr(machine, "fma", lambda threads: 1e9)
    monkeypatch.setattr(machine, "_gemm", gemm)
    monkeypatch.setattr(machine, "_copy", lambda device, size: 1.0)
    assert machine.measure("cpu", "bfloat16").measure == measure
    assert sizes == ([256] if rate < 1e9 else [256, 1024, 2048])


def test_errors_of_nonfinite_or_misshapen_outputs_are_infinite() -> None:
    expected = torch.ones(2, 3, dtype=torch.float64)
    assert relative_error(torch.full((2, 3), 1.5), expected) == 0.5
    assert relative_error(torch.ones(3, 2), expected) == math.inf
    assert relative_error(torch.full((2, 3), math.nan), expected) == math.inf


@pytest.mark.parametrize("command", ["generate", "discriminate"])
def test_a_case_is_discriminating(command: str) -> None:
    """Outputs vary, differ by input and depend on the running statistics; the RNG seed fixes the case."""
    case = Case(command, 8, "float32", "cpu", 1, {"features": 8})
    materials, again = case.materials(), case.materials()
    first, second = materials.expected
    assert first.std() > 0.02
    assert relative_error(second, first) > 0.1
    network = case.network().double()
    assert torch.equal(first, again.expected[0])
    with torch.no_grad():
        batch_statistics = network.train()(materials.inputs[0].double())
    assert relative_error(batch_statistics, first) > 10 * case.tolerance


def test_a_case_uses_the_checkpoint_weights(tmp_path: Path) -> None:
    network = Generator(latent_dim=8, features=2, image_size=32).eval()
    file = tmp_path / "g.pt"
    torch.save(network.state_dict(), file)
    case = Case("generate", 2, "float32", "cpu", 1, network.sizes(), checkpoint=str(file))
    materials = case.materials()
    with torch.no_grad():
        assert relative_error(network(materials.inputs[0]), materials.expected[0]) < 1e-6


def test_tolerance_follows_eager_only_if_eager_exceeds_it() -> None:
    assert cases.allowed(5e-6, 1e-6, 4e-6) == 5e-6
    assert cases.allowed(5e-6, 1e-6, 2e-4) == pytest.approx(2e-3)
    assert Case("generate", 1, "float32", "cpu", 1, {"features": 2}).materials().tolerance == 1e-5


def test_tolerance_in_the_tail_of_the_sigmoid(tmp_path: Path) -> None:
    """In a trained Discriminator, the output's relative error is the logit's absolute error."""
    case = Case("discriminate", 4, "float32", "cpu", 1, {"features": 8, "image_size": 32})
    network = case.network()
    with torch.no_grad():
        last = network.main[-2].weight
        assert isinstance(last, torch.Tensor)
        last.copy_(last.abs())
        last *= -60 / network.main[:-1](case.inputs()[0]).mean()
    file = tmp_path / "d.pt"
    torch.save(network.state_dict(), file)
    materials = dataclasses.replace(case, checkpoint=str(file)).materials()
    with torch.no_grad():
        error = relative_error(network(materials.inputs[0]), materials.expected[0])
    assert case.tolerance < error < materials.tolerance < 0.1


def test_materials_save_and_load(tmp_path: Path) -> None:
    case = Case("generate", 2, "bfloat16", "cpu", 1, {"features": 2, "image_size": 32})
    materials = case.materials()
    torch.save(tuple(materials), tmp_path / "case.pt")
    loaded = Materials(*load_tensors(str(tmp_path / "case.pt")))
    assert loaded.inputs[0].dtype == torch.bfloat16
    assert torch.equal(loaded.expected[1], materials.expected[1])
    assert loaded.state.keys() == materials.state.keys()


def test_materials_of_a_smaller_batch() -> None:
    materials = Case("generate", 5, "float32", "cpu", 1, {"features": 2, "image_size": 32}).materials()
    first = materials.first(2)
    assert [len(x) for x in (*first.inputs, *first.expected)] == [2, 2, 2, 2]
    assert torch.equal(first.expected[1], materials.expected[1][:2])


def test_float64_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("generate", 5, "float32", "cpu", 1, {"features": 2, "image_size": 32})
    network, x = case.network(), case.inputs()[0]
    whole = float64(network, x)
    monkeypatch.setattr(cases, "REFERENCE_BATCH", 2)
    assert relative_error(float64(network, x), whole) < 1e-14
    assert next(network.parameters()).dtype == torch.float32, "the network must stay unchanged"


def test_loading_an_invalid_checkpoint_fails(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"x\.pt is not a loadable checkpoint"):
        load_state(tmp_path / "x.pt")
