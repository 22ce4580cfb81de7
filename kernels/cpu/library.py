"""Load the shared library built from csrc/, bind its C ABI (csrc/dcgan.h) and select its ISA."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

ABI = 5
PATH = Path(__file__).with_name("libdcgan.so")
BUILD_ERROR = Path(__file__).with_name("build-error.txt")  # written by setup.py if compilation fails

ALGORITHMS = ("dense", "direct", "f2", "f4", "narrow")
ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh", "sigmoid")

Strides = ctypes.c_int64 * 4


class Layer(ctypes.Structure):
    """The struct ``dcgan_layer``."""

    _fields_ = (
        ("transposed", ctypes.c_int32),
        ("algorithm", ctypes.c_int32),
        ("c_in", ctypes.c_int32),
        ("c_out", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("kernel", ctypes.c_int32),
        ("stride", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("act", ctypes.c_int32),
        ("slope", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("variance", ctypes.c_void_p),
    )


class Op(ctypes.Structure):
    """The struct ``dcgan_op``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("transposed", "algorithm", "c_in", "c_out", "height", "width")),
        *((name, ctypes.c_int32) for name in ("kernel", "stride", "padding")),
        *((name, ctypes.c_int32) for name in ("in_act", "out_act", "statistics")),
        ("slope", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("center", "scale", "shift", "out_scale", "out_shift")),
        *((name, ctypes.c_void_p) for name in ("mean", "dmean", "dvariance")),
    )


class TrainLayer(ctypes.Structure):
    """The struct ``dcgan_train_layer``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("transposed", "fprop", "dgrad", "wgrad", "c_in", "c_out")),
        *((name, ctypes.c_int32) for name in ("height", "width", "kernel", "stride", "padding")),
        *((name, ctypes.c_int32) for name in ("act", "normalized")),
        ("epsilon", ctypes.c_double),
        ("weight", ctypes.c_void_p),
        ("weight_strides", Strides),
        *((name, ctypes.c_void_p) for name in ("gamma", "beta", "y", "stats", "dweight")),
        ("dweight_strides", Strides),
        *((name, ctypes.c_void_p) for name in ("dgamma", "dbeta")),
    )


class Running(ctypes.Structure):
    """The struct ``dcgan_running``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mean", "variance", "batches", "stats")),
        ("channels", ctypes.c_int32),
        ("momentum", ctypes.c_double),
        ("count", ctypes.c_double),
    )


class View(ctypes.Structure):
    """The struct ``dcgan_tensor``."""

    _fields_ = (("data", ctypes.c_void_p), ("strides", Strides))

    @classmethod
    def of(cls, t: Tensor) -> View:
        return cls(t.data_ptr(), Strides(*t.stride()))


class NativeError(RuntimeError):
    """The library rejected its arguments, ran out of memory, is missing, or lacks the instruction set."""


