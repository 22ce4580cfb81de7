"""Sampling a trained Generator in bounded memory, and writing what it makes.

Noise is a function of the seed and the image's index alone. Image i belongs to chunk c = i // 64, whose
[64, latent_dim] values come from NumPy's PCG64 seeded with ``SeedSequence(seed, spawn_key=(c,))``, on the
CPU. So image i has the same z whatever the batch size, the number of images, the device and the number of
processes that share the work; chunks, and seeds, are independent of each other. (The image itself may differ
in its last bits, as the kernels sum in another order for another batch or device.)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor, nn
from torchvision.utils import make_grid

from dcgan.errors import InputError, RunError
from dcgan.files import replacing

CHUNK = 64

# --- noise --------------------------------------------------------------------------------------------------


def latents(
    indices: Sequence[int], latent_dim: int, *, seed: int = 0, truncation: float | None = None
) -> Tensor:
    """The noise of the images with these indices, float32 [len(indices), latent_dim] on the CPU.

    Args:
        indices: of images, each at least 0.
        latent_dim: length of z.
        seed: at least 0.
        truncation: t: each z_i with |z_i| > t is replaced by a draw from N(0, 1) given |z_i| ≤ t (the
            truncation trick); the others stay as they are. The draw inverts the distribution function, which
            is as good as sampling again until it fits, and takes one draw for any t:
            z = √2·erf⁻¹(u·erf(t/√2)), u uniform in [-1, 1).

    Raises:
        InputError: an argument out of its range.

    Source: Brock et al., *Large Scale GAN Training for High Fidelity Natural Image Synthesis*, 2019.
    """
    _integer(1, latent_dim=latent_dim)
    _integer(0, seed=seed, **({"index": min(indices)} if len(indices) else {}))
    if truncation is not None and not (
        isinstance(truncation, int | float) and 0 < truncation < math.inf and truncation is not True
    ):
        raise InputError(f"truncation must be a positive number, got {truncation!r}")
    z = torch.empty(len(indices), latent_dim)
    for chunk, group in itertools.groupby(range(len(indices)), lambda k: indices[k] // CHUNK):
        rows = list(group)
        drawn = _chunk(seed, chunk, latent_dim, truncation)
        z[rows] = drawn[[indices[k] % CHUNK for k in rows]]
    return z


@functools.lru_cache(maxsize=1)  # small batches ask for the same chunk again and again
def _chunk(seed: int, chunk: int, latent_dim: int, truncation: float | None) -> Tensor:
    """[CHUNK, latent_dim], not to be written to."""
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(chunk,)))
    z = torch.from_numpy(random.standard_normal((CHUNK, latent_dim), dtype=np.float32))
    if truncation is not None:
        outside = z.abs() > truncation
        u = torch.from_numpy(random.uniform(-1, 1, int(outside.sum())))
        drawn = math.sqrt(2) * torch.erfinv(u * math.erf(truncation / math.sqrt(2)))
        # Where erf(t/√2) rounds to 1 the inverse may be infinite.
        z[outside] = drawn.float().clamp(-truncation, truncation)
    return z


def slerp(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    """Spherical interpolation: from a at t = 0 to b at t = 1 at constant angular speed.

    ::

        slerp(a, b, t) = sin((1-t)·ω)/sin ω · a + sin(t·ω)/sin ω · b        ω the angle between a and b

    Between two draws of z it keeps the length that draws have, where a straight line passes nearer to 0 than
    any draw does. Where a and b have one direction it is its limit, (1-t)·a + t·b.

    Args:
        a, b: [D], floating point, not 0.
        t: a number, or [T].

    Returns:
        [D], or [T, D] for t [T]; computed in float64, of a's dtype.

    Raises:
        InputError: shapes differ, a or b is 0 or not finite, or they are opposite (ω within 1e-6 of π), where
            every great circle would do.

    Source: White, *Sampling Generative Networks*, 2016.
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"a and b must be vectors of one length, got {list(a.shape)} and {list(b.shape)}")
    x, y = a.double(), b.double()
    norms = float(x.norm()), float(y.norm())
    if not all(0 < norm < math.inf for norm in norms):
        raise InputError(
            f"a and b must be finite and not 0, got vectors of length {norms[0]:g} and {norms[1]:g}"
        )
    u, v = x / norms[0], y / norms[1]
    omega = 2 * math.atan2(
        float((u - v).norm()), float((u + v).norm())
    )  # arccos(u·v), exact near 0 and π too
    if math.pi - omega < 1e-6:
        raise InputError("a and b must not be opposite: the way between them is not determined")
    s = torch.as_tensor(t, dtype=torch.float64)[..., None]
    if omega < 1e-8:
        return ((1 - s) * x + s * y).to(a.dtype)
    return ((torch.sin((1 - s) * omega) * x + torch.sin(s * omega) * y) / math.sin(omega)).to(a.dtype)


