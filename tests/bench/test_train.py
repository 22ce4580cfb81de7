"""``python -m bench train``: the check of each variant, the cost of a step, its profile, and the command."""

import copy
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench import compare, output, plot, train, training
from bench.__main__ import main
from bench.machine import Ceiling
from bench.providers import PROVIDERS
from bench.race import Outcome
from bench.timing import Spread
from bench.train import Part, Profile
from bench.training import (
    MIN_TOLERANCE,
    VARIANTS,
    Batch,
    Materials,
    Training,
    TrainWorker,
    reference_loop,
    update_error,
)
from bench.worker import Prepared, load_tensors
from dcgan.models import Discriminator, Generator
from dcgan.training import TrainStep

SIZES = {"features": 4, "image_size": 32, "latent_dim": 8}
TINY = Training("train", 4, "float32", "cpu", 1, SIZES)
CEILING = Ceiling(flops=200e9, bandwidth=20e9, measure="float32 FMA peak")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "case.pt"
    torch.save(tuple(TINY.materials()), path)
    return path


@pytest.fixture
def rogues(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)


def checked(name: str, materials: Path) -> Prepared:
    """Run a worker's check in this process, without measuring memory."""
    worker = TrainWorker()
    worker._reset_peak = lambda: None  # type: ignore[method-assign]
    return worker.prepare(TINY, name, str(materials))


# --- the check ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["eager", "channels_last", "cudnn-graph", "fast", "train-step", "rogue:reference"]
)
@pytest.mark.usefixtures("rogues")
def test_correct_variants_pass(materials: Path, name: str) -> None:
    found = checked(name, materials)
    assert 0 < found.error < MIN_TOLERANCE
    assert found.wrong == ""
    steps = ("cudnn-graph", "train-step")  # both use this project's loss operator
    assert bool(found.note) == (name in ("fast", *steps))


def test_the_strongest_baseline_is_our_step_around_cudnn() -> None:
    """On a GPU: one CUDA graph of the reference networks in channels_last. On a CPU: the same, eagerly."""
    loop = VARIANTS["cudnn-graph"].build(*TINY.networks(), TINY)
    assert isinstance(loop.step, TrainStep)
    assert loop.step.why_not_captured == "the networks are on cpu"
    for network, kind in ((loop.step.generator, Generator), (loop.step.discriminator, Discriminator)):
        assert type(network) is kind
        assert network.get_submodule("main")[2 if kind is Discriminator else 3].weight.is_contiguous(
            memory_format=torch.channels_last
        )
    assert all(group["fused"] for adam in loop.adams for group in adam.param_groups)
    variant, provider = VARIANTS["cudnn-graph"], PROVIDERS["cudnn-graph"]
    assert variant.searches
    assert provider.searches
    assert provider.replays
    assert not variant.ours
    assert variant.unavailable(TINY) == provider.unavailable(TINY) != ""


@pytest.mark.parametrize("name", ["half_a_gradient", "remembers", "forgets_its_optimizers"])
@pytest.mark.usefixtures("rogues")
def test_wrong_gradients_are_detected(materials: Path, name: str) -> None:
    assert checked(f"rogue:{name}", materials).error > 0.1


@pytest.mark.usefixtures("rogues")
def test_a_wrong_loss_is_reported(materials: Path) -> None:
    found = checked("rogue:other_labels", materials)
    assert found.error < MIN_TOLERANCE
    assert found.wrong.startswith("loss_d is 1.")
    assert ", expected 1." in found.wrong


@pytest.mark.usefixtures("rogues")
def test_a_missing_parameter_update_is_detected(materials: Path) -> None:
    found = checked("rogue:never_moves", materials)
    assert found.error < MIN_TOLERANCE
    assert found.wrong == "the parameter update does not match Adam's state: error 1.0e+00 > 1e-03"


def test_step_results_match_autograd() -> None:
    """D's gradient is that of D's phase, and the steps leave the parameters unchanged."""
    generator, discriminator = (network.double() for network in TINY.networks())
    real, noise = (t.double() for t in TINY.batches()[1])
    loop = reference_loop(generator, discriminator)
    before = copy.deepcopy(dict(discriminator.named_parameters()))
    _, result = training.step_results(loop, [Batch(*(t.double() for t in b)) for b in TINY.batches()])
    assert all(torch.equal(p, before[n]) for n, p in discriminator.named_parameters())
    assert loop.adams[0].param_groups[0]["lr"] == training.LR

    loss = torch.nn.BCELoss()
    on_real, fake = discriminator(real), generator(noise)
    on_fake = discriminator(fake)
    loss_d = loss(on_real, torch.full_like(on_real, 0.9)) + loss(on_fake, torch.zeros_like(on_fake))
    loss_g = loss(on_fake, torch.full_like(on_fake, 0.9))
    for network, of, found in zip(
        (generator, discriminator), (loss_g, loss_d), result.gradients, strict=True
    ):
        gradients = torch.autograd.grad(of, list(network.parameters()), retain_graph=True)
        expected = training.flat(gradients)
        assert (found - expected).norm() < 1e-12 * expected.norm()
    assert result.figures == pytest.approx(
        [loss_d.item(), loss_g.item(), *map(float, (on_real.detach().mean(), on_fake.detach().mean()))]
    )


