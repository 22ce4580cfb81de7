"""Networks run by the fused kernels: :func:`fuse` for any network, and drop-ins for the reference networks.

    from dcgan import fast

    netG = fast.fuse(netG)                  # your own network: the same parameters, names and checkpoints
    from dcgan.fast import Generator        # or instead of dcgan.models

A convolution, its BatchNorm and its activation are one op of :mod:`dcgan.kernels.ops`, and layers that follow
one another are one operator:

* eval: BatchNorm is folded into the op's epilogue, from the live parameters and running statistics. When no
  gradients are needed, the layers are one operator (:mod:`dcgan.kernels.chain`): one call of the native
  engine, or on a GPU a handful of launches, which become a CUDA graph where small batches recur.
* train: the layers are one operator with one autograd node (:mod:`dcgan.kernels.train_chain`), and a layer
  saves one tensor for the backward. Running statistics and ``num_batches_tracked`` are updated as in
  ``nn.BatchNorm2d``. Where that operator does not apply (a BatchNorm in eval mode, statistics merged over
  processes, activations of different slopes), they run one by one: an op returns its raw output with its mean
  and variance, and the next op applies BatchNorm and activation as its prologue.

**What is replaced.** The call of a module is replaced if the module's type is exactly a known one, if nothing
but ``nn.Module.__call__`` and the class's own ``forward`` would run, and if no hook of any kind is registered
on it, other than that of a spectral or weight norm (:mod:`.introspection`). Any other module is called,
between ops. All are called under ``torch.jit.trace`` and ``torch.export``, and where no engine has kernels
for the input's device and dtype (:mod:`dcgan.kernels.coverage`). :func:`explain` lists, layer by layer, what
runs and why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import fusing, models, pipeline
from .fusing import Fused, Sequential, fuse, refresh
from .graphed import graphed
from .guards import Untraceable
from .introspection import CONTAINERS, is_leaf, plain_type, why_eager
from .kernels import chain, flops
from .layers import SEPARATOR, why_not_fused
from .layers import stages as stages
from .runs import examples, fusion_of

__all__ = [
    "Discriminator",
    "Explanation",
    "Explanations",
    "Generator",
    "convert",
    "explain",
    "fuse",
    "graphed",
    "refresh",
]

flops.register()


class _Network(Fused):
    """Base of the drop-ins, whose layers are ``main``, a fused Sequential."""

    main: nn.Sequential  # unless a user has replaced it

    def refresh(self) -> None:
        """Discard everything cached for the weights: :func:`refresh` says when this is needed."""
        refresh(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "main" and type(value) is nn.Sequential:
            fuse(value, inplace=True)
        super().__setattr__(name, value)


class Generator(_Network, models.Generator):
    """:class:`dcgan.models.Generator` run by the fused kernels.

    Arguments, parameters, checkpoints, results and output strides are the same.
    """

    _fused_from = models.Generator


class Discriminator(_Network, models.Discriminator):
    """:class:`dcgan.models.Discriminator` run by the fused kernels.

    Arguments, parameters, checkpoints and results are the same.
    """

    _fused_from = models.Discriminator

    def logits(self, image: Tensor) -> Tensor:
        return self.logits_of_groups(image, 1)

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
        main = self.main
        if isinstance(main, Sequential):
            found: Tensor = main._fused_run(image, logits=True, groups=groups)
        else:
            found = torch.cat([models.without_sigmoid(main)(part) for part in image.chunk(groups)])
        return found.view(-1, 1).squeeze(1)

    def engine_of_groups(self, image: Tensor, groups: int) -> str:
        """Return the engine with which :meth:`logits_of_groups` makes one pass; '' if it makes several."""
        main = self.main
        if not self.training or not isinstance(main, Sequential):
            return ""
        return main._fused_pipeline(logits=True).engine_of_groups(self._image(image), groups)


fusing.register(models.Generator, Generator)
fusing.register(models.Discriminator, Discriminator)

convert = fuse
"""The former name of :func:`fuse`."""


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


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanations:
    """Report which engine runs each layer of ``model(*args, **kwargs)``, and why no faster one does.

    In training mode the report assumes that gradients are computed, in eval mode that the call is under
    ``torch.no_grad()``. The model and its buffers are unchanged. The rows are in the order of ``model``'s
    modules, with those that are called more than once as often as that.

    Raises:
        TypeError: ``model`` is not a module.
        Exception: whatever the call raises.
    """
    model = getattr(model, "_orig_mod", model)  # unwrap torch.compile
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.set_grad_enabled(model.training), pipeline.explaining() as outcomes:
        torch.func.functional_call(model, buffers, args, kwargs)
    order = {id(module): (i, name) for i, (name, module) in enumerate(model.named_modules())}
    found: list[tuple[int, Explanation]] = []
    seen: set[int] = set()
    for layer, choice, reason, _ in outcomes:
        ids = [id(module) for module in layer.modules]
        seen.update(ids)
        given = layer.names.split(SEPARATOR)
        names = [order.get(i, (0, name))[1] for i, name in zip(ids, given, strict=True)]
        kind = "-".join(type(module).__name__ for module in layer.modules)
        row = Explanation("", kind, "eager", reason) if choice is None else Explanation("", *choice)
        text = names[0] if len(names) == 1 else _range(names[0], names[-1])
        found.append((order.get(ids[0], (len(order), ""))[0], row._replace(modules=text)))
    why = _why_not_run(model)
    for name, module in model.named_modules():
        if id(module) not in seen and next(module.children(), None) is None:
            is_convolution = isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
            reason = (why_not_fused(module) if is_convolution else why_eager(module)) or why
            row = Explanation(name or "the model", type(module).__name__, "eager", reason)
            found.append((order[id(module)][0], row))
    rows = Explanations(row for _, row in sorted(found, key=lambda pair: pair[0]))
    if outcomes and all(
        o.is_chain and o.choice is not None and o.choice.engine == "triton" for o in outcomes
    ):
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        rows.note = chain.described(x, len(outcomes))
    return rows


def _range(first: str, last: str) -> str:
    """Return a range of names: 'main.0-2' for main.0 to main.2."""
    prefix = first.rpartition(".")[0]
    return f"{first}-{last.removeprefix(f'{prefix}.') if prefix else last}"


def _why_not_run(model: nn.Module) -> str:
    """Return why layers that the kernels cover were not run by any of the model's fused modules."""
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    if not any(
        isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and not why_not_fused(m) for m in model.modules()
    ):
        return "it does not follow a convolution that the fused ops support"
    if not fused and fusing.to_be_fused(model):
        return "the model is not fused; dcgan.fast.fuse(model) returns one that is"
    whys = [module._fused_state().why_not_traced for module in fused]
    for module in model.modules():
        if not (isinstance(module, Fused) or is_leaf(module) or plain_type(module) in CONTAINERS):
            try:
                fusion_of(module, examples(module), {}, lambda: None)
            except Untraceable as error:
                whys.append(f"the forward of {type(module).__name__} cannot be traced: {error}")
    return "; ".join(dict.fromkeys(filter(None, whys))) or "it was not called"
