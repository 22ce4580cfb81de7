"""Export of trained networks to formats that other programs read.

* :func:`safetensors`: the weights and the network's sizes; :mod:`dcgan.pretrained` reads it back.
* :func:`onnx`: for ONNX Runtime, OpenVINO, TensorRT and others.
* :func:`torch_export`: a ``torch.export`` program, which runs without this package.

The last two hold what ``network(x)`` computes in eval mode and float32, including changed layers, hooks or a
replaced forward: z [N, latent_dim] → images [N, C, H, W] in [-1, 1] for a Generator, images → probability [N]
for a Discriminator. The first holds only the weights, so a network that computes anything else with them than
the default network does is rejected.

They take networks that the user has written, too, if an ``example`` gives the shape of their inputs, and
safetensors if ``metadata`` says what the weights belong to.

Every export is loaded back and compared with ``network(x)`` before it is written, on inputs whose outputs
differ from each other: a well-trained Discriminator calls nearly every random image a fake, with a saturated
probability that no error in the exported weights would change.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dcgan import extras, fusing, models, pretrained
from dcgan.errors import InputError, RunError, is_integer
from dcgan.files import writing

INSTALL = extras.install("export")

TOLERANCE = 1e-4
"""Maximum difference between the outputs of the exported and the given network, relative to their spread.

