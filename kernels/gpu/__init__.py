"""The Triton engine.

One file a kernel: :mod:`.up`, :mod:`.up_narrow`, :mod:`.down`, :mod:`.down_narrow`, :mod:`.dense`,
:mod:`.dense_narrow`, :mod:`.wgrad`, :mod:`.passes`, :mod:`.bce`, and :mod:`.reduce` for the second steps of
their reductions; :mod:`.device` has the prologues and epilogues they share, :mod:`.packing` their weight
layouts, :mod:`.tiles` their tiles as data, :mod:`.model` the prediction that chooses among them,
:mod:`.launch` what a launch is. :mod:`.products` says what a call and its gradients are as products,
:mod:`.select` chooses the kernel of one, :mod:`.plans` runs it, :mod:`.run` runs a call; :mod:`.offline`
compiles a launch for a GPU that is not there. Everything inside is NHWC; tensors may have any strides.
"""

from .run import backward, bce, bce_backward, forward
from .select import Kernel, kernel_for, output, why_not, why_not_here

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
