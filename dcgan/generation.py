"""Sampling of a trained Generator in bounded memory, and writers for the generated images.

Noise depends only on the RNG seed and the image's index. Image i belongs to noise block c = i // 64, whose
[64, latent_dim] values come from NumPy's PCG64 seeded with ``SeedSequence(seed, spawn_key=(c,))``, on the
CPU. Image i therefore has the same z for any batch size, number of images, device and number of processes
that share the work; blocks and seeds are independent of each other. (The last bits of the image itself may
differ, because the kernels sum in another order for another batch size or device.)
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor, nn
from torch.nn import functional as F

from dcgan.errors import InputError, RunError, check_integers
from dcgan.files import replacing, writing

NOISE_BLOCK = 64

# --- noise --------------------------------------------------------------------------------------------------


def latents(
    indices: Sequence[int], latent_dim: int, *, seed: int = 0, truncation: float | None = None
) -> Tensor:
    """Return the noise of the images with these indices, float32 [len(indices), latent_dim] on the CPU.

    Args:
        indices: image indices, each at least 0.
        latent_dim: length of z.
        seed: RNG seed, at least 0.
        truncation: t: each z_i with |z_i| > t is replaced by a draw from N(0, 1) given |z_i| ≤ t (the
            truncation trick); the others are unchanged. The draw inverts the distribution function, which is
            equivalent to rejection sampling but needs only one draw for any t:
            z = √2·erf⁻¹(u·erf(t/√2)), u uniform in [-1, 1).

    Raises:
        InputError: an argument is out of range.

    Source: Brock et al., *Large Scale GAN Training for High Fidelity Natural Image Synthesis*, 2019.
    """
    check_integers(1, latent_dim=latent_dim)
    check_integers(0, seed=seed, **({"index": min(indices)} if len(indices) else {}))
    if truncation is not None and not (
        isinstance(truncation, int | float) and 0 < truncation < math.inf and truncation is not True
    ):
        raise InputError(f"truncation must be a positive number, got {truncation!r}")
    z = torch.empty(len(indices), latent_dim)
    for block, group in itertools.groupby(range(len(indices)), lambda k: indices[k] // NOISE_BLOCK):
        rows = list(group)
        drawn = _noise_block(seed, block, latent_dim, truncation)
        z[rows] = drawn[[indices[k] % NOISE_BLOCK for k in rows]]
    return z


@functools.lru_cache(maxsize=1)  # consecutive small batches need the same block
def _noise_block(seed: int, block: int, latent_dim: int, truncation: float | None) -> Tensor:
    """Return noise [NOISE_BLOCK, latent_dim]; it is cached, so callers must not write to it."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(block,)))
    z = torch.from_numpy(rng.standard_normal((NOISE_BLOCK, latent_dim), dtype=np.float32))
    if truncation is not None:
        outside = z.abs() > truncation
        u = torch.from_numpy(rng.uniform(-1, 1, int(outside.sum())))
        drawn = math.sqrt(2) * torch.erfinv(u * math.erf(truncation / math.sqrt(2)))
        # If erf(t/√2) rounds to 1, the inverse may be infinite.
        z[outside] = drawn.float().clamp(-truncation, truncation)
    return z


