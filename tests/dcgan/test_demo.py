"""The demo, end to end with tiny settings, and what it refuses."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dcgan import demo, fast, files, generation
from dcgan.models import Discriminator, Generator

TINY = ["--epochs", "1", "--features", "4", "--batch-size", "300", "--device", "cpu"]


def invoke(*arguments: str):
    return CliRunner().invoke(demo.app, list(arguments), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def test_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "dcgan.demo", *TINY, "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"1/1 \d+ img/s Loss_D \d.*Loss_G \d.*D\(x\) 0\.\d.*D\(G\(z\)\) 0\.\d", done.stdout)
    said = re.search(r"makes the same images: largest difference (\S+) over 256 images", done.stdout)
    assert said
    assert float(said[1]) <= demo.TOLERANCE
    assert "conv_transpose2d_fused" in done.stdout

    assert sorted(p.name for p in out.iterdir()) == [
        "discriminator.pth",
        "generator.pth",
        "losses.csv",
        "samples.png",
    ]
    for build in (Generator, fast.Generator):
        build(features=4, image_size=32).load_state_dict(torch.load(out / "generator.pth", weights_only=True))
    Discriminator(features=4, image_size=32).load_state_dict(
        torch.load(out / "discriminator.pth", weights_only=True)
    )
    # 8 images of 32 pixels drawn twice as large, with lines of 2 pixels around each.
    assert Image.open(out / "samples.png").size == (8 * 66 + 2, 8 * 66 + 2)
    rows = list(csv.DictReader((out / "losses.csv").open()))
    assert [(row["epoch"], row["batch"]) for row in rows] == [("0", str(i)) for i in range(6)]
    assert all(0 < float(row["d_x"]) < 1 and float(row["loss_d"]) > 0 for row in rows)


def test_a_seed_repeats_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert invoke(*TINY, "--seed", str(seed), "--out", str(tmp_path / name)).exit_code == 0
    a, b, c = (torch.load(tmp_path / name / "generator.pth", weights_only=True) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["main.0.weight"], c["main.0.weight"])


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_drop_in_that_differs_fails(wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(fast.Generator):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return super().forward(z) + wrong

    monkeypatch.setattr(fast, "Generator", Wrong)
    result = invoke(*TINY, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert re.search(r"images differ by up to (1\.0e-03|nan); 1e-04 is allowed", result.output)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--epochs", "0", "integer of at least 1"),
        ("--epochs", "many", "integer of at least 1"),
        ("--batch-size", "0", "integer of at least 1"),
        ("--features", "-4", "integer of at least 1"),
        ("--image-size", "48", "32, 64, 128, 256"),
        ("--seed", "-1", "integer of at least 0"),
        ("--device", "tpu", "'auto', 'cpu', 'cuda'"),
    ],
)
def test_usage_errors(option: str, value: str, allowed: str, tmp_path: Path) -> None:
    result = invoke(*TINY, "--out", str(tmp_path / "out"), option, value)
    assert result.exit_code == 2
    for words in (option, value, allowed):
        assert words in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_a_usage_error(tmp_path: Path) -> None:
    result = invoke("--device", "cuda", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "'cuda', but PyTorch finds no GPU" in result.output


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_that_cannot_be_a_folder_is_a_usage_error(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke(*TINY, "--out", str(tmp_path / out))
    assert result.exit_code == 2
    assert "--out" in result.output


def test_replacing_keeps_the_old_file_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half_a_write() -> None:
        with files.replacing(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_a_write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("channels", [1, 3])
def test_save_grid_pixels(channels: int, tmp_path: Path) -> None:
    values = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, channels, 1, 2)
    generation.save_grid(values, tmp_path / "grid.png", columns=2, scale=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert grid.shape == (2 * 5 + 2, 2 * 8 + 2)
    assert (grid[2:5, 2:8] == 0).all()
    assert ((grid[2:5, 10:16] == 127) | (grid[2:5, 10:16] == 128)).all()
    assert (grid[7:10, 2:8] == 255).all()
    assert (grid[7:10, 10:16] == 0).all()
