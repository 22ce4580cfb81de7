"""Flips and DiffAugment: loops over pixels in float64, derivatives, distributions, formats and errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dcgan.choices import AugmentationName
from dcgan.errors import InputError
from dcgan.training.augment import POLICIES, DiffAugment, flipped

SUBSETS = [subset for n in (1, 2, 3) for subset in itertools.combinations(POLICIES, n)]
SHAPES = [(5, 3, 16, 16), (4, 1, 16, 16), (3, 3, 17, 11), (2, 1, 9, 24), (3, 2, 5, 6), (2, 4, 8, 1)]
DRAWS = {"color": 3, "translation": 2, "cutout": 2}
SEED = 5


def seeded(augment: Callable[[Tensor], Tensor], images: Tensor, seed: int = SEED) -> Tensor:
    torch.manual_seed(seed)
    return augment(images)


# --- references in float64, pixel by pixel ------------------------------------------------------------------


def color(image: Tensor, u: Sequence[float]) -> Tensor:
    """Brightness, saturation and contrast, one after the other."""
    image = image + (u[0] - 0.5)
    if len(image) > 1:
        grey = image.mean(0)
        image = torch.stack([(channel - grey) * (2 * u[1]) + grey for channel in image])
    return (image - image.mean()) * (u[2] + 0.5) + image.mean()


def translation(image: Tensor, u: Sequence[float]) -> Tensor:
    _, height, width = image.shape
    down, right = (int(v * (2 * (n // 8) + 1)) - n // 8 for v, n in zip(u, (height, width), strict=True))
    rows = []
    for i, j in itertools.product(range(height), range(width)):
        inside = 0 <= i - down < height and 0 <= j - right < width
        rows.append(image[:, i - down, j - right] if inside else torch.zeros_like(image[:, 0, 0]))
    return torch.stack(rows, 1).reshape(image.shape)


def cutout(image: Tensor, u: Sequence[float]) -> Tensor:
    keep = torch.ones_like(image)
    cut = []
    for v, n in zip(u, image.shape[1:], strict=True):
        length = -(-n // 2)
        center = int(v * (n + 1)) if length % 2 == 0 else int(v * n)
        cut.append([i for i in range(center - length // 2, center - length // 2 + length) if 0 <= i < n])
    for i, j in itertools.product(*cut):
        keep[:, i, j] = 0
    return image * keep


REFERENCES = {"color": color, "translation": translation, "cutout": cutout}


def reference(policies: Sequence[str], images: Tensor) -> Tensor:
    """Apply the policies to each image, with the numbers that DiffAugment draws after ``seeded``."""
    torch.manual_seed(SEED)
    draws = torch.rand(sum(DRAWS[name] for name in policies), len(images)).double()
    result = []
    for image, numbers in zip(images, draws.t().tolist(), strict=True):
        for name in policies:
            u, numbers = numbers[: DRAWS[name]], numbers[DRAWS[name] :]
            image = REFERENCES[name](image, u)
        result.append(image)
    return torch.stack(result)


# --- values and derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policies", SUBSETS, ids="+".join)
def test_every_composition_equals_the_definition(
    policies: tuple[AugmentationName, ...], shape: tuple[int, ...]
) -> None:
    """Values and gradients, for odd sizes, sizes without translation, grey, and one pixel of width."""
    images = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = seeded(DiffAugment(policies), images), reference(policies, images)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(found)
    gradient, wanted = (torch.autograd.grad(y, images, cotangent)[0] for y in (found, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policies", [*SUBSETS[:3], POLICIES], ids="+".join)
def test_derivatives_of_both_orders(policies: tuple[AugmentationName, ...]) -> None:
    """Of the cube of the result, so that the second derivative is not zero."""
    images = torch.randn(2, 2, 8, 3, dtype=torch.float64, requires_grad=True)

    def cubed(x: Tensor) -> Tensor:
        return seeded(DiffAugment(policies), x) ** 3

    assert torch.autograd.gradcheck(cubed, images)
    assert torch.autograd.gradgradcheck(cubed, images)


def test_the_order_of_the_policies_is_fixed() -> None:
    images = torch.rand(4, 3, 16, 16)
    augment = DiffAugment(["cutout", "color", "translation"])
    assert augment.policies == POLICIES == ("color", "translation", "cutout")
    assert torch.equal(seeded(augment, images), seeded(DiffAugment(POLICIES), images))
    assert repr(augment) == "DiffAugment(['color', 'translation', 'cutout'])"


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policies", [*SUBSETS[:3], POLICIES], ids="+".join)
def test_dtype_and_memory_format_are_kept(
    policies: tuple[AugmentationName, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    """Also those of the gradient; values agree with float64 up to a few roundings."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.rand(6, 3, 16, 24).to(dtype, memory_format=memory_format).requires_grad_()
    found = seeded(DiffAugment(policies), images)
    cotangent = torch.rand(found.shape).to(dtype, memory_format=memory_format)
    (gradient,) = torch.autograd.grad(found, images, cotangent)
    for tensor in (found, gradient):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous(memory_format=memory_format)
    exact = images.detach().double().requires_grad_()
    expected = reference(policies, exact)
    (wanted,) = torch.autograd.grad(expected, exact, cotangent.double())
    bound = 16 * torch.finfo(dtype).eps  # of sums of at most six terms below 2
    assert (found - expected).abs().max() <= bound
    assert (gradient - wanted).abs().max() <= bound


