"""Drop-in networks: the reference networks' modules, parameters and checkpoints, run by the fused kernels.

    from dcgan.fast import Generator        # instead of dcgan.models

``Generator`` and ``Discriminator`` subclass the reference networks and override ``forward`` and ``logits``
(and, so that prepacked weights are never stale, the methods through which weights change). A convolution, its
BatchNorm and its activation are one op of :mod:`dcgan.kernels.ops`:

* eval: BatchNorm is folded into the op's epilogue, from the live parameters and running statistics. When no
  gradients are needed, the network is one operator (:mod:`dcgan.kernels.chain`): one call of the native
  engine, or on a GPU a handful of launches, which become a CUDA graph where small batches recur.
* train: the network is one operator with one autograd node (:mod:`dcgan.kernels.train_chain`), and a layer
  saves one tensor for the backward. Running statistics and ``num_batches_tracked`` are updated as in
  ``nn.BatchNorm2d``. Where that operator does not apply (a module with hooks, a BatchNorm in eval mode,
  statistics merged over processes, a layer without a kernel), the network runs layer by layer: an op returns
  its raw output with its mean and variance, and the next op applies BatchNorm and activation as its prologue.

**What is replaced.** The call of a module is replaced if the module's type is exactly a known one, if nothing
but ``nn.Module.__call__`` and the class's own ``forward`` would run, and if no hook of any kind is registered
on it or on ``main`` (:mod:`.introspection`). Any other module is called, between ops. ``main`` is called as a
whole if it is not a plain ``nn.Sequential``, under ``torch.jit.trace`` and ``torch.export``, and if no engine
has kernels for the input's device and dtype (:mod:`dcgan.kernels.coverage`). :func:`explain` lists, layer by
layer, what runs and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import layers, models
from .graphed import graphed
from .introspection import tracing
from .kernels import coverage, flops, ops, weight_cache
from .layers import stages as stages

__all__ = ["Discriminator", "Explanation", "Explanations", "Generator", "convert", "explain", "graphed"]

flops.register()


class _Fast(nn.Module):
    """Base of both drop-ins: keeps prepacked weights consistent with every change of the parameters."""

    main: nn.Sequential  # unless a user has replaced it

    def _freeze(self) -> None:
        weight_cache.freeze(self, layers.convolution_weights(self.main))

    def refresh(self) -> None:
        """Discard everything cached for the weights, by this or any other network that shares them.

        This is needed only after an in-place edit that bypasses the tensor's version counter (``p.data``, a
        NumPy view, another process, a CUDA graph other than a TrainStep's) and changes so few elements that
        the sampled weights miss it; :mod:`dcgan.kernels.weight_cache` gives the probability. On a GPU in eval
        mode it is also needed after any such edit of a network whose layers run one by one, because of hooks,
        foreign layers or gradients.
        """
        weight_cache.thaw(self)
        weight_cache.invalidate(self.parameters())

    def _run(self, x: Tensor, logits: bool = False, groups: int = 1) -> Tensor:
        if self.training or torch.compiler.is_compiling() or tracing():
            return layers.run(self.main, x, logits, groups=groups)
        with weight_cache.called_from_python():
            return layers.run(self.main, x, logits, self._freeze, groups)

    def train(self: _Self, mode: bool = True) -> _Self:
        super().train(mode)
        self.refresh()
        if not mode:
            self._freeze()  # a compiled forward runs no Python and would not
        return self

    def _apply(self: _Self, fn: Callable[..., Any], recurse: bool = True) -> _Self:
        self.refresh()
        super()._apply(fn, recurse)
        if not self.training:
            self._freeze()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.refresh()
        result = super().load_state_dict(*args, **kwargs)
        if not self.training:
            self._freeze()
        return result


_Self = TypeVar("_Self", bound=_Fast)


class Generator(_Fast, models.Generator):
    """:class:`dcgan.models.Generator` run by the fused kernels.

    Arguments, parameters, checkpoints, results and output strides are the same.
    """

    def forward(self, z: Tensor) -> Tensor:
        return self._run(self._latent(z))


class Discriminator(_Fast, models.Discriminator):
    """:class:`dcgan.models.Discriminator` run by the fused kernels.

    Arguments, parameters, checkpoints and results are the same.
    """

    def forward(self, image: Tensor) -> Tensor:
        return self._run(self._image(image)).view(-1, 1).squeeze(1)

    def logits(self, image: Tensor) -> Tensor:
        image = self._image(image)
        models.check_sigmoid(self.main)
        return self._run(image, logits=True).view(-1, 1).squeeze(1)

    def logits_of_groups(self, image: Tensor, groups: int) -> Tensor:
        """Return the :meth:`logits` of as many equal groups of images, each with batch statistics of its own.

        The result is that of one call for each group, in order, running statistics included. Where the
        network trains as one operator it is computed in one pass, which fills a GPU better.

        Raises:
            ValueError: ``groups`` does not divide the batch; or as :meth:`logits`.
        """
        image = self._image(image)
        models.check_sigmoid(self.main)
        if groups < 1 or len(image) % groups:
            raise ValueError(f"groups must divide the batch of {len(image)} images, got {groups}")
        return self._run(image, logits=True, groups=groups).view(-1, 1).squeeze(1)

    def engine_of_groups(self, image: Tensor, groups: int) -> str:
        """Return the engine with which :meth:`logits_of_groups` makes one pass; '' if it makes several."""
        return layers.engine_of_groups(self.main, self._image(image), True, groups) if self.training else ""


Model = TypeVar("Model", models.Generator, models.Discriminator)


def convert(model: models.Generator | models.Discriminator) -> Generator | Discriminator:
    """Return a fast network around ``model``'s own modules; parameters and buffers are shared, not copied.

    If ``model.compile()`` has been called, the compiled call is dropped with a warning: it would run the
    plain network.

    Raises:
        TypeError: ``model`` is not a :class:`dcgan.models.Generator` or :class:`dcgan.models.Discriminator`,
            or its ``forward`` or ``logits`` has been replaced; the message says what to do instead.
    """
    if isinstance(model, _Fast):
        return model  # type: ignore[return-value]
    if type(model) is models.Generator:
        fast: Generator | Discriminator = Generator.__new__(Generator)
    elif type(model) is models.Discriminator:
        fast = Discriminator.__new__(Discriminator)
    else:
        raise TypeError(
            "model must be a dcgan.models.Generator or dcgan.models.Discriminator, "
            f"got {type(model).__module__}.{type(model).__qualname__}; {_suggestion(model)}"
        )
    for method in ("forward", "logits"):
        if method in model.__dict__:
            raise TypeError(
                f"model.{method} has been replaced on this instance, and a fast network would ignore it; "
                f"convert the network first, then replace {method} on the result"
            )
    fast.__dict__.update(model.__dict__)
    if fast.__dict__.pop("_compiled_call_impl", None) is not None:
        warnings.warn(
            "model is compiled, but the fast network around it is not: call compile() on the fast network",
            stacklevel=2,
        )
    # Copy the containers, so that whatever is later registered on one network does not appear in the other.
    for name, value in model.__dict__.items():
        if name.startswith("_") and hasattr(value, "copy"):
            fast.__dict__[name] = value.copy()
    if not fast.training:
        fast._freeze()  # a compiled forward runs no Python and would not
    return fast


def _suggestion(model: Any) -> str:
    """Return what a caller of :func:`convert` can do with an unsupported network."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, models.Generator | models.Discriminator):
        return "convert the network that was compiled, model._orig_mod, and compile the fast network"
    if isinstance(model, models.Generator | models.Discriminator):
        base = "Generator" if isinstance(model, models.Generator) else "Discriminator"
        return f"derive the subclass from dcgan.fast.{base} instead"
    if isinstance(model, nn.Module):
        state = model.state_dict()
        for kind in (Generator, Discriminator):
            try:
                fits = kind(**kind.sizes_of(state)).state_dict()
            except ValueError:
                continue
            if {k: v.shape for k, v in fits.items()} == {k: v.shape for k, v in state.items()}:
                sizes = ", ".join(f"{name}={size}" for name, size in kind.sizes_of(state).items())
                return (
                    "its weights fit, so if it computes the same function, load them: "
                    f"fast.{kind.__name__}({sizes}).load_state_dict(model.state_dict())"
                )
    return "other networks have no fast drop-in"