The spread is the range over the check's inputs of the output element that varies most: up to 2 for an image's
values, up to 1 for a probability.
"""

OTHER = "; for a network of another class pass example, a batch of inputs or the shape of one input"

BATCHES = (1, 3, 5)
"""Batch sizes that a program with a dynamic batch size is checked with."""

Exportable = models.Generator | models.Discriminator | models.MLPGenerator | models.MLPDiscriminator


class Exported(NamedTuple):
    """Description of a written file.

    Args:
        size: file size in bytes.
        inputs, outputs: their shapes as text, such as ``[batch, 100]``; '' for safetensors.
        difference: largest difference from ``network(x)``, relative to the outputs' spread (see TOLERANCE);
            None for safetensors, and if no runtime for the format is installed.
        checked: the runtime that ran it, or why it was not run; '' for safetensors.
    """

    size: int
    inputs: str
    outputs: str
    difference: float | None
    checked: str


def safetensors(network: nn.Module, path: Path, *, metadata: Mapping[str, str] | None = None) -> Exported:
    """Write the state dict, with ``network``, ``model`` and the sizes in the file's metadata.

    Args:
        network: a Generator or Discriminator of :mod:`dcgan.models` or :mod:`dcgan.fast` that computes the
            same as the network that :mod:`dcgan.pretrained` builds from its weights; it is left unchanged.
        path: the file, replaced atomically, in an existing folder.
        metadata: for a network of any other class, what the file says about it, such as
            :meth:`dcgan.pretrained.Pretrained.metadata`; its outputs are then not checked, but its weights
            are read back and compared.

    Raises:
        InputError: the network computes something else; the message says what has been changed in it. With
            ``metadata``, its state dict cannot be saved.
        RunError: its outputs are not finite or do not depend on the input, or ``path`` cannot be written;
            an existing file at ``path`` is unchanged.
    """
    from safetensors.torch import load, save

    if metadata is not None:
        try:
            state = {key: value.detach().cpu() for key, value in network.state_dict().items()}
            # Cloned, since safetensors rejects tensors that share memory, such as tied weights.
            own = {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
            content = save(own, {"format": "pt", **metadata})
        except Exception as error:  # a value of the state dict is not a tensor
            raise InputError(f"network cannot be exported to safetensors: {_first_line(error)}") from error
        found = load(content)
        if found.keys() != state.keys() or not all(torch.equal(found[key], state[key]) for key in state):
            raise RunError("not written: the weights read back differ from the network's")
        return _write(content, path, "", "", None, "")

    with _evaluated(network) as (plain, check):
        kind = "generator" if isinstance(plain, models.Generator | models.MLPGenerator) else "discriminator"
        is_mlp = isinstance(plain, models.MLPGenerator | models.MLPDiscriminator)
        metadata = {
            "format": "pt",
            "network": kind,
            "model": "mlp" if is_mlp else "dcgan",
            **{name: str(size) for name, size in plain.sizes().items()},
        }
        try:
            state = {key: value.contiguous() for key, value in network.state_dict().items()}
            content = save(state, metadata)
            check.difference(_read_back(content, kind), "the default network with these weights")
        except Exception as error:  # the state cannot be saved, does not fit, or computes something else
            raise InputError(
                "network cannot be exported to safetensors, which hold only a default network's weights: "
                f"{_changes(network) or _first_line(error.__cause__ or error)}. Export it to onnx or "
                "torch-export instead"
            ) from error
    return _write(content, path, "", "", None, "")


def onnx(
    network: nn.Module,
    path: Path,
    *,
    batch: int | None = None,
    example: Tensor | Sequence[int] | None = None,
) -> Exported:
    """Write an ONNX model that includes its weights, by ``torch.onnx.export``.

    Its input is named ``z`` or ``image``, its output ``image`` or ``probability``.

    Args:
        network: a Generator or Discriminator of :mod:`dcgan.models` or :mod:`dcgan.fast`, or of a subclass,
            with any changes that ``torch.export`` can trace; or any other module with one input and one
            output that have a batch dimension each. It is left unchanged.
        path: the file, replaced atomically, in an existing folder.
        batch: the fixed batch size; None for a dynamic one.
        example: a batch of inputs, [N, …] of float32, or the shape of one input, without N. It is required
            for a network of another class.

    Raises:
        InputError: ``network`` has another type and there is no ``example``, or holds something that cannot
            be copied or traced, or the package onnx or onnxscript is not installed.
        RunError: the model's outputs differ from ``network(x)`` by more than TOLERANCE of their spread, are
            not finite or do not depend on the input, or ``path`` cannot be written; an existing file at
            ``path`` is unchanged.
    """
    try:
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"ONNX export requires the package {error.name}: {INSTALL}") from error
    with _evaluated(network, batch, example) as (plain, check):
        name_in, name_out = ("z", "image") if check.outputs[0][0].numel() > 1 else ("image", "probability")
        with _exporting("ONNX", network):
            program = torch.onnx.export(
                plain,
                (check.example,),
                dynamo=True,
                verbose=False,
                input_names=[name_in],
                output_names=[name_out],
                dynamic_shapes=check.dynamic,
            )
            assert program is not None
            content = program.model_proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        difference, checked = None, f"not verified because ONNX Runtime is not installed: {INSTALL}"
    else:
        with _exporting("ONNX", network):
            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        checked = f"ONNX Runtime {onnxruntime.__version__}"
        difference = check.difference(
            lambda x: torch.from_numpy(session.run(None, {name_in: x.numpy()})[0]), checked
        )
    return _write(content, path, *check.shapes(), difference, checked)


def torch_export(
    network: nn.Module,
    path: Path,
    *,
    batch: int | None = None,
    example: Tensor | Sequence[int] | None = None,
) -> Exported:
    """Write a ``torch.export`` program; run it with ``torch.export.load(path).module()(z)``.

    Arguments and errors are as for :func:`onnx`; PyTorch is the only package that this needs.
    """
    file = io.BytesIO()
    with _evaluated(network, batch, example) as (plain, check), _exporting("torch.export", network):
        program = torch.export.export(plain, (check.example,), dynamic_shapes=check.dynamic)
        torch.export.save(program, file)
        content = file.getvalue()
        loaded = torch.export.load(io.BytesIO(content)).module()
    targets = (node.target for node in program.graph.nodes)
    ours = sorted({target.name() for target in targets if getattr(target, "namespace", "") == "dcgan"})
    if ours:
        raise InputError(
            f"network calls {', '.join(ours)}, so its program would not run without this package"
        )
    checked = f"PyTorch {torch.__version__}, loaded back"
    difference = check.difference(loaded, checked)
    return _write(content, path, *check.shapes(), difference, checked)


# --- the network that is exported ---------------------------------------------------------------------------


@contextlib.contextmanager
def _evaluated(
    network: nn.Module, batch: int | None = None, example: Tensor | Sequence[int] | None = None
) -> Iterator[tuple[Any, _Check]]:
    """Yield a copy of ``network`` (plain modules, on the CPU, eval mode, float32) and the check for it.

    Meanwhile ``network``'s own modules are in eval mode, since the copy of a user's hook or forward may still
    refer to them.

    Raises:
        InputError: ``network`` is not a Generator or Discriminator and there is no ``example``, or it cannot
            be copied or run in float32.
        RunError: :class:`_Check` raises it.
    """
    if example is not None:
        shape = _shape_of(example)
    elif isinstance(network, Exportable):
        shape = _input_shape(network)
    else:
        inner = [n for n in ("_orig_mod", "module") if isinstance(getattr(network, n, None), nn.Module)]
        hint = f"; pass the network that it wraps, its attribute {inner[0]}" if inner else ""
        raise InputError(
            f"network must be a Generator or a Discriminator, got {type(network).__qualname__}{hint or OTHER}"
        )
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.device("cpu"):
            try:
                copied = _copy(network).cpu().float().eval().requires_grad_(False)
                check = _Check(copied, shape, batch)
            except RunError:
                raise
            except Exception as error:  # the user's hooks, forwards and modules may raise anything
                raise InputError(
                    f"network cannot be copied to the CPU and run in float32: {_reason(error, network)}"
                ) from error
            # The check has run the network's own class; a fused module is exported as the class it was.
            copied = copy.copy(copied)
            for module in copied.modules():
                if isinstance(module, fusing.Fused) and type(module) is fusing.fused_class(
                    module._fused_from
                ):
                    module.__class__ = module._fused_from  # type: ignore[assignment]
            yield copied, check
    finally:
        for module in training:
            module.training = True
        if training:
            fusing.refresh(network)


def _copy(network: nn.Module) -> Any:
    """Return a deep copy. Tensors that a hook has computed, as in pruning, are detached to be copyable."""
    computed = [t for m in network.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return copy.deepcopy(network, {id(t): t.detach().clone() for t in computed if not t.is_leaf})


def _shape_of(example: Any) -> tuple[int, ...]:
    """Return the shape of one input. Raises InputError for an ``example`` of another kind."""
    shape = example.shape[1:] if isinstance(example, Tensor) else example
    floats = not isinstance(example, Tensor) or example.dtype == torch.float32
    if not floats or not isinstance(shape, Sequence) or not shape or not all(map(is_integer, shape)):
        what = f"{example.dtype} {list(example.shape)}" if isinstance(example, Tensor) else repr(example)
        raise InputError(
            f"example must be a batch of inputs, float32 [N, …], or the shape of one input, got {what}"
        )
    return tuple(shape)


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


def _changes(network: Any) -> str:
    """Describe how the network differs from the default one of its sizes; '' if it does not."""
    kind = next((kind for kind in get_args(Exportable) if isinstance(network, kind)), None)
    if kind is None:
        return ""
    try:
        with torch.device("meta"):
            default = kind(**network.sizes())
    except ValueError as error:
        return str(error)
    found = []
    if type(network).forward is not kind.forward:
        found.append(f"the network is a {type(network).__qualname__}")
    expected = {name: f"{type(m).__name__}({m.extra_repr()})" for name, m in default.named_modules()}
    changed: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(f"{parent}.") for parent in changed):
            continue
        where = name or "the network"
        if any(vars(module)[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks")):
            found.append(f"{where} has hooks")
        if "forward" in vars(module):
            found.append(f"{where} has a replaced forward")
        is_now = f"{type(module).__name__}({module.extra_repr()})"
        if name and is_now != expected.get(name):
            found.append(f"{name} is {is_now} (default: {expected.get(name, 'absent')})")
            changed.append(name)
    present = dict(network.named_modules())
    found += [f"{name} is missing" for name in expected if name not in present]
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _reason(error: BaseException, network: nn.Module) -> str:
    """Return the innermost error's first line, and the changes in the network that may be its cause."""
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
    """Batches of inputs with ``network``'s outputs for them, to compare an exported network with.

    Args:
        network: on the CPU, in eval mode, float32.
        shape: shape of one input.
        batch: the fixed batch size; None for BATCHES.

    Raises:
        RunError: the outputs are not finite, or do not depend on the input, so that nothing can be compared.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], batch: int | None) -> None:
        self.shape, self.batch = shape, batch
        # To trace with: torch.export would specialize a dynamic batch size if it were 1 here.
        self.example = torch.zeros(2 if batch is None else batch, *shape, dtype=torch.float32)
        self.dynamic: Any = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
        with torch.no_grad():
            probes = _probes(network, shape)
            sizes = BATCHES if batch is None else (batch,) * max(2, -(-_PROBES // batch))
            of_each = itertools.cycle(range(_PROBES))
            self.inputs = [probes[list(itertools.islice(of_each, size))] for size in sizes]
            self.outputs = [_outputs(network, x) for x in self.inputs]
        self.spread = _spread(torch.cat(self.outputs))

    def difference(self, run: Callable[[Tensor], Tensor], name: str) -> float:
        """Return the largest difference of ``run``'s outputs, relative to the spread of the network's.

        Raises:
            RunError: the difference exceeds TOLERANCE, shapes differ, or ``run`` fails.
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
                    f"not written: {name} returns {list(found.shape)}, network(x) returns "
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

    def shapes(self) -> tuple[str, str]:
        """Return the shapes of the inputs and of the outputs as text."""
        n = "batch" if self.batch is None else self.batch
        shapes = self.shape, self.outputs[0].shape[1:]
        inputs, outputs = (f"[{', '.join(map(str, (n, *shape)))}]" for shape in shapes)
        return inputs, outputs


