"""The native engine: the layers of csrc/ on CPU tensors.

:mod:`.library` loads the shared library, and :mod:`.algorithm_selection` chooses each layer's algorithm.
:mod:`.inference` packs weights (cached by :mod:`..weight_cache`) and runs a layer or a chain of layers in
float32; 16-bit inputs and outputs are converted. :mod:`.products` is training in float32: prologue,
statistics, dgrad and wgrad, with memory from :mod:`.buffers`.
"""

from ..call import Call, Outputs
from . import inference, products
from .algorithm_selection import MAX_LAYERS, Geometry
from .inference import Prepared
from .library import problem

__all__ = ["MAX_LAYERS", "Geometry", "Prepared", "problem", "products", "run", "why_not"]


def _needs_training_kernels(call: Call) -> bool:
    """Return whether the call needs statistics or a prologue, which only the training kernels support."""
    return call.stats or call.scale is not None or call.in_act != "none"


def why_not(call: Call, transposed: bool, forced: bool = False) -> str | None:
    """Return the reason why the native engine does not cover the call, or None if it does.

    Unless ``forced``, it declines an inference call whose weights it would have to pack for that call alone
    where that takes longer than it saves.
    """
    if _needs_training_kernels(call):
        return products.why_not(call, transposed)
    return inference.why_not(call, transposed, forced)


def run(call: Call, transposed: bool) -> Outputs:
    """Return (y, mean, var) of a call that the engine covers (:func:`why_not`)."""
    return (products.fprop if _needs_training_kernels(call) else inference.run)(call, transposed)
