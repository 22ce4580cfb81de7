"""The weight cache: packed, transformed or cast copies of frozen weights, kept until the weights change.

**When an entry is valid.** A tensor's ``_version`` is not a sufficient key: fused optimizers and
``p.data.copy_()`` change values without bumping it, and replaying a CUDA graph changes them without running
any Python. Nothing is cached, therefore, unless an owner (a module in eval mode) has declared its weights
constant with :func:`freeze`, and a cached result is reused only while all of the following hold:

* the weight is the same tensor, with the same version, address, shape, strides and dtype (``copy_``,
  ``load_state_dict``, a ``.data`` assignment and a replaced parameter each change one of them);
* its storage has not been invalidated (:func:`invalidate`; a hook on every ``torch.optim.Optimizer`` calls it
  after each step, and a captured training step after each replay, for every tensor that they change);
* its owner has not called :func:`thaw` (on ``train()``, ``eval()``, ``.to()``, ``load_state_dict()``,
  ``refresh()``) and has not been garbage-collected;
* on a CPU, sampled values equal those of a copy of the weight taken when the entry was made
  (:mod:`.cpu.value_guard`). Every use samples different places, and so detects writes that bump no version:
  in-place edits of ``p.data``, as by moving averages and ``weights_init``, NumPy views, and shared memory
  written by another process. If a fraction f of a weight's elements was edited, one use misses it with a
  probability of at most (1 - f)^32 where they are contiguous and (1 - f)^512 where they are scattered: an
  optimizer's or a moving average's step, which changes most elements, is never missed, but an edit of 1% in
  one place is missed three times in four;
* on CUDA, the call is on the stream that the entry was made on, and comes from Python
  (:func:`called_from_python`). A compiled program or a graph under capture computes the result itself, at
  every replay: cached tensors must not lie in a graph's memory pool, and a graph must not hold the address of
  a cached tensor that may be freed (except under :func:`collecting`).

A whole network that runs on CUDA as one operator keeps its packed weights elsewhere, under the same rules,
and there the device samples values (:mod:`.gpu.prepare`).

The remaining cases need ``refresh()``: an edit of a few elements that bumps no version, and, in a network on
CUDA whose layers run one by one, any in-place edit of ``p.data`` and a foreign CUDA graph that writes to a
frozen weight.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .cpu import value_guard


class _Entry:
    """A frozen weight: the fingerprint of its values, and the results computed from them."""

    __slots__ = ("before", "derived", "identity", "pairs", "place", "sampled", "storage", "tensor", "version")

    def __init__(self, weight: Tensor, sampled: bool) -> None:
        self.storage = weight.untyped_storage()  # kept alive, so that its address is not reused
        self.place = self.storage.data_ptr()
        self.identity = _identity(weight)
        self.sampled = sampled
        self.renew(weight)

    def renew(self, weight: Tensor) -> None:
        """Discard all results and take the fingerprint of the weight's present values."""
        self.version = weight._version
        self.tensor = id(weight)  # versions count per tensor; no weakref, as swap_tensors refuses those
        self.derived: dict[Hashable, Tensor] = {}
        self.before: Tensor | None = None
        self.pairs: value_guard.Pairs | None = None

    def copy(self, weight: Tensor) -> None:
        """Copy the values before a result is computed from them, so that a concurrent edit is detected."""
        if self.sampled and self.before is None:
            self.before = value_guard.copied(weight.detach())
            self.pairs = value_guard.Pairs([(weight, self.before)])

    def matches(self, weight: Tensor) -> bool:
        """Return whether the weight's fingerprint is unchanged; does not sample values."""
        return (
            self.version == weight._version
            and self.tensor == id(weight)
            and self.identity == _identity(weight)
        )


_entries: dict[int, _Entry] = {}
_owned: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_local = threading.local()
_epoch = 0
_hook: Any = None


def _identity(weight: Tensor) -> tuple[Hashable, ...]:
    return weight.dtype, weight.shape, weight.stride()


def _cacheable(weight: Tensor) -> bool:
    """Return whether the tensor has values, an address and a version.

    Fake, traced and inference-mode tensors lack one of these, and so do torch.func's wrapped parameters.
    """
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and not weight.is_meta
        and not weight.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
    )


def _is_cuda(weight: Tensor) -> bool:
    return weight.is_cuda


def freeze(owner: Any, weights: Iterable[Tensor]) -> None:
    """Declare that ``weights``, all of ``owner``'s, are constant until :func:`thaw` and may be cached.

    Repeated calls are cheap. Results of tensors without a version (inference mode) and, on a CPU, of tensors
    whose memory is not dense are not cached but computed at each call.
    """
    global _hook
    cacheable = {w.data_ptr(): w for w in weights if _cacheable(w) and w.numel()}
    if cacheable.keys() <= _entries.keys():
        return
    cacheable = {address: w for address, w in cacheable.items() if _is_cuda(w) or value_guard.dense(w)}
    with _lock:
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_after_step)
        if owner not in _owned:
            _owned[owner] = set()
            weakref.finalize(owner, _forget, _owned[owner])
        owned = _owned[owner]
        _forget(owned - cacheable.keys())  # parameters that have been replaced since
        for address, weight in cacheable.items():
            _entries.setdefault(address, _Entry(weight, sampled=not _is_cuda(weight)))
        owned.clear()
        owned.update(cacheable)


def thaw(owner: Any) -> None:
    """End the freeze of ``owner``'s weights and discard their cached results."""
    with _lock:
        _forget(_owned.get(owner, set()))


