"""Tests of noise, images, the files they are written to, and ``dcgan generate``."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomise
from PIL import Image
from scipy import stats
from torch import Tensor, nn
from torchvision.utils import save_image
from typer.testing import CliRunner

from dcgan import checkpoint, fast, generation, images, models
from dcgan.cli.app import app
from dcgan.errors import InputError, RunError
from dcgan.networks import Architecture

SMALL = Architecture(latent_dim=5, channels=1, features_g=4, features_d=4, image_size=32)


class Echo(nn.Module):
    """A generator that returns z as the image."""

    def __init__(self, latent_dim: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.eval()

    def forward(self, z: Tensor) -> Tensor:
        assert z.dtype == self.weight.dtype
        return z[:, None, None, :] * self.weight


# --- noise --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    n=st.integers(1, 200),
    batch=st.integers(1, 150),
    world=st.integers(1, 5),
    seed=st.integers(0, 2**70),
    latent_dim=st.integers(1, 20),
    truncation=st.none() | st.floats(0.01, 4),
)
def test_noise_depends_only_on_seed_and_index(
    n: int, batch: int, world: int, seed: int, latent_dim: int, truncation: float | None
) -> None:
    expected = generation.latents(range(n), latent_dim, seed=seed, truncation=truncation)
    assert expected.shape == (n, latent_dim)
    for rank in range(world):
        batches = list(
            generation.images(
                Echo(latent_dim), n, seed=seed, batch=batch, truncation=truncation, shard=(rank, world)
            )
        )
        assert all(len(images) == batch for images in batches[:-1])
        mine = torch.cat(batches).flatten(1) if batches else torch.empty(0, latent_dim)
        assert torch.equal(mine, expected[rank::world])


def test_noise_matches_its_definition() -> None:
    indices = [0, 63, 64, 700, 3]
    found = generation.latents(indices, 7, seed=11)
    for row, index in zip(found, indices, strict=True):
        rng = np.random.default_rng(np.random.SeedSequence(11, spawn_key=(index // 64,)))
        block = rng.standard_normal((64, 7), dtype=np.float32)
        assert np.array_equal(row.numpy(), block[index % 64])


def test_noise_is_normal_and_seeds_are_independent() -> None:
    a, b = (generation.latents(range(4000), 10, seed=seed).flatten().numpy() for seed in (0, 1))
    assert stats.kstest(a, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert len(np.unique(a)) > 0.99 * len(a)


@pytest.mark.parametrize("t", [1e-3, 0.5, 1.0, 2.0])
def test_truncation(t: float) -> None:
    plain = generation.latents(range(2000), 10)
    cut = generation.latents(range(2000), 10, truncation=t)
    assert cut.abs().max() <= t
    inside = plain.abs() <= t
    assert torch.equal(cut[inside], plain[inside])
    assert stats.kstest(cut.flatten().double().numpy(), stats.truncnorm(-t, t).cdf).pvalue > 1e-3


def test_a_large_truncation_has_no_effect() -> None:
    assert torch.equal(generation.latents(range(500), 10, truncation=9), generation.latents(range(500), 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"truncation": 0}, "truncation must be a positive number, got 0"),
        ({"truncation": -1.0}, "truncation must be a positive number, got -1.0"),
        ({"truncation": math.nan}, "truncation must be a positive number, got nan"),
        ({"truncation": math.inf}, "truncation must be a positive number, got inf"),
        ({"truncation": True}, "truncation must be a positive number, got True"),
        ({"shard": (2, 2)}, "rank must be from 0 to 1 for a world of 2, got 2"),
        ({"shard": (0, 0)}, "world must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_of_images(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):  # raised by the call, not at the first batch
        generation.images(Echo(), **{"n": 3} | arguments)


def test_latents_reject_bad_arguments() -> None:
    with pytest.raises(InputError, match="index must be an integer of at least 0, got -3"):
        generation.latents([1, -3], 4)
    with pytest.raises(InputError, match="latent_dim must be an integer of at least 1, got 0"):
        generation.latents([1], 0)


# --- interpolation ------------------------------------------------------------------------------------------

vectors = st.lists(st.floats(-10, 10), min_size=2, max_size=6).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)


@settings(max_examples=100)
@given(angle=st.floats(0, 3.1), start=st.floats(-4, 4), t=st.floats(0, 1))
def test_slerp_on_the_unit_circle(angle: float, start: float, t: float) -> None:
    def at(phi: float) -> Tensor:
        return torch.tensor([math.cos(phi), math.sin(phi)], dtype=torch.float64)

    found = generation.slerp(at(start), at(start + angle), t)
    torch.testing.assert_close(found, at(start + t * angle), rtol=0, atol=1e-13)


@settings(max_examples=100)
@given(
    a=vectors, scale=st.floats(0.1, 10), t=st.floats(0, 1), noise=st.sampled_from([0.0, 1e-12, 1e-9, 1e-7])
)
def test_slerp_of_parallel_vectors_is_a_straight_line(
    a: Tensor, scale: float, t: float, noise: float
) -> None:
    if a.norm() < 1e-3:
        a = torch.ones_like(a)
    b = scale * a + noise * torch.arange(len(a), dtype=torch.float64)
    expected = (1 - t) * a + t * b
    torch.testing.assert_close(generation.slerp(a, b, t), expected, rtol=1e-12, atol=1e-12)


def test_slerp_endpoints_lengths_and_vector_t() -> None:
    a, b = torch.randn(2, 50)
    b *= a.norm() / b.norm()
    t = torch.linspace(0, 1, 7)
    path = generation.slerp(a, b, t)
    assert path.shape == (7, 50)
    assert path.dtype == torch.float32
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(path.norm(dim=1), a.norm().expand(7))
    steps = torch.arccos((path[1:] * path[:-1]).sum(1).double() / a.double().norm() ** 2)
    torch.testing.assert_close(steps, steps[:1].expand(6), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [-1.0, -2.0], "must not be opposite"),
        ([1.0, 2.0], [-10.0, -20.000001], "must not be opposite"),
        ([0.0, 0.0], [1.0, 2.0], "must be finite and not 0, got vectors of length 0 and"),
        ([1.0, 0.0], [math.nan, 2.0], "must be finite and not 0, got vectors of length 1 and nan"),
        ([1.0, 0.0], [1.0, 0.0, 0.0], r"vectors of the same length, got \[2\] and \[3\]"),
        ([[1.0]], [[1.0]], r"vectors of the same length, got \[1, 1\] and \[1, 1\]"),
    ],
)
def test_slerp_rejects_bad_vectors(a: list[Any], b: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generation.slerp(torch.tensor(a), torch.tensor(b), 0.5)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_interpolation(closed: bool, batch: int) -> None:
    points = generation.waypoints([3, 1, 4], 5)
    assert torch.equal(points[1], generation.latents([0], 5, seed=1)[0])
    batches = list(generation.interpolation(Echo(), points, 6, closed=closed, batch=batch))
    assert all(len(images) == batch for images in batches[:-1])
    z = torch.cat(batches).flatten(1)
    assert len(z) == (18 if closed else 13)
    torch.testing.assert_close(z[[0, 6, 12]], points)
    torch.testing.assert_close(z[9], generation.slerp(points[1], points[2], 0.5))
    if closed:
        torch.testing.assert_close(z[15], generation.slerp(points[2], points[0], 0.5))


def test_interpolation_rejects_bad_arguments() -> None:
    for shape in ([5], [1, 5], [3, 4]):
        with pytest.raises(InputError, match=r"points must be \[K, 5\] with K of at least 2, got "):
            generation.interpolation(Echo(), torch.ones(shape), 3)
    with pytest.raises(InputError, match="steps must be an integer of at least 1, got 0"):
        generation.interpolation(Echo(), torch.ones(3, 5), 0)


# --- images -------------------------------------------------------------------------------------------------


def test_images_match_the_network() -> None:
    reference = models.Generator(6, 3, 4, 32)
    randomise(reference)
    network = fast.convert(reference).eval()
    batches = list(generation.images(network, 10, seed=4, batch=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    expected = reference.double().eval()(generation.latents(range(10), 6, seed=4).double())
    torch.testing.assert_close(torch.cat(batches).double(), expected.detach(), rtol=0, atol=1e-5)


def test_images_have_the_networks_dtype_and_keep_the_grad_mode() -> None:
    batch = next(generation.images(Echo(dtype=torch.float64), 3))
    assert batch.dtype == torch.float64
    assert not batch.requires_grad
    assert torch.is_grad_enabled()


def test_a_generator_in_training_mode_is_rejected() -> None:
    with pytest.raises(InputError, match="must be in eval mode"):
        generation.images(Echo().train(), 3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(error: RuntimeError) -> None:
    class Hungry(Echo):
        def forward(self, z: Tensor) -> Tensor:
            raise error

    with pytest.raises(RunError, match="a batch of 7 images does not fit into memory; use a smaller batch"):
        next(generation.images(Hungry(), 20, batch=7))


def test_rounding_matches_torchvision(tmp_path: Path) -> None:
    levels = torch.arange(-2, 259).div(127.5).sub(1)
    around = torch.stack([levels + d for d in (-1 / 255, -1e-6, 0, 1e-6, 1 / 255)])
    batch = around.view(1, 1, 5, -1)
    save_image(batch, tmp_path / "theirs.png", normalize=True, value_range=(-1, 1))
    theirs = np.asarray(Image.open(tmp_path / "theirs.png"))[..., 0]
    assert np.array_equal(generation.to_uint8(batch)[0, 0].numpy(), theirs)


def test_nan_is_an_error() -> None:
    with pytest.raises(RunError, match="output contains NaN"):
        generation.to_uint8(torch.tensor([0.0, math.nan]))


# --- files --------------------------------------------------------------------------------------------------


def random_pixels(n: int, channels: int) -> Tensor:
    return torch.randint(0, 256, (n, channels, 6, 4), dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "columns"), [(1, 8), (7, 3), (8, 8), (3, 8)])
def test_write_grid_matches_save_grid(n: int, columns: int, channels: int, tmp_path: Path) -> None:
    pixels = random_pixels(n, channels)
    generation.write_grid(pixels.split(2), tmp_path / "ours.png", columns)
    images.save_grid(pixels / 127.5 - 1, tmp_path / "theirs.png", columns)
    ours, theirs = (np.asarray(Image.open(tmp_path / name)) for name in ("ours.png", "theirs.png"))
    assert np.array_equal(ours, theirs)


def from_pil(image: Image.Image, channels: int) -> Tensor:
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_files_and_array(channels: int, tmp_path: Path) -> None:
    pixels = random_pixels(7, channels)
    assert generation.write_files(pixels.split(3), tmp_path) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:06d}.png" for i in range(7)]
    for i, image in enumerate(pixels):
        with Image.open(tmp_path / f"{i:06d}.png") as opened:
            assert opened.mode == ("L" if channels == 1 else "RGB")
            assert torch.equal(from_pil(opened, channels), image)

    generation.write_npy(pixels.split(3), tmp_path / "a.npy", 7)
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert array.dtype == np.uint8
    assert array.shape == (7, 6, 4, channels)
    assert np.array_equal(array, pixels.permute(0, 2, 3, 1).numpy())


def test_images_of_many_channels_can_only_be_written_as_an_array(tmp_path: Path) -> None:
    pixels = random_pixels(2, 5)
    generation.write_npy([pixels], tmp_path / "a.npy", 2)
    assert np.load(tmp_path / "a.npy").shape == (2, 6, 4, 5)
    for write, name in (
        (generation.write_grid, "grid.png"),
        (generation.write_files, ""),
        (generation.write_animation, "a.gif"),
    ):
        with pytest.raises(InputError, match="an image file needs 1 or 3 channels, but these images have 5"):
            write([pixels], tmp_path / name)  # type: ignore[operator]
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".GIF"])
def test_animation(suffix: str, tmp_path: Path) -> None:
    pixels = random_pixels(5, 1)
    path = tmp_path / f"animation{suffix}"
    generation.write_animation(pixels.split(2), path, milliseconds=50)
    with Image.open(path) as opened:
        assert opened.n_frames == 5  # type: ignore[attr-defined]
        assert opened.info["loop"] == 0
        for i, image in enumerate(pixels):
            opened.seek(i)
            opened.load()
            assert opened.info["duration"] == 50
            assert torch.equal(from_pil(opened, 1), image)


def test_animation_with_another_suffix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"path must end in one of \.gif, \.webp, got .*a\.avi"):
        generation.write_animation([random_pixels(2, 1)], tmp_path / "a.avi")


WRITERS = {
    "grid.png": generation.write_grid,
    "a.npy": lambda pixels, path: generation.write_npy(pixels, path, 4),
    "a.gif": generation.write_animation,
}


@pytest.mark.parametrize(("name", "writer"), WRITERS.items(), ids=WRITERS)
def test_an_interrupt_leaves_the_old_file_unchanged(name: str, writer: Any, tmp_path: Path) -> None:
    def interrupted() -> Iterator[Tensor]:
        yield random_pixels(2, 1)
        raise KeyboardInterrupt

    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        writer(interrupted(), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
    writer([random_pixels(4, 1)], tmp_path / name)
    assert (tmp_path / name).read_bytes() != b"old"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RunError, match=r"cannot write .*No such file"):
        writer([random_pixels(4, 1)], tmp_path / "missing" / name)


def test_an_interrupt_leaves_only_complete_files(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Tensor]:
        yield random_pixels(2, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generation.write_files(interrupted(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000.png", "000001.png"]


@pytest.mark.parametrize("n", [3, 5])
def test_an_array_of_the_wrong_length_is_discarded(n: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"n must equal the number of images, 4, got {n}"):
        generation.write_npy([random_pixels(4, 1)], tmp_path / "a.npy", n)
    assert not list(tmp_path.iterdir())


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path, one_thread: None) -> Path:
    path = tmp_path / "run.pt"
    g, ema = SMALL.generator("reference"), SMALL.generator("reference")
    randomise(g)
    randomise(ema)
    d = SMALL.discriminator("reference")
    checkpoint.write(checkpoint.Checkpoint(SMALL, g.state_dict(), d.state_dict(), ema=ema.state_dict()), path)
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
    assert "run.pt, moving average; engine" in result.output
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
    )
    assert result.exit_code == 0, result.output
    assert "run.pt; engine reference on cpu" in result.output or torch.cuda.is_available()
    expected = expected_pixels(trained, 10, seed=3, ema=False).permute(0, 2, 3, 1).numpy()
    assert close(np.load(out), expected)


def test_grid_command(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(trained).exit_code == 0
    assert Image.open("generated.png").size == (8 * 34 + 2, 8 * 34 + 2)
    assert invoke(trained, "-n", 10, "--columns", 4).exit_code == 0
    assert Image.open("generated.png").size == (4 * 34 + 2, 3 * 34 + 2)


def test_strip_and_animation_commands(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(trained, "--format", "strip", "--seeds", "5,6,7", "--steps", 3).exit_code == 0
    assert Image.open("interpolation.png").size == (7 * 34 + 2, 34 + 2)
    strip = np.asarray(Image.open("interpolation.png"))[2:34, :, 0]
    for place, seed in ((0, 5), (3, 6), (6, 7)):
        left = 2 + place * 34
        assert close(strip[:, left : left + 32], expected_pixels(trained, 1, seed=seed)[0, 0].numpy())
    assert invoke(trained, "--format", "strip", "--steps", 2, "--columns", 4).exit_code == 0
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
    result = invoke(trained, "--format", "files", "--num", 2, "--out", whole)
    assert f"Left 5 other PNG files in {whole} unchanged" in result.output


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
        (["--out", "x.jpg"], ["--out must end in .png, got 'x.jpg'"]),
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

    assert generate.DEFAULT_OUT.keys() == generate.FORMAT_OPTIONS.keys()
    assert generate.DEFAULT_OUT.keys() == generate.SUFFIXES.keys() | {"files"}
    for format, suffixes in generate.SUFFIXES.items():
        assert Path(generate.DEFAULT_OUT[format]).suffix in suffixes
    options = set(itertools.chain(*generate.FORMAT_OPTIONS.values()))
    assert options == {"--num", "--columns", "--seeds", "--steps"}
