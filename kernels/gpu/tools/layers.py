"""The products and launches of every layer of a network in every phase, from shapes alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import chain, coverage, train_chain
from ...spec import Call, ConvSpec, Operand, Shaped, Stage, TrainCall, TrainStage, dense_strides, specify
from .. import aten, batchnorm, inference, prologue_kernel, reduce
from ..launcher import Kernel, Launch, Pointers, Product, kernel_for
from ..tiles import Problem, Tile
from ..training import dgrad_spec, wgrad_spec

# tf32 means float32 tensors whose products run on TF32 tensor cores: a GPU setting, not a tensor dtype.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
PRECISIONS = {"float32": "ieee", "tf32": "tf32", "float16": "16bit", "bfloat16": "16bit"}
PHASES = ("eval", "forward", "dgrad", "wgrad")
SM_COUNTS = {80: 108, 90: 132}
"""SMs of an A100 and an H100, by compute capability."""
EPS = 1e-5
"""Of every BatchNorm."""


# --- networks as shapes -------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A layer of a network: a convolution, BatchNorm if ``norm``, and an activation."""

    transposed: bool
    c_in: int
    c_out: int
    size: int
    """Height and width of the input."""
    stride: int
    padding: int
    norm: bool
    act: str

    @property
    def out_size(self) -> int:
        """Height and width of the output of a 4×4 kernel."""
        if self.transposed:
            return (self.size - 1) * self.stride - 2 * self.padding + 4
        return (self.size + 2 * self.padding - 4) // self.stride + 1

    @property
    def name(self) -> str:
        """The channels and map sizes, '512→256 @4→8'."""
        return f"{self.c_in}→{self.c_out} @{self.size}→{self.out_size}"


