"""Prepacked weights: what engines make of weights (packed, transformed, cast), kept while the weights stay.

**When what was made is current.** A tensor's ``_version`` alone is no key: fused optimizers and
``p.data.copy_()`` change values without bumping it, and a replayed CUDA graph changes them without running
any Python. So nothing is kept unless an owner, a module in eval mode, has declared its weights constant with
:func:`freeze`, and what was made of such a weight is used again only while all of this holds:

* it is the same tensor, with the same version, address, shape, strides and dtype (``copy_``,
  ``load_state_dict``, a ``.data`` assignment and a replaced parameter all change one of them);
* nobody has said that its storage was written to (:func:`written`: a hook on every ``torch.optim.Optimizer``
  does after each step, a captured training step after each replay, for every tensor that it changes);
* its owner has not called :func:`thaw` (``train()``, ``eval()``, ``.to()``, ``load_state_dict()``,
  ``refresh()``) and has not been collected;
* on a CPU, samples of its values are those of a copy that was made with it (:mod:`.cpu.samples`). They are
  taken at every use, at other places each time, and see what changes no version: ``p.data`` edited in place,
  as moving averages and ``weights_init`` do, a NumPy view, shared memory written by another process. An edit
  of a share f of a weight's elements is missed by a use with a probability of at most (1 - f)^32 where they
  lie together, (1 - f)^512 where they are scattered: an optimizer's or a moving average's step, which changes
  most elements, never, an edit of 1% in one place three times in four;
* on CUDA, the call is on the stream that it was made on, and comes from Python (:func:`eager`). A compiled
  program or a graph under capture has it made inside itself, at every replay: what is kept here must not lie
  in a graph's memory pool, nor may a graph hold the address of something that is kept here and may be freed
  (except under :func:`keeping`).

What is left for ``refresh()``: on a CPU, an edit of a few elements behind the version's back; on CUDA, any
edit of ``p.data`` in place, or somebody else's CUDA graph that writes to a frozen weight.
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

from .cpu import samples


class _Entry:
    """A frozen weight: what identifies its values, and what has been made of them."""

    __slots__ = ("before", "derived", "identity", "pairs", "place", "sampled", "storage", "tensor", "version")

    def __init__(self, weight: Tensor, sampled: bool) -> None:
        self.storage = weight.untyped_storage()  # held, so that its address is not another tensor's
        self.place = self.storage.data_ptr()
        self.identity = _identity(weight)
        self.sampled = sampled
        self.renew(weight)

    def renew(self, weight: Tensor) -> None:
        """Begin anew with the weight's present values, of which nothing has been made."""
        self.version = weight._version
        self.tensor = id(weight)  # a version is that of one tensor; swap_tensors refuses those with weakrefs
        self.derived: dict[Hashable, Tensor] = {}
        self.before: Tensor | None = None
        self.pairs: samples.Pairs | None = None

    def copy(self, weight: Tensor) -> None:
        """Keep the values that something is about to be made of: an edit meanwhile then differs from them."""
        if self.sampled and self.before is None:
            self.before = samples.copied(weight.detach())
            self.pairs = samples.Pairs([(weight, self.before)])

    def is_of(self, weight: Tensor) -> bool:
        """Whether, by all but samples, the weight is what something was made of."""
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
    """Whether the tensor has values, an address and a version: no fake, traced or inference-mode tensor has.

    Neither has what torch.func passes for a parameter.
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
    """Declare that ``weights``, all of ``owner``'s, stand still until :func:`thaw`: they may be cached.

    Cheap when repeated. What is made of a tensor without a version (inference mode), or on a CPU of one with
    gaps in its memory, is made each time.
    """
    global _hook
    still = {w.data_ptr(): w for w in weights if _cacheable(w) and w.numel()}
    if still.keys() <= _entries.keys():
        return
    still = {address: w for address, w in still.items() if _is_cuda(w) or samples.dense(w)}
    with _lock:
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_after_step)
        if owner not in _owned:
            _owned[owner] = set()
            weakref.finalize(owner, _forget, _owned[owner])
        owned = _owned[owner]
        _forget(owned - still.keys())  # those of parameters since replaced
        for address, weight in still.items():
            _entries.setdefault(address, _Entry(weight, sampled=not _is_cuda(weight)))
        owned.clear()
        owned.update(still)


def thaw(owner: Any) -> None:
    """Forget what was made of the weights that ``owner`` froze, and that they stand still."""
    with _lock:
        _forget(_owned.get(owner, set()))


def frozen(weight: Tensor) -> bool:
    """Whether what is made of ``weight`` would be kept."""
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


def written(tensors: Iterable[Tensor]) -> None:
    """Say that ``tensors`` have new values, which their versions may not tell: forget what was made of them.

    By storage, so that a flat tensor stands for all the parameters that are views of it.
    """
    if not _entries:
        return
    places = {t.untyped_storage().data_ptr() for t in tensors if _cacheable(t)}
    with _lock:
        _forget({address for address, entry in _entries.items() if entry.place in places})


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    written(p for group in optimizer.param_groups for p in group["params"])


def epoch() -> int:
    """A number that grows whenever something may have changed frozen weights."""
    return _epoch


@contextlib.contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """While this lasts, cached tensors may enter a CUDA graph under capture, and are listed for its owner.

    The owner must hold them as long as the graph, and capture anew when :func:`epoch` has grown.
    """
    _local.tensors = []
    try:
        yield _local.tensors
    finally:
        del _local.tensors


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """While this lasts, Python itself runs the ops of this thread, so that on CUDA results may be kept.

    A compiled program never enters it: an op that is called without has been called by one, whose memory may
    belong to a CUDA graph.
    """
    before = getattr(_local, "eager", False)
    _local.eager = True
    try:
        yield
    finally:
        _local.eager = before


def current(weight: Tensor, key: Hashable, result: Tensor) -> Tensor | None:
    """Whether, by all but samples, :func:`transformed` would give ``result`` again: if so, what they compare.

    That is a copy of the weight from when ``result`` was made, for :class:`.cpu.samples.Pairs`, or where none
    is needed, the weight; None if it would not.
    """
    entry = _entries.get(weight.data_ptr())
    if entry is None or entry.derived.get(key) is not result or not entry.is_of(weight):
        return None
    return weight if entry.before is None else entry.before


def renew(weights: Sequence[Tensor]) -> None:
    """Forget what was made of ``weights``, which have new values, and go on to keep what will be."""
    with _lock:
        for weight in weights:
            entry = _entries.get(weight.data_ptr())
            if entry is not None:
                _forget({t.data_ptr() for t in entry.derived.values()})
                entry.renew(weight)


def transformed(weight: Tensor, key: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(weight)``, from the cache if ``weight`` is frozen. The result is itself frozen with it.

    The module's docstring says when a cached result is current.
    """
    entry = _entries.get(weight.data_ptr()) if _cacheable(weight) else None
    if entry is None:
        return make(weight)
    kept = getattr(_local, "tensors", None)
    if _is_cuda(weight):
        of_a_graph = kept is None and torch.cuda.is_current_stream_capturing()
        if of_a_graph or not getattr(_local, "eager", False):
            return make(weight)
        key = (key, torch.cuda.current_stream(weight.device).cuda_stream)
    if entry.identity != _identity(weight):
        return make(weight)
    pairs = entry.pairs
    if not entry.is_of(weight) or (pairs is not None and pairs.differ()):
        renew([weight])
    result = entry.derived.get(key)
    if result is None:
        with torch.inference_mode(False), torch.no_grad():  # usable later by a call that is differentiated
            entry.copy(weight)
            result = make(weight)
        if result.data_ptr() != weight.data_ptr():
            with _lock:
                entry.derived[key] = result
                if not result.is_inference():
                    _entries[result.data_ptr()] = _Entry(result, sampled=False)
    if kept is not None:
        kept.append(result)
    return result