class Explanation(NamedTuple):
    """One layer of :func:`explain`: its modules, the op, the engine, and why no faster engine runs it."""

    modules: str
    op: str
    engine: str
    reason: str


class Explanations(list[Explanation]):
    """The layers of a network, in order; prints as a table."""

    note = ""
    """How a whole network is launched, where its layers are one operator on a GPU."""

    def __str__(self) -> str:
        rows = [("modules", "op", "engine", "why"), *self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, self.note] if self.note else lines)


def explain(model: models.Generator | models.Discriminator, x: Tensor) -> Explanations:
    """Report which engine runs each layer of ``model(x)``, and why no faster one does, without changing it.

    In training mode the report assumes that gradients are computed, in eval mode that ``model(x)`` runs under
    ``torch.no_grad()``. For a reference network it reports that PyTorch runs every module.

    Raises:
        TypeError: ``model`` is not a network of this module or of :mod:`dcgan.models`.
        ValueError: ``model(x)`` raises it.
    """
    model = getattr(model, "_orig_mod", model)  # unwrap torch.compile
    if not isinstance(model, models.Generator | models.Discriminator):
        raise TypeError(
            f"model must be a Generator or Discriminator of dcgan.fast, got {type(model).__qualname__}"
        )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.set_grad_enabled(model.training), ops.recording() as choices:
        torch.func.functional_call(model, buffers, (x,))
    if not isinstance(model, _Fast):
        return _all_eager(model.main, "a reference network; dcgan.fast.convert(model) returns a fast one")
    why = layers.why_main_runs_eagerly(model.main)
    if why:
        return _all_eager(model.main, why)
    if not choices:
        first = x[:, :, None, None] if x.ndim == 2 else x
        why = coverage.why_eager(x, model.training) or coverage.why_eager(x, training=True)
        return _all_eager(
            model.main, why or layers.why_modules_run_eagerly(model.main, first, model.training)
        )
    remaining = iter(choices)
    rows = Explanations()
    for layer in layers.group_layers(layers.named_modules(model.main)):
        if layer.conv is None:
            kinds = "-".join(type(module).__name__ for module in layer.modules)
            rows.append(Explanation(layer.names, kinds, "eager", layer.reason))
        else:
            rows.append(Explanation(layer.names, *next(remaining)))
    if not model.training and len(rows) == len(choices) and all(c.engine == "triton" for c in choices):
        rows.note = layers.chain.described(x, len(rows))
    return rows


def _all_eager(main: nn.Module, why: str) -> Explanations:
    inner = layers.named_modules(main) if isinstance(main, nn.Sequential) else [("main", main)]
    return Explanations(Explanation(name, type(module).__name__, "eager", why) for name, module in inner)
