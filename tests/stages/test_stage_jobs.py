"""Processes that end normally, fail, or exceed their time limit with their children."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.gpu.stages import jobs

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("started", child.pid)
time.sleep(600)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that the test writes to tmp_path."""
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", paths)
    return "stub"


def ended(process: int) -> bool:
    """Return whether the process is gone, or a zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def test_output_and_status(tmp_path: Path, module: str) -> None:
    (tmp_path / "stub.py").write_text("import sys; print('said'); sys.exit(int(sys.argv[1]))")
    done = jobs.run([module, "0"], 30, tmp_path / "logs" / "a.txt")
    assert done.status == 0
    assert done.log.read_text() == "said\n"
    assert 0 < done.seconds < 30
    assert jobs.run([module, "4"], 30, tmp_path / "b.txt").trouble == "exited with status 4: said"


def test_timeout_kills_the_process_and_its_children(tmp_path: Path, module: str) -> None:
    (tmp_path / "stub.py").write_text(PARENT)
    begun = time.monotonic()
    done = jobs.run([module], 3, tmp_path / "a.txt")
    assert time.monotonic() - begun < 10
    assert done.status is None
    assert done.trouble.startswith("killed after 3 s: started ")
    child = int(done.log.read_text().split()[1])
    for _ in range(100):
        if ended(child):
            break
        time.sleep(0.05)
    assert ended(child)


def test_an_exception_kills_the_process(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stub.py").write_text("import time; time.sleep(600)")
    begun: list[subprocess.Popen[bytes]] = []
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], seconds: float | None = None) -> int:
        if seconds is None:  # waits for the killed process
            return wait(process)
        begun.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.run([module], 30, tmp_path / "a.txt")
    assert begun[0].returncode == -9


def test_a_signal_is_named(tmp_path: Path, module: str) -> None:
    (tmp_path / "stub.py").write_text("import os; os.kill(os.getpid(), 11)")
    assert jobs.run([module], 30, tmp_path / "a.txt").trouble == "killed by signal 11: no output"
