"""``python -m bench train``: who is timed and who is refused, what a step costs, and where its time goes."""

import copy
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench import answers, phases, plot, results, table, train, train_worker
from bench.__main__ import main
from bench.answers import Materials, moved
from bench.ceiling import Ceiling
from bench.phases import Part, Profile
from bench.providers import PROVIDERS
from bench.race import Outcome
from bench.results import Report
from bench.stats import Spread
from bench.train_case import FLOOR, Batch, Training
from bench.ways import WAYS, adams, seeds_loop
from bench.worker import Prepared
from dcgan.models import Discriminator, Generator
from dcgan.training import TrainStep

SIZES = {"features": 4, "image_size": 32, "latent_dim": 8}
TINY = Training("train", 4, "float32", "cpu", 1, SIZES)
CEILING = Ceiling(flops=200e9, bandwidth=20e9, measure="float32 FMA peak")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "case.pt"
    Materials.of(TINY).save(path)
    return path


@pytest.fixture
def rogues(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)


def checked(name: str, materials: Path) -> Prepared:
    """What a worker finds, here; memory is not looked at."""
    worker = train_worker.TrainWorker()
    worker._reset_peak = lambda: None  # type: ignore[method-assign]
    return worker.prepare(TINY, name, str(materials))


# --- the check ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["eager", "channels_last", "cudnn-graph", "fast", "train-step", "rogue:seeds"]
)
@pytest.mark.usefixtures("rogues")
def test_a_right_way(materials: Path, name: str) -> None:
    found = checked(name, materials)
    assert 0 < found.error < FLOOR
    assert found.wrong == ""
    steps = ("cudnn-graph", "train-step")  # both take the loss from its operator
    assert bool(found.note) == (name in ("fast", *steps))


def test_the_strongest_rival_is_our_step_around_cudnn() -> None:
    """On a GPU one CUDA graph of the reference networks, channels_last; on a CPU the same, eagerly."""
    loop = WAYS["cudnn-graph"].build(*TINY.networks(), TINY)
    assert isinstance(loop.step, TrainStep)
    assert loop.step.why_not_captured == "the networks are on cpu"
    for network, kind in ((loop.step.generator, Generator), (loop.step.discriminator, Discriminator)):
        assert type(network) is kind
        assert network.get_submodule("main")[2 if kind is Discriminator else 3].weight.is_contiguous(
            memory_format=torch.channels_last
        )
    assert all(group["fused"] for adam in loop.adams for group in adam.param_groups)
    way, provider = WAYS["cudnn-graph"], PROVIDERS["cudnn-graph"]
    assert way.searches
    assert provider.searches
    assert provider.replays
    assert not way.ours
    assert way.unavailable(TINY) == provider.unavailable(TINY) != ""


@pytest.mark.parametrize("name", ["half_a_gradient", "remembers", "forgets_its_optimizers"])
@pytest.mark.usefixtures("rogues")
def test_wrong_gradients(materials: Path, name: str) -> None:
    assert checked(f"rogue:{name}", materials).error > 0.1


@pytest.mark.usefixtures("rogues")
def test_a_wrong_loss_is_named(materials: Path) -> None:
    found = checked("rogue:other_labels", materials)
    assert found.error < FLOOR
    assert found.wrong.startswith("loss_d 1.")
    assert ", not 1." in found.wrong


@pytest.mark.usefixtures("rogues")
def test_parameters_that_stand_still(materials: Path) -> None:
    found = checked("rogue:never_moves", materials)
    assert found.error < FLOOR
    assert found.wrong == "the parameters moved other than Adam's state says: error 1.0e+00 > 1e-03"


def test_the_answers_are_autograds() -> None:
    """D's gradient is that of its own phase, and no step has moved anything."""
    generator, discriminator = (network.double() for network in TINY.networks())
    real, noise = (t.double() for t in TINY.batches()[1])
    loop = seeds_loop(generator, discriminator, adams(generator, discriminator))
    before = copy.deepcopy(dict(discriminator.named_parameters()))
    _, answer = answers.answers(loop, [Batch(*(t.double() for t in b)) for b in TINY.batches()])
    assert all(torch.equal(p, before[n]) for n, p in discriminator.named_parameters())
    assert loop.adams[0].param_groups[0]["lr"] == answers.LR

    loss = torch.nn.BCELoss()
    on_real, fake = discriminator(real), generator(noise)
    on_fake = discriminator(fake)
    loss_d = loss(on_real, torch.full_like(on_real, 0.9)) + loss(on_fake, torch.zeros_like(on_fake))
    loss_g = loss(on_fake, torch.full_like(on_fake, 0.9))
    for network, of, found in zip(
        (generator, discriminator), (loss_g, loss_d), answer.gradients, strict=True
    ):
        gradients = torch.autograd.grad(of, list(network.parameters()), retain_graph=True)
        expected = answers.flat(gradients)
        assert (found - expected).norm() < 1e-12 * expected.norm()
    assert answer.figures == pytest.approx(
        [loss_d.item(), loss_g.item(), *map(float, (on_real.detach().mean(), on_fake.detach().mean()))]
    )


