"""Trained networks in formats that other programs read.

* :func:`safetensors`: the weights and the network's sizes; :mod:`dcgan.pretrained` reads it back.
* :func:`onnx`: for ONNX Runtime, OpenVINO, TensorRT and others.
* :func:`torch_export`: ``torch.export``'s program, which runs without this package.

The last two hold the network of :mod:`dcgan.models` in eval mode, float32, made of plain convolutions: a
Generator's z [N, latent_dim] → images [N, C, H, W] in [-1, 1], a Discriminator's images → probability [N].
What is written has first been loaded back and run beside PyTorch on random inputs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcgan import models
from dcgan.errors import InputError, RunError
from dcgan.files import replacing

INSTALL = "pip install 'dcgan-kernels[export]'"

TOLERANCE = 1e-4
"""Largest difference allowed between the exported network's outputs, in [-1, 1], and PyTorch's."""

Exportable = models.Generator | models.Discriminator | models.MLPGenerator | models.MLPDiscriminator


class Exported(NamedTuple):
    """What was written.

    Args:
        size: of the file, bytes.
        inputs, outputs: their shapes as words, such as ``[batch, 100]``; '' for weights alone.
        difference: the largest from PyTorch's outputs; None where it was not run.
        checked: by what it was run, or why it was not; '' for weights alone.
    """

    size: int
    inputs: str
    outputs: str
    difference: float | None
    checked: str


def safetensors(network: nn.Module, path: Path) -> Exported:
    """The state dict as it is, with ``network``, ``model`` and sizes as the file's metadata.

    Args:
        network: a Generator or Discriminator of :mod:`dcgan.models` or :mod:`dcgan.fast`.
        path: the file, replaced whole, in a folder that exists.

    Raises:
        InputError: the network is another.
        RunError: ``path`` can't be written.
    """
    from safetensors.torch import save

    known = _known(network)
    is_generator = isinstance(known, models.Generator | models.MLPGenerator)
    is_mlp = isinstance(known, models.MLPGenerator | models.MLPDiscriminator)
    names = ("latent_dim", "channels", "features", "image_size")
    metadata = {
        "format": "pt",
        "network": "generator" if is_generator else "discriminator",
        "model": "mlp" if is_mlp else "dcgan",
        **{name: str(getattr(known, name)) for name in names if hasattr(known, name)},
    }
    content = save({key: value.contiguous() for key, value in known.state_dict().items()}, metadata)
    return _write(content, path, Exported(len(content), "", "", None, ""))


def onnx(network: nn.Module, path: Path, *, batch: int | None = None) -> Exported:
    """An ONNX model with its weights inside, from ``torch.onnx.export``.

    Its input is ``z`` or ``image``, its output ``image`` or ``probability``.

    Args:
        network: as for :func:`safetensors`; it stays as it is.
        path: the file, replaced whole, in a folder that exists.
        batch: the one batch size that it takes; None for any.

    Raises:
        InputError: the network is another, or a package is missing, onnx or onnxscript.
        RunError: the model differs from PyTorch by more than TOLERANCE, or ``path`` can't be written; what
            was at ``path`` is as it was.
    """
    try:
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"ONNX takes the package {error.name}, which is not installed: {INSTALL}") from error
    plain, shape, (name_in, name_out) = _plain(network)
    with _quiet():
        program = torch.onnx.export(
            plain,
            (_example(shape, batch),),
            dynamo=True,
            verbose=False,
            input_names=[name_in],
            output_names=[name_out],
            dynamic_shapes=_dynamic(batch),
        )
    assert program is not None
    content = program.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        difference, checked = None, f"not verified, as ONNX Runtime is missing: {INSTALL}"
    else:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        checked = f"ONNX Runtime {onnxruntime.__version__}"
        difference = _difference(
            plain,
            lambda x: torch.from_numpy(session.run(None, {name_in: x.numpy()})[0]),
            shape,
            batch,
            checked,
        )
    return _write(content, path, _exported(content, plain, shape, batch, difference, checked))


def torch_export(network: nn.Module, path: Path, *, batch: int | None = None) -> Exported:
    """A ``torch.export`` program: ``torch.export.load(path).module()(z)`` runs it.

    Arguments and errors are :func:`onnx`'s; it needs no package but PyTorch.
    """
    plain, shape, _ = _plain(network)
    file = io.BytesIO()
    with _quiet():
        program = torch.export.export(plain, (_example(shape, batch),), dynamic_shapes=_dynamic(batch))
        torch.export.save(program, file)
        content = file.getvalue()
        loaded = torch.export.load(io.BytesIO(content)).module()
    checked = f"PyTorch {torch.__version__}, loaded back"
    difference = _difference(plain, loaded, shape, batch, checked)
    return _write(content, path, _exported(content, plain, shape, batch, difference, checked))


def _known(network: nn.Module) -> Any:
    if not isinstance(network, Exportable):
        raise InputError(f"network must be a Generator or a Discriminator, got {type(network).__qualname__}")
    return network


def _plain(network: nn.Module) -> tuple[Any, tuple[int, ...], tuple[str, str]]:
    """A copy as the network of dcgan.models, the shape of its input, and names of input and output."""
    plain = copy.deepcopy(_known(network)).cpu().float()
    for kind in (models.Generator, models.Discriminator):
        if isinstance(plain, kind) and type(plain) is not kind:  # a fast network's forward is our own ops
            state = plain.state_dict()
            plain = kind(**plain.sizes())
            plain.load_state_dict(state)
    plain.eval().requires_grad_(False)
    if isinstance(plain, models.Generator | models.MLPGenerator):
        return plain, (plain.latent_dim,), ("z", "image")
    return plain, (plain.channels, plain.image_size, plain.image_size), ("image", "probability")


def _example(shape: tuple[int, ...], batch: int | None) -> Tensor:
    return torch.zeros(2 if batch is None else batch, *shape)


def _dynamic(batch: int | None) -> Any:
    return ({0: torch.export.Dim("batch", min=1)},) if batch is None else None


def _difference(
    plain: nn.Module,
    run: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    batch: int | None,
    name: str,
) -> float:
    """The largest difference on random inputs, of two batch sizes where any is allowed.

    Raises:
        RunError: it is above TOLERANCE, or shapes differ.
    """
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for n in (1, 5) if batch is None else (batch, batch):
        x = torch.randn(n, *shape, generator=random)
        with torch.no_grad():
            expected, found = plain(x), run(x)
        if found.shape != expected.shape:
            raise RunError(
                f"not written: {name} gives {list(found.shape)} where PyTorch gives {list(expected.shape)}"
            )
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE:  # a NaN is a failure too
            raise RunError(
                f"not written: {name} differs from PyTorch by {difference:.1e}; {TOLERANCE:.0e} is allowed"
            )
        worst = max(worst, difference)
    return worst


def _exported(
    content: bytes,
    plain: nn.Module,
    shape: tuple[int, ...],
    batch: int | None,
    difference: float | None,
    checked: str,
) -> Exported:
    with torch.no_grad():
        out = plain(_example(shape, 1)).shape[1:]
    inputs, outputs = (f"[{', '.join(map(str, (batch or 'batch', *s)))}]" for s in (shape, out))
    return Exported(len(content), inputs, outputs, difference, checked)


def _write(content: bytes, path: Path, exported: Exported) -> Exported:
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return exported


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own insides; what goes wrong is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
