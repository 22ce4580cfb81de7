"""What a fused convolution computes: an operator's arguments, and the same without the tensors' values.

:class:`Call`, :class:`Backward` and :class:`Stage` are the arguments that :mod:`.ops` and :mod:`.chain` take;
:class:`TrainCall` and :class:`TrainBackward` are those of :mod:`.train_chain`.
:class:`ConvSpec` is everything about one product but its tensors' values. It is made once per call
(:func:`specify`), and from then on decides everything: which engine and kernel run, with which algorithm or
tile, and which launch is reused. Nothing in it needs memory, so that a chain of layers, a prediction and an
off-line compilation work on specs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor, Tensor]
"""(y, mean, var)"""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Gradients of x, weight, center, scale, shift, out_scale, out_shift; [0] where not needed or absent."""


class Call(NamedTuple):
    """Arguments of a forward call, in the order of the schema."""

    x: Tensor
    weight: Tensor
    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    in_act: str = "none"
    out_scale: Tensor | None = None
    out_shift: Tensor | None = None
    out_act: str = "none"
    stats: bool = False
    slope: float = 0.2
    stride: int = 2
    padding: int = 1
    channels_last: bool = True


class Backward(NamedTuple):
    """Arguments of a backward call, in the order of the schema.

    ``dy`` is given even where only the statistics have a gradient. ``y`` and ``mean`` are the forward's saved
    outputs; y is given where ``stats`` or ``out_act`` needs it to compute the gradient.
    """

    dy: Tensor
    dmean: Tensor | None
    dvar: Tensor | None
    x: Tensor
    weight: Tensor
    center: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    in_act: str
    out_scale: Tensor | None
    out_act: str
    y: Tensor | None
    mean: Tensor | None
    stats: bool
    slope: float
    stride: int
    padding: int
    needs: tuple[bool, bool, bool, bool, bool]
    """Whether x, weight, (center, scale, shift), out_scale and out_shift need a gradient."""


class Stage(NamedTuple):
    """A layer of a chain: a convolution, an optional BatchNorm in eval mode, and an activation.

        y = act((conv(x, weight) + bias[c] - mean[c])·scale[c]/√(var[c] + eps) + shift[c])

    Without ``mean`` and ``var``, y = act((conv(x, weight) + bias[c])·scale[c] + shift[c]).
    """

    transposed: bool
    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0
    act: str = "none"
    slope: float = 0.0
    stride: int = 2
    padding: int = 1

    @property
    def c_out(self) -> int:
        """The number of output channels."""
        return self.weight.shape[1 if self.transposed else 0]


class TrainStage(NamedTuple):
    """A layer of a network in training: a convolution, an optional BatchNorm, and an activation.

    The BatchNorm (``norm``) uses batch statistics. ``gamma`` and ``beta`` [C_out] are its scale and shift, or
    None for 1 and 0. Without a BatchNorm, ``beta`` is the convolution's bias, and ``gamma`` is None.
    """

    transposed: bool
    weight: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    norm: bool = False
    eps: float = 0.0
    act: str = "none"
    stride: int = 2
    padding: int = 1

    @property
    def c_out(self) -> int:
        """The number of output channels."""
        return self.weight.shape[1 if self.transposed else 0]


class TrainCall(NamedTuple):
    """Arguments of a network's forward in training."""

    x: Tensor
    stages: Sequence[TrainStage]
    slope: float = 0.2
    groups: int = 1
    """Statistics are computed per ``groups``-th of the batch."""
    channels_last: bool = True
    keep: bool = True
    """Whether the forward keeps what the backward needs."""


TrainOutputs = tuple[Tensor, list[Tensor], list[Tensor], Tensor]
"""(y, saved, stats, packed): saved and packed are empty unless the call keeps them."""


class TrainBackward(NamedTuple):
    """Arguments of a network's backward. ``y`` is given where the last activation's derivative needs it."""

    dy: Tensor
    y: Tensor | None
    saved: list[Tensor]
    """The output of each layer but the last."""
    stats: Sequence[Tensor]
    """Of each BatchNorm, [4, groups, C]: mean, biased variance, scale and shift."""
    packed: Tensor
    need_x: bool
    need_weight: Sequence[bool]
    need_gamma: Sequence[bool]
    need_beta: Sequence[bool]
    forward: TrainCall


class TrainGradients(NamedTuple):
    """Gradients of a network; [0] where not needed or absent."""

    x: Tensor
    weight: list[Tensor]
    gamma: list[Tensor]
    beta: list[Tensor]


