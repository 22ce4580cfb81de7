"""Colors and figure helpers shared by the plots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS = ("#c2410c", "#ea580c", "#fb923c")
BASELINES = ("#1e293b", "#334155", "#475569", "#64748b", "#7d8ca3", "#94a3b8", "#b4c0cf", "#cbd5e1")
CEILING = "#0f766e"


@contextmanager
def figure(out: Path, rows: int, height: float, columns: int = 1) -> Iterator[Any]:
    """Yield axes [rows, columns], each row ``height`` inches high, and save the figure to ``out`` on exit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(
        rows, columns, figsize=(10, height * rows), squeeze=False, layout="constrained"
    )
    try:
        yield axes
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(out, dpi=150)
    finally:
        plt.close(drawn)


def plain(ax: Any, grid: str) -> None:
    """Remove the top and right spines and draw a faint grid; ``grid`` is ``x``, ``y`` or ``both``."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#e2e8f0", lw=0.8)
    ax.set_axisbelow(True)


LABELS = {
    "eager": "eager",
    "channels_last": "eager, channels_last",
    "compile": "torch.compile",
    "compile-channels_last": "torch.compile, channels_last",
    "reduce-overhead": "torch.compile, reduce-overhead",
    "max-autotune": "torch.compile, max-autotune",
    "max-autotune-channels_last": "torch.compile, max-autotune, channels_last",
    "cudnn-graph": "cuDNN in one CUDA graph",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "zentorch": "zentorch",
    "fast": "dcgan.fast",
    "fast-compile": "dcgan.fast, torch.compile",
    "fast-graph": "dcgan.fast.graphed",
    "train-step": "dcgan.training.TrainStep",
}
"""Names of providers and training variants in plots and documentation."""
