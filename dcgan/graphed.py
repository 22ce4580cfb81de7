"""Inference by replaying a CUDA graph, for batches so small that kernel launch overhead dominates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import fusing, layers, models
from .introspection import HOOKS, why_all_eager
from .kernels import weight_cache
from .kernels.capturing import Cuda, Replay


class Graphed:
    """Run ``model`` on up to ``batch`` rows by replaying one CUDA graph; constructed by :func:`graphed`.

    The graph keeps its packed weights and folded BatchNorms up to date itself, as
    :mod:`.kernels.gpu.prepare` describes. It is captured again if the network or a setting that it depends
    on has changed, and, where the network's layers do not run as one operator, if weights have.
    """

    def __init__(self, model: nn.Module, batch: int, example: Tensor | None = None) -> None:
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be a positive integer, got {batch!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
        parameter = next(model.parameters())
        if not parameter.is_cuda:
            raise ValueError(f"model must be on a CUDA device, its parameters are on {parameter.device}")
        self.model, self.batch = model, batch
        shape, dtype = _row(model, parameter, example)
        self._example = torch.zeros(batch, *shape, dtype=dtype, device=parameter.device)
        self._backend: Any = Cuda(parameter.device)
        self._replay: Replay | None = None
        self._networks: dict[Any, Any] = {}  # packed weights, see weight_cache.collecting
        self._kept_alive: list[Tensor] = []
        self._is_one_operator = False
        self._settings: Any = None
        self._tensors: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``model(x)`` in newly allocated memory.

        Raises:
            ValueError: x has another shape or more than ``batch`` rows, or the model is in training mode.
            TypeError: x has another dtype or device.
        """
        example = self._example
        latent = isinstance(self.model, models.Generator) and example.ndim == 2
        flat = x.flatten(1) if latent and x.ndim == 4 else x
        if flat.shape[1:] != example.shape[1:] or x.shape[0] > self.batch:
            allowed = ["≤ " + str(self.batch), *example.shape[1:]]
            raise ValueError(f"x must be [{', '.join(map(str, allowed))}], got {list(x.shape)}")
        if x.dtype != example.dtype or x.device != example.device:
            raise TypeError(f"x must be {example.dtype} on {example.device}, got {x.dtype} on {x.device}")
        if self.model.training:
            raise ValueError(
                "a graphed model must be in eval mode: a replay would not update the running statistics"
            )
        with self._backend.device_context():
            if self._replay is None or self._changed() or not self._followed():
                self._capture()
            assert self._replay is not None
            return self._replay(flat)

    def _freeze(self) -> None:
        for module in self.model.modules():
            if isinstance(module, fusing.Fused):
                module._fused_freeze()

    def _followed(self) -> bool:
        """Report changed weights to the device; return False if the graph cannot follow them."""
        return all(network.follow(self._freeze) for network in self._networks.values())

    def _changed(self) -> bool:
        """Return whether anything has changed that the graph depends on but its replay does not read."""
        if self._settings != self._current_settings():
            return True
        if self._is_one_operator:
            return any(network.moved() for network in self._networks.values())
        return bool(self._tensors != self._current_tensors())

    def _runs_as_one_operator(self) -> bool:
        """Return whether the graph reads no other tensors than those of one operator's packed weights."""
        from . import fast  # deferred: imports this module

        model = self.model
        forwards = models.Generator.forward, models.Discriminator.forward
        if not isinstance(model, fast.Generator | fast.Discriminator) or "forward" in model.__dict__:
            return False
        if type(model).forward not in forwards:
            return False
        main: Any = model.main
        if type(main) is not fusing.Sequential or len(self._networks) != 1 or self._kept_alive:
            return False
        example = self._example
        return (
            main._fused_pipeline().whole(example[:, :, None, None] if example.ndim == 2 else example)
            is not None
        )

    def _current_settings(self) -> Any:
        from .kernels.gpu.launcher import precision  # deferred: imports Triton, which CPU machines may lack

        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        main: Any = getattr(self.model, "main", None)
        # In a network that runs as one operator the fingerprint shows that no inner module has hooks.
        alone = self._is_one_operator and type(main) is fusing.Sequential
        modules = (self.model, main) if alone else self.model.modules()
        hooks = [tuple(module.__dict__[name]) for module in modules for name in HOOKS]
        found = layers.fingerprint(list(main._modules.items())) if alone else fusing.fingerprint(self.model)
        return autocast, precision(torch.float32), why_all_eager(), hooks, found

    def _current_tensors(self) -> Any:
        """Return where all tensors lie, and if the graph reads results computed from them, their versions."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        memory = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
        if not self._kept_alive:
            return memory, None
        return memory, (weight_cache.epoch(), [0 if t.is_inference() else t._version for t in tensors])

    @torch.no_grad()
    def _capture(self) -> None:
        self._replay = None  # frees the old graph's memory first
        self._networks.clear()
        with weight_cache.collecting(self._networks):
            # Compiles kernels and packs weights, on the stream that will be captured.
            self._backend.run(lambda: self.model(self._example))
        torch.cuda.synchronize()
        with weight_cache.collecting(self._networks) as kept:
            self._replay = Replay(self.model, self._example, self._backend)
        self._kept_alive = list(kept)
        self._is_one_operator = self._runs_as_one_operator()
        self._settings, self._tensors = self._current_settings(), self._current_tensors()


def _row(model: nn.Module, parameter: Tensor, example: Tensor | None) -> tuple[Sequence[int], torch.dtype]:
    """Return the shape and dtype of one row of the model's input."""
    if example is not None:
        if not isinstance(example, Tensor) or example.ndim < 1:
            raise TypeError(f"example must be a tensor of one or more rows, got {type(example).__qualname__}")
        return example.shape[1:], example.dtype
    if isinstance(model, models.Generator):
        return (model.latent_dim,), parameter.dtype
    if isinstance(model, models.Discriminator):
        return (model.channels, model.image_size, model.image_size), parameter.dtype
    raise ValueError(
        f"example must be given for a {type(model).__qualname__}: a tensor like those that it takes"
    )


def graphed(model: nn.Module, batch: int, example: Tensor | None = None) -> Graphed:
    """Return a callable that runs ``model``, in eval mode, on up to ``batch`` rows by replaying a CUDA graph.

    Args:
        model: a network on a CUDA device that maps one tensor to one tensor of as many rows. Python code that
            runs in its ``forward``, such as hooks, does not run in a replay.
        example: an input of one or more rows, whose values do not matter. It may be left out for a Generator
            or Discriminator of this package.

    Raises:
        ValueError: ``batch`` is not a positive integer, the model is not on a CUDA device, or ``example`` is
            missing.
        TypeError: ``model`` is not a module, or ``example`` is not a tensor.
    """
    return Graphed(model, batch, example)