class Operand(NamedTuple):
    """A tensor [N, C, H, W] of a product, and the function fused into its loads or stores.

    A prologue is the function of a tensor that the product reads, with c the channel:

        none         x
        act          act(x)
        affine       act((x - center[c])·scale[c] + shift[c])
        gradient     x·act'(other)·scale[c], other = the forward's y (scale if ``scaled``)
        statistics   x + (other - center[c])·2·scale[c]/M + shift[c]/M, M = N·H·W:
                     center, scale, shift = mean, dvar, dmean, and other = y

    An epilogue is the function of the accumulator of the tensor that the product writes:

        affine       act(acc·scale[c] + shift[c]) (scale if ``scaled``, shift if ``shifted``)
        statistics   acc, and its channels' means and sums of squared deviations per tile
        adjoint      g·scale[c] for g = acc·act'((other - center[c])·scale[c] + shift[c]), other = the
                     forward's x, and the sums Σ g and Σ g·(other - center[c]) per tile.
                     Unless ``scaled``, g = acc·act'(other), and there are no sums
        gradient     the same g, unscaled and rounded as it is stored, and the same sums of it

    Vectors have one row [C] for each group of images (:attr:`ConvSpec.groups`).
    """

    size: tuple[int, int, int]  # C, H, W
    stride: tuple[int, ...]  # N, C, H, W
    function: str = "none"
    act: str = "none"
    scaled: bool = False
    shifted: bool = False
    other_stride: tuple[int, ...] | None = None
    """The strides of ``other``; None if the function does not read it."""

    @property
    def sums(self) -> bool:
        """Whether an epilogue stores two partial sums per tile and channel."""
        return self.function in ("statistics", "gradient") or (self.function == "adjoint" and self.scaled)


class ConvSpec(NamedTuple):
    """One product: its geometry, the functions fused into it, layouts, dtype and device.

    A NamedTuple, because hashing one is C code: plans are looked up by specs at every call.

        fprop, dgrad   y = epilogue(conv(prologue(x), weight)); in dgrad, conv is the adjoint of the layer's
        wgrad          dweight = Σ over pixels of prologue(x)·prologue(y), with x the layer's input and y the
                       gradient of its output
    """

    kind: str
    transposed: bool
    """Whether conv is the transposed convolution; of a wgrad, whether the layer is."""
    images: int
    weight: tuple[int, int, int, int]
    """[C_in, C_out, kH, kW] if ``transposed``, else [C_out, C_in, kH, kW]."""
    stride: int
    padding: int
    x: Operand
    y: Operand
    slope: float
    dtype: torch.dtype
    device: torch.device
    precision: str = ""
    """'16bit', or on a GPU for float32 'tf32' or 'ieee', by PyTorch's setting."""
    groups: int = 1
    """Equal parts of the images that have statistics and vectors of their own."""
    dependent: bool = False
    """Whether the launch may start before the previous one on its stream has completed, which it awaits."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of y, [N, C_out, H', W']."""
        return self.images, *self.y.size


class Shaped(NamedTuple):
    """Stands in for x in a :class:`Call` where only the shape of the result is wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    strides: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def stride(self) -> tuple[int, ...]:
        return self.strides


def dense_strides(size: tuple[int, int, int], channels_last: bool) -> tuple[int, int, int, int]:
    """Return the strides of a newly allocated [N, C, H, W] tensor in a memory format."""
    c, h, w = size
    return (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def input_operand(call: Call | Backward) -> Operand:
    """Return x with its prologue."""
    _, c, h, w = call.x.shape
    if call.center is not None:
        return Operand((c, h, w), call.x.stride(), "affine", call.in_act, True, True)
    return Operand((c, h, w), call.x.stride(), "none" if call.in_act == "none" else "act", call.in_act)


def specify(call: Call | Backward, transposed: bool) -> ConvSpec:
    """Return the spec of a call's forward product; :func:`.ops.check` has checked the arguments."""
    weight, s, p = call.weight, call.stride, call.padding
    first, second, k_h, k_w = weight.shape
    n, _, h, w = call.x.shape
    if transposed:
        size = second, (h - 1) * s - 2 * p + k_h, (w - 1) * s - 2 * p + k_w
    else:
        size = first, (h + 2 * p - k_h) // s + 1, (w + 2 * p - k_w) // s + 1
    strides = dense_strides(size, channels_last=not isinstance(call, Call) or call.channels_last)
    if call.stats:
        y = Operand(size, strides, "statistics")
    else:
        shifted = isinstance(call, Call) and call.out_shift is not None
        y = Operand(size, strides, "affine", call.out_act, call.out_scale is not None, shifted)
    return ConvSpec(
        "fprop", transposed, n, (first, second, k_h, k_w), s, p, input_operand(call), y, call.slope,
        call.x.dtype, call.x.device, "" if call.x.dtype == torch.float32 else "16bit",
    )  # fmt: skip
