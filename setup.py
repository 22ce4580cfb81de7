"""Packages of the distribution, and the native engine; everything declarative is in pyproject.toml.

``dcgan/kernels`` is a link to the top-level folder ``kernels``, so that a checkout, an editable install,
a wheel and mypy all see the one package ``dcgan.kernels``.

csrc is a plain shared library without Python or PyTorch headers, built here in seconds: engine.cpp once for
each instruction set, the rest once. A failing compiler does not fail the installation: the package then runs
PyTorch's own modules, and says why once.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
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
# Lanes of a register, and the compiler's flags.
ISAS = {
    "portable": (4, []),
    "avx2": (8, ["-mavx2", "-mfma"]),
    "avx512": (
        16,
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    ),
}


class BuildNative(build_ext):
    """Builds dcgan/kernels/cpu/libdcgan.so; a failure is left beside it as build-error.txt."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        error = target.with_name("build-error.txt")
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in (target, error):
            stale.unlink(missing_ok=True)
        try:
            self._compile(Path(self.build_temp), target)
        except (OSError, subprocess.CalledProcessError) as failure:
            why = f"{failure}\n{getattr(failure, 'stderr', None) or ''}".strip()
            error.write_text(why)
            print(f"warning: the native engine was not built: {why}", file=sys.stderr)

    def _compile(self, temporary: Path, target: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        isas = ISAS if x86 else {"portable": ISAS["portable"]}
        temporary.mkdir(parents=True, exist_ok=True)
        with_isas = [f"-DDCGAN_WITH_{isa.upper()}" for isa in isas]
        units = [
            ("csrc/abi.cpp", temporary / "abi.o", with_isas),
            ("csrc/chain.cpp", temporary / "chain.o", []),
            ("csrc/samples.cpp", temporary / "samples.o", []),
            ("csrc/training.cpp", temporary / "training.o", []),
        ]
        for isa, (lanes, flags) in isas.items():
            defines = [f"-DDCGAN_ISA={isa}", f"-DDCGAN_LANES={lanes}"]
            units.append(("csrc/engine.cpp", temporary / f"engine-{isa}.o", [*flags, *defines]))

        def run(command: list[str]) -> None:
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)

        with ThreadPoolExecutor() as pool:
            jobs = [
                pool.submit(run, [*compiler, *FLAGS, *flags, "-c", source, "-o", str(out)])
                for source, out, flags in units
            ]
            for job in jobs:
                job.result()
        run([*compiler, "-shared", "-fopenmp", *(str(out) for _, out, _ in units), "-o", str(target)])


setup(
    packages=find_packages(include=["dcgan", "dcgan.*"]),
    ext_modules=[
        Extension(
            "dcgan.kernels.cpu.libdcgan",
            ["csrc/abi.cpp", "csrc/chain.cpp", "csrc/training.cpp", "csrc/engine.cpp"],
            depends=[str(path) for path in Path("csrc").glob("*.h")],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