def slerp(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    """Interpolate spherically from a at t = 0 to b at t = 1 at constant angular speed.

    ::

        slerp(a, b, t) = sin((1-t)·ω)/sin ω · a + sin(t·ω)/sin ω · b        ω the angle between a and b

    Between two draws of z this preserves the typical length of a draw, whereas a straight line passes closer
    to 0 than draws do. If a and b are parallel, the result is the limit, (1-t)·a + t·b.

    Args:
        a, b: [D], floating point, not 0.
        t: a number, or [T].

    Returns:
        [D], or [T, D] for t [T]; computed in float64 and returned in a's dtype.

    Raises:
        InputError: shapes differ, a or b is 0 or not finite, or they are opposite (ω within 1e-6 of π), so
            that the great circle between them is not unique.

    Source: White, *Sampling Generative Networks*, 2016.
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(
            f"a and b must be vectors of the same length, got {list(a.shape)} and {list(b.shape)}"
        )
    x, y = a.double(), b.double()
    norms = float(x.norm()), float(y.norm())
    if not all(0 < norm < math.inf for norm in norms):
        raise InputError(
            f"a and b must be finite and not 0, got vectors of length {norms[0]:g} and {norms[1]:g}"
        )
    u, v = x / norms[0], y / norms[1]
    # arccos(u·v), but also accurate near 0 and π
    omega = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    if math.pi - omega < 1e-6:
        raise InputError("a and b must not be opposite, because the path between them is not unique")
    s = torch.as_tensor(t, dtype=torch.float64)[..., None]
    if omega < 1e-8:
        return ((1 - s) * x + s * y).to(a.dtype)
    return ((torch.sin((1 - s) * omega) * x + torch.sin(s * omega) * y) / math.sin(omega)).to(a.dtype)


def waypoints(seeds: Sequence[int], latent_dim: int, *, truncation: float | None = None) -> Tensor:
    """Return the noise of image 0 of each seed, float32 [len(seeds), latent_dim]; see :func:`latents`."""
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
    """Generate n images, one batch at a time.

    Args:
        generator: a module z [N, latent_dim] → images with an attribute ``latent_dim``, in eval mode.
        n: number of images, at least 1.
        seed, truncation: noise parameters, see :func:`latents`.
        batch: images per batch, at least 1; the last batch may be smaller.
        shard: (rank, world): generate only images rank, rank + world, rank + 2·world, …; there may be none.

    Yields:
        [≤ batch, C, H, W] in [-1, 1], on the generator's device, in index order.

    Raises:
        InputError: an argument is out of range, or the generator is in training mode, in which images of a
            batch depend on one another.
        RunError: during iteration, if a batch does not fit into memory.
    """
    check_integers(1, n=n, batch=batch)
    rank, world = shard
    check_integers(1, world=world)
    if not 0 <= rank < world:
        raise InputError(f"rank must be from 0 to {world - 1} for a world of {world}, got {rank!r}")
    dim: Any = generator.latent_dim
    latents([], dim, seed=seed, truncation=truncation)  # report errors now, not at the first batch
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
    """Generate images along a path through points of latent space, with :func:`slerp` between neighbours.

    Args:
        generator: as for :func:`images`.
        points: [K, latent_dim], K ≥ 2.
        steps: images per segment, at least 1: from one point (included) to the next (excluded).
        closed: add a segment back to the first point, which is not repeated: a loop of K·steps images.
            Otherwise the path ends with the last point and has (K-1)·steps + 1 images.
        batch: images per batch.

    Yields, raises: as :func:`images`, and InputError as :func:`slerp`.
    """
    check_integers(1, steps=steps, batch=batch)
    dim: Any = generator.latent_dim
    if points.ndim != 2 or points.shape[0] < 2 or points.shape[1] != dim:
        raise InputError(f"points must be [K, {dim}] with K of at least 2, got {list(points.shape)}")
    t = torch.arange(steps, dtype=torch.float64) / steps
    ends = torch.cat([points, points[:1]]) if closed else points
    segments = [slerp(a, b, t) for a, b in itertools.pairwise(ends)]
    return _run(generator, torch.cat(segments if closed else [*segments, points[-1:]]).split(batch))


def _run(generator: nn.Module, noise: Iterable[Tensor]) -> Iterator[Tensor]:
    if generator.training:
        raise InputError("generator must be in eval mode: call generator.eval() first")
    parameter = next(generator.parameters())

    def batches() -> Iterator[Tensor]:
        for z in noise:
            try:
                with torch.no_grad():
                    batch = generator(z.to(parameter))
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                raise RunError(
                    f"a batch of {len(z)} images does not fit into memory; use a smaller batch size"
                ) from error
            yield batch

    return batches()


def to_uint8(batch: Tensor) -> Tensor:
    """Convert images from [-1, 1] to levels 0 … 255, rounded as torchvision's ``save_image`` does.

    Args:
        batch: floating point, of any shape and device; values outside [-1, 1] are clamped.

    Returns:
        uint8 on the CPU.

    Raises:
        RunError: a value is NaN.
    """
    values = batch.detach().float()
    if values.isnan().any():
        raise RunError("the generator's output contains NaN: its training has diverged")
    values = values.clamp(-1, 1).add_(1).div_(2)
    return values.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8).cpu()


# --- files --------------------------------------------------------------------------------------------------
# All but save_grid take at least one batch of pixels, uint8 [N, C, H, W] on the CPU; image files need 1 or 3
# channels and a suffix of their format (else InputError). The integer factor ``scale`` enlarges images by
# repeating pixels. Files are replaced atomically; RunError if a file cannot be written.

IMAGES = (".png", ".jpg", ".jpeg")
ANIMATIONS = (".gif", ".webp")
_MAX_SIDES = {".jpg": 65_500, ".jpeg": 65_500, ".gif": 65_535, ".webp": 16_383}
"""Greatest height and width in pixels, where Pillow's encoder or the format has one."""


def save_grid(images: Tensor, path: Path, columns: int = 8, scale: int = 1) -> None:
    """Write one PNG with the images row by row, separated by black lines of 2 pixels.

    Args:
        images: [N, 1 or 3, H, W] in [-1, 1], black to white, on any device.
        path: output file, replaced atomically.
        columns: images per row.
        scale: integer factor by which small images are enlarged, by repeating pixels.

    Raises:
        OSError: ``path`` cannot be written.
    """
    from torchvision.utils import save_image

    pixels = F.interpolate(images.detach().float(), scale_factor=scale, mode="nearest")
    with replacing(path) as file:
        save_image(pixels, file, format="png", nrow=columns, normalize=True, value_range=(-1, 1))


def write_grid(pixels: Iterable[Tensor], path: Path, columns: int = 8, scale: int = 1) -> None:
    """Write one PNG or JPEG with the images row by row, separated by black lines of 2 pixels.

    A PNG equals :func:`save_grid`'s, but uint8 takes a quarter of the memory of floats.
    """
    from torchvision.utils import make_grid  # here, because importing it takes more than a second

    check_integers(1, columns=columns, scale=scale)
    _check_suffix(path, IMAGES)
    grid = make_grid(torch.cat([_enlarge(scale, batch) for batch in pixels]), nrow=columns)
    _write_image(_to_pil(grid), path)


def write_files(
    pixels: Iterable[Tensor], folder: Path, indices: Iterable[int] | None = None, suffix: str = ".png"
) -> int:
    """Write one file per image, named by its index (0, 1, … by default); return the number of images."""
    _check_suffix(Path(file_name(0, suffix)), IMAGES)
    count = 0
    each = (image for batch in pixels for image in batch)
    for image, index in zip(each, itertools.count() if indices is None else indices, strict=False):
        _write_image(_to_pil(image), folder / file_name(index, suffix))
        count += 1
    return count


def file_name(index: int, suffix: str = ".png") -> str:
    """Return the index padded to six digits, ``000000.png``, whatever the number of images."""
    return f"{index:06d}{suffix}"


def write_npy(pixels: Iterable[Tensor], path: Path, n: int) -> None:
    """Write one NumPy array, uint8 [n, H, W, C], batch by batch.

    Raises:
        InputError: the number of images is not n.
    """
    check_integers(1, n=n)
    written = 0
    with writing(path) as file:
        for batch in pixels:
            array = batch.permute(0, 2, 3, 1).numpy()
            if not written:
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, *array.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(array.tobytes())
            written += len(array)
        if written != n:
            raise InputError(f"n must equal the number of images, {written}, got {n}")


def write_animation(pixels: Iterable[Tensor], path: Path, milliseconds: int = 80, scale: int = 1) -> None:
    """Write a looping GIF or lossless WebP, by the suffix, showing each image for ``milliseconds``.

    GIF has 256 colours per image: enough for grey images, but not for RGB.
    """
    check_integers(1, milliseconds=milliseconds, scale=scale)
    kind = _check_suffix(path, ANIMATIONS)
    if kind == ".webp" and not features.check("webp"):
        raise InputError("this Pillow was built without WebP support; use .gif")
    first, *rest = [_to_pil(image) for batch in pixels for image in _enlarge(scale, batch)]
    _check_sides(first, kind)
    options: dict[str, Any] = {"lossless": True} if kind == ".webp" else {}
    options |= {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0}
    with writing(path) as file:
        first.save(file, kind[1:], **options)


def _check_suffix(path: Path, allowed: tuple[str, ...]) -> str:
    """Return the suffix in lower case. Raises InputError if it is not allowed."""
    kind = path.suffix.lower()
    if kind not in allowed:
        raise InputError(f"path must end in one of {', '.join(allowed)}, got {str(path)!r}")
    return kind


def _check_sides(image: Image.Image, kind: str) -> None:
    """Raise InputError if the image is higher or wider than files of the kind can be."""
    limit = _MAX_SIDES.get(kind, math.inf)
    if max(image.size) > limit:
        raise InputError(
            f"a {kind} file has at most {limit:,} pixels in height and width, but this one would have "
            f"{image.height:,} and {image.width:,}; use a smaller scale or another format"
        )


def _enlarge(scale: int, pixels: Tensor) -> Tensor:
    try:
        return pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise RunError(
            f"images enlarged {scale} times do not fit into memory; use a smaller scale"
        ) from error


def _write_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, or a JPEG of high quality with all of its colour."""
    kind = path.suffix.lower()
    _check_sides(image, kind)
    options: dict[str, Any] = {"format": "PNG"}
    if kind != ".png":
        options = {"format": "JPEG", "quality": 95, "subsampling": 0}
    with writing(path) as file:
        image.save(file, **options)


def _to_pil(image: Tensor) -> Image.Image:
    """Convert uint8 [1 or 3, H, W] to a Pillow image."""
    if image.shape[0] not in (1, 3):
        raise InputError(
            f"an image file needs 1 or 3 channels, but these images have {image.shape[0]}; write a .npy array"
        )
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if image.shape[0] == 1 else array)
