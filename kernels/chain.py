"""A chain of fused convolutions as one operator, for inference.

    dcgan::conv_chain(x, weight, bias, scale, shift, mean, var, eps, act, slope, stride, padding, transposed,
                      channels_last) -> y

        x_0 = x;  y = x_n
        x_{i+1} = act((conv(x_i, weight) + bias[c] - mean[c])·scale[c]/√(var[c] + eps) + shift[c])

This is a sequence of :func:`.ops.conv2d_fused` and :func:`.ops.conv_transpose2d_fused`, and it is computed
as such where no engine covers every layer.

* The native engine runs the chain in one call: the activations between two layers stay in a workspace of
  bounded size, one block of images at a time, and are never materialized as tensors. 16-bit tensors are
  rounded once, at the end.
* The Triton engine runs one kernel that folds BatchNorms and packs weights, and one product per layer
  (:mod:`.gpu.inference`), whose results are rounded to x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu, ops, weight_cache
from .ops import LIBRARY, Choice
from .reference import accumulator_dtype
from .spec import Call, ConvSpec, Shaped, Stage


def runs_as_one_call(x: Tensor) -> bool:
    """Return whether x's device has an engine that can run a chain as one call."""
    return x.device.type in ("cpu", "cuda")


def described(x: Tensor, layers: int) -> str:
    """Describe how a chain of so many layers is launched on x's GPU."""
    from .gpu import inference

    text = f"one operator: {layers + 1} launches per call"
    if inference.captures(x):
        call = inference.CAPTURED_CALL
        text += f", and from call {call} with one shape on a CUDA graph (DCGAN_GRAPHS=0 turns graphs off)"
    return text


