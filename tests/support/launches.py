"""Kernel launches and peak memory of a captured TrainStep on the Triton engine, counted without a GPU.

    python -m tests.support.launches [--batch 64 1024] [--ordered]

prints, per batch size, how often each kernel is launched and the peak of live memory next to that of the
reference networks; ``--ordered`` lists every launch in order with its number of programs, or its output's
shape. Networks have their default sizes; autocast is bfloat16.

The step runs on CPU tensors. Each :class:`dcgan.kernels.gpu.launcher.Launch` is recorded instead of executed,
so feature maps are never written, and nothing is compiled or interpreted. The aten operators, which a
dispatch mode observes below autograd, do run: they work on weights, [C] vectors and the batch. Each counts as
the launches that it needs on CUDA. An operator that :func:`cuda_launches` does not know is an error, so that
none is missed, and so is one that a captured step must not contain, such as a convolution by cuDNN or a read
of a value on the host.

What differs from a GPU: tiles are those that the cost model predicts to be fastest on an H100, without a
check for spills, whereas tuned tiles may fuse other prologues; a memset before a large aten reduction is not
counted; and memory is the sum of the tensors' sizes, without rounding, fragmentation, or cuDNN's workspaces.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pkgutil
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcgan import fast, models
from dcgan.kernels import gpu, ops, train_chain
from dcgan.kernels.gpu.launcher import Launch
from dcgan.training import Config, TrainStep, optimizers

# Import every kernel now: one that is first imported while the interpreter is on could never be compiled.
for _module in pkgutil.iter_modules(gpu.__path__):
    importlib.import_module(f"{gpu.__name__}.{_module.name}")


class Launched(NamedTuple):
    """One launch: the kernel with its module, and the number of programs or, for aten, the output's shape."""

    name: str
    size: int | tuple[int, ...]


class Measured(NamedTuple):
    """The launches of one step, in order, and the peak of live memory in bytes."""

    launches: list[Launched]
    peak: int

    def totals(self) -> Counter[str]:
        """Return the number of launches by kernel."""
        return Counter(launch.name for launch in self.launches)


# --- aten operators -----------------------------------------------------------------------------------------

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
_FILLS = {"fill_", "full", "full_like", "new_full", "new_zeros", "ones", "ones_like", "zero_", "zeros"}
_COPIES = {"_to_copy", "cat", "clone", "copy_", "stack"}
_REDUCTIONS = {"amax", "amin", "max", "mean", "min", "norm", "sum", "var", "var_mean"}
_OTHERS = {"_fused_adam_", "zeros_like"}
_ONE_LAUNCH = _FILLS | _COPIES | _REDUCTIONS | _OTHERS
_SEVERAL = {"constant_pad_nd": 2}  # a fill of the output and a copy of the input


