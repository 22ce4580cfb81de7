"""The products and launches of every layer of a network in every phase, from shapes alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...spec import Backward, Call, ConvSpec, Operand, dense_strides, specify
from .. import executor, prologue_kernel, reduce
from ..launcher import Kernel, Launch, Pointers, Product, kernel_for
from ..tiles import Problem, Tile

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
OUTPUTS = (
    *("y.ptr", "out_ptr", "partial_ptr", "mean_ptr", "var_ptr", "dcenter_ptr", "dscale_ptr"),
    *("dshift_ptr", "dw_ptr"),
)
"""The tensors that launches write, as :meth:`..launcher.Launch.flat_tensors` names them."""


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
    """Return the layers of the reference Discriminator."""
    found = [Shape(False, channels, features, image_size, 2, 1, False, "leaky_relu")]
    while found[-1].out_size > 4:
        width = found[-1].c_out
        found.append(Shape(False, width, 2 * width, found[-1].out_size, 2, 1, True, "leaky_relu"))
    return [*found, Shape(False, found[-1].c_out, 1, 4, 1, 0, False, "sigmoid")]


def networks(channels: int = 1) -> dict[str, list[Shape]]:
    """Return the layers of both reference networks, by the letters that name them in tables."""
    return {"G": generator(channels), "D": discriminator(channels)}


# --- layers -------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A product of one layer at one batch size in one of PHASES; a spec, without memory."""

    name: str
    phase: str
    spec: ConvSpec

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

    @property
    def accepts_shared_du(self) -> bool:
        """Whether it is a weight gradient that could read the du that dgrad has materialized."""
        return self.spec.kind == "wgrad" and self.spec.y.other_stride is not None

    def with_shared_du(self) -> Layer:
        """Return the weight gradient that reads the du materialized by dgrad's standalone prologue."""
        size = self.spec.y.size
        return self._replace(spec=self.spec._replace(y=Operand(size, dense_strides(size, True))))

    def product(self, device: str = "meta") -> Product:
        """Return the product with random tensors."""
        spec = self.spec._replace(device=torch.device(device))

        def drawn(size: Sequence[int], stride: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
            found = torch.empty(size, dtype=dtype, device=device)
            if stride is not None:
                found = torch.empty_strided(size, stride, dtype=dtype, device=device)
            return found if found.is_meta else found.normal_()

        def pointers(operand: Operand) -> Pointers:
            size, c = (spec.images, *operand.size), operand.size[:1]
            present = operand.scaled and operand.shifted, operand.scaled, operand.shifted
            vectors = (drawn(c, None, torch.float32) if one else None for one in present)
            other = drawn(size, operand.other_stride, spec.dtype) if operand.other_stride else None
            return Pointers(drawn(size, operand.stride, spec.dtype), other, *vectors)

        weight = None if spec.kind == "wgrad" else drawn(spec.weight, None, spec.dtype).mul_(0.02)
        return Product(spec, pointers(spec.x), weight, pointers(spec.y))

    def launches(self, tile: Tile, sms: int) -> Launches:
        """Return its launches on the meta device."""
        return launches(self.product(), tile, sms)


def _calls(shapes: Iterable[Shape], batch: int, dtype: str) -> Iterator[tuple[Shape, Call]]:
    """Yield each layer's convolution on the meta device: NHWC between layers, NCHW for image and noise."""
    shapes = list(shapes)
    for i, shape in enumerate(shapes):
        t, c_in, c_out, size = shape[:4]
        strides = dense_strides((c_in, size, size), channels_last=i > 0)
        x = torch.empty_strided((batch, c_in, size, size), strides, dtype=DTYPES[dtype], device="meta")
        weight = torch.empty(*((c_in, c_out) if t else (c_out, c_in)), 4, 4, dtype=x.dtype, device="meta")
        last = i == len(shapes) - 1
        yield shape, Call(x, weight, stride=shape.stride, padding=shape.padding, channels_last=not last)


def _layer(shape: Shape, phase: str, product: Product, dtype: str) -> Layer:
    return Layer(shape.name, phase, product.spec._replace(precision=PRECISIONS[dtype]))


def _output(spec: ConvSpec) -> Tensor:
    return torch.empty_strided(spec.shape, spec.y.stride, dtype=spec.dtype, device=spec.device)


def evaluation(shapes: Iterable[Shape], batch: int, dtype: str) -> list[Layer]:
    """Return every convolution of a network in eval mode, without its epilogue."""
    found = []
    for shape, call in _calls(shapes, batch, dtype):
        spec = specify(call, shape.transposed)
        found.append(_layer(shape, "eval", executor.fprop(spec, call, _output(spec)), dtype))
    return found


def training(shapes: Iterable[Shape], batch: int, dtype: str, *, input_gradient: bool = False) -> list[Layer]:
    """Return the products of a training step's forward and backward, in execution order.

    As in training, a BatchNorm is split into the statistics epilogue of one layer and the prologue of the
    next. ``input_gradient`` adds the dgrad of the first layer, which the Discriminator needs in the
    Generator's update.
    """
    forwards: list[Layer] = []
    backwards: list[list[Layer]] = []
    before: dict[str, Any] = {}
    for shape, plain in _calls(shapes, batch, dtype):
        t, norm = shape.transposed, shape.norm
        call = plain._replace(**before, stats=norm, out_act="none" if norm else shape.act)
        spec = specify(call, t)
        y = _output(spec)
        vectors = [torch.empty(shape.c_out, device="meta") for _ in range(3)]
        mean, dmean, dvar = vectors if norm else (None, None, None)
        back = Backward(
            torch.empty_like(y), dmean, dvar, call.x, call.weight, call.center, call.scale, call.shift,
            call.in_act, None, call.out_act, y, mean, norm, call.slope, call.stride, call.padding,
            (True, True, call.center is not None, False, False),
        )  # fmt: skip
        products = {"wgrad": executor.wgrad(back, t)}
        if forwards or input_gradient:
            products = {"dgrad": executor.dgrad(back, t, torch.empty_like(call.x))} | products
        forwards.append(_layer(shape, "forward", executor.fprop(spec, call, y), dtype))
        backwards.append([_layer(shape, phase, product, dtype) for phase, product in products.items()])
        before = dict(zip(("center", "scale", "shift"), vectors, strict=True)) | {"in_act": shape.act}
        before = before if norm else {}
    return forwards + [layer for wanted in reversed(backwards) for layer in wanted]


def all_layers(shapes: Sequence[Shape], batch: int, dtype: str) -> list[Layer]:
    """Return every layer in every phase, training first; weight gradients also with dgrad's du."""
    steps = training(shapes, batch, dtype, input_gradient=True)
    shared = [layer.with_shared_du() for layer in steps if layer.accepts_shared_du]
    return [*steps, *shared, *evaluation(shapes, batch, dtype)]


# --- launches -----------------------------------------------------------------------------------------------


class Launches(NamedTuple):
    """The launches of a product, in order."""

    prologues: tuple[Launch, ...]  # standalone prologue kernels
    product: Launch
    reduction: Launch | None  # of per-tile partial sums or split-K partials

    def __call__(self) -> None:
        for launch in self.ordered():
            launch()

    def ordered(self) -> Iterator[Launch]:
        """Yield all launches in order."""
        yield from (*self.prologues, self.product, *([] if self.reduction is None else [self.reduction]))

    def poison(self) -> None:
        """Fill everything that the launches write with NaN, including intermediate partial sums."""
        for launch in self.ordered():
            for name, t in launch.flat_tensors():
                if name in OUTPUTS:
                    t.fill_(math.nan)


def launches(
    it: Product, tile: Tile, sms: int, packed: Tensor | None = None, dtype: torch.dtype | None = None
) -> Launches:
    """Return the launches of a product with a tile, on a GPU with ``sms`` SMs.

    Args:
        packed: the packed weight, which is packed here if it is not given.
        dtype: of a weight gradient; by default that of the product.
    """
    kernel = kernel_for(it.spec)
    assert kernel is not None
    if packed is None and it.weight is not None and kernel.pack is not None:
        packed = kernel.pack(it.weight)
    inner, before = it, []
    if not tile.fused:
        inner = it.materialized(run=False)
        operands = [(it.spec.x, it.x, inner.x), (it.spec.y, it.y, inner.y)]
        for operand, pointers, result in operands[: 2 if it.spec.kind == "wgrad" else 1]:
            if operand.function != "none":
                before.append(prologue_kernel.launch(it.spec, operand, pointers, result.ptr))
    spec, device = inner.spec, it.x.ptr.device
    shape = kernel.partial(spec, tile, sms)
    partial = None if shape is None else torch.empty(shape, dtype=torch.float32, device=device)
    after = None
    if partial is not None and spec.kind == "wgrad":
        dw = torch.empty(spec.weight, dtype=dtype or spec.dtype, device=device)
        after = reduce.split_k_launch(partial, dw)
    elif partial is not None:
        sums = [torch.empty(spec.y.size[0], device=device) for _ in range(3)]
        if spec.y.function == "statistics":
            group = kernel.rows_per_tile(spec)
            rows = it.y.ptr.numel() // spec.y.size[0] // group
            after = reduce.statistics_launch(partial, sums[0], sums[1], rows, group, tile.block_m)
        else:
            after = reduce.sums_launch(partial, it.y.scale, sums[0], sums[1], sums[2])
    return Launches(tuple(before), kernel.launch(inner, packed, partial, tile), after)


def outputs(it: Product, tile: Tile, sms: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Poison a product's outputs, run its launches and return the same tensors as :func:`..aten.compute`."""
    made = launches(it, tile, sms, dtype=dtype)
    made.poison()
    made()
    sums: dict[str, Any] = {} if made.reduction is None else made.reduction.tensors
    if it.spec.kind == "wgrad":
        return (sums["dw_ptr"],)
    names = ("mean_ptr", "var_ptr") if "mean_ptr" in sums else ("dshift_ptr", "dscale_ptr")
    return it.y.ptr, *(sums[name] for name in names if name in sums)


def positive(text: str) -> int:
    """Parse an argument that must be a whole number from 1 upward."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 upward, got {text!r}")
    return int(text)
