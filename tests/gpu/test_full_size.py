"""The error bounds of the GPU tests, checked without a GPU by truncating operands to TF32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu import full_size
from tests.gpu.full_size import LAYERS, TOLERANCE, call_of, error, in_float64

SMALL = [layer for layer, (_, c_in, c_out, *_) in LAYERS.items() if c_in * c_out <= 2**13]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "DEVICE", "cpu")


def truncated(t: Tensor) -> Tensor:
    """Truncate float32 to TF32's 11 significant bits, as tensor cores do."""
    return (t.contiguous().view(torch.int32) & ~((1 << 13) - 1)).view(torch.float32)


@pytest.mark.parametrize("layer", SMALL)
def test_tf32_is_within_its_tolerance_and_a_wrong_weight_is_not(layer: str) -> None:
    """For several random seeds: a layer with one channel draws a single shift."""
    for seed in range(8):
        torch.manual_seed(seed)
        call, transposed = call_of(layer, 4, torch.float32)
        exact = in_float64(call, transposed)
        tf32 = call._replace(x=truncated(call.x), weight=truncated(call.weight))
        assert 1e-4 < error(in_float64(tf32, transposed), exact) <= TOLERANCE["tf32"]
        wrong = call._replace(weight=1.01 * call.weight)
        assert error(in_float64(wrong, transposed), exact) > TOLERANCE["tf32"]
