"""The Triton kernels in Triton's interpreter: run `TRITON_INTERPRET=1 pytest tests/interpreter`.

The variable must be set before triton is imported, so these tests need a separate pytest run; `make test` and
`make test-slow` include it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dcgan.kernels import ops
from dcgan.kernels.gpu import tuning
from tests.interpreter.memory import guarded
from tests.support.inference import PROGRAMS
from tests.support.native import fresh_memory_is_nan

if os.environ.get("TRITON_INTERPRET") == "1":
    from dcgan.kernels.gpu import up_block
    from tests.interpreter import repair

    repair.bfloat16()
    repair.speed()
    up_block.MIN_BLOCKS = 0  # small maps run as up_block too
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def inference_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run networks in eval on the Triton engine, with memory that starts as NaN.

    A launch of ``prepare`` has few programs, as an interpreted one takes milliseconds, and each has several
    tiles to pack.
    """
    monkeypatch.setattr(tuning, "sm_count", lambda device: PROGRAMS)
    with ops.use_engine("triton"), fresh_memory_is_nan():
        yield


@pytest.fixture
def margins() -> Iterator[None]:
    """Put margins around all memory, which no kernel may write to."""
    with guarded():
        yield
