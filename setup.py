"""Packages of the distribution and the build of its native engine; pyproject.toml has the metadata.

The top-level folder ``kernels`` is installed as the package ``dcgan.kernels``. The native engine in ``csrc``
is a plain shared library without Python or PyTorch headers: engine.cpp is compiled once per instruction set,
every other file once, in under a minute. Nothing in the wheel depends on a Python version or ABI, so it is
tagged ``py3-none-<platform>``.

Environment variables:
    CXX, CXXFLAGS: the compiler and additional flags, as usual.
    DCGAN_REQUIRE_NATIVE: ``1`` makes a failed compilation fail the installation. Otherwise the package is
        installed without the engine, runs PyTorch's own modules on CPUs, and warns with the compiler's error.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
# Floats per vector register, and the compiler flags that enable the instruction set.
ISAS = {
    "portable": (4, []),
    "avx2": (8, ["-mavx2", "-mfma"]),
    "avx512": (
        16,
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    ),
}


class BuildNative(build_ext):
    """Build ``dcgan/kernels/cpu/libdcgan.so``; where that fails, leave the reason in ``build-error.txt``."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        error = target.with_name("build-error.txt")
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in (target, error):
            stale.unlink(missing_ok=True)
        try:
            self._compile(ext.sources, Path(self.build_temp), target)
        except (OSError, subprocess.CalledProcessError) as failure:
            why = f"{failure}\n{getattr(failure, 'stderr', None) or ''}".strip()
            if os.environ.get("DCGAN_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"DCGAN_REQUIRE_NATIVE=1: the native engine was not built: {why}") from None
            error.write_text(why)
            rule = "=" * 100
            print(f"{rule}\nWARNING: the native CPU engine was not built: {why}\n{rule}", file=sys.stderr)

    def _compile(self, sources: list[str], temporary: Path, target: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        isas = ISAS if x86 else {"portable": ISAS["portable"]}
        temporary.mkdir(parents=True, exist_ok=True)
        units: list[tuple[str, Path, list[str]]] = []
        for source in sources:
            name = Path(source).stem
            if name == "engine":
                for isa, (lanes, flags) in isas.items():
                    defines = [f"-DDCGAN_ISA={isa}", f"-DDCGAN_LANES={lanes}"]
                    units.append((source, temporary / f"engine-{isa}.o", [*flags, *defines]))
            else:
                defines = [f"-DDCGAN_WITH_{isa.upper()}" for isa in isas]
                units.append((source, temporary / f"{name}.o", defines))

        def run(command: list[str]) -> None:
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)

        with ThreadPoolExecutor() as pool:
            jobs = [
                pool.submit(run, [*compiler, *FLAGS, *flags, *user_flags, "-c", source, "-o", str(out)])
                for source, out, flags in units
            ]
            for job in jobs:
                job.result()
        run([*compiler, "-shared", "-fopenmp", *(str(out) for _, out, _ in units), "-o", str(target)])


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on one platform, since ctypes loads the engine, which uses no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["dcgan", "dcgan.*"], exclude=["dcgan.kernels", "dcgan.kernels.*"]),
        "dcgan.kernels",
        *(f"dcgan.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"dcgan.kernels": "kernels"},
    ext_modules=[
        Extension(
            "dcgan.kernels.cpu.libdcgan",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
