"""The combinations of layer, batch and precision that are tested."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from dcgan.kernels.gpu.tools.layers import DTYPES
from tests.gpu.full_size import LAYERS

FULL = 64  # fills whole tiles
RAGGED = (1, 7)  # leave the last or only row tile almost empty
RAGGED_PRECISION = "bfloat16"


def layers(check: Collection[tuple[str, str]]) -> list[Any]:
    """Return parameters (layer, batch, precision): every layer in every precision at a full batch.

    Ragged batches test masks, whose code does not depend on the precision, so they use a single one.
    ``check`` lists the (precision, layer) pairs whose full batches get the ``check`` mark.
    """
    full = [(layer, FULL, precision) for precision in DTYPES for layer in LAYERS]
    ragged = [(layer, batch, RAGGED_PRECISION) for batch in RAGGED for layer in LAYERS]
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
"""The names of these parameters; ``precision`` is the fixture's."""