def fold_epilogue(stage: Stage, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Fold a stage's bias and BatchNorm into an epilogue's scale and shift, in ``dtype``; differentiable."""
    bias, scale, shift = (None if v is None else v.to(dtype) for v in (stage.bias, stage.scale, stage.shift))
    if stage.mean is None or stage.var is None:
        if bias is None:
            return scale, shift
        if scale is None:
            return None, bias if shift is None else bias + shift
        return scale, bias * scale if shift is None else torch.addcmul(shift, bias, scale)
    inverse = torch.rsqrt(stage.var.to(dtype) + stage.eps)
    scale = inverse if scale is None else inverse * scale
    center = stage.mean.to(dtype) if bias is None else stage.mean.to(dtype) - bias
    return scale, -center * scale if shift is None else torch.addcmul(shift, center, scale, value=-1)


def conv_chain(x: Tensor, stages: Sequence[Stage], channels_last: bool = True) -> Tensor:
    """Apply the stages to x in order.

    Args:
        x: [N, C, H, W] of float16, bfloat16, float32 or float64, any strides.
        stages: one or more. A weight is [C_out, C_in, kH, kW] ([C_in, C_out, kH, kW] if transposed) of x's
            dtype; bias, scale, shift, mean and var are [C_out].
        channels_last: y's memory format; otherwise contiguous.

    Returns:
        y, of x's dtype.

    Raises:
        ValueError, TypeError: names the argument, what was given and what is allowed.
    """
    if not stages:
        raise ValueError("stages must hold at least one layer, got none")
    if ops.under_transform():
        return _one_by_one(x, stages, channels_last, _public)
    return _OP(x, *_columns(stages), channels_last)  # type: ignore[no-any-return]


def _columns(stages: Sequence[Stage]) -> tuple[Any, ...]:
    transposed, *rest = zip(*stages, strict=True)
    return (*rest, transposed)


def arguments(columns: Sequence[Any]) -> tuple[list[Stage], bool]:
    """Return (stages, channels_last) from the operator's arguments after x."""
    *rest, transposed = columns[:12]
    channels_last = columns[12] if len(columns) > 12 else True  # the dispatcher drops trailing defaults
    return [Stage(*row) for row in zip(transposed, *rest, strict=True)], channels_last


Run = Callable[[Call, bool], ops.Outputs]


def _public(call: Call, transposed: bool) -> ops.Outputs:
    return ops.conv_transpose2d_fused(*call) if transposed else ops.conv2d_fused(*call)


def _check_vectors(x: Tensor, stage: Stage) -> None:
    """Check the vectors that the ops cannot: they only see the folded scale and shift."""
    if (stage.mean is None) != (stage.var is None):
        raise ValueError("mean and var must be given together or not at all")
    for name in ("bias", "scale", "shift", "mean", "var"):
        vector: Tensor | None = getattr(stage, name)
        if vector is None or stage.weight.ndim != 4:
            continue
        if vector.ndim != 1 or vector.shape[0] != stage.c_out:
            raise ValueError(
                f"{name} must be [{stage.c_out}], one value per channel, got {list(vector.shape)}"
            )
        if vector.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {vector.device}")


def _call(x: Any, stage: Stage, channels_last: bool) -> Call:
    """Return the stage as a call of an op, without the epilogue's vectors."""
    return Call(
        x,
        stage.weight,
        out_act=stage.act,
        slope=stage.slope,
        stride=stage.stride,
        padding=stage.padding,
        channels_last=channels_last,
    )


def _one_by_one(x: Tensor, stages: Sequence[Stage], channels_last: bool, run: Run) -> Tensor:
    """Run the stages in order, each through ``run``."""
    for i, stage in enumerate(stages):
        _check_vectors(x, stage)
        scale, shift = fold_epilogue(stage, accumulator_dtype(x.dtype))
        call = _call(x, stage, channels_last or i + 1 < len(stages))
        x = run(call._replace(out_scale=scale, out_shift=shift), stage.transposed)[0]
    return x


def specs(x: Tensor, stages: Sequence[Stage], channels_last: bool) -> list[ConvSpec]:
    """Check each layer as its op would, and return its spec, from shapes alone."""
    found: list[ConvSpec] = []
    shaped = Shaped(x.shape, x.dtype, x.device, x.stride())
    for i, stage in enumerate(stages):
        _check_vectors(x, stage)
        call = _call(shaped, stage, channels_last or i + 1 < len(stages))
        spec = ops.check(call, stage.transposed)
        found.append(spec)
        shaped = Shaped(spec.shape, spec.dtype, spec.device, spec.y.stride)
    return found


# --- execution ----------------------------------------------------------------------------------------------


def _choose_engines(specs: Sequence[ConvSpec], stages: Sequence[Stage]) -> tuple[Choice, ...]:
    return tuple(ops.choose(spec, stage.weight) for spec, stage in zip(specs, stages, strict=True))


def _engine_of(choices: Sequence[Choice], x: Tensor) -> str:
    """Return the engine that can run the whole chain, '' if none can."""
    engines = {choice.engine for choice in choices}
    if x.numel() == 0 or len(engines) > 1:
        return ""
    (engine,) = engines
    covered = engine == "triton" or (engine == "native" and len(choices) <= cpu.MAX_LAYERS)
    return engine if covered else ""


def _implementation(x: Tensor, *columns: Any) -> Tensor:
    stages, channels_last = arguments(columns)
    found = specs(x, stages, channels_last)
    choices = _choose_engines(found, stages)
    engine = _engine_of(choices, x)
    if not engine:
        return _one_by_one(x, stages, channels_last, ops.run)
    for choice in choices:
        ops.record(choice)
    if engine == "triton":
        from . import gpu

        return gpu.run_once(x, found, stages)
    return cpu.Prepared(x.shape, stages, torch.get_num_threads())(x, channels_last)


class Chain:
    """A chain prepared for repeated calls: plans and packed weights are cached per input shape and dtype.

    It follows its tensors: a changed weight is repacked (:mod:`.weight_cache`, :mod:`.gpu.prepare`), and
    vectors are read at every call.
    """

    _MAX_PREPARED = 16  # input shapes cached; when full, the cache is cleared

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        # A tensor subclass may own no memory, and only the dispatcher knows what it represents.
        tensors = (t for stage in stages for t in stage[1:7] if t is not None)
        self._plain_tensors = all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        self._prepared: dict[Any, tuple[tuple[Choice, ...], cpu.Prepared]] = {}
        self._engines: dict[Hashable, tuple[str, tuple[Choice, ...]]] = {}  # of calls on a GPU
        self._network: Any = None  # a gpu.Network

    def __call__(
        self, x: Tensor, channels_last: bool = True, freeze: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Run as :func:`conv_chain`; ``freeze`` is called before weights are packed."""
        if not (self._plain_tensors and ops.can_bypass_dispatcher(x, autocast=x.is_cuda)):
            freeze()
            return conv_chain(x, self.stages, channels_last)
        if x.is_cuda or ops.engine() == "triton":
            return self._on_gpu(x, channels_last, freeze)
        threads = torch.get_num_threads()
        key = (x.shape, x.dtype, channels_last, threads, ops.engine())
        found = self._prepared.get(key)
        held = None if found is None else found[1].current()  # kept alive until the call is over
        if found is None or held is None:
            freeze()
            choices = _choose_engines(specs(x, self.stages, channels_last), self.stages)
            if _engine_of(choices, x) != "native":
                return conv_chain(x, self.stages, channels_last)
            if len(self._prepared) >= self._MAX_PREPARED:
                self._prepared.clear()
            found = self._prepared[key] = choices, cpu.Prepared(x.shape, self.stages, threads)
            held = found[1].take()
        choices, prepared = found
        for choice in choices:
            ops.record(choice)
        return prepared(x, channels_last)

    def _on_gpu(self, x: Tensor, channels_last: bool, freeze: Callable[[], None]) -> Tensor:
        from . import gpu

        networks = weight_cache.networks_of_graph()
        if networks is None and x.is_cuda and torch.cuda.is_current_stream_capturing():
            return conv_chain(x, self.stages, channels_last)  # the graph packs weights at every replay
        cast = ops.autocast_dtype(x)
        dtype = x.dtype if cast is None else cast
        tensor = x.shape, x.stride(), x.dtype, x.device
        key = *tensor, cast, channels_last, ops.engine(), gpu.precision(dtype)
        if cast is not None:
            x = x.to(cast)

        def call_specs() -> list[ConvSpec]:
            return specs(x, self.stages if cast is None else self._cast_stages(dtype), channels_last)

        found = self._engines.get(key)
        if found is None:
            if len(self._engines) >= gpu.MAX_PREPARED:
                self._engines.clear()
            choices = _choose_engines(call_specs(), self.stages)
            found = self._engines[key] = _engine_of(choices, x), choices
        engine, choices = found
        if engine != "triton":
            freeze()
            return conv_chain(x, self.stages, channels_last)
        for choice in choices:
            ops.record(choice)
        if networks is not None:
            if self not in networks:
                networks[self] = gpu.Network(self.stages, of_a_graph=True)
            return networks[self].run(key, x, call_specs, freeze)  # type: ignore[no-any-return]
        if self._network is None:
            self._network = gpu.Network(self.stages)
        return self._network.run(key, x, call_specs, freeze)  # type: ignore[no-any-return]

    def _cast_stages(self, dtype: torch.dtype) -> list[Stage]:
        """Return the stages with weights as autocast casts them, of which only the shapes are right."""
        found = []
        for stage in self.stages:
            w = stage.weight
            shaped: Any = Shaped(w.shape, dtype, w.device, w.stride())
            found.append(stage if w.dtype == torch.float64 else stage._replace(weight=shaped))
        return found


def _fake(x: Tensor, *columns: Any) -> Tensor:
    return ops.empty(specs(x, *arguments(columns))[-1])[0]


def _autograd(x: Tensor, *columns: Any) -> Tensor:
    """Run the chain as separate ops if it is differentiated: the native call saves nothing for a backward."""
    tensors = (x, *(t for column in columns[:6] for t in column))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _one_by_one(x, *arguments(columns), _public)
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(x, *columns)  # type: ignore[no-any-return]


def _autocast(device: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    without = torch._C.DispatchKeySet(key)

    def autocast(x: Tensor, weight: Sequence[Tensor], *rest: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(without):
            if x.dtype == torch.float64:
                return _OP(x, weight, *rest)  # type: ignore[no-any-return]
            return _OP(x.to(dtype), [ops.cast(w, dtype) for w in weight], *rest)  # type: ignore[no-any-return]

    return autocast


LIBRARY.define(
    "conv_chain(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor?[] scale, Tensor?[] shift, Tensor?[] mean, "
    "Tensor?[] var, float[] eps, str[] act, float[] slope, int[] stride, int[] padding, bool[] transposed, "
    "bool channels_last=True) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("conv_chain", _implementation, "CompositeExplicitAutograd")
LIBRARY.impl("conv_chain", _autograd, "Autograd")
torch.library.register_fake("dcgan::conv_chain", _fake, lib=LIBRARY)
for _device in ("cpu", "cuda"):
    _key = f"Autocast{_device.upper()}"
    LIBRARY.impl("conv_chain", _autocast(_device, getattr(torch._C.DispatchKey, _key)), _key)
_OP = torch.ops.dcgan.conv_chain.default
