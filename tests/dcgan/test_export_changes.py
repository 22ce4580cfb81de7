"""Exports of networks changed by the user: the file computes what network(x) does, or is not written."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dcgan import export, fast, models, pretrained
from dcgan.errors import InputError, RunError
from tests.support.networks import drop_in, norms, reference, replace, replace_norms, set_on_norms, with_bias

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[Any], None]


def network(kind: str, engine: str, change: Change) -> Any:
    """Return a changed network in training mode, as it is right after training."""
    model = reference(kind, dtype=torch.float32, features=8)
    if engine == "fast":
        model = drop_in(model)
    change(model)
    return model.train()


def inputs(model: Any, batch: int) -> Tensor:
    random = torch.Generator().manual_seed(3)
    return torch.randn(batch, *export._input_shape(model), generator=random)


def assert_computes(run: Callable[[Tensor], Tensor], model: Any) -> None:
    """Check ``run`` against network(x) in eval mode, relative to the outputs' spread."""
    model.eval()
    for batch in (1, 2, 7):
        x = inputs(model, batch)
        with torch.no_grad():
            expected, found = model(x), run(x)
        spread = expected.max() - expected.min() if batch > 1 else 1
        assert (found - expected).abs().max() <= 2e-5 * spread
    assert spread > 1e-2


# --- changes ------------------------------------------------------------------------------------------------


def other_slope(model: Any) -> None:
    for i, module in enumerate(model.main):
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            model.main[i] = nn.LeakyReLU(0.5)


Find = Callable[[Any], nn.Module]


def the_network(model: Any) -> nn.Module:
    return model  # type: ignore[no-any-return]


def main(model: Any) -> nn.Module:
    return model.main  # type: ignore[no-any-return]


def layer(index: int) -> Find:
    return lambda model: model.main[index]  # type: ignore[no-any-return]


def hook(find: Find) -> Change:
    def change(model: Any) -> None:
        find(model).register_forward_hook(lambda module, args, output: 0.5 * output)

    return change


def hook_before(find: Find) -> Change:
    def change(model: Any) -> None:
        find(model).register_forward_pre_hook(lambda module, args: (0.5 * args[0],))

    return change


def replaced_forward(find: Find) -> Change:
    """Replace forward by a closure, which in a copy of the network still calls the original module."""

    def change(model: Any) -> None:
        module = find(model)
        original = module.forward
        module.forward = lambda x: 0.5 * original(x)  # type: ignore[method-assign]

    return change


def subclass(model: Any) -> None:
    """Subclass the network with a forward that wraps the original."""

    class Halved(type(model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)  # type: ignore[no-any-return]

    model.__class__ = Halved


def subclass_with_main(model: Any) -> None:
    class Skips(type(model)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            for module in self.main[:-1]:
                x = module(x[:, :, None, None] if x.ndim == 2 else x)
            return 0.1 * (x if x.shape[-1] > 1 else x.flatten())

    model.__class__ = Skips


def compiled_in_place(model: Any) -> None:
    other_slope(model)
    model.compile(backend="eager")


def spectral(model: Any) -> None:
    parametrizations.spectral_norm(model.main[0])


def weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model.main[-2])
    with torch.no_grad():
        model.main[-2].parametrizations.weight.original0.mul_(0.5)


def old_spectral(model: Any) -> None:
    nn.utils.spectral_norm(model.main[0])


def pruned(model: Any) -> None:
    """Prune a layer, whose weight becomes a computed tensor with a graph."""
    prune.l1_unstructured(model.main[0], "weight", 0.3)


# The change, and the message with which safetensors() rejects it.
CHANGES: dict[str, tuple[Change, str]] = {
    "slope": (other_slope, r"LeakyReLU\(negative_slope=0.5\) \(default: (ReLU|LeakyReLU\(.*=0.2)"),
    "eps": (set_on_norms(eps=0.1), r"BatchNorm2d\(.*eps=0.1.*default: BatchNorm2d\(.*eps=1e-05"),
    "hook on a layer": (hook(layer(1)), "main.1 has hooks"),
    "hook before a layer": (hook_before(layer(3)), "main.3 has hooks"),
    "hook on main": (hook(main), "main has hooks"),
    "hook on the network": (hook(the_network), "the network has hooks"),
    "forward of a layer": (replaced_forward(layer(0)), "main.0 has a replaced forward"),
    "forward of a norm": (replaced_forward(lambda m: norms(m)[0][1]), r"main\.\d has a replaced forward"),
    "forward of main": (replaced_forward(main), "main has a replaced forward"),
    "forward of the network": (replaced_forward(the_network), "the network has a replaced forward"),
    "subclass": (subclass, "the network is a .*Halved"),
    "subclass with layers": (subclass_with_main, "the network is a .*Skips"),
    "compiled in place": (compiled_in_place, r"LeakyReLU\(negative_slope=0.5\)"),
    "spectral norm": (spectral, "main.0 is ParametrizedConv"),
    "weight norm": (weight_norm, r"main\.\d+ is ParametrizedConv"),
    "spectral norm by hooks": (old_spectral, "main.0 has hooks"),
    "pruned": (pruned, "main.0 has hooks"),
    "nested": (replace(3, lambda conv: nn.Sequential(conv, nn.Identity())), r"main\.3 is Sequential"),
    "GroupNorm": (replace_norms(lambda c: nn.GroupNorm(2, c)), r"GroupNorm\(2"),
    "no norm": (replace_norms(lambda c: nn.Identity()), r"main\.\d is Identity\(\) \(default: BatchNorm2d"),
    "bias": (replace(-2, with_bias), r"main\.\d+ is Conv.* \(default: Conv.*bias=False"),
    "no last activation": (lambda m: m.main.pop(len(m.main) - 1), r"main\.\d+ is missing"),
}

KINDS = pytest.mark.parametrize("kind", ["G", "D"])
ENGINES = pytest.mark.parametrize("engine", ["reference", "fast"])
# An export takes a third of a second: each engine runs one network, and the others as slow tests.
PROGRAMS = pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("G", "fast"),
        ("D", "reference"),
        pytest.param("G", "reference", marks=pytest.mark.slow),
        pytest.param("D", "fast", marks=pytest.mark.slow),
    ],
)