def generator(
    channels: int = 1, latent_dim: int = 100, features: int = 64, image_size: int = 64
) -> list[Shape]:
    """Return the layers of the reference Generator."""
    width = features * image_size // 8  # channels of the 4×4 map
    found = [Shape(True, latent_dim, width, 1, 1, 0, True, "relu")]
    while width > features:
        width //= 2
        found.append(Shape(True, 2 * width, width, found[-1].out_size, 2, 1, True, "relu"))
    return [*found, Shape(True, width, channels, image_size // 2, 2, 1, False, "tanh")]


def discriminator(channels: int = 1, features: int = 64, image_size: int = 64) -> list[Shape]:
    """Return the layers of the reference Discriminator, whose last has no activation.

    In training it returns logits: the loss applies the sigmoid.
    """
    found = [Shape(False, channels, features, image_size, 2, 1, False, "leaky_relu")]
    while found[-1].out_size > 4:
        width = found[-1].c_out
        found.append(Shape(False, width, 2 * width, found[-1].out_size, 2, 1, True, "leaky_relu"))
    return [*found, Shape(False, found[-1].c_out, 1, 4, 1, 0, False, "none")]


def networks(channels: int = 1) -> dict[str, list[Shape]]:
    """Return the layers of both reference networks, by the letters that name them in tables."""
    return {"G": generator(channels), "D": discriminator(channels)}


class Pass(NamedTuple):
    """A forward and a backward of a network in a training step."""

    network: str
    images: int
    groups: int = 1
    runs: int = 1
    """How often a step runs it."""
    input_gradient: bool = False
    weight_gradients: bool = True


def step_passes(batch: int, max_together: int = coverage.MAX_IMAGES_TOGETHER) -> list[Pass]:
    """Return the passes of a training step.

    D runs on real and on generated images, in one pass of twice the batch up to ``max_together`` images; then
    G is trained through D, whose weights need no gradients.
    """
    both = Pass("D", 2 * batch, groups=2) if batch <= max_together else Pass("D", batch, runs=2)
    return [both, Pass("G", batch), Pass("D", batch, input_gradient=True, weight_gradients=False)]


# --- layers -------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A product of one layer at one batch size in one of PHASES; a spec, without memory."""

    name: str
    phase: str
    spec: ConvSpec
    x_hat: bool = True
    """Whether a weight gradient needs the x̂ that ``batchnorm.apply`` computes after a dgrad."""

    @property
    def kernel(self) -> Kernel:
        """The kernel that runs it."""
        found = kernel_for(self.spec)
        assert found is not None
        return found

    @property
    def problem(self) -> Problem:
        """Its GEMM sizes."""
        return self.kernel.problem(self.spec)

    @property
    def kernel_name(self) -> str:
        """The name of its kernel in tables."""
        return self.problem.kernel if self.phase == "wgrad" else self.kernel.name

    def product(self, device: str = "meta") -> Product:
        """Return the product with random tensors.

        Where a function normalises a tensor, its channels have the mean ``center`` and variance 1, as
        :func:`stats_of` assumes.
        """
        spec = self.spec._replace(device=torch.device(device))

        def drawn(size: Sequence[int], stride: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
            found = torch.empty(size, dtype=dtype, device=device)
            if stride is not None:
                found = torch.empty_strided(size, stride, dtype=dtype, device=device)
            return found if found.is_meta else found.normal_()

        def pointers(operand: Operand) -> Pointers:
            size, vector = (spec.images, *operand.size), (spec.groups, operand.size[0])
            present = operand.scaled and operand.shifted, operand.scaled, operand.shifted
            vectors = [drawn(vector, None, torch.float32) if one else None for one in present]
            other = drawn(size, operand.other_stride, spec.dtype) if operand.other_stride else None
            found = Pointers(drawn(size, operand.stride, spec.dtype), other, *vectors)
            if found.center is not None:
                normalised = found.ptr if other is None else other
                normalised += found.center.repeat_interleave(spec.images // spec.groups, 0)[:, :, None, None]
            return found

        weight = None if spec.kind == "wgrad" else drawn(spec.weight, None, spec.dtype).mul_(0.02)
        return Product(spec, pointers(spec.x), weight, pointers(spec.y))

    def launches(self, tile: Tile, sms: int) -> Launches:
        """Return its launches on the meta device."""
        return launches(self.product(), tile, sms, x_hat=self.x_hat)


def _input(shapes: Sequence[Shape], batch: int, dtype: str) -> Any:
    """Return a network's input, image or noise, in NCHW on the meta device."""
    size = shapes[0].c_in, shapes[0].size, shapes[0].size
    strides = dense_strides(size, channels_last=False)
    return Shaped((batch, *size), DTYPES[dtype], torch.device("meta"), strides)


def _weight(shape: Shape, dtype: str) -> Tensor:
    first, second = (shape.c_in, shape.c_out) if shape.transposed else (shape.c_out, shape.c_in)
    return torch.empty(first, second, 4, 4, dtype=DTYPES[dtype], device="meta")


def evaluation(shapes: Sequence[Shape], batch: int, dtype: str) -> list[Layer]:
    """Return every convolution of a network in eval mode, without its epilogue; the image is in NCHW."""
    found = []
    x = _input(shapes, batch, dtype)
    for i, shape in enumerate(shapes):
        last = i + 1 == len(shapes)
        call = Call(x, _weight(shape, dtype), stride=shape.stride, padding=shape.padding)
        call = call._replace(channels_last=not last)
        spec = specify(call, shape.transposed)._replace(precision=PRECISIONS[dtype])
        found.append(Layer(shape.name, "eval", spec))
        x = Shaped(spec.shape, spec.dtype, spec.device, spec.y.stride)
    return found


def stages_of(shapes: Sequence[Shape], dtype: str) -> list[Stage]:
    """Return a network in eval mode as the stages of a chain, on the meta device."""
    found = []
    for s in shapes:
        norm = dict.fromkeys(("scale", "shift", "mean", "var"), torch.empty(s.c_out, device="meta"))
        found.append(
            Stage(
                s.transposed, _weight(s, dtype), **(norm if s.norm else {}), eps=EPS if s.norm else 0.0,
                act=s.act, slope=0.2, stride=s.stride, padding=s.padding,
            )
        )  # fmt: skip
    return found


def inference_layers(shapes: Sequence[Shape], batch: int, dtype: str, dependent: bool = True) -> list[Layer]:
    """Return the products of a network in eval mode as :mod:`..inference` runs them; the image is in NCHW."""
    stages = stages_of(shapes, dtype)
    specs = chain.specs(_input(shapes, batch, dtype), stages, channels_last=False)
    products = inference.product_specs(specs, stages)
    products = [p._replace(precision=PRECISIONS[dtype], dependent=dependent) for p in products]
    return [Layer(shape.name, "eval", spec) for shape, spec in zip(shapes, products, strict=True)]


def training(
    shapes: Sequence[Shape],
    batch: int,
    dtype: str,
    *,
    input_gradient: bool = False,
    weight_gradients: bool = True,
    groups: int = 1,
) -> list[Layer]:
    """Return the products of a network's forward and backward, in execution order.

    They are those of :mod:`..training`: a BatchNorm is split into the statistics epilogue of one layer and
    the prologue of the next one's fprop, and no product of the backward has a prologue.

    Args:
        batch: images, in ``groups`` groups with statistics of their own.
        input_gradient: whether to add the dgrad of the first layer, which the Discriminator needs in the
            Generator's update.
        weight_gradients: whether to add the wgrads.
    """
    stages = [
        TrainStage(s.transposed, _weight(s, dtype), None, None, s.norm, EPS, s.act, s.stride, s.padding)
        for s in shapes
    ]
    call = TrainCall(_input(shapes, batch, dtype), stages, groups=groups, channels_last=False)
    specs = train_chain.specs(call)

    def layer(i: int, phase: str, spec: ConvSpec) -> Layer:
        return Layer(shapes[i].name, phase, spec._replace(precision=PRECISIONS[dtype]), weight_gradients)

    found = [layer(i, "forward", spec) for i, spec in enumerate(specs)]
    for i, spec in reversed(list(enumerate(specs))):
        before = stages[i - 1] if i else None
        x = Operand(spec.x.size, spec.x.stride)
        du = Operand(spec.y.size, dense_strides(spec.y.size, channels_last=True))
        of_layer = []
        if i or input_gradient:
            of_layer.append(layer(i, "dgrad", dgrad_spec(spec, before, du, x.stride)))
        if weight_gradients:
            wgrad = layer(i, "wgrad", wgrad_spec(spec, x, du))
            # It reads the x̂ that follows the dgrad, unless the layer before stores x̂.
            of_layer.insert(len(of_layer) if before is not None and before.norm else 0, wgrad)
        found += of_layer
    return found


def pass_layers(shapes: Mapping[str, Sequence[Shape]], of: Pass, dtype: str) -> list[Layer]:
    """Return the products of a pass of a training step, given the networks by name."""
    return training(
        shapes[of.network],
        of.images,
        dtype,
        input_gradient=of.input_gradient,
        weight_gradients=of.weight_gradients,
        groups=of.groups,
    )


def all_layers(shapes: Sequence[Shape], batch: int, dtype: str) -> list[Layer]:
    """Return every layer in every phase, training first."""
    return [*training(shapes, batch, dtype, input_gradient=True), *evaluation(shapes, batch, dtype)]


# --- launches -----------------------------------------------------------------------------------------------


class Launches(NamedTuple):
    """The launches of a product in a network's training, in order."""

    prologues: tuple[Launch, ...]
    """Standalone prologue kernels."""
    product: Launch
    after: tuple[Launch, ...]
    """What follows it: BatchNorm's forward, BatchNorm's backward and ``apply``, or split-K's reduction."""
    results: tuple[Tensor, ...]
    """What these compute: mean and var [groups·C]; factor and offset [groups, C], du in place of g, and x̂ if
    wanted; dweight, float32."""
    partial: Tensor | None
    """The product's partial sums."""
    written: tuple[Tensor, ...]
    """Everything that the launches write."""

    def __call__(self) -> None:
        for launch in self.ordered():
            launch()

    def ordered(self) -> Iterator[Launch]:
        """Yield all launches in order."""
        yield from (*self.prologues, self.product, *self.after)

    def poison(self) -> None:
        """Fill everything that the launches write with NaN."""
        for t in self.written:
            t.fill_(math.nan)


def launches(it: Product, tile: Tile, sms: int, x_hat: bool = True) -> Launches:
    """Return the launches of a product with a tile, on a GPU with ``sms`` SMs; its weight is packed here.

    ``x_hat`` tells whether ``batchnorm.apply`` also computes x̂.
    """
    kernel = kernel_for(it.spec)
    assert kernel is not None
    packed = None
    if it.weight is not None and kernel.layout is not None:
        if it.weight.is_meta:  # only its shape matters
            packed = it.weight.new_empty(kernel.layout.shape(it.weight.shape))
        else:
            packed = kernel.layout.pack(it.weight, it.spec.dtype)
    inner, before = it, []
    written: list[Tensor] = [] if it.spec.kind == "wgrad" else [it.y.ptr]
    if not tile.fused:
        inner = it.materialized(run=False)
        operands = [(it.spec.x, it.x, inner.x), (it.spec.y, it.y, inner.y)]
        for operand, pointers, result in operands[: 2 if it.spec.kind == "wgrad" else 1]:
            if operand.function != "none":
                before.append(prologue_kernel.launch(it.spec, operand, pointers, result.ptr))
                written.append(result.ptr)
    shape = kernel.partial(inner.spec, tile, sms)
    partial = None if shape is None else torch.empty(shape, dtype=torch.float32, device=it.x.ptr.device)
    product = kernel.launch(inner, packed, partial, tile)
    after, results = ((), ()) if partial is None else _after(inner, partial, x_hat)
    written += [*results, *([] if partial is None else [partial])]
    return Launches(tuple(before), product, after, results, partial, tuple(written))


def _after(it: Product, partial: Tensor, x_hat: bool) -> tuple[tuple[Launch, ...], tuple[Tensor, ...]]:
    """Return :attr:`Launches.after` and :attr:`Launches.results`."""
    spec, y = it.spec, it.y
    if spec.kind == "wgrad":
        dweight = partial.new_empty(spec.weight)
        return (reduce.split_k_launch(partial, dweight),), (dweight,)
    channels, groups = spec.y.size[0], spec.groups
    gamma, beta = partial.new_ones(2, channels)
    if spec.y.function == "statistics":
        stats = partial.new_empty(4, groups, channels)
        results = stats[0].flatten(), stats[1].flatten()
        return (batchnorm.forward_launch(partial, gamma, beta, EPS, stats),), results
    if spec.y.function != "gradient":
        return (), ()
    stats = stats_of(it)
    dgamma, dbeta, coefficients = gamma, beta, torch.empty_like(stats[:2])
    pixels = y.ptr.numel() // channels // groups
    x = torch.empty_like(y.other) if x_hat else None
    after = (
        batchnorm.backward_launch(partial, stats, coefficients, dgamma, dbeta, pixels, EPS),
        batchnorm.apply_launch(y.ptr, y.other, stats, coefficients, x, spec.y.act, spec.slope),
    )
    return after, (*coefficients, y.ptr, *([] if x is None else [x]))


def stats_of(it: Product) -> Tensor:
    """Return the statistics [4, groups, C] of the BatchNorm that a dgrad's epilogue differentiates."""
    _, _, center, scale, shift = it.y
    return torch.stack([center, torch.ones_like(center), scale, shift]).view(4, it.spec.groups, -1)


def outputs(it: Product, tile: Tile, sms: int) -> tuple[Tensor, ...]:
    """Run a product after its prologues, with poisoned outputs; return the tensors of :func:`..aten.compute`.

    :func:`..aten.merged` merges its partial sums: the kernels that do so otherwise do not depend on the tile.
    """
    kernel, made = kernel_for(it.spec), launches(it, tile, sms)
    assert kernel is not None
    made.poison()
    for launch in (*made.prologues, made.product):
        launch()
    return aten.merged(it, made.partial)


def positive(text: str) -> int:
    """Parse an argument that must be a whole number from 1 upward."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 upward, got {text!r}")
    return int(text)
