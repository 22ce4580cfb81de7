"""Trained networks in formats that other programs read.

* :func:`safetensors`: the weights and the network's sizes; :mod:`dcgan.pretrained` reads it back.
* :func:`onnx`: for ONNX Runtime, OpenVINO, TensorRT and others.
* :func:`torch_export`: ``torch.export``'s program, which runs without this package.

The last two hold what ``network(x)`` computes in eval mode, in float32, with whatever has been changed in the
network: layers, hooks, a forward of its own. A Generator's is z [N, latent_dim] → images [N, C, H, W] in
[-1, 1], a Discriminator's images → probability [N]. The first holds the weights alone, so that a network that
computes something else with them than the default one is refused.

What is written has first been loaded back and compared with ``network(x)``, on inputs for which the outputs
differ from each other: a Discriminator that has learned much calls nearly every random image a fake, with a
probability that no error in the exported weights would move.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import itertools
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dcgan import fast, models, pretrained
from dcgan.errors import InputError, RunError
from dcgan.files import replacing

INSTALL = "pip install 'dcgan-kernels[export]'"

TOLERANCE = 1e-4
"""Largest difference allowed between the outputs of the exported and the given network, to their spread.

The spread is the range of the outputs over the inputs of the check, of that output element where it is
largest: up to 2 for an image's values, up to 1 for a probability.
"""

BATCHES = (1, 3, 5)
"""Sizes of the batches that a program for any batch size is checked with."""

Exportable = models.Generator | models.Discriminator | models.MLPGenerator | models.MLPDiscriminator


class Exported(NamedTuple):
    """What was written.

    Args:
        size: of the file, bytes.
        inputs, outputs: their shapes as words, such as ``[batch, 100]``; '' for weights alone.
        difference: the largest from ``network(x)``, as a part of the outputs' spread (see TOLERANCE); None
            for weights alone, and where no program to run it is installed.
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
        network: a Generator or Discriminator of :mod:`dcgan.models` or :mod:`dcgan.fast` that computes what
            :mod:`dcgan.pretrained` makes of its weights; it stays as it is.
        path: the file, replaced whole, in a folder that exists.

    Raises:
        InputError: the network is another; says what has been changed in it.
        RunError: its outputs are not finite or are all the same, so that they show nothing, or ``path``
            can't be written; what was at ``path`` is as it was.
    """
    from safetensors.torch import save

    with _evaluated(network) as (plain, check):
        kind = "generator" if isinstance(plain, models.Generator | models.MLPGenerator) else "discriminator"
        is_mlp = isinstance(plain, models.MLPGenerator | models.MLPDiscriminator)
        metadata = {
            "format": "pt",
            "network": kind,
            "model": "mlp" if is_mlp else "dcgan",
            **{name: str(size) for name, size in _sizes(plain).items()},
        }
        try:
            state = {key: value.contiguous() for key, value in network.state_dict().items()}
            content = save(state, metadata)
            check.difference(_read_back(content, kind), "the default network with these weights")
        except Exception as error:  # it cannot be saved, does not fit, or computes something else
            raise InputError(
                "network cannot be read back from safetensors, which hold the weights of a default network "
                f"alone: {_changes(network) or _first_line(error.__cause__ or error)}. Export it to onnx or "
                "torch-export instead"
            ) from error
    return _write(content, path, Exported(len(content), "", "", None, ""))


def onnx(network: nn.Module, path: Path, *, batch: int | None = None) -> Exported:
    """An ONNX model with its weights inside, from ``torch.onnx.export``.

    Its input is ``z`` or ``image``, its output ``image`` or ``probability``.

    Args:
        network: a Generator or Discriminator of :mod:`dcgan.models` or :mod:`dcgan.fast`, or of a subclass,
            with any changes that ``torch.export`` can trace; it stays as it is.
        path: the file, replaced whole, in a folder that exists.
        batch: the one batch size that it takes; None for any.

    Raises:
        InputError: the network is another, holds something that cannot be copied or traced, or a package is
            missing, onnx or onnxscript.
        RunError: the model's outputs differ from ``network(x)`` by more than TOLERANCE of their spread, they
            are not finite or all the same, or ``path`` can't be written; what was at ``path`` is as it was.
    """
    try:
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"ONNX takes the package {error.name}, which is not installed: {INSTALL}") from error
    with _evaluated(network, batch) as (plain, check):
        name_in, name_out = ("z", "image") if len(check.shape) == 1 else ("image", "probability")
        with _exporting("ONNX", network):
            program = torch.onnx.export(
                plain,
                (_example(check.shape, batch),),
                dynamo=True,
                verbose=False,
                input_names=[name_in],
                output_names=[name_out],
                dynamic_shapes=check.dynamic(),
            )
            assert program is not None
            content = program.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        difference, checked = None, f"not verified, as ONNX Runtime is missing: {INSTALL}"
    else:
        with _exporting("ONNX", network):
            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        checked = f"ONNX Runtime {onnxruntime.__version__}"
        difference = check.difference(
            lambda x: torch.from_numpy(session.run(None, {name_in: x.numpy()})[0]), checked
        )
    return _write(content, path, Exported(len(content), *check.shapes(), difference, checked))


def torch_export(network: nn.Module, path: Path, *, batch: int | None = None) -> Exported:
    """A ``torch.export`` program: ``torch.export.load(path).module()(z)`` runs it.

    Arguments and errors are :func:`onnx`'s; it needs no package but PyTorch.
    """
    file = io.BytesIO()
    with _evaluated(network, batch) as (plain, check), _exporting("torch.export", network):
        program = torch.export.export(plain, (_example(check.shape, batch),), dynamic_shapes=check.dynamic())
        torch.export.save(program, file)
        content = file.getvalue()
        loaded = torch.export.load(io.BytesIO(content)).module()
    targets = (node.target for node in program.graph.nodes)
    ours = sorted({target.name() for target in targets if getattr(target, "namespace", "") == "dcgan"})
    if ours:
        raise InputError(
            f"network calls {', '.join(ours)}, without which its program would not run elsewhere"
        )
    checked = f"PyTorch {torch.__version__}, loaded back"
    difference = check.difference(loaded, checked)
    return _write(content, path, Exported(len(content), *check.shapes(), difference, checked))


# --- the network that is exported ---------------------------------------------------------------------------


@contextlib.contextmanager
def _evaluated(network: nn.Module, batch: int | None = None) -> Iterator[tuple[Any, _Check]]:
    """A copy on the CPU in eval mode and float32, made of plain modules, and what it is to be checked with.

    ``network``'s own modules are in eval mode meanwhile: a hook or a forward that the user has put there may
    refer to them, and in the copy still does.

    Raises:
        InputError: it is no Generator or Discriminator, or cannot be copied or run like this.
        RunError: as :class:`_Check`.
    """
    if not isinstance(network, Exportable):
        inner = [n for n in ("_orig_mod", "module") if isinstance(getattr(network, n, None), nn.Module)]
        hint = f"; give what it wraps, its attribute {inner[0]}" if inner else ""
        raise InputError(
            f"network must be a Generator or a Discriminator, got {type(network).__qualname__}{hint}"
        )
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.device("cpu"):
            try:
                copied = _copy(network).cpu().float().eval().requires_grad_(False)
                check = _Check(copied, _input_shape(copied), batch)
            except RunError:
                raise
            except Exception as error:  # whatever the user's own hooks, forwards and modules raise
                raise InputError(
                    f"network cannot be copied to the CPU and run in float32: {_reason(error, network)}"
                ) from error
            # What the check has run is the network's own class; exported is the same in plain modules.
            plain = copied
            for kind, reference in _REFERENCES.items():
                if type(copied) is kind:
                    plain = copy.copy(copied)
                    plain.__class__ = reference
            yield plain, check
    finally:
        for module in training:
            module.training = True
        if training and isinstance(network, fast.Generator | fast.Discriminator):
            network.refresh()


_REFERENCES: dict[type[nn.Module], type[nn.Module]] = {
    fast.Generator: models.Generator,
    fast.Discriminator: models.Discriminator,
}


def _copy(network: nn.Module) -> Any:
    """A deep copy. Tensors that a hook has computed, as pruning's does, lose their graph, which cannot be."""
    computed = [t for m in network.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return copy.deepcopy(network, {id(t): t.detach().clone() for t in computed if not t.is_leaf})


def _sizes(network: Any) -> dict[str, int]:
    names = ("latent_dim", "channels", "features", "image_size")
    return {name: getattr(network, name) for name in names if hasattr(network, name)}


def _input_shape(network: Any) -> tuple[int, ...]:
    if isinstance(network, models.Generator | models.MLPGenerator):
        return (network.latent_dim,)
    return (network.channels, network.image_size, network.image_size)


def _read_back(content: bytes, kind: Any) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "network" + pretrained.SAFETENSORS)
        file.write_bytes(content)
        with torch.random.fork_rng(devices=[]):
            return pretrained.read(file, kind).module("reference")