def test_views_and_subtensors() -> None:
    """Strides of any kind, such as those of a gradient that is expanded."""
    memory = torch.full((4, 6, 16, 40), float("nan"))
    images = memory[:, ::2, :, 3:35:2]
    images.copy_(torch.rand(images.shape))
    expected = seeded(DiffAugment(POLICIES), images.contiguous())
    assert torch.equal(seeded(DiffAugment(POLICIES), images), expected)
    leaf = images.contiguous().requires_grad_()
    augmented = seeded(DiffAugment(POLICIES), leaf)
    ones = torch.autograd.grad(augmented, leaf, torch.ones_like(augmented), retain_graph=True)
    expanded = torch.autograd.grad(augmented, leaf, torch.ones(()).expand(augmented.shape))
    torch.testing.assert_close(expanded, ones)


def test_no_images() -> None:
    """An empty share of a batch."""
    images = torch.empty(0, 3, 16, 16)
    assert DiffAugment(POLICIES)(images).shape == flipped(images).shape == images.shape


# --- images are independent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policies", [*SUBSETS[:3], POLICIES], ids="+".join)
def test_a_nan_stays_in_its_image(policies: tuple[AugmentationName, ...]) -> None:
    images = torch.rand(5, 3, 16, 16)
    clean = seeded(DiffAugment(policies), images)
    images[2] = float("nan")
    found = seeded(DiffAugment(policies), images)
    assert found[2].isnan().any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], clean[others])


def test_what_is_removed_does_not_matter() -> None:
    """A NaN that is moved out or cut out is gone, as is its gradient; a product with a mask would keep it."""
    images = torch.ones(64, 1, 16, 16, requires_grad=True)
    augment = DiffAugment(["translation", "cutout"])
    kept = seeded(augment, images)
    (used,) = torch.autograd.grad(kept.sum(), images)
    assert set(used.unique().tolist()) == {0.0, 1.0}
    spoiled = torch.where(used == 0, float("nan"), images.detach())
    assert torch.equal(seeded(augment, spoiled), kept)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_image_has_its_own_numbers(policy: AugmentationName) -> None:
    """Of 64 equal images many differ after augmentation, and a seed determines all of them."""
    images = torch.rand(1, 3, 16, 16).expand(64, -1, -1, -1)
    augment = DiffAugment([policy])
    found = seeded(augment, images)
    assert len(found.flatten(1).unique(dim=0)) > 15
    assert torch.equal(seeded(augment, images), found)
    assert not torch.equal(seeded(augment, images, SEED + 1), found)


# --- distributions ------------------------------------------------------------------------------------------


def assert_uniform(values: Tensor, first: int, last: int) -> None:
    """Check integers by a chi-squared test at 6 standard deviations."""
    assert first <= values.min()
    assert values.max() <= last
    counts = torch.bincount(values - first, minlength=last - first + 1).double()
    expected, freedom = len(values) / len(counts), len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(("height", "width"), [(16, 64), (65, 15)])