_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_problem: str | None = None
_isa: str | None = None


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    network = (integer, pointer, integer, wide, integer, ctypes.c_float)
    for name, result, *arguments in (
        ("dcgan_abi", integer),
        ("dcgan_error", ctypes.c_char_p),
        ("dcgan_isas", ctypes.c_char_p),
        ("dcgan_built", ctypes.c_char_p),
        ("dcgan_isa", ctypes.c_char_p),
        ("dcgan_use_isa", integer, ctypes.c_char_p),
        ("dcgan_limit_threads", integer, integer),
        ("dcgan_supports", integer, pointer),
        ("dcgan_packed_size", wide, pointer),
        ("dcgan_pack", integer, pointer, pointer, pointer, pointer, integer),
        ("dcgan_run", integer, pointer, integer, wide, pointer, pointer, integer),
        ("dcgan_workspace", wide, pointer, integer, wide, integer),
        ("dcgan_op_supports", integer, pointer, integer),
        ("dcgan_fprop", integer, pointer, wide, *(pointer,) * 6, integer),
        ("dcgan_dgrad", integer, pointer, wide, *(pointer,) * 9, integer),
        ("dcgan_wgrad", integer, pointer, wide, *(pointer,) * 8, integer),
        ("dcgan_shift_gradient", integer, pointer, wide, *(pointer,) * 3, integer),
        ("dcgan_train_forward", *network, pointer, integer),
        ("dcgan_train_backward", *network, *(pointer,) * 3, integer),
        ("dcgan_bce", integer, pointer, wide, wide, integer, *(pointer,) * 3),
        ("dcgan_bce_backward", integer, pointer, wide, wide, integer, *(pointer,) * 4),
        ("dcgan_track", integer, pointer, integer, integer),
        ("dcgan_differ", integer, pointer, integer, integer),
        ("dcgan_release", None),
        ("dcgan_peak", ctypes.c_double, integer, ctypes.c_double),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _open() -> tuple[ctypes.CDLL | None, str | None]:
    if not PATH.exists():
        because = f": {BUILD_ERROR.read_text().strip()}" if BUILD_ERROR.exists() else ""
        return None, f"csrc was not built{because}"
    try:
        library = ctypes.CDLL(str(PATH))  # loaded after torch, so that both share one OpenMP thread pool
        _declare(library)
    except (OSError, AttributeError) as error:
        return None, f"{PATH.name} does not load: {error}"
    if library.dcgan_abi() != ABI:
        return (
            None,
            f"{PATH.name} has ABI version {library.dcgan_abi()}, but this package needs {ABI}; rebuild it",
        )
    wanted = os.environ.get("DCGAN_ISA")
    if wanted and library.dcgan_use_isa(wanted.encode()) < 0:
        raise ValueError(f"DCGAN_ISA: {library.dcgan_error().decode()}")
    return library, None


def problem() -> str | None:
    """Return why the library is unavailable, or None if it is loaded. The first failure also warns.

    Raises:
        ValueError: ``DCGAN_ISA`` names an instruction set that this machine or this build lacks.
    """
    global _library, _problem
    if _library is None and _problem is None:
        with _lock:
            if _library is None and _problem is None:
                library, missing = _open()
                if missing is not None:
                    warnings.warn(
                        "dcgan's native CPU engine is missing, and PyTorch's own modules run instead: "
                        f"{missing}\n{_advice()}",
                        stacklevel=2,
                    )
                _library, _problem = library, missing
    return _problem


def _advice() -> str:
    """Return how to build the engine: from this checkout, or for an installed wheel from the sdist."""
    sources = Path(__file__).resolve().parents[2]
    if (sources / "csrc" / "dcgan.h").is_file():
        command = f"pip install -e {sources}"
    else:
        command = "pip install --force-reinstall --no-deps --no-binary dcgan-kernels dcgan-kernels"
    return (
        "To build it, install a C++17 compiler with OpenMP (or name one in CXX), then run: "
        f"DCGAN_REQUIRE_NATIVE=1 {command}"
    )


def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        NativeError: it is unavailable; the message says why.
    """
    if _library is None and problem() is not None:
        raise NativeError(_problem)
    assert _library is not None
    return _library


def checked(result: int) -> int:
    """Return the ``result`` of a call; raise NativeError with the library's message if it is negative."""
    if result < 0:
        raise NativeError(library().dcgan_error().decode())
    return result


def isas() -> tuple[str, ...]:
    """Return the instruction sets that this build contains and this machine supports, best first."""
    return tuple(library().dcgan_isas().decode().split())


def built_isas() -> tuple[str, ...]:
    """Return the instruction sets that this build contains, supported by this machine or not."""
    return tuple(library().dcgan_built().decode().split())


def isa() -> str:
    """Return the instruction set in use: the best available one, or the one that ``DCGAN_ISA`` names."""
    global _isa
    if _isa is None:
        _isa = library().dcgan_isa().decode()
    return _isa


def use_isa(name: str) -> None:
    """Switch to another instruction set; not safe while another thread is inside the library.

    Raises:
        NativeError: this machine or this build lacks it; the message lists the available ones.
    """
    global _isa
    checked(library().dcgan_use_isa(name.encode()))
    _isa = None


def peak(threads: int | None = None, seconds: float = 0.2) -> float:
    """Measure the FMA peak in multiply-adds per second: ``threads`` threads, all operands in registers."""
    return library().dcgan_peak(threads or torch.get_num_threads(), seconds)  # type: ignore[no-any-return]


def release() -> None:
    """Free the calling thread's workspace."""
    library().dcgan_release()
