"""``dcgan generate``: every format, shards of processes, existing files, and usage errors."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from dcgan import checkpoint, generation, models
from dcgan.cli.app import app
from dcgan.networks import Architecture
from tests.support.networks import randomise

SMALL = Architecture(latent_dim=5, channels=1, features_g=4, features_d=4, image_size=32)


@pytest.fixture
def trained(tmp_path: Path, one_thread: None) -> Path:
    path = tmp_path / "run.pt"
    g, ema = SMALL.generator("reference"), SMALL.generator("reference")
    randomise(g)
    randomise(ema)
    d = SMALL.discriminator("reference")
    where: dict[str, Any] = {"epoch": 2, "step": 938, "config": {"ema": 0.999}}
    states = g.state_dict(), d.state_dict()
    checkpoint.write(checkpoint.Checkpoint(SMALL, *states, ema=ema.state_dict(), **where), path)
    return path


def invoke(*arguments: object, **env: str) -> Any:
    return CliRunner().invoke(
        app,
        ["generate", *map(str, arguments)],
        env={"COLUMNS": "200", "TERMINAL_WIDTH": "200", "RANK": None, "WORLD_SIZE": None} | env,
    )


def expected_pixels(path: Path, n: int, seed: int = 0, ema: bool = True) -> Tensor:
    content = checkpoint.read(path)
    network = models.Generator(5, 1, 4, 32)
    network.load_state_dict((content.ema if ema else None) or content.generator)
    z = generation.latents(range(n), 5, seed=seed)
    with torch.no_grad():
        return generation.to_uint8(network.double().eval()(z.double()))


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Compare up to one level in fewer than 1 % of the pixels, because rounding may differ."""
    difference = np.abs(found.astype(int) - expected.astype(int))
    return found.shape == expected.shape and difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_npy_command(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "a.npy"
    result = invoke(trained, "--format", "npy", "--num", 10, "--batch-size", 4, "--seed", 3, "--out", out)
    assert result.exit_code == 0, result.output
    words = f"Generator of {trained} (epoch 2, step 938), moving average of decay 0.999; engine"
    assert words in " ".join(result.output.split())
    assert re.search(r"10 images in \d+\.\d\d s, [\d,]+ images/s \(loading", result.output)
    assert f"Wrote {out}" in result.output
    expected = expected_pixels(trained, 10, seed=3).permute(0, 2, 3, 1).numpy()
    assert close(np.load(out), expected)

    result = invoke(
        trained,
        "--format",
        "npy",
        "--num",
        10,
        "--seed",
        3,
        "--no-ema",
        "--engine",
        "reference",
        "--out",
        out,
        "--force",
    )
    assert result.exit_code == 0, result.output
    words = "(epoch 2, step 938), weights of that step (--ema uses the average); engine reference on"
    assert words in result.output
    expected = expected_pixels(trained, 10, seed=3, ema=False).permute(0, 2, 3, 1).numpy()
    assert close(np.load(out), expected)


def test_grid_command(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(trained).exit_code == 0
    assert Image.open("generated.png").size == (8 * 34 + 2, 8 * 34 + 2)
    assert invoke(trained, "-n", 10, "--columns", 4, "--force").exit_code == 0
    assert Image.open("generated.png").size == (4 * 34 + 2, 3 * 34 + 2)


def test_strip_and_animation_commands(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(trained, "--format", "strip", "--seeds", "5,6,7", "--steps", 3).exit_code == 0
    assert Image.open("interpolation.png").size == (7 * 34 + 2, 34 + 2)
    strip = np.asarray(Image.open("interpolation.png"))[2:34, :, 0]
    for place, seed in ((0, 5), (3, 6), (6, 7)):
        left = 2 + place * 34
        assert close(strip[:, left : left + 32], expected_pixels(trained, 1, seed=seed)[0, 0].numpy())
    assert invoke(trained, "--format", "strip", "--steps", 2, "--columns", 4, "--force").exit_code == 0
    assert Image.open("interpolation.png").size == (4 * 34 + 2, 2 * 34 + 2)
    assert invoke(trained, "--format", "animation", "--steps", 2).exit_code == 0
    assert Image.open("interpolation.gif").n_frames == 8  # type: ignore[attr-defined]
    assert invoke(trained, "--format", "animation", "--seeds", "1,2", "--out", "a.webp").exit_code == 0
    assert Image.open("a.webp").n_frames == 16  # type: ignore[attr-defined]


def test_files_command_in_shards(trained: Path, tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert invoke(trained, "--format", "files", "--num", 7, "--out", whole).exit_code == 0
    names = [f"{i:06d}.png" for i in range(7)]
    for rank in range(3):
        result = invoke(
            trained, "--format", "files", "--num", 7, "--out", shared, RANK=str(rank), WORLD_SIZE="3"
        )
        assert result.exit_code == 0, result.output
        assert f"Rank {rank} of 3: {3 if rank == 0 else 2} images" in result.output
    assert sorted(p.name for p in whole.iterdir()) == names == sorted(p.name for p in shared.iterdir())
    for name, expected in zip(names, expected_pixels(trained, 7), strict=True):
        for folder in (whole, shared):
            assert close(np.asarray(Image.open(folder / name)), expected[0].numpy())

    result = invoke(trained, "--format", "files", "--num", 1, "--out", shared, RANK="2", WORLD_SIZE="3")
    assert result.exit_code == 0
    assert "Rank 2 of 3: no images" in result.output
    result = invoke(trained, "--format", "files", "--num", 2, "--out", whole, "--force")
    assert f"Left 5 other image files in {whole} unchanged" in result.output


def test_jpegs(trained: Path, tmp_path: Path) -> None:
    """They decode to about the pixels of the PNGs, grey or with chroma at full resolution."""
    for format, name in (("grid", "a.jpg"), ("strip", "b.JPEG")):
        for out in (tmp_path / name, (tmp_path / name).with_suffix(".png")):
            assert invoke(trained, "--format", format, "--out", out).exit_code == 0
        jpeg, png = Image.open(tmp_path / name), Image.open((tmp_path / name).with_suffix(".png"))
        assert (jpeg.format, jpeg.size) == ("JPEG", png.size)
        assert [layer[1:3] for layer in jpeg.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]
        assert np.abs(np.asarray(jpeg).astype(int) - np.asarray(png)).mean() < 6

    folder = tmp_path / "files"
    given = "--format", "files", "--num", 3, "--image-type", "jpg", "--out", folder
    assert invoke(trained, *given).exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:06d}.jpg" for i in range(3)]
    for i, expected in enumerate(expected_pixels(trained, 3)):
        image = Image.open(folder / f"{i:06d}.jpg")
        assert (image.format, image.mode) == ("JPEG", "L")
        assert np.abs(np.asarray(image).astype(int) - expected[0].numpy()).mean() < 6


@pytest.mark.parametrize("scale", [1, 3])
def test_scale(scale: int, trained: Path, tmp_path: Path) -> None:
    """Each pixel of an image is a square of ``scale`` × ``scale``; the lines in grids keep their 2 pixels."""
    side = 32 * scale
    given = [trained, "--scale", scale, "--device", "cpu"]
    assert invoke(*given, "--num", 3, "--columns", 2, "--out", tmp_path / "a.png").exit_code == 0
    grid = np.asarray(Image.open(tmp_path / "a.png"))[:, :, 0]
    assert grid.shape == (2 * (side + 2) + 2, 2 * (side + 2) + 2)
    points = ["--seeds", "0,1", "--steps", 1]
    assert invoke(*given, *points, "--format", "strip", "--out", tmp_path / "b.png").exit_code == 0
    strip = np.asarray(Image.open(tmp_path / "b.png"))[:, :, 0]
    assert strip.shape == (side + 4, 2 * (side + 2) + 2)
    frames = []
    for suffix in (".gif", ".webp"):
        out = tmp_path / f"c{suffix}"
        assert invoke(*given, *points, "--format", "animation", "--out", out).exit_code == 0
        with Image.open(out) as opened:
            assert opened.n_frames == 2  # type: ignore[attr-defined]
            frames.append(np.asarray(opened.convert("L")))
    expected = expected_pixels(trained, 1)[0, 0].numpy().repeat(scale, 0).repeat(scale, 1)
    for found in (grid[2 : side + 2, 2 : side + 2], strip[2 : side + 2, 2 : side + 2], *frames):
        assert close(found, expected)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ([], "generated.png"),
        (["--out", "new.jpg"], "new.jpg"),
        (["--format", "npy"], "generated.npy"),
        (["--format", "strip"], "interpolation.png"),
        (["--format", "animation"], "interpolation.gif"),
        (["--format", "files", "--num", "5"], "generated/000004.png"),
        (["--format", "files", "--num", "5", "--image-type", "jpg"], "generated/000000.jpg"),
    ],
    ids=str,
)
def test_existing_files(
    given: list[str], name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``--force``, an existing file ends the command before FROM is read, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    existing = Path(name)
    existing.parent.mkdir(exist_ok=True)
    existing.write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    for source in (trained, tmp_path / "missing.pt"):
        result = invoke(source, *given)
        assert result.exit_code == 2, result.output
        (line,) = result.output.splitlines()
        assert line == f"Error: --out: {name} exists already; give another --out, or --force to overwrite"
    assert sorted(tmp_path.rglob("*")) == before
    assert existing.read_text() == "kept"
    result = invoke(trained, *given, "--force")
    assert result.exit_code == 0, result.output
    assert existing.read_bytes() != b"kept"


def test_existing_files_of_other_processes_and_types(trained: Path, tmp_path: Path) -> None:
    """Only the files that a process would write itself stop it."""
    given = ["--format", "files", "--num", 7, "--out", tmp_path / "out"]
    assert invoke(trained, *given, RANK="0", WORLD_SIZE="2").exit_code == 0
    assert invoke(trained, *given, RANK="1", WORLD_SIZE="2").exit_code == 0
    result = invoke(trained, *given, RANK="1", WORLD_SIZE="2")
    assert result.exit_code == 2
    assert "000001.png exists already (and 2 more);" in " ".join(result.output.split())
    result = invoke(trained, *given, "--image-type", "jpg")
    assert result.exit_code == 0, result.output
    assert f"Left 7 other image files in {tmp_path / 'out'} unchanged" in result.output


@pytest.mark.parametrize("given", [["--out", "a/b/c.png"], ["--format", "files", "--out", "a/b"]], ids=str)
def test_a_failure_leaves_no_empty_folder(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert invoke("missing.pt", *given).exit_code == 2
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_the_weights_used_are_named(tmp_path: Path, one_thread: None) -> None:
    g, d = SMALL.generator("reference"), SMALL.discriminator("reference")
    content = checkpoint.Checkpoint(SMALL, g.state_dict(), d.state_dict(), epoch=1, batch=3, step=472)
    checkpoint.write(content, tmp_path / "run.pt")
    result = invoke(tmp_path / "run.pt", "--out", tmp_path / "a.png")
    words = "run.pt (epoch 2, step 472), weights of that step (the run keeps no average); engine"
    assert words in result.output
    torch.save(g.state_dict(), tmp_path / "g.pth")
    result = invoke(tmp_path / "g.pth", "--out", tmp_path / "b.png")
    assert f"Generator of {tmp_path / 'g.pth'}; engine" in result.output


@pytest.mark.parametrize("format", ["grid", "npy", "strip", "animation"])
def test_only_files_can_be_split_over_processes(format: str, trained: Path) -> None:
    result = invoke(trained, "--format", format, RANK="0", WORLD_SIZE="2")
    assert result.exit_code == 2
    assert f"--format {format} cannot be split over WORLD_SIZE=2 processes" in result.output
    assert "use --format files" in result.output


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("a", "2"), ("0", "")])
def test_bad_shards(rank: str, world: str, trained: Path) -> None:
    result = invoke(trained, "--format", "files", RANK=rank, WORLD_SIZE=world)
    assert result.exit_code == 2
    assert f"0 ≤ RANK < WORLD_SIZE, got '{rank}' and '{world}'" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num", "0"], ["--num", "integer of at least 1", "'0'"]),
        (["--num", "many"], ["--num", "integer of at least 1", "'many'"]),
        (["--truncation", "0"], ["--truncation", "positive number", "'0'"]),
        (["--truncation", "-2"], ["--truncation", "positive number", "'-2'"]),
        (["--truncation", "nan"], ["--truncation", "positive number", "'nan'"]),
        (["--format", "jpeg"], ["--format", "jpeg", "'grid', 'files', 'npy', 'strip', 'animation'"]),
        (["--seed", "-1"], ["--seed", "integer of at least 0"]),
        (["--seeds", "3"], ["--seeds", "at least two integers", "'3'"]),
        (["--seeds", "3,x"], ["--seeds", "at least two integers", "'3,x'"]),
        (["--seeds", "3,-1"], ["--seeds", "at least two integers", "'3,-1'"]),
        (["--steps", "0"], ["--steps", "integer of at least 1"]),
        (["--batch-size", "0"], ["--batch-size", "integer of at least 1"]),
        (["--columns", "0"], ["--columns", "integer of at least 1"]),
        (["--engine", "fast"], ["--engine", "'auto', 'reference', 'triton', 'native'"]),
        (["--device", "tpu"], ["--device", "'auto', 'cpu', 'cuda'"]),
        (["--which", "first"], ["--which", "'last', 'best'"]),
        (["--which", "best"], ["which must be last for a single file"]),
        (["--steps", "3"], ["--steps does not apply to --format grid, which takes --num, --columns"]),
        (
            ["--format", "npy", "--columns", "3"],
            ["--columns does not apply to --format npy, which takes --num"],
        ),
        (
            ["--format", "strip", "--num", "3"],
            ["--num does not apply to --format strip, which takes --seeds"],
        ),
        (["--format", "npy", "--scale", "1"], ["--scale does not apply to --format npy, which takes --num"]),
        (["--scale", "0"], ["--scale", "integer of at least 1"]),
        (["--format", "npy", "--scale", "2"], ["--scale does not apply to --format npy, which takes --num"]),
        (["--image-type", "jpg"], ["--image-type does not apply to --format grid, which takes --num"]),
        (["--format", "files", "--image-type", "gif"], ["--image-type", "gif", "'png', 'jpg'"]),
        (["--out", "x.gif"], ["--out must end in .png or .jpg or .jpeg, got 'x.gif'"]),
        (["--format", "npy", "--out", "x.jpg"], ["--out must end in .npy, got 'x.jpg'"]),
        (["--format", "animation", "--out", "x.avi"], ["--out must end in .gif or .webp, got 'x.avi'"]),
        (["--out", "folder.png"], ["--out must be a file, got the folder 'folder.png'"]),
        (["--out", "file/x.png"], ["--out: cannot make the folder 'file'"]),
        (["--format", "files", "--out", "file"], ["--out: cannot make the folder 'file'"]),
    ],
)
def test_usage_errors(
    arguments: list[str], words: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.iterdir())
    result = invoke(trained, *arguments)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_sources_without_a_generator(tmp_path: Path, trained: Path) -> None:
    for source, message in (
        (tmp_path / "missing.pth", "missing.pth: No such file"),
        (tmp_path / "empty", "empty has no checkpoint of a run"),
        (tmp_path / "d.pth", "d.pth holds the weights of a Discriminator, not of a Generator"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        torch.save(SMALL.discriminator().state_dict(), tmp_path / "d.pth")
        result = invoke(source, "--out", tmp_path / "x.png")
        assert result.exit_code == 2
        assert message in result.output
        assert result.output.startswith("Error: ")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_unsupported_engine_is_a_usage_error(trained: Path, tmp_path: Path) -> None:
    result = invoke(trained, "--engine", "triton", "--out", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "--engine: engine 'triton' is forced, but does not cover this" in result.output


def test_a_diverged_generator_is_a_run_error(tmp_path: Path, one_thread: None) -> None:
    g = SMALL.generator("reference")
    with torch.no_grad():
        next(g.parameters()).fill_(math.nan)
    torch.save(g.state_dict(), tmp_path / "g.pth")
    result = invoke(tmp_path / "g.pth", "--out", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "the generator's output contains NaN" in result.output
    assert not (tmp_path / "x.png").exists()


def test_mlp_command(tmp_path: Path, one_thread: None) -> None:
    mlp = Architecture("mlp", latent_dim=6, channels=3, image_size=32)
    content = checkpoint.Checkpoint(mlp, mlp.generator().state_dict(), mlp.discriminator().state_dict())
    checkpoint.write(content, tmp_path / "mlp.pt")
    for format, out in (("npy", "a.npy"), ("grid", "a.png"), ("strip", "b.png")):
        result = invoke(tmp_path / "mlp.pt", "--format", format, "--out", tmp_path / out)
        assert result.exit_code == 0, result.output
        assert "engine reference" in result.output
    assert np.load(tmp_path / "a.npy").shape == (64, 32, 32, 3)
    result = invoke(tmp_path / "mlp.pt", "--engine", "native")
    assert result.exit_code == 2
    assert "engine must be auto or reference for the model mlp, got 'native'" in result.output


def test_each_format_has_its_defaults() -> None:
    from dcgan.cli import generate

    assert set(generate.FORMATS) == set(get_args(generate.Format))
    for format, (name, suffixes, _) in generate.FORMATS.items():
        assert name
        assert (format == "files") == (not suffixes)
        assert all(suffix.startswith(".") for suffix in suffixes)
    options = set(itertools.chain(*(options for _, _, options in generate.FORMATS.values())))
    assert options == {"--num", "--columns", "--seeds", "--steps", "--scale", "--image-type"}
    assert generate.FORMATS["animation"][1] == generation.ANIMATIONS
    assert generate.FORMATS["grid"][1] == generate.FORMATS["strip"][1] == generation.IMAGES


def test_help_does_not_import_pytorch() -> None:
    """``--help``, and a usage error that needs no file, end before PyTorch is imported."""
    code = (
        "import sys\n"
        "from dcgan.cli import generate\n"
        "import typer\n"
        "app = typer.Typer()\n"
        "app.command()(generate.command)\n"
        "for words in (['--help'], ['x.pt', '--format=npy', '--columns=3']):\n"
        "    try:\n"
        "        app(words)\n"
        "    except SystemExit as end:\n"
        "        print('exit', end.code)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"exit (\d)", done.stdout) == ["0", "2"]
