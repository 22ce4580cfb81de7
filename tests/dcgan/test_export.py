"""Exported networks, run by other runtimes and compared with float64; ``dcgan export``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from dcgan import checkpoint, export, fast, models, pretrained
from dcgan.cli.app import app
from dcgan.errors import InputError, RunError
from dcgan.networks import Architecture
from tests.support.networks import randomise

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Architecture(latent_dim=5, channels=3, features_g=4, features_d=3, image_size=32)
SMALL_MLP = Architecture("mlp", latent_dim=5, channels=1, image_size=32)


def network(kind: str, architecture: Architecture = SMALL) -> Any:
    model = getattr(architecture, kind)("reference")
    randomise(model)
    return model.eval()


def run_file(architecture: Architecture, path: Path) -> checkpoint.Checkpoint:
    g, d, ema = network("generator", architecture), network("discriminator", architecture), None
    ema = network("generator", architecture).state_dict()
    content = checkpoint.Checkpoint(architecture, g.state_dict(), d.state_dict(), ema=ema)
    checkpoint.write(content, path)
    return content


def inputs(model: Any, batch: int) -> Tensor:
    if isinstance(model, models.Generator | models.MLPGenerator):
        return torch.randn(batch, model.latent_dim)
    return torch.randn(batch, model.channels, model.image_size, model.image_size)


def assert_agrees(found: Tensor, model: Any, x: Tensor) -> None:
    with torch.no_grad():
        expected = model.double()(x.double())
    model.float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(
        app, ["export", *map(str, arguments)], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )


# --- safetensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["generator", "discriminator"])
@pytest.mark.parametrize("architecture", [SMALL, SMALL_MLP], ids=["dcgan", "mlp"])
def test_safetensors_round_trip(architecture: Architecture, kind: str, tmp_path: Path) -> None:
    run_file(architecture, tmp_path / "run.pt")
    out = tmp_path / "new" / "g.safetensors"
    result = invoke(tmp_path / "run.pt", "--to", "safetensors", "--network", kind, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}: " in result.output
    assert ("moving average" in result.output) == (kind == "generator")
    for engine in ("auto", "reference"):
        load: Any = getattr(pretrained, kind)
        before, after = load(tmp_path / "run.pt", engine=engine), load(out, engine=engine)
        assert type(before) is type(after)
        found, expected = after.state_dict(), before.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        names = ("latent_dim", "channels", "features", "image_size")
        assert [getattr(before, n, None) for n in names] == [getattr(after, n, None) for n in names]


def test_no_ema(tmp_path: Path) -> None:
    content = run_file(SMALL, tmp_path / "run.pt")
    out = tmp_path / "g.safetensors"
    result = invoke(tmp_path / "run.pt", "--to", "safetensors", "--no-ema", "--out", out)
    assert result.exit_code == 0
    assert "moving average" not in result.output
    state = pretrained.read(out, "generator").state
    assert all(torch.equal(state[key], content.generator[key]) for key in state)


def test_channels_last_and_fast_networks(tmp_path: Path) -> None:
    model = fast.convert(network("generator").to(memory_format=torch.channels_last))
    export.safetensors(model, tmp_path / "g.safetensors")
    state = pretrained.read(tmp_path / "g.safetensors", "generator").state
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


# --- ONNX ---------------------------------------------------------------------------------------------------

CASES = [(SMALL, "generator"), (SMALL, "discriminator"), (SMALL_MLP, "generator")]
IDS = [f"{a.model}-{kind}" for a, kind in CASES]


def onnx_run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize(("architecture", "kind"), CASES, ids=IDS)
def test_onnx(architecture: Architecture, kind: str, tmp_path: Path) -> None:
    content = run_file(architecture, tmp_path / "run.pt")
    out = tmp_path / f"{kind}.onnx"
    result = invoke(tmp_path / "run.pt", "--to", "onnx", "--network", kind, "--out", out)
    assert result.exit_code == 0, result.output
    assert re.search(
        rf"ONNX Runtime {re.escape(onnxruntime.__version__)}: largest difference from PyTorch \S+ of the "
        r"outputs' spread \(1e-04 is",
        result.output,
    )
    model = network(kind, architecture)
    model.load_state_dict(content.ema if kind == "generator" else content.discriminator)
    for batch in (1, 2, 7):
        x = inputs(model, batch)
        assert_agrees(onnx_run(out, x), model, x)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == "batch"
    names = session.get_inputs()[0].name, session.get_outputs()[0].name
    assert names == (("z", "image") if kind == "generator" else ("image", "probability"))
    shapes = "[batch, 5] → [batch, " if kind == "generator" else "32, 32] → [batch]"
    assert shapes in result.output


def test_onnx_of_one_batch_size(tmp_path: Path) -> None:
    model = fast.convert(network("generator"))
    exported = export.onnx(model, tmp_path / "g.onnx", batch=3)
    assert (exported.inputs, exported.outputs) == ("[3, 5]", "[3, 3, 32, 32]")
    assert exported.size == (tmp_path / "g.onnx").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [3, 5]
    x = inputs(model, 3)
    assert_agrees(onnx_run(tmp_path / "g.onnx", x), reference_copy(model), x)
    assert model.training is False
    assert all(p.requires_grad for p in model.parameters())


def reference_copy(model: Any) -> Any:
    plain = models.Generator(**model.sizes())
    plain.load_state_dict(model.state_dict())
    return plain.eval()


@pytest.fixture(scope="module")
def exported_discriminator() -> tuple[Any, Any]:
    """A Discriminator's state and its ONNX program for a batch of 2, exported once because it takes long."""
    torch.manual_seed(0)
    model = network("discriminator")
    x = (torch.zeros(2, 3, 32, 32),)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["probability"]}
    return model.state_dict(), torch.onnx.export(model, x, dynamo=True, verbose=False, **names)


