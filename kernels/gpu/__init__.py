"""The Triton engine.

One file a kernel: :mod:`.up`, :mod:`.up_narrow`, :mod:`.down`, :mod:`.down_narrow`, :mod:`.dense`,
:mod:`.dense_narrow`; :mod:`.device` has the functions they share, :mod:`.packing` their weight layouts,
:mod:`.tiles` their tiles as data, :mod:`.launch` what a launch is. :mod:`.select` chooses the kernel for a
call, :mod:`.plans` runs it, :mod:`.offline` compiles it for a GPU that is not there. Everything inside is
NHWC; x and y may have any strides.
"""

from .plans import run
from .select import Kernel, kernel_for, output, why_not

__all__ = ["Kernel", "kernel_for", "output", "run", "why_not"]
