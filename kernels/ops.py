"""The two fused convolutions as PyTorch operators: schemas, fakes, autograd, autocast and engine dispatch.

    dcgan::conv2d_fused, dcgan::conv_transpose2d_fused
        (x, weight, center, scale, shift, in_act, out_scale, out_shift, out_act,
         stats, slope, stride, padding, channels_last) -> y, mean, var

        x̂ = in_act((x - center[c])·scale[c] + shift[c])   prologue, optional
        u = conv(x̂, weight)                               the zero padding pads x̂, not x
        stats:     y = u (raw); mean[c], var[c] (biased) of u over N, H, W
        otherwise: y = out_act(u·out_scale[c] + out_shift[c])   epilogue, optional; mean and var empty

A BatchNorm in training becomes the next convolution's prologue, ``center=mean,
scale=gamma·rsqrt(var+eps), shift=beta``; in eval it becomes ``out_scale, out_shift`` of the convolution
before it. :mod:`.reference` defines the semantics in full, including the backward.

    dcgan::conv2d_fused_backward, dcgan::conv_transpose2d_fused_backward

compute all first derivatives of a call from dy, dmean, dvar and the forward's arguments. Of the full-size
outputs only y is saved. Second derivatives (``create_graph=True``) go through the reference, in aten.

The engines are ``reference``, ``triton`` and ``native``. ``DCGAN_ENGINE`` (or :func:`use_engine`) forces one;
``auto`` uses Triton on CUDA and the native engine on CPUs for the calls that they cover, and the reference
for the rest. A forced engine that does not cover a call is an error; there is no fallback. The exceptions are
the loss and running statistics, which the native engine computes in float32 alone: the reference computes
the others. Networks that no engine
covers do not use these ops at all (:mod:`.coverage`).
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, ParamSpec, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, reference, weight_cache
from .reference import ACTIVATIONS
from .spec import Backward, Call, ConvSpec, Gradients, Outputs, specify

ENGINES = ("auto", "reference", "triton", "native")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class EngineError(RuntimeError):
    """The forced engine does not cover a call."""


class Choice(NamedTuple):
    """The engine that runs a call, and the reason why no faster one does ('' if it is the fastest)."""

    op: str
    engine: str
    reason: str


# --- checks ------------------------------------------------------------------------------------------------


MAX_SPECS = 4096  # kept for repeated calls
_specs: dict[Hashable, ConvSpec] = {}


def _traits(t: Tensor | None) -> Hashable:
    return None if t is None else (t.shape, t.dtype, t.device)


def check(call: Call, transposed: bool) -> ConvSpec:
    """Validate a call and return its spec. x may be a :class:`.spec.Shaped`.

    Every call pays for this, so the spec of a call like an earlier one is looked up, in half the time.

    Raises:
        ValueError, TypeError: names the argument at fault.
    """
    if torch.compiler.is_compiling():  # the compiled program would be guarded by the cache's contents
        return _check(call, transposed)
    x, weight, center, scale, shift, in_act, out_scale, out_shift, *rest = call
    vectors = (center, scale, shift, out_scale, out_shift)
    key = (transposed, _traits(x), x.stride(), _traits(weight), *map(_traits, vectors), in_act, *rest)
    try:
        spec = _specs.get(key)
    except TypeError:  # symbolic sizes are not hashable
        return _check(call, transposed)
    if spec is None:
        if len(_specs) >= MAX_SPECS:
            _specs.clear()
        spec = _specs[key] = _check(call, transposed)
    return spec


def _check(call: Call, transposed: bool) -> ConvSpec:
    """Validate a call and make its spec."""
    x, weight = call.x, call.weight
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W], got {list(x.shape)}")
    if weight.ndim != 4:
        raise ValueError(f"weight must have 4 dimensions, got {list(weight.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    c_in, c_out = weight.shape[:2] if transposed else weight.shape[1::-1]
    if x.shape[1] != c_in:
        order = "C_in, C_out" if transposed else "C_out, C_in"
        raise ValueError(
            f"x has {x.shape[1]} channels, but weight [{order}, kH, kW] = {list(weight.shape)} expects {c_in}"
        )
    if call.stride < 1 or call.padding < 0:
        raise ValueError(
            f"stride must be at least 1 and padding at least 0, got {call.stride} and {call.padding}"
        )
    if call.in_act not in ACTIVATIONS or call.out_act not in ACTIVATIONS:
        bad = "in_act" if call.in_act not in ACTIVATIONS else "out_act"
        raise ValueError(f"{bad} must be one of {ACTIVATIONS}, got {getattr(call, bad)!r}")
    if call.slope < 0:
        raise ValueError(f"slope must not be negative, got {call.slope}")
    if (call.center is None) != (call.scale is None) or (call.center is None) != (call.shift is None):
        raise ValueError("center, scale and shift must be given together or not at all")
    if call.stats and (call.out_scale is not None or call.out_shift is not None or call.out_act != "none"):
        raise ValueError("stats returns the raw convolution: out_scale, out_shift and out_act must be absent")
    if call.center is not None:
        _check_vector("center", call.center, c_in, x)
        _check_vector("scale", call.scale, c_in, x)
        _check_vector("shift", call.shift, c_in, x)
    if call.out_scale is not None:
        _check_vector("out_scale", call.out_scale, c_out, x)
    if call.out_shift is not None:
        _check_vector("out_shift", call.out_shift, c_out, x)
    spec = specify(call, transposed)
    if spec.y.size[1] < 1 or spec.y.size[2] < 1:
        raise ValueError(
            f"x {list(x.shape)} is too small for a {weight.shape[2]}×{weight.shape[3]} kernel with stride "
            f"{call.stride} and padding {call.padding}"
        )
    return spec


def _check_vector(name: str, vector: Tensor | None, channels: int, x: Tensor) -> None:
    assert vector is not None
    if vector.ndim != 1 or vector.shape[0] != channels:
        raise ValueError(f"{name} must be [{channels}], one value per channel, got {list(vector.shape)}")
    if vector.dtype != reference.accumulator_dtype(x.dtype):
        expected = reference.accumulator_dtype(x.dtype)
        raise TypeError(f"{name} must be {expected} for x of {x.dtype}, got {vector.dtype}")
    if vector.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {vector.device}")


# --- engines -----------------------------------------------------------------------------------------------


def _engine_name(name: str, source: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"{source} must be one of {ENGINES}, got {name!r}")
    return name


_ENGINE_OF = {"cuda": "triton", "cpu": "native"}
_forced = _engine_name(os.environ.get("DCGAN_ENGINE", "auto"), "DCGAN_ENGINE")
_recorder: list[Choice] | None = None


@contextlib.contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Run every op in this context on engine ``name``; raise ValueError if it is not one of ENGINES."""
    global _forced
    previous, _forced = _forced, _engine_name(name, "engine")
    try:
        yield
    finally:
        _forced = previous


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Yield a list to which each op that runs in this context appends its :class:`Choice`."""
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


def is_recording() -> bool:
    """Return whether a :func:`recording` is active."""
    return _recorder is not None


def choose(spec: ConvSpec, weight: Tensor) -> Choice:
    """Choose the engine for a call; raise EngineError if the forced engine does not cover it."""
    return choose_engine(
        NAMES[spec.transposed],
        spec.device,
        triton=lambda gpu: gpu.why_not(spec),
        native=lambda: cpu.why_not(spec, weight, forced=_forced == "native"),
    )


def choose_engine(
    name: str,
    device: torch.device,
    triton: Callable[[Any], str | None],
    native: Callable[[], str | None] | None = None,
) -> Choice:
    """Choose the engine for the operation ``name``: the forced engine, or else that of the device.

    Args:
        triton: given the :mod:`.gpu` package, which is imported only if needed, returns the reason why the
            Triton engine does not cover the operation, or None if it does.
        native: the same for the native engine; None if it does not implement the operation, which the
            reference then runs.

    Raises:
        EngineError: the forced engine does not cover the operation.
    """
    if _forced == "reference":
        return Choice(name, "reference", "engine 'reference' is forced")
    engine = _forced
    if engine == "auto":
        engine = _ENGINE_OF.get(device.type, "reference")
    if engine == "reference":
        return Choice(name, "reference", f"no faster engine for {device.type} tensors")
    if engine == "triton":
        from . import gpu

        why_not = triton(gpu)
    elif native is None:
        return Choice(name, "reference", f"the native engine has no {name}")
    else:
        why_not = native()
    if why_not is None:
        return Choice(name, engine, "")
    if _forced == engine:
        raise EngineError(f"engine {engine!r} is forced, but does not cover this {name}: {why_not}")
    return Choice(name, "reference", f"{engine}: {why_not}")


def engine() -> str:
    """Return the engine forced by :func:`use_engine` or ``DCGAN_ENGINE``, or 'auto'."""
    return _forced


def record(choice: Choice) -> None:
    """Append ``choice`` to the list of the enclosing :func:`recording`, if any."""
    if _recorder is not None:
        _recorder.append(choice)


def run(call: Call, transposed: bool) -> Outputs:
    """Check a call, choose its engine and run it there."""
    spec = check(call, transposed)
    choice = choose(spec, call.weight)
    record(choice)
    if 0 in spec.shape:
        return empty(spec)
    if choice.engine == "triton":
        from . import gpu

        return gpu.forward(spec, call)
    if choice.engine == "native":
        return cpu.run(spec, call)
    return reference.forward(call, transposed)


def empty(spec: ConvSpec) -> Outputs:
    """Allocate outputs of the right shape, dtype and strides; statistics are NaN, as for an empty batch."""
    acc = reference.accumulator_dtype(spec.dtype)
    y = torch.empty_strided(spec.shape, spec.y.stride, dtype=spec.dtype, device=spec.device)
    size = spec.y.size[0] if spec.y.function == "statistics" else 0
    mean, var = (torch.full((size,), float("nan"), dtype=acc, device=spec.device) for _ in range(2))
    return y, mean, var


# --- autograd ----------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    call = Call(*inputs)
    y, mean, _ = output
    # y is saved only where the gradient is computed from it: with statistics, or with an activation.
    keep_y = call.stats or call.out_act != "none"
    ctx.save_for_backward(
        call.x,
        call.weight,
        call.center,
        call.scale,
        call.shift,
        call.out_scale,
        y if keep_y else None,
        mean if call.stats else None,
    )
    ctx.stats, ctx.in_act, ctx.out_act = call.stats, call.in_act, call.out_act
    ctx.slope, ctx.stride, ctx.padding = call.slope, call.stride, call.padding
    ctx.tensors = [i for i, argument in enumerate(inputs) if isinstance(argument, Tensor)]
    ctx.set_materialize_grads(False)


def _needed(ctx: Any) -> list[bool]:
    """Return, per argument, whether this backward must compute its gradient.

    ``needs_input_grad`` is fixed by the forward: it stays true for parameters even if ``torch.autograd.grad``
    asks for the input's gradient alone, and their gradients take as long to compute as the input's.
    """
    needed = list(ctx.needs_input_grad)
    for i, (node, _) in zip(ctx.tensors, ctx.next_functions, strict=True):
        needed[i] = needed[i] and node is not None and _executes(node)
    return needed


def _executes(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised for leaves that were passed to torch.autograd.grad
        return True


def _backward(transposed: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, dy: Any, dmean: Any, dvar: Any) -> tuple[Tensor | None, ...]:
        x, weight, center, scale, shift, out_scale, y, mean = ctx.saved_tensors
        if not ctx.stats:
            dmean = dvar = None
        if dy is None and dmean is None and dvar is None:
            return (None,) * len(ctx.needs_input_grad)
        if dy is None:
            dy = torch.zeros_like(y)
        given = len(ctx.needs_input_grad)  # the dispatcher drops trailing default arguments
        need = (*_needed(ctx), *[False] * (len(Call._fields) - given))
        needs = (need[0], need[1], any(need[2:5]), need[6], need[7])
        call = Backward(
            dy, dmean, dvar, x, weight, center, scale, shift, ctx.in_act, out_scale, ctx.out_act, y, mean,
            ctx.stats, ctx.slope, ctx.stride, ctx.padding, needs,
        )  # fmt: skip
        if torch.is_grad_enabled():  # double backward differentiates the reference
            gradients: tuple[Tensor | None, ...] = reference.backward(call, transposed)
        else:
            computed = _call_backward_op(call, transposed)
            wanted = (*needs[:2], *(needs[2] and center is not None,) * 3, *needs[3:])
            gradients = tuple(g if want else None for g, want in zip(computed, wanted, strict=True))
        dx, dweight, dcenter, dscale, dshift, dout_scale, dout_shift = gradients
        return (dx, dweight, dcenter, dscale, dshift, None, dout_scale, dout_shift, *[None] * 6)[:given]

    return backward


def _call_backward_op(call: Backward, transposed: bool) -> Gradients:
    """Call the backward operator, marked as a call from Python: a compiled backward never comes here."""
    if torch.compiler.is_compiling():
        return _BACKWARD_OPS[transposed](*call)
    with weight_cache.called_from_python():
        return _BACKWARD_OPS[transposed](*call)


def _run_backward(call: Backward, transposed: bool) -> Gradients:
    spec = specify(call, transposed)
    choice = choose_engine(
        f"{NAMES[transposed]}_backward",
        spec.device,
        triton=lambda gpu: gpu.why_not(spec),
        native=lambda: cpu.why_not(spec),
    )
    record(choice)
    if call.dy.numel():
        if choice.engine == "triton":
            from . import gpu

            return gpu.backward(call, transposed)
        if choice.engine == "native":
            return cpu.products.backward(spec, call)
    computed = reference.backward(call, transposed)
    results = empty_gradients(call)
    for result, gradient in zip(results, computed, strict=True):
        if gradient is not None and result.numel():
            result.copy_(gradient)
    return results


# --- registration ------------------------------------------------------------------------------------------

NAMES = {False: "conv2d_fused", True: "conv_transpose2d_fused"}
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    tuple[bool, bool, bool, bool, bool]: "bool[]",
}


def _schema(arguments: type[Call] | type[Backward], results: int) -> str:
    """Return the schema of an operator with the fields of ``arguments`` that returns ``results`` tensors."""
    defaults, fields = arguments._field_defaults, []
    for name, hint in get_type_hints(arguments).items():
        field = f"{_SCHEMA_TYPES.get(hint) or hint.__name__} {name}"
        fields.append(f"{field}={defaults[name]!r}" if name in defaults else field)
    return f"({', '.join(fields)}) -> ({', '.join(['Tensor'] * results)})"


LIBRARY = torch.library.Library("dcgan", "DEF")


def empty_gradients(call: Backward) -> Gradients:
    """Allocate gradients of the right shape, dtype and strides; [0] where not needed."""
    need_x, need_weight, need_prologue, need_out_scale, need_out_shift = call.needs
    x, weight = call.x, call.weight
    acc = reference.accumulator_dtype(x.dtype)

    def vector(wanted: bool, channels: int) -> Tensor:
        return torch.empty(channels if wanted else 0, dtype=acc, device=x.device)

    need_prologue = need_prologue and call.center is not None
    c_in, c_out = x.shape[1], call.dy.shape[1]
    return (
        reference.empty_gradient(x) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        vector(need_prologue, c_in),
        vector(need_prologue, c_in),
        vector(need_prologue, c_in),
        vector(need_out_scale, c_out),
        vector(need_out_shift, c_out),
    )


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a weight to autocast's dtype; the cast of a frozen weight is cached unless it needs a gradient."""
    if weight.dtype == dtype or (torch.is_grad_enabled() and weight.requires_grad):
        return weight.to(dtype)
    return weight_cache.get_or_make(weight, dtype, lambda w: w.to(dtype))


