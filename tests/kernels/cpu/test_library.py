"""Choice of the instruction set, a missing library, and compiler failures in setup.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dcgan.kernels import ops
from dcgan.kernels.cpu import library
from tests.support import native

ROOT = Path(__file__).parents[3]
CALL = ops.Call(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
RUN = """
import warnings
import torch
from pathlib import Path
from dcgan import fast, models
from dcgan.kernels.cpu import library

def check():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = fast.Generator(6, 3, 8, 32).eval()
    z = torch.randn(3, 6)
    rows = fast.explain(model, z)
    reference = models.Generator(6, 3, 8, 32).eval()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        y, exact = model(z), reference.double()(z.double())
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-5
    print(*{row.engine for row in rows}, *{row.reason for row in rows})
"""


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset the module to its state before the library is loaded; restore it afterwards."""
    before = None if native.MISSING else library.isa()
    with monkeypatch.context() as patch:
        for name in ("_library", "_problem", "_isa"):
            patch.setattr(library, name, None)
        yield
    if before is not None:
        library.use_isa(before)


# --- instruction sets --------------------------------------------------------------------------------------


@native.NEEDED
def test_the_best_instruction_set_is_the_default() -> None:
    assert library.isas()[-1] == "portable"
    assert set(library.isas()) <= set(library.built_isas())
    if "DCGAN_ISA" not in os.environ:
        assert library.isa() == library.isas()[0]


@native.NEEDED
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.usefixtures("not_loaded")
def test_dcgan_isa_selects_each_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCGAN_ISA", isa)
    for transposed in (False, True):
        for algorithm in (*native.SPATIAL, "dense"):
            with native.forced(algorithm):
                native.assert_correct(native.small(algorithm, transposed))
    assert library.isa() == isa


@native.NEEDED
def test_dcgan_isa_in_a_new_process() -> None:
    done = native.in_a_new_process(f"{RUN}\ncheck()\nprint(library.isa())", DCGAN_ISA=native.ISAS[-1])
    assert done.stdout.split() == ["native", native.ISAS[-1]], done.stderr


@native.NEEDED
@pytest.mark.usefixtures("not_loaded")
def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call fails as well: it does not fall back to another instruction set."""
    monkeypatch.setenv("DCGAN_ISA", "sse9")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^DCGAN_ISA: .*must be one of: .*; got sse9$") as raised:
            ops.conv2d_fused(*CALL)
    assert f"must be one of: {' '.join(native.ISAS)};" in str(raised.value)
    with ops.use_engine("reference"):
        assert ops.conv2d_fused(*CALL)[0].shape == (1, 1, 2, 2)


@native.NEEDED
@pytest.mark.usefixtures("not_loaded")
def test_an_instruction_set_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in set(library.built_isas()) - set(native.ISAS):
        for name in ("_library", "_isa"):
            monkeypatch.setattr(library, name, None)
        monkeypatch.setenv("DCGAN_ISA", isa)
        with pytest.raises(ValueError, match=f"DCGAN_ISA: this machine does not run {isa}, but: "):
            ops.conv2d_fused(*CALL)


@native.NEEDED
def test_use_isa() -> None:
    before = library.isa()
    for isa in native.ISAS:
        with native.instruction_set(isa):
            assert library.isa() == isa
    assert library.isa() == before
    with pytest.raises(library.NativeError, match=rf"must be one of: {' '.join(native.ISAS)}; got sse9"):
        library.use_isa("sse9")
    assert library.isa() == before


@native.NEEDED
def test_invalid_arguments_are_named() -> None:
    with pytest.raises(library.NativeError, match="layer is null"):
        library.checked(library.library().dcgan_supports(None))


@native.NEEDED
def test_a_released_workspace_is_allocated_again() -> None:
    call = native.small("f4", True).call()
    y = native.run_native(call, True)
    for _ in range(2):
        library.release()
        assert torch.equal(native.run_native(call, True), y)


# --- no library --------------------------------------------------------------------------------------------


def test_without_a_library_in_a_new_process(tmp_path: Path) -> None:
    """PyTorch's modules run, and a single warning gives the reason with the compiler's message."""
    error = tmp_path / "build-error.txt"
    error.write_text("No such file or directory: 'c++'\nat line 2 of it\n")
    code = f"""{RUN}
