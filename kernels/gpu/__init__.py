"""The Triton engine.

There is one file per kernel: :mod:`.up`, :mod:`.up_narrow`, :mod:`.down`, :mod:`.down_narrow`,
:mod:`.dense`, :mod:`.dense_narrow`, :mod:`.wgrad`, :mod:`.prologue_kernel`, :mod:`.bce`, and :mod:`.reduce`,
which reduces their partial sums. :mod:`.device_functions` holds the prologues and epilogues they share,
:mod:`.packing` their weight layouts, :mod:`.tiles` the tile candidates and tuning, :mod:`.cost_model` the
model that ranks tiles, and :mod:`.launch` the data types of a launch. :mod:`.lowering` lowers a call and its
gradients to products, :mod:`.kernel_selection` selects the kernel of a product, :mod:`.plans` plans and runs
its launches, :mod:`.executor` runs a whole call, and :mod:`.offline` compiles a launch without a GPU. Kernels
work in NHWC internally; tensors may have any strides.
"""

from .executor import backward, bce, bce_backward, forward
from .kernel_selection import Kernel, kernel_for, output, why_not, why_not_here

__all__ = [
    "Kernel",
    "backward",
    "bce",
    "bce_backward",
    "forward",
    "kernel_for",
    "output",
    "why_not",
    "why_not_here",
]