def test_the_materials_survive_their_file(materials: Path) -> None:
    loaded = Materials.load(materials)
    assert loaded.tolerance >= FLOOR
    assert [len(answer.gradients) for answer in loaded.answers] == [2, 2]
    assert all(g.dtype == torch.float64 for answer in loaded.answers for g in answer.gradients)
    for first, second in zip(*(answer.gradients for answer in loaded.answers), strict=True):
        assert (first - second).norm() > 0.1 * first.norm(), "a way that remembers is to be caught"


def test_sixteen_bits_are_held_against_eagers_own() -> None:
    case = Training("train", 4, "bfloat16", "cpu", 1, SIZES)
    found = Materials.of(case)
    assert 1e-2 < found.tolerance < 1
    networks = case.networks()
    error, figure, _ = answers.answers(WAYS["fast"].build(*networks, case), case.batches())[0].errors(
        found.answers[0]
    )
    assert 1e-3 < error < found.tolerance
    assert figure < found.figure_tolerance
    assert all(p.dtype == torch.float32 for network in networks for p in network.parameters())


def test_no_step_of_an_optimizer_at_all() -> None:
    generator, discriminator = TINY.networks()
    loop = seeds_loop(generator, discriminator, adams(generator, discriminator))

    def step(real: Tensor, noise: Tensor) -> object:
        return None

    assert moved(type(loop)(step, loop.adams), TINY.batches()[0]) == float("inf")  # type: ignore[arg-type]


# --- figures ------------------------------------------------------------------------------------------------


def test_what_a_step_costs() -> None:
    """12 forwards' worth of products less those of the gradients that go nowhere."""
    work = Training("train", 64, "float32", "cpu", 2).work()
    first_g, middle, first_d, last_d = 100 * 512 * 16, 3 * 512 * 256 * 256, 16 * 64 * 1024, 512 * 16
    g, d = first_g + middle + first_d, first_d + middle + last_d
    assert work.flops == 2 * (3 * g - first_g + 9 * d - 2 * first_d)
    assert round(work.flops / 1e9, 2) == 2.44


def outcome(name: str, seconds: float, peak: int) -> Outcome:
    return Outcome(WAYS[name], "ok", "", 6e-4, 2e-3, {"warm": Spread(seconds, seconds, seconds, 9)}, peak)


def printed(thing: object) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=table.PIPED_WIDTH).print(thing)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_table() -> None:
    case = Training("train", 64, "float32", "cpu", 2)
    absent = Outcome(WAYS["reduce-overhead"], "skipped", "no GPU here")
    ways = [outcome("eager", 1.28, 1000_000_000), outcome("channels_last", 1.0, 900_000_000)]
    report = Report(case, case.work(), CEILING, [*ways, absent, outcome("train-step", 0.4, 600_000_000)])
    rows = [line.split() for line in printed(train.race_table(report)) if line.strip()]
    assert rows[0][:4] == ["train", "·", "batch", "64"]
    assert rows[3] == ["train-step", "160", "0%", "9", "390", "2.50×", "195%", "600", "60%", "6.0e-04"]
    assert rows[5] == ["eager", "50.0", "0%", "9", "122", "0.78×", "61%", "1,000", "100%", "6.0e-04"]
    assert rows[6][0] == "reduce-overhead"
    assert rows[6][-3:] == ["no", "GPU", "here"]
    assert train.ceiling_lines(report)[-1].endswith("2e-03 is allowed")
    without = Report(case, case.work(), CEILING, [outcome("fast", 1, 1)])
    assert train.memory_share(without, without.outcomes[0]) is None