def _autocast(transposed: bool, device: str, key: torch._C.DispatchKey) -> Callable[..., Outputs]:
    """Return the autocast kernel, which casts only x and weight: per-channel vectors stay float32."""
    without = torch._C.DispatchKeySet(key)

    def autocast(*args: Any, **kwargs: Any) -> Outputs:
        call = Call(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(without):
            if call.x.dtype == torch.float64:
                return _OPS[transposed](*call)
            return _OPS[transposed](call.x.to(dtype), cast(call.weight, dtype), *call[2:])

    return autocast


def _register(transposed: bool) -> Any:
    name = NAMES[transposed]
    LIBRARY.define(name + _schema(Call, 3), tags=(torch.Tag.pt2_compliant_tag,))

    def implementation(*args: Any, **kwargs: Any) -> Outputs:
        return run(Call(*args, **kwargs), transposed)

    def fake(*args: Any, **kwargs: Any) -> Outputs:
        return empty(_check(Call(*args, **kwargs), transposed))

    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dcgan::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"dcgan::{name}", _backward(transposed), setup_context=_save, lib=LIBRARY)
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        LIBRARY.impl(name, _autocast(transposed, device, getattr(torch._C.DispatchKey, key)), key)
    return getattr(torch.ops.dcgan, name).default


def _register_backward(transposed: bool) -> Any:
    name = f"{NAMES[transposed]}_backward"
    LIBRARY.define(name + _schema(Backward, 7), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, lambda *args: _run_backward(Backward(*args), transposed), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dcgan::{name}", lambda *args: empty_gradients(Backward(*args)), lib=LIBRARY)
    return getattr(torch.ops.dcgan, name).default


_OPS: dict[bool, Callable[..., Outputs]] = {transposed: _register(transposed) for transposed in (False, True)}
_BACKWARD_OPS: dict[bool, Callable[..., Gradients]] = {
    transposed: _register_backward(transposed) for transposed in (False, True)
}


def under_transform() -> bool:
    """Return whether forward-mode AD or a torch.func transform is active.

    Neither uses the registered backward: the operator would silently return zero tangents.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def can_bypass_dispatcher(x: Tensor, autocast: bool = False) -> bool:
    """Return whether a call on x may bypass the dispatcher and call an engine directly.

    That is so if no autograd, transform, tracing, fake tensor or dispatch mode is active, nor, unless the
    caller casts itself, autocast.
    """
    return (
        type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and (autocast or not torch.is_autocast_enabled(x.device.type))
        and torch._C._get_tracing_state() is None
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.compiler.is_compiling()
        and not x.is_neg()
        and not under_transform()
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts x; None if it is off, for float64, and on other devices."""
    device = x.device.type
    if device in ("cpu", "cuda") and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _run_under_transform(call: Call, transposed: bool) -> Outputs:
    """Run the call in plain aten, which every transform supports; y has the strides that aten gives it."""
    device, dtype = call.x.device.type, autocast_dtype(call.x)
    if dtype is not None:
        call = call._replace(x=call.x.to(dtype), weight=call.weight.to(dtype))
    check(call, transposed)
    choice = Choice(NAMES[transposed], "reference", "a torch.func transform or forward-mode AD is active")
    if _forced not in ("auto", "reference"):
        raise EngineError(f"engine {_forced!r} is forced, but does not cover this call: {choice.reason}")
    record(choice)
    with torch.autocast(device, enabled=False):
        return reference.forward(call, transposed, functional=True)


P = ParamSpec("P")


def _public(arguments: Callable[P, Call], transposed: bool, doc: str) -> Callable[P, Outputs]:
    """Return the public function of an operator; its parameters are those of ``arguments``, in that order."""

    def function(*args: P.args, **kwargs: P.kwargs) -> Outputs:
        call = arguments(*args, **kwargs)
        return _run_under_transform(call, transposed) if under_transform() else _OPS[transposed](*call)

    function.__name__ = function.__qualname__ = NAMES[transposed]
    hints = get_type_hints(arguments)
    parameters = inspect.signature(arguments).parameters.values()
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(annotation=hints[p.name]) for p in parameters], return_annotation=Outputs
    )
    function.__doc__ = doc
    return function


conv2d_fused = _public(
    Call,
    False,
    """Convolve with a BatchNorm+activation prologue and an epilogue of statistics or affine+activation.

    Args:
        x: [N, C_in, H, W] of float16, bfloat16, float32 or float64, any strides.
        weight: [C_out, C_in, kH, kW], x's dtype.
        center, scale, shift: [C_in], float32 (float64 for float64), together or not at all.
        in_act, out_act: 'none', 'relu', 'leaky_relu', 'tanh' or 'sigmoid'.
        out_scale, out_shift: [C_out], float32 (float64 for float64); not with ``stats``.
        stats: return the raw y with its per-channel mean and biased variance.
        slope: negative slope of leaky_relu, in the prologue and the epilogue; at least 0.
        stride, padding: the same for height and width.
        channels_last: y's memory format; otherwise contiguous.

    Returns:
        y [N, C_out, H', W'] of x's dtype; mean and var [C_out] of the accumulator's dtype, or empty ([0]).

    Raises:
        ValueError, TypeError: names the argument, what was given and what is allowed.
    """,
)
conv_transpose2d_fused = _public(
    Call,
    True,
    """Convolve as :func:`conv2d_fused` does, but transposed: weight is [C_in, C_out, kH, kW].""",
)