def frozen(weight: Tensor) -> bool:
    """Return whether results computed from ``weight`` are cached."""
    return _cacheable(weight) and weight.data_ptr() in _entries


def _forget(addresses: set[int]) -> None:
    global _epoch
    with _lock:
        for address in addresses:
            entry = _entries.pop(address, None)
            if entry is not None:
                _epoch += 1
                _forget({t.data_ptr() for t in entry.derived.values()})
        addresses.clear()


def invalidate(tensors: Iterable[Tensor]) -> None:
    """Discard results computed from ``tensors``, whose values have changed, perhaps without a version bump.

    Matches by storage, so that a flat tensor covers all the parameters that are views of it.
    """
    if not _entries:
        return
    places = {t.untyped_storage().data_ptr() for t in tensors if _cacheable(t)}
    with _lock:
        _forget({address for address, entry in _entries.items() if entry.place in places})


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    invalidate(p for group in optimizer.param_groups for p in group["params"])


def epoch() -> int:
    """Return a counter that increases whenever frozen weights may have changed."""
    return _epoch


@contextlib.contextmanager
def collecting(networks: dict[Any, Any]) -> Iterator[list[Tensor]]:
    """In this context, a CUDA graph under capture may use cached tensors, which are listed for its owner.

    The owner must keep them alive as long as the graph, and recapture when :func:`epoch` has increased.

    Args:
        networks: the graph's own packed weights of whole networks (:mod:`.gpu.inference`), which a replay
            keeps up to date itself. The owner passes the same dict for warm-up and capture.
    """
    _local.tensors, _local.networks = [], networks
    try:
        yield _local.tensors
    finally:
        del _local.tensors, _local.networks


def networks_of_graph() -> dict[Any, Any] | None:
    """Return the dict passed to the enclosing :func:`collecting`, or None outside of one."""
    return getattr(_local, "networks", None)


@contextlib.contextmanager
def constant_weights(weights: Iterable[Tensor]) -> Iterator[None]:
    """Within this context ``weights`` do not change: what one call computes from them serves the next.

    This is for networks in training, whose weights are not frozen, and holds for a graph under capture too.
    """
    before = getattr(_local, "constant", None)
    _local.constant = {w.data_ptr() for w in weights if _cacheable(w)}, {}
    try:
        yield
    finally:
        _local.constant = before


def make_once(
    weights: Iterable[Tensor], key: Hashable, make: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Return ``make()``, or where ``weights`` are constant the results of an earlier call with ``key``.

    ``key`` identifies the weights too. As with the cache, calls that do not come from Python make their own.
    """
    constant: tuple[set[int], dict[Hashable, tuple[Tensor, ...]]] | None = getattr(_local, "constant", None)
    if constant is None or not getattr(_local, "eager", False):
        return make()
    addresses, kept = constant
    if not all(w.data_ptr() in addresses for w in weights):
        return make()
    results = kept.get(key)
    if results is None:
        results = kept[key] = make()
    return tuple([t.detach() for t in results])  # aliases: no operator may return the same tensor twice


class called_from_python:
    """Mark this thread's ops as called from Python, so that their results on CUDA may be cached.

    A compiled program never enters this context: an op called outside it was called by a compiled program,
    whose memory may belong to a CUDA graph.
    """

    def __enter__(self) -> None:
        self._before = getattr(_local, "eager", False)
        _local.eager = True

    def __exit__(self, *_: object) -> None:
        _local.eager = self._before


def cached_from(weight: Tensor, key: Hashable, result: Tensor) -> Tensor | None:
    """Check whether :func:`get_or_make` would return ``result`` again, without sampling values.

    Returns:
        If so, the tensor to sample against (:class:`.cpu.value_guard.Pairs`): a copy of the weight from when
        ``result`` was made, or the weight itself where no copy is needed. Otherwise None.
    """
    entry = _entries.get(weight.data_ptr())
    if entry is None or entry.derived.get(key) is not result or not entry.matches(weight):
        return None
    return weight if entry.before is None else entry.before


def discard(weights: Sequence[Tensor]) -> None:
    """Discard results computed from ``weights``, whose values have changed; the weights stay frozen."""
    with _lock:
        for weight in weights:
            entry = _entries.get(weight.data_ptr())
            if entry is not None:
                _forget({t.data_ptr() for t in entry.derived.values()})
                entry.renew(weight)


def get_or_make(weight: Tensor, key: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``make(weight)``, from the cache if ``weight`` is frozen; the result is then frozen as well.

    The module's docstring says when a cached result is valid.
    """
    entry = _entries.get(weight.data_ptr()) if _cacheable(weight) else None
    if entry is None:
        return make(weight)
    listed = getattr(_local, "tensors", None)
    if _is_cuda(weight):
        capturing = listed is None and torch.cuda.is_current_stream_capturing()
        if capturing or not getattr(_local, "eager", False):
            return make(weight)
        key = (key, torch.cuda.current_stream(weight.device).cuda_stream)
    if entry.identity != _identity(weight):
        return make(weight)
    pairs = entry.pairs
    if not entry.matches(weight) or (pairs is not None and pairs.differ()):
        discard([weight])
    result = entry.derived.get(key)
    if result is None:
        with torch.inference_mode(False), torch.no_grad():  # a later call may need gradients
            entry.copy(weight)
            result = make(weight)
        if result.data_ptr() != weight.data_ptr():
            with _lock:
                entry.derived[key] = result
                if not result.is_inference():
                    _entries[result.data_ptr()] = _Entry(result, sampled=False)
    if listed is not None:
        listed.append(result)
    return result