def test_the_parts_of_a_step() -> None:
    parts = [
        Part("G fprop", "2→1 @4→8", "native", 1, 0.1, 10**10),
        Part("D wgrad", "1→2 @8→4", "native", 3, 0.2, 10**10),
    ]
    profile = Profile(parts, optimizers=0.05, step=0.5)
    assert profile.other == pytest.approx(0.15)
    lines = [line.split() for line in printed(train.profile_table(TINY, "fast", profile, CEILING)) if line]
    assert ["D", "wgrad", "1→2", "@8→4", "native", "3", "200", "40%", "10.0", "50.0", "25%"] in lines
    assert ["everything", "else", "150", "30%"] in lines
    assert ["a", "step", "500", "100%", "20.0", "40.0", "20%"] in lines
    rows = train.profile_rows(TINY, "fast", profile, CEILING, None)
    assert sum(row["share"] for row in rows) == pytest.approx(1)


@pytest.mark.parametrize("name", ["fast", "train-step"])
def test_every_product_is_seen(name: str) -> None:
    """As many as a step has, with the arithmetic that is counted from the layers."""
    generator, discriminator = TINY.networks()
    loop = WAYS[name].build(generator, discriminator, TINY)
    profile = phases.measure(loop, TINY.batches(), rounds=1, device="cpu")
    calls = {phase: sum(p.calls for p in profile.parts if p.phase == phase) for phase in phases.PHASES}
    passes = 3 if name == "fast" else 2  # of D's in which its weights have a gradient
    layers = 4
    assert calls == {
        "G fprop": layers,
        "D fprop": 3 * layers,
        "D dgrad": 3 * layers - 2,
        "D wgrad": passes * layers,
        "G dgrad": layers - 1,
        "G wgrad": layers,
    }
    assert all(part.seconds > 0 and part.engine for part in profile.parts)
    assert 0 < profile.optimizers < profile.step
    if name == "fast":
        assert sum(part.flops for part in profile.parts) == TINY.batch * TINY.work().flops


def test_a_step_without_our_operators_has_no_parts() -> None:
    generator, discriminator = TINY.networks()
    with pytest.raises(ValueError, match="no call of a fused operator"):
        phases.record(WAYS["eager"].build(generator, discriminator, TINY), TINY.batches()[0])


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rogues")
def test_end_to_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.jsonl"
    monkeypatch.setattr(train, "measure_ceiling", lambda case: CEILING)
    monkeypatch.setenv("DCGAN_ENGINE", "native")  # of itself it would leave so small a network to PyTorch
    sizes = ["--features", "4", "--image-size", "32", "--latent-dim", "8", "--batch", "4", "--threads", "1"]
    ways = ["--providers", "fast", "reduce-overhead", "rogue:half_a_gradient"]
    options = [*sizes, *ways, "--device", "cpu", "--seconds", "0.01", "--rounds", "2", "--json", str(file)]
    assert main(["train", *options]) == 1
    out = capsys.readouterr().out
    assert "WRONG: error" in out
    assert (
        out.index("fast · train · latent_dim 8 · features 4")
        < out.index("G fprop")
        < out.index("everything else")
    )
    rows = results.read(file)
    raced = {row["provider"]: row for row in rows if "status" in row}
    assert {name: row["status"] for name, row in raced.items()} == {
        "fast": "ok",
        "reduce-overhead": "skipped",
        "rogue:half_a_gradient": "wrong",
    }
    assert {row["kind"] for row in rows} == {"train"}
    assert raced["fast"]["times"]["warm"]["count"] >= 2
    assert 0 < raced["fast"]["peak_bytes"] < 1 << 30
    assert {row["phase"] for row in rows if "phase" in row} == {*phases.PHASES, "optimizers", "other"}

    pytest.importorskip("matplotlib")
    (batches,) = plot.arrange(rows).values()
    assert list(batches[4]) == ["fast"]
    assert main(["plot", str(file), "--out", str(tmp_path / "train.png")]) == 0
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_the_profile_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that can be taken apart, without a race; a failure is said."""
    asked: list[str] = []

    def fail(case: Training, name: str, rounds: int) -> Profile:
        asked.append(name)
        raise train.WorkerFailed("no memory")

    monkeypatch.setattr(train, "measure_ceiling", lambda case: CEILING)
    monkeypatch.setattr(train, "measure_profile", fail)
    assert main(["train", "--profile", "--features", "4", "--batch", "2", "--device", "cpu"]) == 1
    assert asked == ["fast", "train-step"]
    assert "fast: where the time goes: FAILED: no memory" in capsys.readouterr().out


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--providers", "fastest"])
    assert "there are eager, channels_last, compile" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--device", "cpu", "--dtype", "tf32"])
    assert "tf32 is a setting of CUDA devices" in capsys.readouterr().err
