"""The native engine: the layers of csrc/ on CPU tensors.

:mod:`.library` loads the shared library, and :mod:`.algorithm_selection` chooses each layer's algorithm.
:mod:`.inference` packs weights (cached by :mod:`..weight_cache`) and runs a layer or a chain of layers in
float32; 16-bit inputs and outputs are converted. :mod:`.products` and :mod:`.training` are training in
float32, with memory from :mod:`.buffers`: one layer's products with prologue and statistics, and a whole
network's forward or backward in one call. :mod:`.loss` is the loss.
"""

from ..spec import Call, ConvSpec, Outputs
from . import inference, loss, products
from .algorithm_selection import MAX_LAYERS, Geometry
from .inference import Prepared, why_not
from .library import problem
from .training import track, train_backward, train_forward

__all__ = [
    "MAX_LAYERS",
    "Geometry",
    "Prepared",
    "loss",
    "problem",
    "products",
    "run",
    "track",
    "train_backward",
    "train_forward",
    "why_not",
]


def run(spec: ConvSpec, call: Call) -> Outputs:
    """Return (y, mean, var) of a call that the engine covers (:func:`why_not`)."""
    return (products.fprop if inference.needs_training_kernels(spec) else inference.run)(spec, call)