class Untouched:
    """Checks that the export has left a network unchanged."""

    def __init__(self, model: Any) -> None:
        self.model, self.before = model, self.snapshot(model)
        self.state = copy.deepcopy(model.state_dict())

    @staticmethod
    def snapshot(model: Any) -> list[Any]:
        return [
            (type(m), m.training, list(m._forward_hooks), list(m._forward_pre_hooks), list(vars(m)))
            for m in model.modules()
        ] + [(p.requires_grad, p.dtype, p.device) for p in model.parameters()]

    def check(self) -> None:
        assert self.snapshot(self.model) == self.before
        state = self.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in self.state.items())


@PROGRAMS
@pytest.mark.parametrize("change", CHANGES)
def test_torch_export_matches_the_network(change: str, engine: str, kind: str, tmp_path: Path) -> None:
    model = network(kind, engine, CHANGES[change][0])
    untouched = Untouched(model)
    exported = export.torch_export(model, tmp_path / "x.pt2")
    untouched.check()
    assert exported.difference is not None
    assert exported.difference < export.TOLERANCE / 5
    program = torch.export.load(tmp_path / "x.pt2")
    assert "dcgan" not in {getattr(node.target, "namespace", "") for node in program.graph.nodes}
    assert_computes(program.module(), model)


@KINDS
@ENGINES
@pytest.mark.parametrize("change", CHANGES)
def test_safetensors_are_rejected(change: str, engine: str, kind: str, tmp_path: Path) -> None:
    make, words = CHANGES[change]
    model = network(kind, engine, make)
    untouched = Untouched(model)
    with pytest.raises(InputError, match=words) as caught:
        export.safetensors(model, tmp_path / "x.safetensors")
    assert "Export it to onnx or torch-export instead" in str(caught.value)
    untouched.check()
    assert not list(tmp_path.iterdir())


ONNX = [
    ("G", "fast", "slope"),
    ("G", "reference", "hook on main"),
    ("D", "fast", "eps"),
    ("D", "fast", "forward of a norm"),
    ("D", "reference", "GroupNorm"),
    ("G", "fast", "subclass"),
    ("D", "fast", "spectral norm"),
]


@pytest.mark.parametrize(("kind", "engine", "change"), ONNX)
def test_onnx_matches_the_network(change: str, engine: str, kind: str, tmp_path: Path) -> None:
    model = network(kind, engine, CHANGES[change][0])
    untouched = Untouched(model)
    exported = export.onnx(model, tmp_path / "x.onnx")
    untouched.check()
    assert exported.difference is not None
    assert exported.difference < export.TOLERANCE / 5
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    assert_computes(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model)


# --- changes that preserve the output -----------------------------------------------------------------------


def recording(model: Any) -> None:
    model.main[1].register_forward_hook(lambda module, args, output: setattr(module, "seen", output.shape))