@pytest.fixture
def discriminator_file(
    exported_discriminator: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    state, program = exported_discriminator
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: program)
    torch.save(state, tmp_path / "d.pth")
    return tmp_path / "d.pth"


def test_a_wrong_onnx_model_is_not_written(
    discriminator_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = onnxruntime.InferenceSession

    class Wrong:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.session = session(*args, **kwargs)

        def run(self, *args: Any) -> Any:
            return [self.session.run(*args)[0] + 1e-3]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    out = tmp_path / "d.onnx"
    out.write_bytes(b"old")
    arguments = "--to", "onnx", "--network", "discriminator", "--batch", 2, "--out", out
    result = invoke(discriminator_file, *arguments, "--force")
    assert result.exit_code == 1
    assert re.search(
        r"not written: ONNX Runtime \S+ differs from network\(x\) by \S+ of the outputs' spread; 1e-04 is",
        result.output,
    )
    assert out.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_of_nan_are_not_exported(tmp_path: Path) -> None:
    model = network("discriminator")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    for function in (export.safetensors, export.onnx, export.torch_export):
        with pytest.raises(RunError, match=r"network\(x\) is not finite"):
            function(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


# --- torch.export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "kind"), CASES, ids=IDS)
def test_torch_export(architecture: Architecture, kind: str, tmp_path: Path) -> None:
    run_file(architecture, tmp_path / "run.pt")
    out = tmp_path / f"{kind}.pt2"
    result = invoke(tmp_path / "run.pt", "--to", "torch-export", "--network", kind, "--no-ema", "--out", out)
    assert result.exit_code == 0, result.output
    words = r"loaded back: largest difference from PyTorch \S+ of the outputs' spread \(1e-04 is allowed\)"
    assert re.search(words, result.output)
    load: Any = getattr(pretrained, kind)
    model = load(tmp_path / "run.pt", engine="reference", **({"ema": False} if kind == "generator" else {}))
    program = torch.export.load(out).module()
    for batch in (1, 2, 7):
        x = inputs(model, batch)
        with torch.no_grad():
            assert_agrees(program(x), model, x)


def test_torch_export_of_one_batch_size(tmp_path: Path) -> None:
    exported = export.torch_export(network("discriminator"), tmp_path / "d.pt2", batch=1)
    assert (exported.inputs, exported.outputs) == ("[1, 3, 32, 32]", "[1]")
    program = torch.export.load(tmp_path / "d.pt2").module()
    program(torch.randn(1, 3, 32, 32))
    with pytest.raises(Exception, match=r"size|shape"):
        program(torch.randn(2, 3, 32, 32))


# --- files that exist ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False], ids=["--out", "default"])
@pytest.mark.parametrize(("to", "suffix"), [("safetensors", ".safetensors"), ("torch-export", ".pt2")])
def test_force(to: str, suffix: str, given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing file is refused before the source is read, and replaced with --force."""
    monkeypatch.chdir(tmp_path)
    torch.save(network("generator").state_dict(), "g.pth")
    out = Path(("mine" if given else "generator") + suffix)
    out.write_bytes(b"old")
    arguments = ["--to", to, *(["--out", out] if given else [])]
    result = invoke("gone.pth", *arguments)
    assert result.exit_code == 2
    message = f"Error: --out: {out} exists already; give another --out, or --force to overwrite\n"
    assert result.output == message
    assert out.read_bytes() == b"old"
    assert invoke("g.pth", *arguments, "--force").exit_code == 0
    assert len(out.read_bytes()) > 1000


def test_a_failed_export_leaves_no_folder(tmp_path: Path) -> None:
    model = network("discriminator")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    torch.save(model.state_dict(), tmp_path / "d.pth")
    arguments = "--to", "torch-export", "--network", "discriminator", "--out", tmp_path / "a/b/d.pt2"
    assert invoke(tmp_path / "d.pth", *arguments).exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["d.pth"]


def test_the_command_starts_without_torch() -> None:
    code = "import sys, dcgan.cli.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(network("generator").state_dict(), tmp_path / "g.pth")
    monkeypatch.setitem(sys.modules, package, None)
    result = invoke(tmp_path / "g.pth", "--to", "onnx", "--out", tmp_path / "g.onnx")
    assert result.exit_code == 2
    assert f"ONNX export requires the package {package}: pip install 'dcgan-kernels[export]'" in (
        result.output
    )
    assert len(list(tmp_path.iterdir())) == 1


def test_without_onnx_runtime_the_model_is_not_verified(
    discriminator_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    out = tmp_path / "d.onnx"
    result = invoke(
        discriminator_file, "--to", "onnx", "--network", "discriminator", "--batch", 2, "--out", out
    )
    assert result.exit_code == 0
    assert (
        "not verified because ONNX Runtime is not installed: pip install 'dcgan-kernels[export]'"
        in result.output
    )
    monkeypatch.undo()
    state = torch.load(discriminator_file, weights_only=True)
    model = models.Discriminator(3, 3, 32).eval()
    model.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    assert_agrees(onnx_run(out, x), model, x)


def test_other_modules_are_rejected(tmp_path: Path) -> None:
    for function in (export.safetensors, export.onnx, export.torch_export):
        with pytest.raises(InputError, match="network must be a Generator or a Discriminator, got Linear"):
            function(nn.Linear(2, 2), tmp_path / "x")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*gone.*: No such file"):
        export.safetensors(network("generator"), tmp_path / "gone" / "g.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["g.pth"], ["--to"]),
        (["g.pth", "--to", "tflite"], ["--to", "'safetensors', 'onnx', 'torch-export', 'huggingface'"]),
        (["g.pth", "--to", "onnx", "--batch", "0"], ["--batch", "integer of at least 1", "'0'"]),
        (["g.pth", "--to", "safetensors", "--batch", "2"], ["--batch does not apply to --to safetensors"]),
        (["g.pth", "--to", "onnx", "--network", "both"], ["--network", "'generator', 'discriminator'"]),
        (["g.pth", "--to", "onnx", "--network", "discriminator"], ["weights of a Generator, not of a Disc"]),
        (["g.pth", "--to", "onnx", "--which", "best"], ["which must be last for a single file"]),
        (["g.pth", "--to", "onnx", "--out", "g.pt2"], ["--out must end in .onnx, got 'g.pt2'"]),
        (["g.pth", "--to", "onnx", "--out", "dir.onnx"], ["--out must be a file, got the folder 'dir.onnx'"]),
        (["g.pth", "--to", "onnx", "--out", "g.pth/g.onnx"], ["--out: cannot make the folder 'g.pth'"]),
        (["gone.pth", "--to", "onnx", "--push", "me/x"], ["--push requires --to huggingface, got --to onnx"]),
        (["gone.pth", "--to", "onnx"], ["cannot read gone.pth: No such file"]),
        (["dir.onnx", "--to", "onnx"], ["dir.onnx has no checkpoint of a run"]),
    ],
)
def test_usage_errors(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(network("generator").state_dict(), "g.pth")
    Path("dir.onnx").mkdir()
    before = sorted(tmp_path.iterdir())
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    assert sorted(tmp_path.iterdir()) == before