def _is_view(op: torch._ops.OpOverload) -> bool:
    """Return whether the operator returns views of its arguments and writes to none."""
    aliases = [result.alias_info for result in op._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def cuda_launches(op: torch._ops.OpOverload, results: Sequence[Tensor]) -> int:
    """Return the number of kernels that an operator with these results launches on CUDA.

    Lists of tensors are those of these networks: short enough for one launch of ``torch._foreach_*``.

    Raises:
        ValueError: the number is unknown, or the operator must not occur in a captured step.
    """
    name = op._schema.name.split("::")[1]
    if op.namespace == "profiler" or name in _ALLOCATIONS or _is_view(op):
        return 0
    known = op.namespace == "aten" and (
        name in _ONE_LAUNCH or name.startswith("_foreach_") or torch.Tag.pointwise in op.tags
    )
    if not known and name not in _SEVERAL:
        raise ValueError(f"op must be one whose number of launches is known here, got {op}")
    if results and not any(t.numel() for t in results):
        return 0
    return _SEVERAL.get(name, 1)


# --- observing a step ---------------------------------------------------------------------------------------


class Memory:
    """Bytes of the live storages that it has been shown, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._live: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage, once, until the last tensor that uses it is freed."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._live:
            return
        self._live.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, address, size).atexit = False

    def _remove(self, address: int, size: int) -> None:
        self._live.remove(address)
        self.now -= size


class Observer(TorchDispatchMode):
    """Shows every operator's results to ``memory``, and appends to ``launches`` unless it is None."""

    def __init__(self, memory: Memory, launches: list[Launched] | None = None) -> None:
        super().__init__()
        self._memory, self._launches = memory, launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._launches is not None:
            # The mode is off while it handles an operator. Turn it on for what these operators consist of.
            if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
                with self:
                    return func.decompose(*args, **kwargs)
            if func.namespace == ops.LIBRARY.ns:
                with self:
                    return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in tensors:
            self._memory.add(tensor)
        if self._launches is not None:
            name, shape = f"aten.{func._schema.name.split('::')[1]}", tensors[0].shape if tensors else ()
            self._launches += [Launched(name, tuple(shape))] * cuda_launches(func, tensors)
        return result


@contextlib.contextmanager
def recording(launches: list[Launched]) -> Iterator[None]:
    """Force the Triton engine on CPU tensors, and record its launches instead of executing them."""

    def record(launch: Launch) -> None:
        function = launch.kernel.fn
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        launches.append(Launched(name, launch.programs))

    with (
        ops.use_engine("triton"),
        triton.knobs.runtime.scope(),
        mock.patch.object(Launch, "__call__", record),
        # As in a step that no mode observes, the backward may free maps before it returns.
        mock.patch.object(train_chain, "_may_bypass_dispatcher", return_value=True),
    ):
        triton.knobs.runtime.interpret = True
        yield


def _step(generator: Any, discriminator: Any, batch: int) -> tuple[TrainStep, Tensor, Tensor]:
    pair = optimizers(generator, discriminator, Config(), fused=True)
    step = TrainStep(generator, discriminator, *pair, autocast=torch.bfloat16)
    real = torch.zeros(batch, discriminator.channels, *[discriminator.image_size] * 2)
    return step, real, torch.zeros(batch, generator.latent_dim, 1, 1)


def _observe(step: TrainStep, real: Tensor, noise: Tensor, launches: list[Launched] | None) -> Measured:
    """Run a second step under observation: the first one creates the optimizers' state."""
    step._step(real, noise)
    if launches is not None:
        launches.clear()
    memory = Memory()
    parameters, changed = step._tensors()
    states = (step._optimizer_g.state, step._optimizer_d.state)
    for tensor in tree_leaves([real, noise, changed, [p.grad for p in parameters], *map(dict, states)]):
        if isinstance(tensor, Tensor):
            memory.add(tensor)
    with Observer(memory, launches):
        torch.stack(step._step(real, noise))  # as it is captured
    return Measured(launches or [], memory.peak)


def measure(batch: int) -> Measured:
    """Return the launches and the peak of live memory of one step of the fast networks.

    Memory holds parameters, buffers, gradients, optimizer state, the batch and whatever the step allocates.
    """
    launches: list[Launched] = []
    with recording(launches):
        return _observe(*_step(fast.Generator(), fast.Discriminator(), batch), launches)


def reference_peak(batch: int) -> int:
    """Return the peak of live memory, in bytes, of the same step with the reference networks.

    The step runs on fake tensors: nothing is computed.
    """
    with FakeTensorMode():
        return _observe(*_step(models.Generator(), models.Discriminator(), batch), None).peak


# --- the command --------------------------------------------------------------------------------------------


def table(batch: int, ordered: bool = False) -> str:
    """Return the launches of a step by kernel, or in order, and its peak memory."""
    measured, reference = measure(batch), reference_peak(batch)
    lines = [f"TrainStep, batch {batch}, bfloat16: {len(measured.launches)} launches"]
    if ordered:
        lines += [f"{i:5}  {name:36} {size}" for i, (name, size) in enumerate(measured.launches)]
    else:
        lines += [f"{count:5}  {name}" for name, count in measured.totals().most_common()]
    ours, theirs = measured.peak / 1e6, reference / 1e6
    lines.append(f"peak {ours:.1f} MB, {ours / theirs:.0%} of the reference's {theirs:.1f} MB")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1024], help="batch sizes")
    parser.add_argument("--ordered", action="store_true", help="list every launch in order")
    args = parser.parse_args(arguments)
    print("\n\n".join(table(batch, args.ordered) for batch in args.batch))


if __name__ == "__main__":
    main()