def _changes(network: nn.Module) -> str:
    """What there is in the network that is not in the default one of its sizes, in words; '' for nothing."""
    kind = next(kind for kind in get_args(Exportable) if isinstance(network, kind))
    try:
        with torch.device("meta"):
            default = kind(**_sizes(network))
    except ValueError as error:
        return str(error)
    found = []
    if type(network) not in (kind, *(fast_kind for fast_kind, k in _REFERENCES.items() if k is kind)):
        found.append(f"it is a {type(network).__qualname__}")
    expected = {name: f"{type(m).__name__}({m.extra_repr()})" for name, m in default.named_modules()}
    changed: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(f"{parent}.") for parent in changed):
            continue
        where = name or "it"
        if any(vars(module)[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks")):
            found.append(f"{where} has hooks")
        if "forward" in vars(module):
            found.append(f"{where} has a forward of its own")
        is_now = f"{type(module).__name__}({module.extra_repr()})"
        if name and is_now != expected.get(name):
            found.append(f"{name} is {is_now}, by default {expected.get(name, 'there is none')}")
            changed.append(name)
    kept = dict(network.named_modules())
    found += [f"{name} is missing" for name in expected if name not in kept]
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _reason(error: BaseException, network: nn.Module) -> str:
    """The innermost error's first line, and what of the network may be its cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    changes = _changes(network)
    return _first_line(error) + (f" ({changes})" if changes else "")


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:300]}"


# --- the check ----------------------------------------------------------------------------------------------

_PROBES = sum(BATCHES)
_CONTRASTS = (1.0, 0.25, 4.0, 16.0, 64.0, 256.0, 1024.0)


class _Check:
    """Batches of inputs with what ``network`` gives for them, to hold another's outputs against.

    Args:
        network: on the CPU, in eval mode, float32.
        shape: of one input.
        batch: the one size of the batches; None for BATCHES.

    Raises:
        RunError: its outputs are not finite, or the same for all inputs, so that nothing could be compared.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], batch: int | None) -> None:
        self.shape, self.batch = shape, batch
        with torch.no_grad():
            probes = _probes(network, shape)
            sizes = BATCHES if batch is None else (batch,) * max(2, -(-_PROBES // batch))
            of_each = itertools.cycle(range(_PROBES))
            self.inputs = [probes[list(itertools.islice(of_each, size))] for size in sizes]
            self.outputs = [_outputs(network, x) for x in self.inputs]
        self.spread = _spread(torch.cat(self.outputs))

    def difference(self, run: Callable[[Tensor], Tensor], name: str) -> float:
        """The largest difference of ``run``'s outputs, as a part of the spread of the network's.

        Raises:
            RunError: it is above TOLERANCE, shapes differ, or ``run`` fails.
        """
        worst = 0.0
        for x, expected in zip(self.inputs, self.outputs, strict=True):
            try:
                with torch.no_grad():
                    found = run(x)
            except Exception as error:
                raise RunError(
                    f"not written: {name} fails for a batch of {len(x)}: {_first_line(error)}"
                ) from error
            if found.shape != expected.shape:
                raise RunError(
                    f"not written: {name} gives {list(found.shape)} where network(x) is "
                    f"{list(expected.shape)}"
                )
            difference = float((found - expected).abs().max()) / self.spread
            if not difference <= TOLERANCE:  # a NaN is a failure too
                raise RunError(
                    f"not written: {name} differs from network(x) by {difference:.1e} of the outputs' "
                    f"spread; {TOLERANCE:.0e} is allowed"
                )
            worst = max(worst, difference)
        return worst

    def dynamic(self) -> Any:
        return ({0: torch.export.Dim("batch", min=1)},) if self.batch is None else None

    def shapes(self) -> tuple[str, str]:
        """Of inputs and outputs, as words."""
        n = "batch" if self.batch is None else self.batch
        shapes = self.shape, self.outputs[0].shape[1:]
        inputs, outputs = (f"[{', '.join(map(str, (n, *shape)))}]" for shape in shapes)
        return inputs, outputs


def _example(shape: tuple[int, ...], batch: int | None) -> Tensor:
    """An input to trace with: not of one where any size is meant, which torch.export takes for a constant."""
    return torch.zeros(2 if batch is None else batch, *shape, dtype=torch.float32)


def _spread(outputs: Tensor) -> float:
    """The range over the batch, of that output element where it is largest."""
    return float((outputs.amax(0) - outputs.amin(0)).max())


def _outputs(network: nn.Module, x: Tensor) -> Tensor:
    outputs = network(x)
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != x.shape[:1]:
        raise TypeError("what it returns is no tensor with a row for each input")
    if not outputs.isfinite().all():
        raise RunError("not written: network(x) is not finite")
    return outputs


def _probes(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Inputs [_PROBES, *shape] whose outputs differ, and that no Sigmoid at the end makes alike.

    They are latents from N(0, 1), or images of all scales from noise to blobs, at the first contrast at which
    the outputs differ by a tenth of their size or of 1, the size of what Tanh and Sigmoid give.

    Raises:
        RunError: at no contrast do the outputs differ.
    """
    random = torch.Generator().manual_seed(0)
    pool = _latents(shape, random) if len(shape) == 1 else _images(shape, random)
    probes, most = pool, -1.0
    for contrast in _CONTRASTS:
        outputs = _outputs(network, contrast * pool)
        spread = _spread(outputs) / max(1.0, float(outputs.abs().max()))
        if spread > most:
            probes, most = contrast * pool, spread
        if most >= 0.1:
            break
    probes = _unsaturated(network, probes)
    outputs = _outputs(network, probes)
    if not _spread(outputs) > 1e-3 * float(outputs.abs().max()):  # float32's 1e-7 would be 1e-4 of it
        raise RunError(
            "not written: network(x) is the same for every x, so that a comparison would show nothing"
        )
    return probes


def _unsaturated(network: nn.Module, images: Tensor) -> Tensor:
    """The images moved until a Sigmoid at the end gives probabilities from 0.1 to 0.9, if there is one.

    A Discriminator's logit is piecewise linear in the image, so that Newton's method along the gradient takes
    few steps, and small ones.
    """
    seen: list[Tensor] = []
    sigmoids = [module for module in network.modules() if isinstance(module, nn.Sigmoid)]
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in sigmoids]
    targets = torch.linspace(0.1, 0.9, len(images), dtype=torch.float32).logit()
    try:
        for _ in range(50):
            seen.clear()
            images = images.detach().requires_grad_()
            with torch.enable_grad():
                network(images)
            if not seen or seen[-1].numel() != len(images) or not seen[-1].requires_grad:
                break
            logits = seen[-1]
            missing = targets - logits.flatten()
            if missing.abs().max() < 0.1:
                break
            (gradient,) = torch.autograd.grad(logits, images, torch.ones_like(logits))
            size = gradient.square().flatten(1).sum(1)
            step = torch.where(size > 0, missing / size, 0)
            images = images + step.view(-1, 1, 1, 1) * gradient
    finally:
        for hook in hooks:
            hook.remove()
    return images.detach()


def _latents(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(_PROBES, *shape, generator=random, dtype=torch.float32)


def _images(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """From noise to blobs, in (-1, 1)."""
    channels, size, _ = shape
    noise = _latents(shape, random)
    blobs = nn.functional.interpolate(_latents((channels, 4, 4), random), (size, size), mode="bicubic")
    share = torch.linspace(0, 1, _PROBES, dtype=torch.float32).view(-1, 1, 1, 1)
    return torch.lerp(noise, blobs, share).tanh()


# --- files and exporters ------------------------------------------------------------------------------------


def _write(content: bytes, path: Path, exported: Exported) -> Exported:
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return exported


@contextlib.contextmanager
def _exporting(name: str, network: nn.Module) -> Iterator[None]:
    """Without the exporters' remarks on their own insides.

    Raises:
        InputError: for whatever they raise; says what of the network may be its cause.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        except Exception as error:
            raise InputError(f"network cannot be exported by {name}: {_reason(error, network)}") from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
