"""The Triton engine.

There is one file per operation, with the packing of its weights: :mod:`.up`, :mod:`.down`, :mod:`.dense`,
:mod:`.wgrad`, :mod:`.prologue_kernel`, :mod:`.bce`, and :mod:`.reduce`, which reduces their partial sums.
:mod:`.device_functions` holds the prologues and epilogues they share. :mod:`.executor` turns a call and its
gradients into products, and :mod:`.launcher` selects the kernel of a product and runs it from a cached plan.
:mod:`.tuning` chooses tiles: from :mod:`.tiles`, the candidates and tuned choices, by :mod:`.cost_model`.
:mod:`.aten` is a product in plain PyTorch, :mod:`.offline` compiles a launch without a GPU, and :mod:`.tools`
are a kernel developer's. Kernels work in NHWC internally; tensors may have any strides.
"""

from . import dense, down, up, wgrad  # noqa: F401  (each registers its kernels)
from .executor import backward, bce, bce_backward, forward
from .launcher import kernel_for, why_not, why_not_here

__all__ = ["backward", "bce", "bce_backward", "forward", "kernel_for", "why_not", "why_not_here"]
