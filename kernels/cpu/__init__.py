"""The native engine: csrc's layers on CPU tensors, in inference form.

:mod:`.library` loads the shared library, :mod:`.select` chooses a layer's algorithm, :mod:`.run` packs
weights (cached, :mod:`..weights`) and runs one layer or a chain of them. float32 inside; 16-bit tensors are
converted at both ends.
"""

from .run import Prepared, run, why_not
from .select import MAX_LAYERS, Geometry

__all__ = ["MAX_LAYERS", "Geometry", "Prepared", "run", "why_not"]