def _spread(outputs: Tensor) -> float:
    """Return the range over the batch of the output element that varies most."""
    return float((outputs.amax(0) - outputs.amin(0)).max())


def _outputs(network: nn.Module, x: Tensor) -> Tensor:
    outputs = network(x)
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != x.shape[:1]:
        raise TypeError("its output is not a tensor with one row per input")
    if not outputs.isfinite().all():
        raise RunError("not written: network(x) is not finite")
    return outputs


def _probes(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return inputs [_PROBES, *shape] whose outputs differ, also after a saturating Sigmoid at the end.

    They are latents from N(0, 1), or images of all scales from noise to blobs, at the first contrast at which
    the outputs differ by a tenth of their magnitude, or of 1, the range of Tanh and Sigmoid, if that is more.

    Raises:
        RunError: the outputs do not differ at any contrast.
    """
    random = torch.Generator().manual_seed(0)
    pool = torch.randn(_PROBES, *shape, generator=random, dtype=torch.float32)
    if len(shape) == 3 and shape[1:] != (1, 1):  # from noise to smooth blobs, in (-1, 1)
        blobs = torch.randn(_PROBES, shape[0], 4, 4, generator=random, dtype=torch.float32)
        blobs = nn.functional.interpolate(blobs, shape[1:], mode="bicubic")
        share = torch.linspace(0, 1, _PROBES, dtype=torch.float32).view(-1, 1, 1, 1)
        pool = torch.lerp(pool, blobs, share).tanh()
    probes, max_spread = pool, -1.0
    for contrast in _CONTRASTS:
        outputs = _outputs(network, contrast * pool)
        spread = _spread(outputs) / max(1.0, float(outputs.abs().max()))
        if spread > max_spread:
            probes, max_spread = contrast * pool, spread
        if max_spread >= 0.1:
            break
    probes = _unsaturated(network, probes)
    outputs = _outputs(network, probes)
    if not _spread(outputs) > 1e-3 * float(outputs.abs().max()):  # float32's 1e-7 would be 1e-4 of it
        raise RunError("not written: network(x) is the same for every x, so the export cannot be verified")
    return probes


def _unsaturated(network: nn.Module, images: Tensor) -> Tensor:
    """Adjust the images until a Sigmoid at the end, if any, returns probabilities from 0.1 to 0.9.

    A Discriminator's logit is piecewise linear in the image, so Newton's method along the gradient needs only
    few and small steps.
    """
    captured: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
        for module in network.modules()
        if isinstance(module, nn.Sigmoid)
    ]
    targets = torch.linspace(0.1, 0.9, len(images), dtype=torch.float32).logit()
    try:
        for _ in range(50):
            captured.clear()
            images = images.detach().requires_grad_()
            with torch.enable_grad():
                network(images)
            if not captured:
                break
            logits = captured[-1]
            if logits.numel() != len(images) or not logits.requires_grad:
                break
            missing = targets - logits.flatten()
            if missing.abs().max() < 0.1:
                break
            (gradient,) = torch.autograd.grad(logits, images, torch.ones_like(logits))
            size = gradient.square().flatten(1).sum(1)
            step = torch.where(size > 0, missing / size, 0)
            images = images + step.view(-1, *[1] * (images.ndim - 1)) * gradient
    finally:
        for hook in hooks:
            hook.remove()
    return images.detach()


# --- files and exporters ------------------------------------------------------------------------------------


def _write(content: bytes, path: Path, *description: Any) -> Exported:
    """Write the file; ``description`` is what :class:`Exported` says apart from its size."""
    with writing(path) as file:
        file.write(content)
    return Exported(len(content), *description)


@contextlib.contextmanager
def _exporting(name: str, network: nn.Module) -> Iterator[None]:
    """Silence the exporters' warnings and logs.

    Raises:
        InputError: the exporter fails; the message says which change in the network may be the cause.
    """
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise InputError(f"network cannot be exported by {name}: {_reason(error, network)}") from error
    finally:
        logging.disable(disabled)
