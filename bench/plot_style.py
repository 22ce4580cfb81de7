"""What the pictures share: colours, and a figure that becomes a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OURS = ("#c2410c", "#ea580c", "#fb923c")
RIVALS = ("#1e293b", "#334155", "#475569", "#64748b", "#7d8ca3", "#94a3b8", "#b4c0cf", "#cbd5e1")
CEILING = "#0f766e"


@contextmanager
def figure(out: Path, rows: int, height: float, columns: int = 1) -> Iterator[Any]:
    """Axes [rows, columns], each row of a height in inches; written to ``out`` when they are drawn."""
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
    """No frame, a faint grid behind everything; ``grid`` is ``x``, ``y`` or ``both``."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#e2e8f0", lw=0.8)
    ax.set_axisbelow(True)