def waypoints(seeds: Sequence[int], latent_dim: int, *, truncation: float | None = None) -> Tensor:
    """The noise of image 0 of each seed, float32 [len(seeds), latent_dim]. Errors are :func:`latents`'."""
    return torch.cat([latents([0], latent_dim, seed=seed, truncation=truncation) for seed in seeds])


# --- images -------------------------------------------------------------------------------------------------


def images(
    generator: nn.Module,
    n: int,
    *,
    seed: int = 0,
    batch: int = 64,
    truncation: float | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Tensor]:
    """n images, a batch at a time.

    Args:
        generator: z [N, latent_dim] → images, with an attribute ``latent_dim``, in eval mode.
        n: how many, at least 1.
        seed, truncation: of the noise, see :func:`latents`.
        batch: images at a time, at least 1; the last batch may be smaller.
        shard: (rank, world): only images rank, rank + world, rank + 2·world, …, which may be none.

    Yields:
        [≤ batch, C, H, W] in [-1, 1], on the generator's device, in the order of the index.

    Raises:
        InputError: an argument out of its range, or a generator in training mode, whose images would depend
            on one another.
        RunError: while it is read: a batch does not fit into memory.
    """
    _integer(1, n=n, batch=batch)
    rank, world = shard
    _integer(1, world=world)
    if not 0 <= rank < world:
        raise InputError(f"rank must be from 0 to {world - 1} for a world of {world}, got {rank!r}")
    dim: Any = generator.latent_dim
    latents(
        [], dim, seed=seed, truncation=truncation
    )  # its errors now, not when the first batch is asked for
    mine = range(rank, n, world)
    return _run(
        generator,
        (
            latents(mine[i : i + batch], dim, seed=seed, truncation=truncation)
            for i in range(0, len(mine), batch)
        ),
    )


def interpolation(
    generator: nn.Module, points: Tensor, steps: int, *, closed: bool = False, batch: int = 64
) -> Iterator[Tensor]:
    """Images along the way through the points of latent space, :func:`slerp` between neighbours.

    Args:
        generator: as for :func:`images`.
        points: [K, latent_dim], K ≥ 2.
        steps: images a leg, at least 1: from a point (included) to the next (which begins the next leg).
        closed: a last leg leads back to the first point, which is not repeated: a loop of K·steps images.
            Otherwise the last point ends the way, which has (K-1)·steps + 1 images.
        batch: images at a time.

    Yields, raises: as :func:`images`, and InputError where :func:`slerp` does.
    """
    _integer(1, steps=steps, batch=batch)
    dim: Any = generator.latent_dim
    if points.ndim != 2 or points.shape[0] < 2 or points.shape[1] != dim:
        raise InputError(f"points must be [K, {dim}] with K of at least 2, got {list(points.shape)}")
    t = torch.arange(steps, dtype=torch.float64) / steps
    ends = torch.cat([points, points[:1]]) if closed else points
    legs = [slerp(a, b, t) for a, b in itertools.pairwise(ends)]
    return _run(generator, torch.cat(legs if closed else [*legs, points[-1:]]).split(batch))


def _run(generator: nn.Module, noise: Iterable[Tensor]) -> Iterator[Tensor]:
    if generator.training:
        raise InputError("generator must be in eval mode: call generator.eval() first")
    parameter = next(generator.parameters())

    def batches() -> Iterator[Tensor]:
        for z in noise:
            try:
                with torch.no_grad():
                    made = generator(z.to(parameter))
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                raise RunError(
                    f"a batch of {len(z)} images does not fit into memory; try a smaller one"
                ) from error
            yield made

    return batches()


