"""The Triton engine.

There is one file per operation, with the layout of its weights: :mod:`.up`, :mod:`.down`, :mod:`.dense`,
:mod:`.wgrad`, :mod:`.prologue_kernel`, :mod:`.bce`, and :mod:`.reduce`, which reduces their partial sums.
Between the products of a network in training, :mod:`.batchnorm` does everything else, and :mod:`.packing`
packs its weights; in front of a network's in eval, :mod:`.prepare` does both. :mod:`.device_functions` holds
the prologues and epilogues they share. :mod:`.executor` turns a call and its gradients into products,
:mod:`.inference` a network in eval, :mod:`.training` one in training, and :mod:`.launcher` selects the kernel
of a product and runs it from a cached plan. :mod:`.tuning` chooses tiles: from :mod:`.tiles`, the candidates
and tuned choices, by :mod:`.cost_model`. :mod:`.aten` is a product in plain PyTorch, :mod:`.offline` compiles
a launch without a GPU, and :mod:`.tools` are a kernel developer's. Kernels work in NHWC internally; tensors
may have any strides.
"""

from . import dense, down, up, up_block, wgrad  # noqa: F401  (each registers its kernels)
from .executor import backward, bce, bce_backward, forward
from .inference import MAX_PREPARED, Network, run_once
from .launcher import kernel_for, precision, why_not, why_not_here
from .training import backward as train_backward
from .training import forward as train_forward
from .training import packed_size, track

__all__ = [
    "MAX_PREPARED",
    "Network",
    "backward",
    "bce",
    "bce_backward",
    "forward",
    "kernel_for",
    "packed_size",
    "precision",
    "run_once",
    "track",
    "train_backward",
    "train_forward",
    "why_not",
    "why_not_here",
]