def test_materials_save_and_load(materials: Path) -> None:
    loaded = Materials(*load_tensors(str(materials)))
    assert loaded.tolerance >= MIN_TOLERANCE
    assert [len(result.gradients) for result in loaded.step_results] == [2, 2]
    assert all(g.dtype == torch.float64 for result in loaded.step_results for g in result.gradients)
    for first, second in zip(*(result.gradients for result in loaded.step_results), strict=True):
        assert (first - second).norm() > 0.1 * first.norm(), (
            "a variant that repeats its first result must be detectable"
        )


def test_16_bit_tolerance_follows_eager() -> None:
    case = Training("train", 4, "bfloat16", "cpu", 1, SIZES)
    found = case.materials()
    assert 1e-2 < found.tolerance < 1
    networks = case.networks()
    error, figure, _ = training.step_results(VARIANTS["fast"].build(*networks, case), case.batches())[
        0
    ].errors(found.step_results[0])
    assert 1e-3 < error < found.tolerance
    assert figure < found.figure_tolerance
    assert all(p.dtype == torch.float32 for network in networks for p in network.parameters())


def test_a_step_without_optimizer_steps_is_detected() -> None:
    generator, discriminator = TINY.networks()
    loop = reference_loop(generator, discriminator)

    def step(real: Tensor, noise: Tensor) -> object:
        return None

    assert update_error(type(loop)(step, loop.adams), TINY.batches()[0]) == float("inf")  # type: ignore[arg-type]


# --- figures ------------------------------------------------------------------------------------------------


def test_flops_of_a_step() -> None:
    """The products of 12 forwards, minus those of the gradients that are not needed."""
    work = Training("train", 64, "float32", "cpu", 2).work()
    first_g, middle, first_d, last_d = 100 * 512 * 16, 3 * 512 * 256 * 256, 16 * 64 * 1024, 512 * 16
    g, d = first_g + middle + first_d, first_d + middle + last_d
    assert work.flops == 2 * (3 * g - first_g + 9 * d - 2 * first_d)
    assert round(work.flops / 1e9, 2) == 2.44


def outcome(name: str, seconds: float, peak: int) -> Outcome:
    return Outcome(VARIANTS[name], "ok", "", 6e-4, 2e-3, {"warm": Spread(seconds, seconds, seconds, 9)}, peak)


def printed(renderable: object) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=output.PIPED_WIDTH).print(renderable)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_race_table() -> None:
    case = Training("train", 64, "float32", "cpu", 2)
    absent = Outcome(VARIANTS["reduce-overhead"], "skipped", "no GPU here")
    baselines = [outcome("eager", 1.28, 1000_000_000), outcome("channels_last", 1.0, 900_000_000)]
    ours = outcome("train-step", 0.4, 600_000_000)
    found = output.race_rows(case, case.work(), CEILING, [*baselines, absent, ours])
    rows = [line.split() for line in printed(output.race_table(case.title, found)) if line.strip()]
    assert rows[0][:4] == ["train", "·", "batch", "64"]
    assert rows[3] == ["train-step", "160", "0%", "9", "390", "2.50×", "195%", "600", "60%", "6.0e-04"]
    assert rows[5] == ["eager", "50.0", "0%", "9", "122", "0.78×", "61%", "1,000", "100%", "6.0e-04"]
    assert rows[6][0] == "reduce-overhead"
    assert rows[6][-3:] == ["no", "GPU", "here"]
    assert output.ceiling_lines(found[0])[-1].endswith("2e-03 is allowed")
    without = output.race_rows(case, case.work(), CEILING, [outcome("fast", 1, 1)])
    (row,) = [line.split() for line in printed(output.race_table(case.title, without)) if "fast" in line]
    assert row[-2:] == ["–", "6.0e-04"]


