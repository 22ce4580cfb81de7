"""A fixture for the precisions that GPU tests run in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dcgan.kernels.gpu.tools.layers import DTYPES


@pytest.fixture(params=DTYPES)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    yield request.param
    torch.backends.cudnn.allow_tf32 = before
