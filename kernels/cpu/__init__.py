"""The native engine: csrc's layers on CPU tensors.

:mod:`.library` loads the shared library, :mod:`.select` chooses a layer's algorithm. :mod:`.run` is
inference: it packs weights (cached, :mod:`..weights`) and runs one layer or a chain of them, float32 inside,
16-bit tensors converted at both ends. :mod:`.training` is training, float32: prologue, statistics, dgrad and
wgrad, in memory of :mod:`.buffers`.
"""

from ..call import Call, Outputs
from . import run as inference
from . import training
from .library import problem
from .run import Prepared
from .select import MAX_LAYERS, Geometry

__all__ = ["MAX_LAYERS", "Geometry", "Prepared", "problem", "run", "training", "why_not"]


def _of_training(call: Call) -> bool:
    """Whether only the training kernels have what the call asks for."""
    return call.stats or call.scale is not None or call.in_act != "none"


def why_not(call: Call, transposed: bool, forced: bool = False) -> str | None:
    """Why the native engine does not cover the call, or None if it does.

    Unless ``forced``, it leaves alone a call of inference whose weights it would transform for that call
    only, where that takes longer than what it saves.
    """
    if _of_training(call):
        return training.why_not(call, transposed)
    return inference.why_not(call, transposed, forced)


def run(call: Call, transposed: bool) -> Outputs:
    """(y, mean, var) of a call that :func:`why_not` has nothing against."""
    return (training.fprop if _of_training(call) else inference.run)(call, transposed)
