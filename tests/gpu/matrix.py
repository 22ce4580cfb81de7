"""Which layers, batches and precisions are tested with each other."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from real import LAYERS

from bench.cases import DTYPES

FULL = 64  # fills tiles
RAGGED = (1, 7)  # leave the last tile of rows, or the only one, almost empty
ONE = "bfloat16"


def layers(check: Collection[tuple[str, str]]) -> list[Any]:
    """(layer, batch, precision), for a ``precision`` fixture: every layer in every precision at a full batch.

    Ragged batches are a matter of masks, which are the same code whatever the precision: one has them.
    ``check`` names the (precision, layer) of full batches that are marked so.
    """
    full = [(layer, FULL, precision) for precision in DTYPES for layer in LAYERS]
    ragged = [(layer, batch, ONE) for batch in RAGGED for layer in LAYERS]
    return [
        pytest.param(
            layer,
            batch,
            precision,
            id=f"{precision}-{layer}-{batch}",
            marks=[pytest.mark.check] if batch == FULL and (precision, layer) in check else [],
        )
        for layer, batch, precision in [*full, *ragged]
    ]


LAYER = ("layer", "batch", "precision")
"""The names of these parameters."""
