"""The sdist and the wheel: built offline from a checkout without symlinks, run in a fresh environment."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dcgan

ROOT = Path(__file__).resolve().parents[1]
NEEDED = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command: str, at: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DCGAN_ENGINE")}
    env |= OFFLINE | environment
    return subprocess.run(command, cwd=at, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that are under version control, or would be; the link dcgan/kernels is a text file."""
    to = tmp_path_factory.mktemp("checkout")
    listed = subprocess.check_output(
        ["git", "ls-files", "-co", "--exclude-standard", "-x", "tests", "-x", "bench"], cwd=ROOT, text=True
    )
    for name in listed.splitlines():
        if name.startswith(("tests/", "bench/")) or not (ROOT / name).exists():
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (to / name).write_text(os.readlink(ROOT / name))
        else:
            shutil.copyfile(ROOT / name, to / name)
    assert (to / "dcgan/kernels").is_file()
    return to


@pytest.fixture(scope="module")
def built(checkout: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    # Without optimization, since no kernel's speed is measured here and the build takes seconds.
    flags = {"CXXFLAGS": "-O0", "DCGAN_REQUIRE_NATIVE": "1"}
    done = run(sys.executable, "-m", "build", "--no-isolation", at=checkout, **flags)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    (wheel,) = (checkout / "dist").glob("*.whl")
    return sdist, wheel


def closure(requirements: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The distributions that satisfy ``requirements`` here, and all that these require, by name."""
    found: dict[str, metadata.Distribution] = {}
    todo, seen = [Requirement(text) for text in requirements], set()
    while todo:
        requirement = todo.pop()
        for extra in {"", *requirement.extras}:
            if (requirement.name, extra) in seen:
                continue
            seen.add((requirement.name, extra))
            found[requirement.name] = metadata.distribution(requirement.name)
            needed = map(Requirement, found[requirement.name].requires or [])
            todo += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that has the wheel and, linked from this one, its requirements."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    base = (Requirement(text) for text in required_by(built[1]))
    for distribution in closure(str(r) for r in base if r.marker is None).values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(""))) / top)
    done = run(
        *(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", str(built[1])),
        at=folder,
    )
    assert done.returncode == 0, done.stderr
    return python


def required_by(wheel: Path) -> list[str]:
    """The wheel's requirements, those of its extras too."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = email.message_from_bytes(archive.read(name))
    return message.get_all("Requires-Dist", [])


@NEEDED
def test_the_sdist_holds_the_sources_and_nothing_else(built: tuple[Path, Path], checkout: Path) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if "/" in name}
        assert all(member.isfile() or member.isdir() for member in archive)
    files = {name for name in names if Path(name).suffix or name == "LICENSE"} - {"dcgan_kernels.egg-info"}
    folders = {
        "csrc": (".h", ".cpp"),
        "kernels": (".py", ".json"),
        "dcgan": (".py",),
        "examples": (".py", ".cpp"),
    }
    for folder, suffixes in folders.items():
        ours = {
            str(path.relative_to(checkout))
            for path in (checkout / folder).rglob("*")
            if path.suffix in suffixes and "tests" not in path.parts
        }
        assert {name for name in files if name.split("/")[0] == folder} - {"dcgan/py.typed"} == ours
    others = {name for name in files if name.split("/")[0] not in folders}
    generated = {name for name in others if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert others - generated == {
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in"),
        *("setup.py", "pyproject.toml"),
    }


@NEEDED
def test_the_wheel_is_for_any_python_and_holds_the_engine(built: tuple[Path, Path], checkout: Path) -> None:
    version, tag = re.fullmatch(r"dcgan_kernels-([\w.]+)-(py3-none-\w+)\.whl", built[1].name).groups()  # type: ignore[union-attr]
    assert version == dcgan.__version__
    assert tag != "py3-none-any"
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (record,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert f"Tag: {tag}" in archive.read(record).decode()
    expected = {"dcgan/py.typed", "dcgan/kernels/cpu/libdcgan.so"}
    expected |= {str(p.relative_to(checkout)) for p in (checkout / "dcgan").rglob("*.py")}
    expected |= {f"dcgan/{p.relative_to(checkout)}" for p in (checkout / "kernels").rglob("*.py")}
    expected |= {f"dcgan/{p.relative_to(checkout)}" for p in (checkout / "kernels").rglob("*.json")}
    assert names == expected


CHECK = """
import sys
import torch
before = set(sys.modules)
import dcgan.fast, dcgan.models, dcgan.training, dcgan.pretrained, dcgan.checkpoint
from dcgan.kernels.cpu import library
assert library.problem() is None, library.problem()
print(*sorted(name for name in set(sys.modules) - before if name in ("torch._dynamo", "sympy")))
torch.manual_seed(0)
reference = dcgan.models.Generator(features=8).eval()
z = torch.randn(2, 100)
with torch.no_grad():
    ours = dcgan.fast.convert(reference)
    error = (ours(z) - reference(z)).abs().max().item()
    print({row.engine for row in dcgan.fast.explain(ours, z)}, error < 1e-5)
print(dcgan.__file__)
"""


@NEEDED
def test_the_base_install_runs_with_its_own_requirements_alone(installed: Path, tmp_path: Path) -> None:
    done = run(str(installed), "-W", "error::UserWarning:dcgan", "-c", CHECK, at=tmp_path)
    assert done.returncode == 0, done.stderr
    modules, result, file = done.stdout.splitlines()
    assert modules == "", "the import takes a second longer with these"
    assert result == "{'native'} True"
    assert Path(file).is_relative_to(installed.parents[1])


@NEEDED
@pytest.mark.parametrize("command", [("-m", "dcgan"), ("bin/dcgan",)], ids=["module", "script"])
def test_the_command_names_the_extra_that_it_needs(command: tuple[str, ...], installed: Path) -> None:
    done = run(str(installed), *command, "train", "--help", at=installed.parents[1])
    assert done.returncode == 1
    assert re.fullmatch(
        r"dcgan: \w+ is not installed; pip install 'dcgan-kernels\[train\]' installs it\n", done.stderr
    )


def test_a_checkout_without_symlinks_runs_uninstalled(checkout: Path) -> None:
    code = "import dcgan.fast, dcgan.kernels.ops as ops; print(ops.__file__)"
    done = run(sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}; {code}", at=checkout)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == checkout / "kernels/ops.py"


def test_a_failed_compilation_is_an_error_if_required(checkout: Path, tmp_path: Path) -> None:
    build = ("setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    done = run(sys.executable, *build, at=checkout, CXX="/bin/false", DCGAN_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "DCGAN_REQUIRE_NATIVE=1: the native engine was not built: " in done.stderr
    assert "/bin/false" in done.stderr
    assert not list(tmp_path.rglob("build-error.txt"))
