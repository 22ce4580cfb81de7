"""``dcgan train``: its outputs, and the input that it rejects."""

from __future__ import annotations

import json
import os
import resource
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
from dcgan.models import Discriminator, Generator
from dcgan.training.report import read_metrics
from dcgan.training.settings import Settings, read_file
from tests.support import train_runs

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


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def test_outputs_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    # --tensorboard given last wins over TINY's.
    result = invoke(*TINY, "--out", str(out), "--sample-interval", "4", "--ema", "0.5", "--tensorboard")
    assert result.exit_code == 0, result.output
    assert "Training dcgan on 44 images of fake (1×32×32), 1 epochs in batches of 8" in result.output
    assert "[1/1][6/6]" in result.output
    for words in ("img/s Loss_D", "Loss_G", "D(x) 0.", "D(G(z)) 0.", "ETA 0:00:00"):
        assert words in result.output
    assert "The input pipeline took" in result.output
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
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert [line["batch"] for line in lines[:6]] == [1, 2, 3, 4, 5, 6]
    assert [line["images"] for line in lines[:6]] == [8, 16, 24, 32, 40, 44]
    assert all(0 < line["d_x"] < 1 and line["loss_d"] > 0 for line in lines[:6])
    assert lines[6]["pixel_frechet_distance"] == saved.score

    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step-000000004.png", "step-000000006.png"]
    grid = Image.open(out / "samples" / "step-000000006.png")
    assert grid.size == (8 * 66 + 2, 8 * 66 + 2)
    assert np.asarray(grid).std() > 0
    with Image.open(out / "samples.gif") as animation:
        assert animation.n_frames == 2
    assert Image.open(out / "losses.png").size == (960, 600)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {"loss/D", "loss/G", "D/x", "D/G(z)", "images per second"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"]
    losses = [e.value for e in events.Scalars("loss/D")]
    assert losses == pytest.approx([line["loss_d"] for line in lines[:6]])


def test_option_names_of_pytorch_examples(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke(
        *("--dataset", "fake", "--batchSize", "8", "--imageSize", "32", "--nz", "6", "--ngf", "4"),
        *("--ndf", "4", "--niter", "3", "--lr", "1e-4", "--beta1", "0.4", "--manualSeed", "7"),
        *("--workers", "1", "--dry-run", "--outf", str(out), "--nc", "3", "--no-tensorboard"),
    )
    assert result.exit_code == 0, result.output
    settings = Settings.of(read_file(out / "config.yaml"))
    assert (settings.batch_size, settings.image_size, settings.epochs, settings.seed) == (8, 32, 3, 7)
    assert (settings.lr, settings.beta1, settings.channels) == (1e-4, 0.4, 3)
    assert checkpoints.read(out / "checkpoints" / "last.pt").step == 1
    assert (out / "losses.png").exists()
    assert (out / "samples.gif").exists()


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
    # Resuming a finished run is a no-op.
    result = invoke("--resume", "--out", str(tmp_path / "a"))
    assert result.exit_code == 0, result.output
    assert "Done after 12 steps" in result.output


def test_initial_weights_from_model_files(tmp_path: Path) -> None:
    torch.manual_seed(3)
    g, d = Generator(6, 1, 4, 32), Discriminator(1, 4, 32)
    torch.save(g.state_dict(), tmp_path / "g.pth")
    torch.save(d.state_dict(), tmp_path / "d.pth")
    out = tmp_path / "run"
    result = invoke(
        *TINY,
        *("--netG", str(tmp_path / "g.pth"), "--netD", str(tmp_path / "d.pth")),
        *("--lr", "1e-12", "--dry-run", "--out", str(out)),
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
        (["--dataset", "imagenet"], ["imagenet", "mnist", "folder", "digits"]),
        (["--image-size", "48"], ["48", "32, 64, 128, 256"]),
        (["--batch-size", "45"], ["batch_size", "44", "45"]),
        (["--batch-size", "0"], ["'--batch-size' / '--batchSize': must be an integer of at least 1, got 0"]),
        (["--niter", "many"], ["'--epochs' / '--niter': must be an integer of at least 1, got 'many'"]),
        (["--epochs", "3.0"], ["'--epochs' / '--niter': must be an integer of at least 1, got '3.0'"]),
        (["--lr", "nan"], ["'--lr': must be a positive number, got nan"]),
        (["--nc", "2"], ["'--channels' / '--nc': must be 1 or 3, got 2"]),
        (["--classes", ","], ["classes", "at least one class"]),
        (["--model", "vae"], ["vae", "dcgan", "mlp"]),
        (["--model", "mlp", "--engine", "native"], ["mlp", "native", "auto or reference"]),
        (["--engine", "triton"], ["--engine: engine 'triton' is forced, but does not cover"]),
        (["--dtype", "tf32"], ["tf32", "GPU"]),
        (["--dtype", "int8"], ["int8", "bfloat16"]),
        (["--device", "tpu"], ["tpu", "cpu", "cuda"]),
        (["--netG", "none.pth"], ["none.pth"]),
        (["--config", "none.toml"], ["none.toml", "cannot read"]),
        (["--resume"], ["--resume", "no run"]),
        (["--unknown"], ["--unknown"]),
    ],
)
def test_bad_input(given: list[str], expected: list[str], tmp_path: Path) -> None:
    result = invoke(*TINY, "--out", str(tmp_path / "run"), *given)
    assert result.exit_code == 2, result.output
    for words in expected:
        assert words in result.output
    assert not (tmp_path / "run" / "checkpoints").exists()


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
    assert "Training dcgan on 6 images of folder" in result.output


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_images(exists: bool, tmp_path: Path) -> None:
    root = tmp_path / "empty"
    if exists:
        root.mkdir()
        (root / "notes.txt").write_text("no image")
    result = invoke(*TINY, "--dataset=folder", f"--dataroot={root}", "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert str(root) in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    result = invoke(*TINY, "--device", "cuda", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "PyTorch finds no GPU" in result.output


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke(*TINY, "--dry-run", "--out", str(out)).exit_code == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    result = invoke(*TINY, "--dry-run", "--out", str(out))
    assert result.exit_code == 2
    assert "already holds a run; add --resume to continue it" in result.output
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--ngf", "8"], "ngf is 4 in the run to be resumed, got 8"),
        (["--model", "mlp"], "model is 'dcgan' in the run to be resumed, got 'mlp'"),
        (["--seed", "1"], "seed is 0"),
        (["--limit", "20"], "limit is 44"),
    ],
)
def test_settings_that_cannot_change_on_resume(given: list[str], expected: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke(*TINY, "--dry-run", "--out", str(out)).exit_code == 0
    result = invoke("--resume", "--out", str(out), *given)
    assert result.exit_code == 2
    assert expected in result.output


def test_resuming_from_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    assert invoke(*TINY, "--dry-run", "--out", str(out)).exit_code == 0
    assert invoke(*TINY, "--dry-run", "--ngf", "8", "--out", str(other)).exit_code == 0
    os.replace(other / "checkpoints" / "step-000000001.pt", out / "checkpoints" / "step-000000001.pt")
    result = invoke("--resume", "--out", str(out))
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
    from dcgan.training.run import Run

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
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [1, 2, 3, 4]


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


def test_help_lists_every_setting() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    text = " ".join(result.output.replace("│", " ").split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description is not None
        assert " ".join(field.description.split()[:5]) in text
    for flag in ("--batchSize", "--imageSize", "--nc", "--niter", "--manualSeed", "--outf", "--no-compile"):
        assert flag in text
    for default in ("[default: (mnist)]", "[default: (128)]", "[default: (0.0002)]", "[default: runs/train]"):
        assert default in text


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert invoke(*TINY, "--dry-run", "--out", str(out)).exit_code == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {
        *("step", "epoch", "batch", "images", "loss_d", "loss_g", "d_x", "d_g_z")
    }
