"""``dcgan eval``."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from dcgan import checkpoint, evaluation, pretrained
from dcgan.checkpoint import Checkpoint, Folder
from dcgan.cli.app import app
from dcgan.models import Discriminator, Generator
from dcgan.networks import Architecture
from dcgan.settings import CONFIG, Settings, write_file
from tests.support.parts import CPU, silent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "generator.pth"
    torch.save(Generator(features=4, image_size=32).state_dict(), path)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, ["eval", *map(str, arguments)], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )


def table(output: str) -> list[str]:
    """Return the lines from the first empty one on, without one that names a file."""
    lines = output.splitlines()
    return [line for line in lines[lines.index("") + 1 :] if not line.startswith("Wrote ")]


@pytest.mark.parametrize("chosen", ["pixels", "digits"])
def test_command(chosen: str, generator: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.json"
    arguments = (generator, "--dataset", "digits", "--num", 100, "--device", "cpu", "--json", out)
    result = invoke(*arguments, "--features", chosen)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["features"] == chosen
    assert (found["generator"], found["moving_average"]) == (str(generator), False)
    assert found["frechet"] in result.output
    assert found["kernel"] in result.output
    assert ("classifier_accuracy" in found) == (chosen == "digits")
    generated, floor = found["scores"]["generated"], found["scores"]["floor"]
    assert generated["images"] == floor["images"] == [100, 100]
    assert generated["frechet"] > 2 * floor["frechet"] >= 0  # an untrained Generator's images are plain grey
    assert f"{generated['frechet']:.4g}" in result.output
    assert "Floor: 100 other real images (the other half)\n" in result.output
    for name in ("precision", "recall", "density", "coverage"):
        row = next(line for line in result.output.splitlines() if line.startswith(f"{name.capitalize()}:"))
        assert row.split()[-2:] == [f"{generated[name]:.3f}", f"{floor[name]:.3f}"]
    assert max(map(len, table(result.output))) <= 80
    before = out.read_text()
    assert invoke(*arguments, "--features", chosen).exit_code == 0
    assert out.read_text() == before
    assert invoke(*arguments, "--features", chosen, "--seed", 1, "--batch-size", 33).exit_code == 0
    assert out.read_text() != before


def test_a_runs_folder_and_its_moving_average(tmp_path: Path, cache: Path) -> None:
    """Use a colour network: grey datasets then have three equal channels, which the classifier supports."""
    sizes = {"features": 4, "channels": 3, "image_size": 32}
    torch.manual_seed(0)
    states = [Generator(**sizes).state_dict() for _ in range(2)]
    architecture = Architecture(channels=3, features_g=4, features_d=4, image_size=32)
    saved = Checkpoint(architecture, states[0], Discriminator(**sizes).state_dict(), ema=states[1])
    Folder(tmp_path / "run" / "checkpoints").save(saved)
    found = []
    for option in ("--ema", "--no-ema"):
        out = tmp_path / f"{option}.json"
        arguments = ("--dataset", "digits", "--num", 20, "--device", "cpu", "--json", out, option)
        result = invoke(tmp_path / "run", *arguments)
        assert result.exit_code == 0, result.output
        found.append(json.loads(out.read_text()))
    assert [one["moving_average"] for one in found] == [True, False]
    generated, floors = ([one["scores"][row]["frechet"] for one in found] for row in ("generated", "floor"))
    assert generated[0] != generated[1]
    assert floors[0] == floors[1]


def test_command_reports_the_number_of_real_images(generator: Path, cache: Path) -> None:
    result = invoke(
        generator, "--dataset", "digits", "--num", 1000, "--features", "pixels", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "Real images: 899 of digits (one half)" in result.output
    fewer = "fewer images make its Fréchet distance higher and its coverage lower"
    assert f"Floor: 898 other real images (the other half); {fewer}\n" in result.output
    rows = [line.split() for line in table(result.output)]
    assert ["Number", "of", "images", "1,000", "898"] in rows


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--num", "9", "integer of at least 10"),
        ("--num", "x", "integer of at least 10"),
        ("--features", "vgg", "'auto', 'inception', 'digits', 'pixels'"),
        ("--seed", "-1", "integer of at least 0"),
        ("--batch-size", "0", "integer of at least 1"),
        ("--device", "tpu", "'auto', 'cpu', 'cuda'"),
        ("--engine", "fast", "'auto', 'reference', 'triton', 'native'"),
        ("--which", "first", "'last', 'best'"),
        ("--dataset", "imagenet", "digits"),
        ("--json", "/dev/null/scores.json", "cannot make the folder"),
    ],
)
def test_usage_errors(option: str, value: str, allowed: str, generator: Path, cache: Path) -> None:
    arguments = {"--dataset": "digits", "--device": "cpu", option: value}
    result = invoke(generator, *(word for pair in arguments.items() for word in pair))
    assert result.exit_code == 2
    for words in (option.removeprefix("--"), Path(value).parent.name or value, allowed):
        assert words in result.output


def test_missing_arguments(generator: Path) -> None:
    for arguments, name in (((generator,), "--dataset"), (("--dataset", "digits"), "FROM")):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert name in result.output


def test_a_file_that_is_not_a_generator(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "discriminator.pth"
    torch.save(Discriminator(features=4, image_size=32).state_dict(), path)
    for source in (path, tmp_path / "none.pth"):
        result = invoke(source, "--dataset", "digits", "--device", "cpu")
        assert result.exit_code == 2
        assert source.name in result.output


def test_json_that_is_a_folder(tmp_path: Path, generator: Path) -> None:
    result = invoke(generator, "--dataset", "digits", "--json", tmp_path)
    assert result.exit_code == 2
    assert "--json" in result.output
    assert "is a directory" in result.output


def test_a_missing_dataset(tmp_path: Path, generator: Path, cache: Path) -> None:
    result = invoke(generator, "--dataset", "folder", "--dataroot", tmp_path / "nowhere", "--device", "cpu")
    assert result.exit_code == 2
    assert "nowhere" in result.output


def test_a_generator_of_nans_exits_with_1(tmp_path: Path, cache: Path) -> None:
    model = Generator(features=4, image_size=32)
    torch.nn.init.constant_(model.main[0].weight, math.nan)
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    arguments = ("--dataset", "digits", "--num", 10, "--features", "pixels", "--device", "cpu")
    result = invoke(tmp_path / "nan.pth", *arguments, "--json", tmp_path / "new" / "scores.json")
    assert result.exit_code == 1
    assert f"{tmp_path / 'nan.pth'}: " in result.output
    assert "NaN" in result.output
    assert not (tmp_path / "new").exists()


def test_an_unsupported_engine_is_a_usage_error(generator: Path, cache: Path) -> None:
    arguments = ("--dataset", "digits", "--num", 10, "--features", "pixels", "--device", "cpu")
    result = invoke(generator, *arguments, "--engine", "triton")
    assert result.exit_code == 2
    assert "--engine: engine 'triton' is forced" in result.output


# --- runs ---------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"image_size": 32, "ngf": 4, "ndf": 4}
FAST = ("--num", 20, "--features", "pixels", "--device", "cpu")


def write_run(folder: Path, settings: Settings) -> None:
    """Write what evaluation reads of a run: its configuration and three checkpoints."""
    architecture = settings.architecture(1)
    checkpoints = Folder(folder / "checkpoints")
    for epoch in range(3):
        torch.manual_seed(epoch)
        generator, discriminator = architecture.generator(), architecture.discriminator()
        with torch.no_grad():  # the images are otherwise about the same grey
            next(generator.parameters()).mul_(3 + epoch)
        states = generator.state_dict(), discriminator.state_dict()
        config = settings.to_dict()
        checkpoints.save(Checkpoint(architecture, *states, epoch=epoch, step=100 * epoch, config=config))
    write_file(settings, folder / CONFIG)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run on 60 images of two classes of digits, with three checkpoints."""
    write_run(tmp_path / "run", Settings(dataset="digits", classes=["3", "8"], limit=60, **SIZES))
    return tmp_path / "run"


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/last.pt"])
def test_a_run_says_which_images_to_compare_with(place: str, run: Path, cache: Path, tmp_path: Path) -> None:
    result = invoke(run / place, *FAST, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert "Real images: 20 of digits (one half, classes ['3', '8'], limit 60)" in result.output
    found = json.loads((tmp_path / "a.json").read_text())
    pair = evaluation.parts(
        "digits", Path("data"), image_size=32, channels=1, classes=["3", "8"], limit=60, say=silent
    )
    chosen = evaluation.choose("pixels", *pair, CPU, silent)
    evaluator = evaluation.Evaluator(chosen, *pair, num=20)
    network = pretrained.generator(run, engine="auto")
    expected = {"generated": evaluator.of(network), "floor": evaluator.floor()}
    assert found["scores"] == json.loads(json.dumps({name: asdict(one) for name, one in expected.items()}))
    # The run's own dataset has the same meaning if it is named; another one is compared with as a whole.
    assert invoke(run / place, *FAST, "--dataset", "digits", "--json", tmp_path / "b.json").exit_code == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    other = invoke(run / place, *FAST[2:], "--num", 2000, "--dataset", "fake")
    assert "Real images: 1,024 of fake (train split)" in other.output


def test_dataroot_is_that_of_the_run_unless_given(
    run: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "others"):
        (tmp_path / name).mkdir()
        for i in range(24 if name == "mine" else 30):
            Image.new("L", (32, 32), 10 * i).save(tmp_path / name / f"{i:02d}.png")
    write_file(Settings(dataset="folder", dataroot="mine", **SIZES), run / CONFIG)
    for given, n in (((), 12), (("--dataroot", "others"), 15), (("--dataset", "folder"), 12)):
        result = invoke(run, *FAST, *given)
        assert result.exit_code == 0, result.output
        assert f"Real images: {n} of folder (one half)" in result.output


def test_all_checkpoints(run: Path, cache: Path, tmp_path: Path) -> None:
    result = invoke(run, *FAST, "--all", "--json", tmp_path / "all.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "all.json").read_text())
    singles = []
    for step in (0, 100, 200):
        file = run / "checkpoints" / f"step-{step:09d}.pt"
        assert invoke(file, *FAST, "--json", tmp_path / "one.json").exit_code == 0
        singles.append(json.loads((tmp_path / "one.json").read_text()))
    assert [one["generator"] for one in found["checkpoints"]] == [one["generator"] for one in singles]
    assert [one["scores"] for one in found["checkpoints"]] == [one["scores"]["generated"] for one in singles]
    assert found["scores"]["floor"] == singles[0]["scores"]["floor"]
    best = min(found["checkpoints"], key=lambda one: one["scores"]["frechet"])
    assert found["best"] == best["generator"]
    lines = table(result.output)
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    rows = [line.removeprefix("* ").split() for line in lines[1:5]]
    assert [row[0] for row in rows] == ["0", "100", "200", "floor"]
    assert [float(row[2]) for row in rows[:3]] == [
        pytest.approx(one["scores"]["generated"]["frechet"], rel=1e-3) for one in singles
    ]
    assert [line.split()[1] for line in lines[1:5] if line.startswith("*")] == [str(best["step"])]
    assert f"3 checkpoints of {run}\n" in result.output
    assert "Scoring 3 checkpoints" in result.output


def spoil(file: Path) -> None:
    saved = checkpoint.read(file)
    next(iter(saved.generator.values())).fill_(math.nan)
    checkpoint.write(saved, file)


def test_all_checkpoints_of_a_run_that_diverged(run: Path, cache: Path, tmp_path: Path) -> None:
    """A checkpoint of NaN is a row of dashes; the others keep their scores."""
    files = sorted((run / "checkpoints").glob("step-*.pt"))
    assert invoke(run, *FAST, "--all", "--json", tmp_path / "before.json").exit_code == 0
    spoil(files[1])
    result = invoke(run, *FAST, "--all", "--json", tmp_path / "after.json")
    assert result.exit_code == 0, result.output
    before, after = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("before", "after"))
    before["checkpoints"][1]["scores"] = None
    assert after["checkpoints"] == before["checkpoints"]
    lines = table(result.output)
    assert lines[2].split() == ["100", "1", *"––––––"]
    assert len(lines[2]) == len(lines[1]) == len(lines[0])
    assert "–: images that contain NaN" in result.output
    for file in files:
        spoil(file)
    result = invoke(run, *FAST, "--all", "--json", tmp_path / "none.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "none.json").read_text())
    assert found["best"] is None
    assert [one["scores"] for one in found["checkpoints"]] == [None] * 3
    assert "lowest" not in result.output


def test_checkpoints_that_the_run_deletes_meanwhile(
    run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = sorted((run / "checkpoints").glob("step-*.pt"))[0]
    load = evaluation.Evaluator.load

    def load_slowly(*args: Any, **options: Any) -> evaluation.Evaluator:
        gone.unlink()
        return load(*args, **options)

    monkeypatch.setattr(evaluation.Evaluator, "load", load_slowly)
    result = invoke(run, *FAST, "--all")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("is gone") == 1
    assert f"{gone} is gone, the run has deleted it meanwhile\n" in result.stderr
    assert [line.removeprefix("* ").split()[0] for line in table(result.stdout)[1:4]] == [
        "100",
        "200",
        "floor",
    ]


def test_a_damaged_checkpoint_is_an_error(run: Path, cache: Path) -> None:
    file = sorted((run / "checkpoints").glob("step-*.pt"))[0]
    file.write_bytes(b"damaged")
    result = invoke(run, *FAST, "--all")
    assert result.exit_code == 2
    assert str(file) in result.stderr


def test_one_checkpoint_is_no_plural(run: Path, cache: Path) -> None:
    for file in sorted((run / "checkpoints").glob("step-*.pt"))[:2]:
        file.unlink()
    result = invoke(run, *FAST, "--all")
    assert result.exit_code == 0, result.output
    assert f"1 checkpoint of {run}\n" in result.output
    assert "Scoring 1 checkpoint\n" in result.output.replace("\r", "\n").replace("  ", "\n")


def test_all_checkpoints_of_a_generator_of_the_users_own(cache: Path, tmp_path: Path) -> None:
    """The run's config.yaml names its class, which the checkpoints alone do not import."""
    own = {"netG_module": "tests.support.foreign_networks:Generator", "netG_args": {"nz": 6, "width": 3}}
    settings = Settings(dataset="digits", nz=6, **own, **SIZES)
    write_run(tmp_path / "run", settings)
    result = invoke(tmp_path / "run", *FAST, "--all")
    assert result.exit_code == 0, result.output
    rows = [line.removeprefix("* ").split() for line in table(result.output)[1:5]]
    assert [row[0] for row in rows] == ["0", "100", "200", "floor"]
    config = tmp_path / "run" / CONFIG
    imported = f"imported from {own['netG_module']} as {config} says"
    assert f"3 checkpoints of {tmp_path / 'run'}, {imported}\n" in result.output
    assert result.output.count("imported from") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--all", "--which", "best"), "--all scores every checkpoint, so it excludes --which best"),
        (("--all", "--which", "last"), "--all scores every checkpoint, so it excludes --which last"),
    ],
)
def test_all_excludes_which(arguments: tuple[str, ...], message: str, run: Path) -> None:
    result = invoke(run, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_all_requires_a_run(generator: Path, tmp_path: Path) -> None:
    for source in (generator, tmp_path, tmp_path / "nowhere"):
        result = invoke(source, "--all", "--dataset", "digits")
        assert result.exit_code == 2
        assert f"--all requires the folder of a run with checkpoints, got {str(source)!r}" in result.output


def test_a_file_outside_a_run_needs_a_dataset(generator: Path) -> None:
    result = invoke(generator, "--device", "cpu")
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: --dataset is required")
    for words in (str(generator), "mnist", "folder", "fake"):
        assert words in lines[0]


def test_help_starts_without_pytorch() -> None:
    code = "import sys, dcgan.cli.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