def not_in_place(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False


def named_subclass(model: Any) -> None:
    class Mine(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Mine


def compiled_layer(model: Any) -> None:
    model.main[0] = torch.compile(model.main[0], backend="eager")


@KINDS
@ENGINES
@pytest.mark.parametrize("change", [recording, not_in_place, named_subclass, compiled_layer])
def test_changes_that_preserve_the_output_can_be_exported(
    change: Change, engine: str, kind: str, tmp_path: Path
) -> None:
    model = network(kind, engine, change)
    export.safetensors(model, tmp_path / "x.safetensors")
    load = pretrained.generator if kind == "G" else pretrained.discriminator
    export.torch_export(model, tmp_path / "x.pt2")
    assert_computes(load(tmp_path / "x.safetensors", engine="reference"), model)
    assert_computes(torch.export.load(tmp_path / "x.pt2").module(), model)


# --- what cannot be exported --------------------------------------------------------------------------------


def data_dependent(model: Any) -> None:
    def choose(module: Any, args: Any, output: Tensor) -> Tensor:
        return 0.5 * output if output.sum() > 0 else output

    model.main[1].register_forward_hook(choose)


def uncopyable(model: Any) -> None:
    model.lock = threading.Lock()


def other_dtype(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, args: (args[0].double(),))


def not_a_tensor(model: Any) -> None:
    model.register_forward_hook(lambda module, args, output: (output, output))


def failing(model: Any) -> None:
    def fail(module: Any, args: Any) -> None:
        raise ZeroDivisionError("no such thing")

    model.main[3].register_forward_pre_hook(fail)


@KINDS
@ENGINES
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (data_dependent, r"cannot be exported by torch.export: .*\(main.1 has hooks"),
        (uncopyable, "cannot be copied to the CPU and run in float32: TypeError: cannot pickle"),
        (other_dtype, r"cannot be copied to the CPU and run in float32: .*\(the network has hooks\)"),
        (not_a_tensor, r"cannot be copied .* its output is not a tensor .*\(the network has hooks\)"),
        (failing, r"ZeroDivisionError: no such thing \(main.3 has hooks\)"),
    ],
)
def test_networks_that_cannot_be_exported(
    change: Change, words: str, engine: str, kind: str, tmp_path: Path
) -> None:
    model = network(kind, engine, change)
    training = [module.training for module in model.modules()]
    with pytest.raises(InputError, match=words):
        export.torch_export(model, tmp_path / "x.pt2")
    assert [module.training for module in model.modules()] == training
    assert not list(tmp_path.iterdir())


def test_an_onnx_exporter_that_fails(tmp_path: Path) -> None:
    model = network("D", "fast", data_dependent)
    with pytest.raises(InputError, match=r"cannot be exported by ONNX: .*\(main.1 has hooks"):
        export.onnx(model, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@KINDS
def test_a_program_that_differs_is_not_written(kind: str, tmp_path: Path) -> None:
    """A hook acts differently at every call, but the program repeats what was traced."""
    calls: list[int] = []

    def count(module: Any, args: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * (1 + 0.01 * len(calls))

    model = network(kind, "fast", lambda m: m.main[1].register_forward_hook(count))
    with pytest.raises(RunError, match=r"not written: PyTorch \S+, loaded back differs from network\(x\) by"):
        export.torch_export(model, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_programs_that_need_this_package_are_rejected(tmp_path: Path) -> None:
    from dcgan.kernels import ops

    class Own(models.Generator):
        def forward(self, z: Tensor) -> Tensor:
            first = self.main[0]
            x, _, _ = ops.conv_transpose2d_fused(self._latent(z), first.weight, stride=1, padding=0)
            return self.main[1:](x)  # type: ignore[no-any-return]

    model = network("G", "reference", lambda m: setattr(m, "__class__", Own))
    with pytest.raises(
        InputError, match=r"calls dcgan::conv_transpose2d_fused, so its program would not run"
    ):
        export.torch_export(model, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", [export.safetensors, export.torch_export, export.onnx])
def test_wrapped_networks_are_rejected(function: Any, tmp_path: Path) -> None:
    model = network("G", "fast", lambda m: None)
    for wrapped, attribute in (
        (torch.compile(model, backend="eager"), "_orig_mod"),
        (nn.DataParallel(model), "module"),
    ):
        with pytest.raises(InputError, match=f"got {type(wrapped).__name__}; pass .* {attribute}"):
            function(wrapped, tmp_path / "x")


@KINDS
def test_half_precision_networks_are_exported_in_float32(kind: str, tmp_path: Path) -> None:
    model = fast.convert(reference(kind, dtype=torch.float64, features=8)).bfloat16()
    export.torch_export(model, tmp_path / "x.pt2")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert_computes(torch.export.load(tmp_path / "x.pt2").module(), copy.deepcopy(model).float())


@KINDS
def test_default_device_and_dtype_do_not_matter(kind: str, tmp_path: Path) -> None:
    model = network(kind, "fast", other_slope)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            export.torch_export(model, tmp_path / "x.pt2")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_computes(torch.export.load(tmp_path / "x.pt2").module(), model)


def test_a_fully_connected_network(tmp_path: Path) -> None:
    model = models.MLPGenerator(6, 1, 28)  # no checkpoint may have this size, so it cannot be read back
    with pytest.raises(InputError, match=r"image_size must be one of 32, .*, got 28\. Export it to onnx or"):
        export.safetensors(model, tmp_path / "x")
    other = models.MLPDiscriminator(1, 32)
    other_slope(other)
    with pytest.raises(InputError, match=r"main.1 is LeakyReLU\(negative_slope=0.5\) \(default"):
        export.safetensors(other, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    for network in (model, other):
        export.torch_export(network, tmp_path / "x.pt2")
        assert_computes(torch.export.load(tmp_path / "x.pt2").module(), network)