def test_profile_table_and_rows() -> None:
    parts = [
        Part("G fprop", "2→1 @4→8", "native", 1, 0.1, 10**10),
        Part("D wgrad", "1→2 @8→4", "native", 3, 0.2, 10**10),
    ]
    profile = Profile(parts, optimizers=0.05, step=0.5)
    assert profile.other == pytest.approx(0.15)
    lines = [line.split() for line in printed(train.profile_table(TINY, "fast", profile, CEILING)) if line]
    assert ["D", "wgrad", "1→2", "@8→4", "native", "3", "200", "40%", "10.0", "50.0", "25%"] in lines
    assert ["everything", "else", "150", "30%"] in lines
    assert ["total", "500", "100%", "20.0", "40.0", "20%"] in lines
    rows = train.profile_rows(TINY, "fast", profile, CEILING)
    assert sum(row["share"] for row in rows) == pytest.approx(1)


@pytest.mark.parametrize("name", ["fast", "train-step"])
def test_profile_covers_every_product(name: str) -> None:
    """The number of calls and FLOPs match those counted from the layers."""
    generator, discriminator = TINY.networks()
    loop = VARIANTS[name].build(generator, discriminator, TINY)
    profile = train.profile(loop, TINY.batches(), rounds=1, device="cpu")
    calls = {phase: sum(p.calls for p in profile.parts if p.phase == phase) for phase in train.PHASES}
    wgrads = 3 if name == "fast" else 2  # backwards of D that compute wgrad
    layers = 4
    assert calls == {
        "G fprop": layers,
        "D fprop": 3 * layers,
        "D dgrad": 3 * layers - 2,
        "D wgrad": wgrads * layers,
        "G dgrad": layers - 1,
        "G wgrad": layers,
    }
    assert all(part.seconds > 0 and part.engine for part in profile.parts)
    assert 0 < profile.optimizers < profile.step
    if name == "fast":
        assert sum(part.flops for part in profile.parts) == TINY.batch * TINY.work().flops


def test_profiling_a_step_without_our_operators_fails() -> None:
    loop = VARIANTS["eager"].build(*TINY.networks(), TINY)
    with pytest.raises(ValueError, match="no call of a fused operator"):
        train.profile(loop, TINY.batches(), rounds=1, device="cpu")


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rogues")
def test_end_to_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.jsonl"
    monkeypatch.setattr(compare, "measure_ceiling", lambda *_: CEILING)
    monkeypatch.setenv("DCGAN_ENGINE", "native")  # by default, so small a network falls back to PyTorch
    sizes = ["--features", "4", "--image-size", "32", "--latent-dim", "8", "--batch", "4", "--threads", "1"]
    providers = ["--providers", "fast", "reduce-overhead", "rogue:half_a_gradient"]
    options = [
        *sizes,
        *providers,
        "--device",
        "cpu",
        "--seconds",
        "0.01",
        "--rounds",
        "2",
        "--json",
        str(file),
    ]
    assert main(["train", *options]) == 1
    out = capsys.readouterr().out
    assert "WRONG: error" in out
    assert (
        out.index("fast · train · latent_dim 8 · features 4")
        < out.index("G fprop")
        < out.index("everything else")
    )
    rows = output.read(file)
    timed = {row["provider"]: row for row in rows if "status" in row}
    assert {name: row["status"] for name, row in timed.items()} == {
        "fast": "ok",
        "reduce-overhead": "skipped",
        "rogue:half_a_gradient": "wrong",
    }
    assert {row["kind"] for row in rows} == {"train"}
    assert timed["fast"]["times"]["warm"]["count"] >= 2
    assert 0 < timed["fast"]["peak_bytes"] < 1 << 30
    assert {row["phase"] for row in rows if "phase" in row} == {*train.PHASES, "optimizers", "other"}

    pytest.importorskip("matplotlib")
    (batches,) = plot.arrange(rows).values()
    assert list(batches[4]) == ["fast"]
    assert main(["plot", str(file), "--out", str(tmp_path / "train.png")]) == 0
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_profile_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the variants that can be profiled run, without a race; a failure is reported."""
    profiled: list[str] = []

    def fail(case: Training, name: str, rounds: int) -> Profile:
        profiled.append(name)
        raise train.WorkerFailed("no memory")

    monkeypatch.setattr(compare, "measure_ceiling", lambda *_: CEILING)
    monkeypatch.setattr(train, "measure_profile", fail)
    assert main(["train", "--profile", "--features", "4", "--batch", "2", "--device", "cpu"]) == 1
    assert profiled == ["fast", "train-step"]
    assert "fast: profiling: FAILED: no memory" in capsys.readouterr().out


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--providers", "fastest"])
    assert "choose from eager, channels_last, compile" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--device", "cpu", "--dtype", "tf32"])
    assert "tf32 is a setting of CUDA devices" in capsys.readouterr().err
