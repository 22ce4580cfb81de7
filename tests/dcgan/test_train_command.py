"""``dcgan train``: its outputs, and the input that it rejects."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dcgan import checkpoint as checkpoints
from dcgan.cli.app import app
from dcgan.cli.train import train
from dcgan.errors import InputError, RunError
from dcgan.models import Discriminator, Generator
from dcgan.settings import Settings, read_file
from dcgan.training.report import read_metrics
from dcgan.training.run import Run
from tests.support import image_files, train_runs

TINY = [
    "--dataset=fake",
    "--limit=44",
    "--channels=1",
    "--batch-size=8",
    "--image-size=32",
    "--ngf=4",
    "--ndf=4",
    "--nz=6",
    "--epochs=1",
    "--device=cpu",
    "--no-tensorboard",
]
ONE_STEP = [*TINY, "--limit=8"]


def write_images(folder: Path, count: int) -> None:
    for i in range(count):
        image_files.save(folder / f"{i}.png", image_files.noise(40, 40, seed=i))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def snapshot(folder: Path) -> dict[Path, int]:
    """Return everything in a folder with its time of change, which differs if it is written again."""
    return {path: path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_outputs_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    # --tensorboard given last wins over TINY's.
    result = invoke(*TINY, "--out", str(out), "--sample-interval", "4", "--ema", "0.5", "--tensorboard")
    assert result.exit_code == 0, result.output
    assert "Training dcgan on 44 images of fake (1×32×32):\n1 epoch in batches of 8" in result.output
    assert "[1/1][6/6]" in result.output
    for words in ("img/s Loss_D", "Loss_G", "D(x) 0.", "D(G(z)) 0.", "ETA 0:00:00"):
        assert words in result.output
    assert "The input pipeline took" in result.output
    assert result.output.startswith("Loading fake")
    assert result.output.endswith(f"Done after 6 steps: {out}\nNext: dcgan generate {out}\n")
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "losses.png",
        "metrics.jsonl",
        "samples",
        "samples.gif",
        "tensorboard",
    ]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "best.pt",
        "last.pt",
        "step-000000006.pt",
    ]
    saved = checkpoints.read(out / "checkpoints" / "last.pt")
    assert (saved.epoch, saved.batch, saved.step, saved.images) == (1, 0, 6, 44)
    Generator(6, 1, 4, 32).load_state_dict(saved.ema)
    Discriminator(1, 4, 32).load_state_dict(saved.discriminator)
    assert Settings.of(read_file(out / "config.yaml")) == Settings.of(saved.config)

    lines = read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if "loss_d" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["batch"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["images"] for line in steps] == [8, 16, 24, 32, 40, 44]
    assert all(0 < line["d_x"] < 1 and line["loss_d"] > 0 for line in steps)
    (scored,) = (line for line in lines if "pixel_frechet_distance" in line)
    assert (scored["step"], scored["pixel_frechet_distance"]) == (6, saved.score)

    grids = [f"step-{step:09d}.png" for step in (0, 4, 6)]
    assert sorted(p.name for p in (out / "samples").iterdir()) == grids
    grid = Image.open(out / "samples" / "step-000000006.png")
    assert grid.size == (8 * 66 + 2, 8 * 66 + 2)
    assert np.asarray(grid).std() > 0
    with Image.open(out / "samples.gif") as animation:
        assert animation.n_frames == 3
    assert Image.open(out / "losses.png").size == (960, 600)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {"loss/D", "loss/G", "D/x", "D/G(z)", "images per second"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"]
    losses = [e.value for e in events.Scalars("loss/D")]
    assert losses == pytest.approx([line["loss_d"] for line in steps])


def test_options_override_the_settings_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'dataset = "fake"\nlimit = 44\nbatch_size = 8\nimage_size = 32\nngf = 4\nndf = 4\n'
        "nz = 6\nepochs = 9\ntensorboard = false\nlr = 1e-3\n"
    )
    out = tmp_path / "run"
    result = invoke("--config", str(tmp_path / "run.toml"), "--epochs", "1", "--out", str(out))
    assert result.exit_code == 0, result.output
    settings = Settings.of(read_file(out / "config.yaml"))
    assert (settings.lr, settings.epochs, settings.nz) == (1e-3, 1, 6)


def test_resuming_for_more_epochs_equals_the_longer_run(tmp_path: Path) -> None:
    given = [*TINY, "--out"]
    assert invoke(*given, str(tmp_path / "a")).exit_code == 0
    result = invoke("--resume", "--out", str(tmp_path / "a"), "--epochs", "2")
    assert result.exit_code == 0, result.output
    assert "after 6 steps" in result.output
    assert invoke(*given, str(tmp_path / "b"), "--epochs", "2").exit_code == 0
    train_runs.assert_same(
        {**vars(train_runs.final(tmp_path / "a")), "config": None},
        {**vars(train_runs.final(tmp_path / "b")), "config": None},
        "",
    )


@pytest.mark.parametrize("given", [[], ["--epochs", "1"]])
def test_resuming_a_finished_run_says_how_to_go_on_and_changes_nothing(
    given: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "my run"
    assert invoke(*ONE_STEP, "--out", str(out)).exit_code == 0
    before = snapshot(out)
    result = invoke("--resume", "--out", str(out), *given)
    assert result.exit_code == 0, result.output
    assert "The run is finished: 1 step in 1 epoch" in result.output
    assert f"dcgan train --resume --out '{out}' --epochs 2\n" in result.output
    assert snapshot(out) == before


def test_the_end_of_a_finished_run_is_made_up_for(tmp_path: Path) -> None:
    """A run that was killed after its last checkpoint lacks the plot and the animation."""
    out = tmp_path / "run"
    assert invoke(*ONE_STEP, "--out", str(out)).exit_code == 0
    for name in ("losses.png", "samples.gif"):
        (out / name).unlink()
        assert invoke("--resume", "--out", str(out)).exit_code == 0
        assert (out / name).exists()
    os.utime(out / "losses.png", (0, 0))  # of an earlier end, when the run had fewer epochs
    assert invoke("--resume", "--out", str(out)).exit_code == 0
    assert (out / "losses.png").stat().st_mtime > 0


@pytest.mark.parametrize("option", ["--niter", "file"])
def test_fewer_epochs_than_the_run_has_taken_are_an_error_and_change_nothing(
    option: str, tmp_path: Path
) -> None:
    out, file = tmp_path / "run", tmp_path / "fewer.toml"
    assert invoke(*ONE_STEP, "--epochs", "2", "--out", str(out)).exit_code == 0
    file.write_text("epochs = 1\n")
    before = snapshot(out)
    given = ["--config", str(file)] if option == "file" else [option, "1"]
    result = invoke("--resume", "--out", str(out), *given)
    assert result.exit_code == 2
    name = f"{file}: epochs" if option == "file" else option
    expected = f"{name} must be at least 2, which the run has reached after 2 steps, got 1"
    assert result.stderr == f"Error: {expected}\n"
    assert snapshot(out) == before


def test_a_dry_run_lists_what_a_run_writes_and_leaves_nothing(tmp_path: Path) -> None:
    out = "a/b/run"
    result = invoke(*ONE_STEP, "--dry-run", "--out", str(tmp_path / out))
    assert result.exit_code == 0, result.output
    assert f"Done after 1 step. A run without --dry-run writes into {tmp_path / out}:\n" in result.output
    listed = {line.strip() for line in result.output.partition("writes into")[2].splitlines()[1:]}
    assert list(tmp_path.iterdir()) == []
    assert invoke(*ONE_STEP, "--out", str(tmp_path / out)).exit_code == 0
    files = (path for path in (tmp_path / out).rglob("*") if path.is_file())
    assert listed == {str(path.relative_to(tmp_path / out)) for path in files}


def test_a_dry_run_of_a_resumed_run_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke(*ONE_STEP, "--out", str(out)).exit_code == 0
    before = snapshot(out)
    result = invoke("--resume", "--epochs=2", "--dry-run", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "step-000000002.pt" in result.output
    assert snapshot(out) == before


def test_a_batch_larger_than_the_dataset_is_clamped(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke(*TINY, "--batchSize", "50", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "--batchSize 50 exceeds the 44 images: using 44\n" in result.output
    assert "1 epoch in batches of 44" in result.output
    assert train_runs.final(out).step == 1
    result = invoke("--resume", "--epochs=2", "--out", str(out))
    assert "--batch-size 50 exceeds the 44 images: using 44\n" in result.output
    assert train_runs.final(out).step == 2


def test_initial_weights_from_model_files(tmp_path: Path) -> None:
    torch.manual_seed(3)
    g, d = Generator(6, 1, 4, 32), Discriminator(1, 4, 32)
    torch.save(g.state_dict(), tmp_path / "g.pth")
    torch.save(d.state_dict(), tmp_path / "d.pth")
    out = tmp_path / "run"
    result = invoke(
        *TINY,
        *("--netG", str(tmp_path / "g.pth"), "--netD", str(tmp_path / "d.pth")),
        *("--lr", "1e-12", "--limit", "8", "--out", str(out)),
    )
    assert result.exit_code == 0, result.output
    saved = checkpoints.read(out / "checkpoints" / "last.pt")
    for state, network in ((saved.generator, g), (saved.discriminator, d)):
        for name, value in network.named_parameters():
            torch.testing.assert_close(state[name], value.detach(), atol=1e-10, rtol=0)
    wide = Generator(6, 1, 8, 32)
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    result = invoke(*TINY, "--netG", str(tmp_path / "wide.pth"), "--out", str(tmp_path / "other"))
    assert result.exit_code == 2
    for words in ("wide.pth does not fit", "features=8", "features=4"):
        assert words in result.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--dataset", "cats"], "--dataset must be one of mnist, fashion-mnist, cifar10, "),
        (["--image-size", "48"], "--image-size must be one of 32, 64, 128, 256, got 48"),
        (["--imageSize", "48"], "--imageSize must be one of 32, 64, 128, 256, got 48"),
        (
            ["--imageSize=0"],
            "--imageSize must be one of 32, 64, 128, 256, or with networks of your own a pos",
        ),
        (["--batch-size", "0"], "--batch-size must be an integer of at least 1, got 0"),
        (["--batchSize", "0"], "--batchSize must be an integer of at least 1, got 0"),
        (["--niter", "many"], "--niter must be an integer of at least 1, got 'many'"),
        (["--epochs", "3.0"], "--epochs must be an integer of at least 1, got '3.0'"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--nc", "2"], "--nc must be 1 or 3, got 2"),
        (["--classes", ","], "--classes must be a list of strings that names at least one class, got []"),
        (["--classes=x"], "--classes must be among 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, got 'x'"),
        (
            ["--diffaugment", "blur"],
            "--diffaugment must be a list of color, translation, cutout, each at most",
        ),
        (["--model", "vae"], "--model must be 'dcgan' or 'mlp', got 'vae'"),
        (
            ["--model", "mlp", "--engine", "native"],
            "--engine must be auto or reference for the model mlp, got",
        ),
        (["--model", "mlp", "--sync-batchnorm"], "--sync-batchnorm requires model dcgan, got model 'mlp'"),
        (["--engine", "triton"], "--engine: engine 'triton' is forced, but does not cover"),
        (["--dtype", "tf32"], "--dtype tf32 requires a GPU, got device 'cpu'; use float32"),
        (["--dtype", "int8"], "--dtype must be 'float32', 'tf32', 'bfloat16' or 'float16', got 'int8'"),
        (["--device", "tpu"], "--device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        (["--netG", "none.pth"], "none.pth"),
        (["--netG-args", "width=3"], "--netG-args requires --netG-module, got {'width': 3}"),
        (["--netG-module", "no_such_module:G"], "--netG-module: cannot import 'no_such_module:G'"),
        (["--config", "none.toml"], "cannot read none.toml"),
        (["--resume"], "--resume: there is no run in"),
        (["--dataset=folder", "--dataroot=none"], "--dataroot 'none' does not exist\n"),
        (
            ["--dataset=mnist", "--dataroot=none"],
            "--dataroot 'none' does not exist; create it to let mnist be",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    given: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names the option as typed; neither the run's folder nor its parent is left."""
    monkeypatch.chdir(tmp_path)
    result = invoke(*TINY, "--out", str(tmp_path / "a" / "run"), *given)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ")
    assert expected in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given", [["--dtype=tf32"], ["--engine=triton"], ["--dataset=folder", "--dataroot=x"]]
)
def test_a_failed_run_leaves_a_folder_that_existed_as_it_was(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    before = snapshot(tmp_path)
    assert invoke(*TINY, "--out", str(tmp_path), *given).exit_code == 2
    assert snapshot(tmp_path).keys() == before.keys()


def test_an_unknown_option(tmp_path: Path) -> None:
    result = invoke(*TINY, "--out", str(tmp_path / "run"), "--unknown")
    assert result.exit_code == 2
    assert "--unknown" in result.output


def test_without_tensorboard_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "a" / "run"
    result = invoke(*TINY, "--tensorboard", "--out", str(out))
    assert result.exit_code == 2, result.output
    assert "tensorboard is not installed" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("batch-size = 0", [], "{file}: batch-size must be an integer of at least 1, got 0"),
        ("batch_size = 0", [], "{file}: batch_size must be an integer of at least 1, got 0"),
        ("dtype = 'tf32'", [], "{file}: dtype tf32 requires a GPU, got device 'cpu'; use float32"),
        ("batch-size = 8", ["--batchSize=0"], "--batchSize must be an integer of at least 1, got 0"),
        (
            "batchSize = 8",
            [],
            "{file}: unknown setting 'batchSize'; did you mean batch_size? ",
        ),
        ("cuda = true", [], "{file}: unknown setting 'cuda'; `dcgan train --help` lists all"),
        ("dataset = 'lsun'", [], "{file}: dataset must be one of mnist, "),
        ("image-size = 48", [], "{file}: image-size must be one of 32, 64, 128, 256, got 48"),
        ("netG-args = {a = 1}", [], "{file}: netG-args requires --netG-module, got {{'a': 1}}"),
    ],
)
def test_errors_name_the_key_of_a_settings_file(
    text: str, given: list[str], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "my settings.toml"
    file.write_text(text)
    tiny = [option for option in TINY if option.partition("=")[0] not in ("--batch-size", "--image-size")]
    if text.startswith("dataset"):
        tiny.remove("--dataset=fake")
    result = invoke(*tiny, "--config", str(file), "--out", str(tmp_path / "run"), *given)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"Error: {expected.format(file=file)}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{"batch_size": 0}, {"dtype": "tf32", "device": "cpu", "dataset": "fake"}])
def test_errors_name_the_field_if_python_calls(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^(batch_size must be|dtype tf32 requires)"):
        train(given, tmp_path / "run", None, resume=False, dry_run=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_images_in_all_modes_with_one_unreadable(tmp_path: Path) -> None:
    root, random = tmp_path / "images", np.random.default_rng(0)
    for i, mode in enumerate(["L", "RGB", "RGBA", "P", "1", "LA"] * 2):
        image = Image.fromarray(random.integers(0, 256, (40, 33, 3), np.uint8)).convert(mode)
        (root / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        image.save(root / f"class{i % 2}" / f"{i}.png")
    Image.fromarray(random.integers(0, 65536, (40, 33), np.uint16)).save(root / "class0" / "deep.png")
    (root / "class1" / "broken.png").write_bytes((root / "class0" / "0.png").read_bytes()[:50])
    out = tmp_path / "run"
    given = ["--dataset=folder", f"--dataroot={root}", "--batch-size=4", "--image-size=32", "--ngf=4"]
    given += ["--ndf=4", "--nz=6", "--epochs=1", "--device=cpu", "--no-tensorboard"]
    result = invoke(*given, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "Training dcgan on 13 images of folder, 1 skipped (3×32×32)" in result.output
    assert "broken.png" in result.output
    assert train_runs.final(out).images == 13
    result = invoke(*given, "--classes=class1", "--dry-run", "--out", str(tmp_path / "other"))
    assert result.exit_code == 0, result.output
    assert "Training dcgan on 6 images of folder" in result.output


@pytest.mark.parametrize("kind", ["file", "empty"])
def test_a_folder_without_images(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "empty"
    if kind == "file":
        root.write_text("no folder")
    else:
        root.mkdir()
        (root / "notes.txt").write_text("no image")
    result = invoke(*TINY, "--dataset=folder", f"--dataroot={root}", "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: --dataroot must be a folder of images, got '{root}', which ")
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("typed", [("--device", "cuda"), ("--cuda",)], ids=" ".join)
def test_cuda_without_a_gpu(typed: tuple[str, ...], tmp_path: Path) -> None:
    given = [option for option in TINY if option != "--device=cpu"]
    result = invoke(*given, *typed, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr == f"Error: {typed[0]} is 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'\n"


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke(*ONE_STEP, "--out", str(out)).exit_code == 0
    before = snapshot(out)
    for given in ([], ["--dry-run"]):
        result = invoke(*TINY, *given, "--out", str(out))
        assert result.exit_code == 2
        assert "already holds a run; add --resume to continue it" in result.output
        assert snapshot(out) == before


@pytest.mark.parametrize(
    "name",
    ["checkpoints/step-000000001.pt", "metrics.jsonl", "losses.png", "samples/mine.png", "tensorboard/x"],
)
def test_a_folder_with_files_of_such_names_is_not_overwritten(name: str, tmp_path: Path) -> None:
    """They may be a run's whose config.yaml is lost, or somebody else's."""
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    result = invoke(*ONE_STEP, "--out", str(out))
    assert result.exit_code == 2
    taken = name.partition("/")[0]
    assert result.stderr == f"Error: --out: {out} already holds {taken}; choose another folder\n"
    assert (out / name).read_text() == "mine"
    assert list(out.iterdir()) == [out / taken]


@pytest.mark.parametrize("below", ["", "runs/one"])
def test_a_run_among_its_training_images_is_an_error(below: str, tmp_path: Path) -> None:
    """Its samples would become training images."""
    root = tmp_path / "images"
    write_images(root, 4)
    given = ["--dataset=folder", f"--dataroot={root}", "--limit=4", "--batch-size=4", "--image-size=32"]
    result = invoke(*given, "--epochs=1", "--out", str(root / below))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: --out must not be in --dataroot '{root}'")
    assert len(list(root.iterdir())) == 4


def test_a_dataset_that_has_changed_is_an_error_on_resume(tmp_path: Path) -> None:
    """Also if an epoch has as many batches as before."""
    root, out = tmp_path / "images", tmp_path / "run"
    write_images(root, 7)
    given = [
        "--dataset=folder",
        f"--dataroot={root}",
        "--image-size=32",
        "--ngf=4",
        "--ndf=4",
        "--device=cpu",
    ]
    training = invoke(*given, "--batch-size=4", "--epochs=1", "--no-tensorboard", "--out", str(out))
    assert training.exit_code == 0, training.output
    next(root.iterdir()).unlink()
    result = invoke("--resume", "--epochs=2", "--out", str(out))
    assert result.exit_code == 2
    assert "trained on 7 images, but the dataset has 6 now" in result.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--netG", "nothing.pth"], "--netG: cannot read nothing.pth"),
        (["--netD", "nothing.pth"], "--netD: cannot read nothing.pth"),
        (["--limit", "1"], "--score pixels needs at least 2 images, got 1; choose none"),
    ],
)
def test_what_only_training_finds_out_names_the_option(
    given: list[str], expected: str, tmp_path: Path
) -> None:
    result = invoke(*TINY, *given, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {expected}")
    assert not list(tmp_path.iterdir())


def test_empty_model_files_are_none(tmp_path: Path) -> None:
    """They are the defaults of pytorch/examples."""
    result = invoke(*ONE_STEP, "--netG", "", "--netD", "", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--ngf", "8"], "--ngf is 4 in the run to be resumed, got 8"),
        (["--model", "mlp"], "--model is 'dcgan' in the run to be resumed, got 'mlp'"),
        (["--seed", "1"], "--seed is 0"),
        (["--manualSeed", "1"], "--manualSeed is 0"),
        (["--limit", "20"], "--limit is 8"),
    ],
)
def test_settings_that_cannot_change_on_resume(given: list[str], expected: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke(*ONE_STEP, "--out", str(out)).exit_code == 0
    result = invoke("--resume", "--out", str(out), *given)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {expected}")


def test_resuming_from_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    assert invoke(*ONE_STEP, "--out", str(out)).exit_code == 0
    assert invoke(*ONE_STEP, "--ngf", "8", "--out", str(other)).exit_code == 0
    os.replace(other / "checkpoints" / "step-000000001.pt", out / "checkpoints" / "step-000000001.pt")
    result = invoke("--resume", "--epochs", "2", "--out", str(out))
    assert result.exit_code == 2
    for words in ("the checkpoint has", "features_g=8", "features_g=4"):
        assert words in result.output


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_cannot_be_a_file(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke(*TINY, "--out", str(tmp_path / out))
    assert result.exit_code == 2
    assert "--out" in result.output


def test_out_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)  # root can write anywhere
    result = invoke(*TINY, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "is not writable" in result.output


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke(*TINY, "--lr", "1e30", "--checkpoint-interval", "1", "--out", str(out))
    assert result.exit_code == 1
    assert "step" in result.output
    assert "finite" in result.output or "nan" in result.output
    last = out / "checkpoints" / "last.pt"
    if last.exists():
        assert f"The last good checkpoint is {last.resolve()}" in result.output
        saved = checkpoints.read(last)
        assert all(bool(v.isfinite().all()) for v in saved.generator.values())
    else:
        assert "There is no checkpoint yet" in result.output


def test_nan_images_stop_the_run_at_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Run.inputs

    def poisoned(self: Run) -> tuple[torch.Tensor, torch.Tensor]:
        real, noise = inputs(self)
        return (real * float("nan") if self.position.step == 4 else real), noise

    monkeypatch.setattr(Run, "inputs", poisoned)
    out = tmp_path / "run"
    result = invoke(*TINY, "--checkpoint-interval", "2", "--log-interval", "1", "--out", str(out))
    assert result.exit_code == 1
    assert "loss_d is nan at step 5 (epoch 1, batch 5)" in result.output
    assert "The last good checkpoint is" in result.output
    assert checkpoints.read(out / "checkpoints" / "last.pt").step == 4
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss_d" in line] == [1, 2, 3, 4]


def test_a_full_disk_is_reported_and_earlier_checkpoints_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke(*TINY, "--out", str(out)).exit_code == 0
    before = checkpoints.read(out / "checkpoints" / "last.pt")
    size = (out / "checkpoints" / "last.pt").stat().st_size

    def limited() -> None:  # writes beyond this file size fail, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    done = subprocess.run(
        [sys.executable, "-m", "dcgan", "train", "--resume", "--out", str(out), "--epochs", "2"],
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    assert done.returncode == 1
    assert "Error: cannot write the checkpoint" in done.stderr
    assert "Earlier checkpoints are as they were" in done.stderr
    train_runs.assert_same(vars(checkpoints.read(out / "checkpoints" / "last.pt")), vars(before), "")
    assert not list((out / "checkpoints").glob(".*"))


def test_a_signal_ends_with_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Run.step

    def interrupted(self: Run, real: torch.Tensor, noise: torch.Tensor) -> Any:
        result = step(self, real, noise)
        if self.position.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(Run, "step", interrupted)
    out = tmp_path / "my run"
    result = invoke(*TINY, "--out", str(out))
    assert result.exit_code == 130, result.output
    last = f"Stopped and saved after 2 steps; continue with: dcgan train --resume --out '{out}'\n"
    assert result.output.endswith(last)
    assert result.stderr == ""
    monkeypatch.undo()
    assert invoke("--resume", "--out", str(out)).exit_code == 0
    assert train_runs.final(out).step == 6


def test_an_error_after_a_step_keeps_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Run, real: torch.Tensor, noise: torch.Tensor) -> Any:
        if self.position.step == 2:
            raise RunError("no more")
        return step(self, real, noise)

    step = Run.step
    monkeypatch.setattr(Run, "step", fail)
    result = invoke(*TINY, "--log-interval=1", "--out", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke(*ONE_STEP, "--out", str(out)).exit_code == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {
        *("step", "epoch", "batch", "images", "loss_d", "loss_g", "d_x", "d_g_z")
    }
