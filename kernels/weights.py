"""What engines make of weights (packed, transformed, cast), made once for weights that stand still.

A tensor's ``_version`` alone is no key: fused optimizers and ``p.data.copy_()`` change values without
bumping it, and a replayed CUDA graph skips Python altogether. So nothing is cached unless an owner, a module
in eval mode, has declared its weights still with :func:`freeze`; a frozen weight's derivatives are kept until

* it is another tensor, or its version, address, shape or dtype is another (``load_state_dict``, ``copy_``, a
  ``.data`` assignment),
* an optimizer has stepped on it (a hook on every ``torch.optim.Optimizer``),
* its owner calls :func:`thaw` (``train()``, ``eval()``, ``.to()``, ``refresh()``) or is collected.

What no key and no hook can see is ``p.data.copy_()`` on a frozen weight: for that there is ``refresh()``.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Entry:
    """A frozen weight: what identifies its values, and what has been made of them."""

    __slots__ = ("derived", "identity", "storage", "tensor", "version")

    def __init__(self, weight: Tensor) -> None:
        self.storage = weight.untyped_storage()  # held, so that its address is not another tensor's
        self.identity = _identity(weight)
        self.version = weight._version
        self.tensor = weakref.ref(weight)  # a version is that of one tensor; a storage may have several
        self.derived: dict[Hashable, Tensor] = {}


_entries: dict[int, _Entry] = {}
_owned: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_kept = threading.local()
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


def freeze(owner: Any, weights: Iterable[Tensor]) -> None:
    """Declare that ``weights``, all of ``owner``'s, stand still until :func:`thaw`: they may be cached.

    Cheap when repeated. What is made of a tensor without a version (inference mode) is made each time.
    """
    global _hook
    still = {w.data_ptr(): w for w in weights if _cacheable(w) and w.numel()}
    if still.keys() <= _entries.keys():
        return
    with _lock:
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_after_step)
        if owner not in _owned:
            _owned[owner] = set()
            weakref.finalize(owner, _forget, _owned[owner])
        owned = _owned[owner]
        _forget(owned - still.keys())  # those of parameters since replaced
        for address, weight in still.items():
            _entries.setdefault(address, _Entry(weight))
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


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _entries:
        _forget({p.data_ptr() for group in optimizer.param_groups for p in group["params"]})


def epoch() -> int:
    """A number that grows whenever something may have changed frozen weights."""
    return _epoch


@contextlib.contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """While this lasts, cached tensors may enter a CUDA graph under capture, and are listed for its owner.

    The owner must hold them as long as the graph, and capture anew when :func:`epoch` has grown.
    """
    _kept.tensors = []
    try:
        yield _kept.tensors
    finally:
        del _kept.tensors


def current(weight: Tensor, key: Hashable, result: Tensor) -> bool:
    """Whether :func:`transformed` would give ``result`` again."""
    entry = _entries.get(weight.data_ptr())
    return (
        entry is not None
        and entry.derived.get(key) is result
        and entry.version == weight._version
        and entry.tensor() is weight
        and entry.identity == _identity(weight)
    )


def transformed(weight: Tensor, key: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make(weight)``, from the cache if ``weight`` is frozen. The result is itself frozen with it.

    On CUDA a cached tensor is one stream's own. A graph under capture takes none unless :func:`keeping`:
    it would hold the address of something that may be freed, or hand out what only its replay fills.
    """
    entry = _entries.get(weight.data_ptr()) if _cacheable(weight) else None
    if entry is None:
        return make(weight)
    kept = getattr(_kept, "tensors", None)
    if weight.is_cuda:
        if kept is None and torch.cuda.is_current_stream_capturing():
            return make(weight)
        key = (key, torch.cuda.current_stream(weight.device).cuda_stream)
    if entry.identity != _identity(weight):
        return make(weight)
    if entry.version != weight._version or entry.tensor() is not weight:
        with _lock:
            _forget({t.data_ptr() for t in entry.derived.values()})
            entry.derived, entry.version, entry.tensor = {}, weight._version, weakref.ref(weight)
    result = entry.derived.get(key)
    if result is None:
        with torch.inference_mode(False), torch.no_grad():  # usable later by a call that is differentiated
            result = make(weight)
        if result.data_ptr() != weight.data_ptr():
            with _lock:
                entry.derived[key] = result
                if not result.is_inference():
                    _entries[result.data_ptr()] = _Entry(result)
    if kept is not None:
        kept.append(result)
    return result