def test_shifts_are_uniform_and_independent(height: int, width: int) -> None:
    """A single bright pixel in the middle shows the shift of each image."""
    images = torch.zeros(20_000, 1, height, width)
    images[:, :, height // 2, width // 2] = 1
    moved = seeded(DiffAugment(["translation"]), images)
    _, _, i, j = moved.nonzero().unbind(1)
    assert len(i) == len(images)
    down, right = i - height // 2, j - width // 2
    s, t = height // 8, width // 8
    assert_uniform(down, -s, s)
    assert_uniform(right, -t, t)
    assert_uniform((down + s) * (2 * t + 1) + right, -t, (2 * s + 1) * (2 * t + 1) - 1 - t)


@pytest.mark.parametrize(("height", "width"), [(16, 32), (9, 15), (17, 10)])
def test_rectangles_have_uniform_centers(height: int, width: int) -> None:
    """The part inside starts at max(0, center - ⌊length / 2⌋), and has the length except at a border."""
    cut = seeded(DiffAugment(["cutout"]), torch.ones(20_000, 1, height, width))[:, 0] == 0
    for axis, size in ((2, height), (1, width)):
        positions = cut.any(axis)
        length, half = (size + 1) // 2, (size + 1) // 2 // 2
        counts = positions.sum(1)
        assert counts.max() == length
        # Rectangles are contiguous and touch a border if they are shorter.
        first = positions.int().argmax(1)
        last = size - 1 - positions.flip(1).int().argmax(1)
        assert torch.equal(last - first + 1, counts)
        assert bool(((counts == length) | (first == 0) | (last == size - 1)).all())
        center = torch.where(first > 0, first + half, last - (length - 1 - half))
        assert_uniform(center, 0, size - length % 2)
    assert torch.equal(cut.sum((1, 2)), cut.any(2).sum(1) * cut.any(1).sum(1))


def test_ranges_of_the_colors() -> None:
    """Brightness in ±1/2, saturation in [0, 2), contrast in [1/2, 3/2), each with the mean of its range.

    The image has two columns with opposite colors, from which the three are computed.
    """
    difference = torch.tensor([0.5, -0.25, -0.25])
    image = torch.stack([difference + 0.3, 0.3 - difference], 1)[:, None]  # grey is 0.3 everywhere
    dark = torch.full((3, 1, 2), 0.1)
    images = torch.cat([image, dark], 1).double()  # [3, 2, 2]; the mean is 0.2
    found = seeded(DiffAugment(["color"]), images.expand(20_000, -1, -1, -1))
    grey = found.mean(1)
    brightness = found.mean((1, 2, 3)) - 0.2
    contrast = (grey[:, 0, 0] - grey[:, 1, 0]) / 0.2
    saturation = (found[:, 0, 0, 0] - grey[:, 0, 0]) / (0.5 * contrast)
    for values, low, high in ((brightness, -0.5, 0.5), (saturation, 0, 2), (contrast, 0.5, 1.5)):
        assert low - 1e-9 <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high + 1e-9
        bins = ((values - low) / (high - low) * 10).long().clamp(0, 9)
        assert_uniform(bins, 0, 9)


# --- flips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(2000, 3, 4, 5), (2000, 1, 2, 2)], ids=str)
def test_half_of_the_images_are_mirrored(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randint(256, shape).to(dtype, memory_format=memory_format)
    images[..., 0], images[..., -1] = 1, 2  # so that no image is its own mirror image
    found = seeded(flipped, images)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=memory_format)
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    same = (found == images).flatten(1).all(1)
    assert bool((mirrored ^ same).all())
    assert abs(int(mirrored.sum()) - 1000) < 6 * 500**0.5  # standard deviation √(2000/4)
    pairs = 2 * mirrored[0::2] + mirrored[1::2].long()
    assert_uniform(pairs, 0, 3)
    assert torch.equal(seeded(flipped, images), found)


def test_a_nan_is_not_spread_by_a_flip() -> None:
    images = torch.rand(40, 1, 3, 3)
    images[7] = float("nan")
    rest = torch.arange(40) != 7
    assert not seeded(flipped, images)[rest].isnan().any()


# --- no synchronization, and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("function", [flipped, DiffAugment(POLICIES)], ids=["flipped", "DiffAugment"])
def test_nothing_depends_on_a_value(function: Callable[[Tensor], Tensor]) -> None:
    """Tensors without values, which raise if one is read or determines a shape; forward and backward."""
    images = torch.empty(6, 3, 16, 16, device="meta", requires_grad=True)
    found = function(images)
    found.sum().backward()
    assert images.grad is not None
    assert found.shape == images.grad.shape == images.shape
    with FakeTensorMode():
        gpu = torch.empty(6, 3, 16, 16, device="cuda")
        assert function(gpu).device.type == "cuda"


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """Replays draw new numbers, the same ones as eager calls from the same state of the generator."""
    images = torch.rand(64, 3, 32, 32, device="cuda", requires_grad=True)
    augment = DiffAugment(POLICIES)

    def step() -> tuple[Tensor, Tensor]:
        found = flipped(augment(images))
        return found.detach(), torch.autograd.grad(found.square().sum(), images)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    def replay() -> tuple[Tensor, Tensor]:
        graph.replay()
        return captured[0].clone(), captured[1].clone()

    torch.cuda.manual_seed(SEED)
    replayed = [replay(), replay()]
    torch.cuda.manual_seed(SEED)
    eager = [step(), step()]
    torch.testing.assert_close(replayed, eager)
    assert not torch.equal(replayed[0][0], replayed[1][0])


def test_random_numbers_are_the_generators() -> None:
    """One call of the default generator of the device, whatever the policies are."""
    images = torch.rand(3, 1, 8, 8)
    seeded(DiffAugment(["translation", "cutout"]), images)
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    torch.rand(4, 3)
    assert torch.equal(torch.get_rng_state(), state)


WRONG: list[Any] = [[], (), "color", ["hue"], ["color", "color"], ["color", 1], [["color"]], None]


@pytest.mark.parametrize("policies", WRONG, ids=repr)
def test_wrong_policies(policies: Any) -> None:
    with pytest.raises(InputError) as error:
        DiffAugment(policies)
    allowed = "policies must be a list of color, translation, cutout, each at most once"
    assert str(error.value) == f"{allowed}, got {policies!r}"


def test_wrong_images() -> None:
    for function in (flipped, DiffAugment(["color"])):
        with pytest.raises(InputError, match=r"images must have shape \[N, C, H, W\], got \[3, 8, 8\]"):
            function(torch.rand(3, 8, 8))
    with pytest.raises(InputError, match=r"images must be of a floating-point dtype, got torch\.uint8"):
        DiffAugment(["cutout"])(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
