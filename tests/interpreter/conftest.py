"""The Triton kernels in Triton's interpreter: run `TRITON_INTERPRET=1 pytest tests/interpreter`.

The variable must be set before triton is imported, so these tests need a separate pytest run; `make test` and
`make test-slow` include it.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from dcgan.kernels.gpu import up_block
    from tests.interpreter import repair

    repair.bfloat16()
    repair.speed()
    up_block.MIN_BLOCKS = 0  # small maps run as up_block too
else:
    collect_ignore_glob = ["test_*.py"]
