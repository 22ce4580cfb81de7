"""Exports of networks that the user has written, run by other runtimes and compared with float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dcgan import checkpoint, export, fast, pretrained
from dcgan.errors import InputError, RunError
from dcgan.foreign import Foreign
from dcgan.networks import Architecture
from tests.dcgan.test_foreign_command import invoke, one_line
from tests.support import foreign_networks
from tests.support.networks import randomise

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = foreign_networks.__name__
CLASSES: dict[str, tuple[str, type[nn.Module], dict[str, Any]]] = {
    "functionals": ("generator", foreign_networks.Generator, {"width": 5}),
    "rows": ("generator", foreign_networks.RowGenerator, {"widths": [5, 3]}),
    "a column": ("discriminator", foreign_networks.Discriminator, {"width": 3}),
    "a Sequential": ("discriminator", foreign_networks.SequentialDiscriminator, {}),
}


def network(name: str) -> nn.Module:
    _, kind, args = CLASSES[name]
    found = kind(**args)
    randomise(found)
    return found.eval()


def run_file(name: str, path: Path) -> nn.Module:
    """Write a checkpoint with the network and one of this project; return the network."""
    kind, cls, args = CLASSES[name]
    found, own = network(name), Architecture(latent_dim=6, features_g=4, features_d=4, image_size=32)
    foreign: dict[str, Any] = {f"foreign_{kind[0]}": Foreign(f"{MODULE}:{cls.__name__}", args)}
    states = {one: getattr(own, one)().state_dict() for one in ("generator", "discriminator")}
    states[kind] = found.state_dict()
    checkpoint.write(checkpoint.Checkpoint(Architecture(**vars(own) | foreign), **states), path)
    return found


def spelled(name: str) -> list[str]:
    kind, cls, _ = CLASSES[name]
    return ["--network", kind, f"--net{kind[0].upper()}-module", f"{MODULE}:{cls.__name__}"]


def input_shape(name: str) -> tuple[int, ...]:
    return {"functionals": (6, 1, 1), "rows": (6,)}.get(name, (1, 32, 32))


def assert_agrees(found: Tensor, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def onnx_session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", CLASSES)
def test_onnx(name: str, tmp_path: Path) -> None:
    model, out = run_file(name, tmp_path / "run.pt"), tmp_path / "x.onnx"
    result = invoke("export", tmp_path / "run.pt", "--to", "onnx", *spelled(name), "--out", out)
    assert result.exit_code == 0, result.output
    assert "largest difference from PyTorch" in result.output
    session = onnx_session(out)
    names = session.get_inputs()[0].name, session.get_outputs()[0].name
    assert names == (("z", "image") if CLASSES[name][0] == "generator" else ("image", "probability"))
    assert session.get_inputs()[0].shape == ["batch", *input_shape(name)]
    for batch in (1, 2, 7):
        x = torch.randn(batch, *input_shape(name))
        assert_agrees(torch.from_numpy(session.run(None, {names[0]: x.numpy()})[0]), model, x)


@pytest.mark.parametrize("name", CLASSES)
def test_torch_export(name: str, tmp_path: Path) -> None:
    model, out = run_file(name, tmp_path / "run.pt"), tmp_path / "x.pt2"
    result = invoke("export", tmp_path / "run.pt", "--to", "torch-export", *spelled(name), "--out", out)
    assert result.exit_code == 0, result.output
    program = torch.export.load(out)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets
    assert not any("dcgan" in str(target) for target in targets)
    for batch in (1, 2, 7):
        x = torch.randn(batch, *input_shape(name))
        with torch.no_grad():
            assert_agrees(program.module()(x), model, x)


@pytest.mark.parametrize("name", CLASSES)
def test_fused_networks(name: str, tmp_path: Path) -> None:
    """An example may be a batch or a shape; the network is left as it was, in training mode too."""
    model = network(name)
    plain, fused = copy.deepcopy(model), fast.fuse(model, inplace=True).train()
    example = torch.randn(3, *input_shape(name))
    exported = export.torch_export(fused, tmp_path / "x.pt2", batch=2, example=example)
    assert exported.inputs == str([2, *input_shape(name)])
    program = torch.export.load(tmp_path / "x.pt2")
    assert not any("dcgan" in str(node.target) for node in program.graph.nodes)
    assert_agrees(program.module()(example[:2]), plain, example[:2])
    assert all(module.training for module in fused.modules())
    state = fused.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    export.onnx(fused, tmp_path / "x.onnx", example=input_shape(name))
    session = onnx_session(tmp_path / "x.onnx")
    (given,) = (one.name for one in session.get_inputs())
    assert_agrees(torch.from_numpy(session.run(None, {given: example.numpy()})[0]), plain, example)


@pytest.mark.parametrize("name", CLASSES)
def test_safetensors(name: str, tmp_path: Path) -> None:
    model, out = run_file(name, tmp_path / "run.pt"), tmp_path / "x.safetensors"
    given = ["export", tmp_path / "run.pt", "--to", "safetensors", *spelled(name), "--out", out]
    assert invoke(*given).exit_code == 0
    from safetensors import safe_open

    kind, cls, args = CLASSES[name]
    with safe_open(out, framework="pt") as content:
        metadata = content.metadata()
    assert (metadata["network"], metadata["class"]) == (kind, f"{MODULE}:{cls.__name__}")
    assert json.loads(metadata["args"]) == args
    load: Any = getattr(pretrained, kind)
    found, expected = load(out, module=f"{MODULE}:{cls.__name__}").state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(InputError, match=rf"x\.safetensors holds .*: pass --net[GD]-module {MODULE}:"):
        load(out)
    other: Any = "discriminator" if kind == "generator" else "generator"
    with pytest.raises(
        InputError, match=f"the weights of a {kind.capitalize()}, not of a {other.capitalize()}"
    ):
        pretrained.read(out, other, module="a:B")
    if kind == "generator":
        arguments = [out, "--netG-module", f"{MODULE}:{cls.__name__}", "--num=2", "--out", tmp_path / "x.png"]
        assert invoke("generate", *arguments).exit_code == 0


def test_safetensors_of_tied_weights(tmp_path: Path) -> None:
    model = foreign_networks.Tied()
    export.safetensors(model, tmp_path / "x.safetensors", metadata={"class": "a:B"})
    from safetensors.torch import load_file

    found, expected = load_file(tmp_path / "x.safetensors"), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


class WithText(foreign_networks.Generator):
    """Its state dict holds a text."""

    def get_extra_state(self) -> Any:
        return "text"

    def set_extra_state(self, state: Any) -> None: ...


def test_safetensors_that_cannot_be_written(tmp_path: Path) -> None:
    model = foreign_networks.Generator()
    with torch.no_grad():
        model.out.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not written: the weights read back differ"):
        export.safetensors(model, tmp_path / "x.safetensors", metadata={})
    with pytest.raises(InputError, match="network cannot be exported to safetensors: AttributeError"):
        export.safetensors(WithText(), tmp_path / "x.safetensors", metadata={})
    assert not list(tmp_path.iterdir())


def test_damaged_metadata(tmp_path: Path) -> None:
    path, state = tmp_path / "x.safetensors", foreign_networks.Generator()
    sizes = {"latent_dim": "6", "channels": "1", "image_size": "32"}
    good = {"network": "generator", "class": f"{MODULE}:Generator", "args": "{}", **sizes}
    for bad in ({"network": "vae"}, {"args": "{"}, {"args": "[1]"}, {"latent_dim": "0"}, {"channels": "x"}):
        export.safetensors(state, path, metadata=good | bad)
        with pytest.raises(InputError, match=r"x\.safetensors has damaged metadata: "):
            pretrained.generator(path, module=f"{MODULE}:Generator")
    export.safetensors(state, path, metadata={key: good[key] for key in good if key != "args"})
    with pytest.raises(InputError, match=r"has damaged metadata: 'args'"):
        pretrained.generator(path, module=f"{MODULE}:Generator")


def test_errors_of_the_command(tmp_path: Path) -> None:
    run_file("functionals", tmp_path / "run.pt")
    given = ["export", tmp_path / "run.pt", "--to", "onnx", "--out", tmp_path / "x.onnx"]
    line = one_line(invoke(*given))
    assert line.endswith(f"pass --netG-module {MODULE}:Generator")
    line = one_line(invoke(*given, "--netD-module", f"{MODULE}:Discriminator"))
    assert "--netD-module and --netD-args require --network discriminator, got 'generator'" in line
    line = one_line(invoke(*given, "--network", "discriminator", "--netG-args", "a=1"))
    assert "--netG-module and --netG-args require --network generator, got 'discriminator'" in line
    assert "got 'width'" in one_line(invoke(*given, *spelled("functionals"), "--netG-args", "width"))


@pytest.mark.parametrize("example", [torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2), (), 6, ("a",)])
def test_invalid_examples(example: Any, tmp_path: Path) -> None:
    model = foreign_networks.RowGenerator()
    for function in (export.torch_export, export.onnx):
        with pytest.raises(InputError, match=r"example must be a batch of inputs, float32 \[N, …\], or"):
            function(model, tmp_path / "x", example=example)


def test_a_missing_or_unsuitable_example(tmp_path: Path) -> None:
    model = foreign_networks.RowGenerator()
    message = r"network must be a Generator or a Discriminator, got RowGenerator; .* pass example"
    for function in (export.torch_export, export.onnx):
        with pytest.raises(InputError, match=message):
            function(model, tmp_path / "x")
        with pytest.raises(InputError, match="network cannot be copied to the CPU and run in float32"):
            function(model, tmp_path / "x", example=(7,))
    with pytest.raises(InputError, match=message):
        export.safetensors(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())
