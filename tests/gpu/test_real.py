"""The GPU tests' own yardsticks, without a GPU: what TF32 does to operands, done to them here."""

from __future__ import annotations

import pytest
import real
import torch
from real import LAYERS, TOLERANCE, call_of, error, in_float64
from torch import Tensor

SMALL = [layer for layer, (_, c_in, c_out, *_) in LAYERS.items() if c_in * c_out <= 2**13]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "DEVICE", "cpu")


def cut(t: Tensor) -> Tensor:
    """To TF32's 11 bits, the rest left out: what tensor cores read of a float32."""
    return (t.contiguous().view(torch.int32) & ~((1 << 13) - 1)).view(torch.float32)


@pytest.mark.parametrize("layer", SMALL)
def test_tf32_is_within_its_tolerance_and_a_fault_is_not(layer: str) -> None:
    """Whatever is drawn: a layer of one channel draws one shift."""
    for seed in range(8):
        torch.manual_seed(seed)
        call, transposed = call_of(layer, 4, torch.float32)
        exact = in_float64(call, transposed)
        tf32 = call._replace(x=cut(call.x), weight=cut(call.weight))
        assert 1e-4 < error(in_float64(tf32, transposed), exact) <= TOLERANCE["tf32"]
        wrong = call._replace(weight=1.01 * call.weight)
        assert error(in_float64(wrong, transposed), exact) > TOLERANCE["tf32"]
