"""The Triton kernels' meaning, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreter`.

The variable must be set before triton is imported, so these tests are a run of their own; `make test` and
`make test-slow` do both.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import repair

    repair.bfloat16()
    repair.speed()
else:
    collect_ignore_glob = ["test_*.py"]