def to_uint8(batch: Tensor) -> Tensor:
    """Pixels of images: [-1, 1] → 0 … 255, rounded as torchvision's ``save_image`` does.

    Args:
        batch: floating point, any shape and device; values beyond [-1, 1] are clamped.

    Returns:
        uint8 on the CPU.

    Raises:
        RunError: a value is NaN, which no pixel stands for.
    """
    values = batch.detach().float()
    if values.isnan().any():
        raise RunError("the generator made NaN instead of an image: its training has diverged")
    values = values.clamp(-1, 1).add_(1).div_(2)
    return values.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8).cpu()


# --- files --------------------------------------------------------------------------------------------------
# All take batches of pixels, uint8 [N, C, H, W] on the CPU, at least one; a picture has 1 or 3 channels (else
# InputError). A file is replaced whole, or stays as it was; RunError where it can't be written.


def write_grid(pixels: Iterable[Tensor], path: Path, columns: int = 8) -> None:
    """One PNG, row by row, with a black line of 2 pixels between images.

    As :func:`dcgan.images.save_grid` writes, but it holds pixels, a quarter of the memory of floats.
    """
    _integer(1, columns=columns)
    picture = _picture(make_grid(torch.cat(list(pixels)), nrow=columns))
    with _writing(path) as file:
        picture.save(file, format="PNG")


def write_files(pixels: Iterable[Tensor], folder: Path, indices: Iterable[int] | None = None) -> int:
    """A PNG an image, named :func:`file_name` of its index: 0, 1, … unless given. Returns how many."""
    count = 0
    each = (image for batch in pixels for image in batch)
    for image, index in zip(each, itertools.count() if indices is None else indices, strict=False):
        picture = _picture(image)
        with _writing(folder / file_name(index)) as file:
            picture.save(file, format="PNG")
        count += 1
    return count


def file_name(index: int) -> str:
    """``000000.png``: six digits whatever the number of images, so that image i has one name."""
    return f"{index:06d}.png"


def write_npy(pixels: Iterable[Tensor], path: Path, n: int) -> None:
    """One NumPy array, uint8 [n, H, W, C], a batch at a time.

    Raises:
        InputError: there are other than n images.
    """
    _integer(1, n=n)
    written = 0
    with _writing(path) as file:
        for batch in pixels:
            array = batch.permute(0, 2, 3, 1).numpy()
            if not written:
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, *array.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(array.tobytes())
            written += len(array)
        if written != n:
            raise InputError(f"n must be the number of images, {written}, got {n}")


def write_animation(pixels: Iterable[Tensor], path: Path, milliseconds: int = 80) -> None:
    """An endless GIF or WebP (lossless), by the path's suffix, each image shown for ``milliseconds``.

    A GIF has 256 colours an image: all greys, but not all of RGB.
    """
    _integer(1, milliseconds=milliseconds)
    kind = path.suffix.lower()
    if kind not in ANIMATIONS:
        raise InputError(f"path must end in one of {', '.join(ANIMATIONS)}, got {str(path)!r}")
    if kind == ".webp" and not features.check("webp"):
        raise InputError("this Pillow was built without WebP; use .gif")
    first, *rest = [_picture(image) for batch in pixels for image in batch]
    options = {"lossless": True} if kind == ".webp" else {}
    with _writing(path) as file:
        first.save(
            file,
            format=kind[1:].upper(),
            save_all=True,
            append_images=rest,
            duration=milliseconds,
            loop=0,
            **options,
        )


ANIMATIONS = (".gif", ".webp")


def _picture(image: Tensor) -> Image.Image:
    """uint8 [1 or 3, H, W] as Pillow has it."""
    if image.shape[0] not in (1, 3):
        raise InputError(f"a picture has 1 or 3 channels, these images have {image.shape[0]}; write an array")
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if image.shape[0] == 1 else array)


@contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _integer(minimum: int, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise InputError(f"{name} must be an integer of at least {minimum}, got {value!r}")