library.PATH, library.BUILD_ERROR = Path({str(tmp_path / "libdcgan.so")!r}), Path({str(error)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    check()
    check()
for warning in caught:
    if "native" in str(warning.message):
        print(warning.category.__name__, warning.message)
"""
    done = native.in_a_new_process(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    reason = "csrc was not built: No such file or directory: 'c++'"
    assert lines[:2] == [f"eager native: {reason}"] * 2
    assert lines[2].startswith(
        "UserWarning dcgan's native CPU engine is missing, and PyTorch's own modules run"
    )
    assert lines[2].endswith(reason)
    assert lines[3] == "at line 2 of it"
    assert sum("Warning" in line for line in lines) == 1


def corrupt_library(folder: Path) -> str:
    (folder / "libdcgan.so").write_bytes(b"\x7fELF, but no more of it")
    return "libdcgan.so does not load: "


def unrelated_library(folder: Path) -> str:
    source = next(Path(torch.__file__).parent.glob("lib/libc10.so"))
    (folder / "libdcgan.so").symlink_to(source)
    return "libdcgan.so does not load: .*dcgan_abi"


@pytest.mark.parametrize("make", [lambda folder: "csrc was not built$", corrupt_library, unrelated_library])
@pytest.mark.usefixtures("not_loaded")
def test_no_library(make: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing or unusable: one warning, a reason in every choice, and an error if the engine is forced."""
    monkeypatch.setattr(library, "PATH", tmp_path / "libdcgan.so")
    monkeypatch.setattr(library, "BUILD_ERROR", tmp_path / "build-error.txt")
    reason = make(tmp_path)
    with ops.recording() as choices, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            assert ops.conv2d_fused(*CALL)[0][0, 0, 0, 0] == 9
    (warning,) = [w for w in warned if "native CPU engine is missing" in str(w.message)]
    assert re.search(reason, str(warning.message).splitlines()[0])
    assert {c.engine for c in choices} == {"reference"}
    assert all(re.search(f"native: {reason}", c.reason) for c in choices)
    with (
        ops.use_engine("native"),
        pytest.raises(RuntimeError, match=f"does not cover this conv2d_fused: {reason}"),
    ):
        ops.conv2d_fused(*CALL)
    with pytest.raises(library.NativeError, match=reason):
        library.library()


# --- setup.py ----------------------------------------------------------------------------------------------


def build(compiler: str, to: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["build_ext", "--build-lib", str(to / "lib"), "--build-temp", str(to / "temporary")]
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env={**os.environ, "CXX": compiler},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere/c++ --std=c++17"])
def test_a_failing_compiler_does_not_fail_the_installation(compiler: str, tmp_path: Path) -> None:
    ours = Path(library.PATH)
    before = ours.read_bytes() if ours.exists() else None
    folder = tmp_path / "lib/dcgan/kernels/cpu"
    folder.mkdir(parents=True)
    (folder / "libdcgan.so").write_bytes(b"of an earlier build")
    done = build(compiler, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING: the native CPU engine was not built: " in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["build-error.txt"]
    why = (folder / "build-error.txt").read_text()
    assert compiler.split()[0] in why
    assert (ours.read_bytes() if ours.exists() else None) == before


@pytest.mark.slow
def test_a_build_replaces_an_earlier_error(tmp_path: Path) -> None:
    folder = tmp_path / "lib/dcgan/kernels/cpu"
    folder.mkdir(parents=True)
    (folder / "build-error.txt").write_text("no compiler")
    done = build(os.environ.get("CXX", "c++"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in folder.iterdir()] == ["libdcgan.so"]


def test_the_engine_is_built_if_there_is_a_compiler() -> None:
    """Tests of the engine are skipped if it is missing; this one is not, and reveals a failed build."""
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None:
        assert native.MISSING is None
