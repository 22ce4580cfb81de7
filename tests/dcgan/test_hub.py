"""Networks for the Hugging Face Hub: folders, model cards and uploads, without a network connection."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from dcgan import checkpoint, export, fast, hub, models, pretrained
from dcgan.cli.app import app
from dcgan.errors import InputError, RunError
from dcgan.hub import card
from dcgan.settings import Settings
from tests.support.networks import randomise

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = pytest.mark.parametrize("kind", ["generator", "discriminator"])
SIZES = [(1, 64), (3, 32)]
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every connection fail."""
    import socket

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no connections in tests")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def class_of(kind: str) -> Any:
    return {"generator": hub.Generator, "discriminator": hub.Discriminator}[kind]


def network(kind: str, channels: int = 1, image_size: int = 32) -> Any:
    args = (5, channels, 6, image_size) if kind == "generator" else (channels, 6, image_size)
    found = class_of(kind)(*args)
    randomise(found)
    return found.eval()


def inputs(model: Any, batch: int = 3) -> Tensor:
    if isinstance(model, models.Generator):
        return torch.randn(batch, model.latent_dim)
    return torch.randn(batch, model.channels, model.image_size, model.image_size)


def assert_same(found: Any, expected: Any) -> None:
    """The same class and sizes, and bit-identical states and outputs."""
    assert type(found) is type(expected)
    assert found.sizes() == expected.sizes()
    state, wanted = found.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert all(state[key].dtype == wanted[key].dtype for key in wanted)
    x = inputs(expected)
    with torch.no_grad():
        assert torch.equal(found(x), expected(x))


def assert_same_weights(content: bytes, model: Any) -> None:
    from safetensors.torch import load

    found, expected = load(content), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def one_line(result: Any, code: int) -> str:
    assert result.exit_code == code, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert result.output.endswith(f"{line}\n")
    return str(line).removeprefix("Error: ")


SETTINGS: dict[str, Any] = {
    **{"nz": 5, "ngf": 4, "ndf": 3, "image_size": 32, "channels": 3, "epochs": 3, "batch_size": 12},
    **{"dataset": "folder", "dataroot": "/home/someone/pictures", "ema": 0.99, "flip": True},
    **{"netG": "/home/someone/start.pth", "diffaugment": ["color", "cutout"], "lr": 3e-4},
}


def evaluation(step: int, epoch: int, frechet: float, features: str = "digits") -> dict[str, Any]:
    scores = {"kernel": 0.0125, "kernel_std": 0.002, "precision": 0.75, "recall": 0.5, "density": 0.875}
    where = {"step": step, "epoch": epoch, "features": features}
    return {**where, "frechet": frechet, **scores, "coverage": 0.625, "images": 10_000}


ROWS = [
    {"step": 10, "epoch": 1, "pixel_frechet_distance": 0.25},
    evaluation(10, 1, 1.5, features="pixels"),
    evaluation(20, 2, 2.25),
    evaluation(30, 3, 4.5),
]


def make_run(folder: Path, rows: list[dict[str, Any]] = ROWS, device: str = "cpu", **given: Any) -> Any:
    """Write the folder of a run with checkpoints of steps 20 and 30; return the last."""
    settings = Settings(**{**SETTINGS, **given})
    architecture = settings.architecture(3)
    saved: Any = None
    for epoch, score in ((2, 2.25), (3, 4.5)):
        g, d, ema = (getattr(architecture, name)() for name in ("generator", "discriminator", "generator"))
        for one in (g, d, ema):
            randomise(one)
        saved = checkpoint.Checkpoint(
            architecture,
            g.state_dict(),
            d.state_dict(),
            ema=None if settings.ema is None else ema.state_dict(),
            epoch=epoch,
            step=10 * epoch,
            images=1200 * epoch,
            random={"cpu": torch.get_rng_state(), device: torch.get_rng_state()},
            config=settings.to_dict(),
            score=score,
            score_name="digits",
        )
        checkpoint.Folder(folder / "checkpoints").save(saved)
    (folder / "samples").mkdir()
    for step in (0, 10, 20, 25, 30):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "samples" / f"step-{step:09d}.png")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return saved


def red(image: Path) -> int:
    with Image.open(image) as content:
        found = content.convert("RGB").getpixel((0, 0))
    assert isinstance(found, tuple)
    return int(found[0])


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(found)


def results_of(found: ModelCard) -> dict[str, float]:
    """The metrics in the header, by their type."""
    data: Any = found.data
    return {one.metric_type: one.metric_value for one in data.eval_results or []}


class FakeApi:
    """Records what would be uploaded; the Hub's part of huggingface_hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.created: list[str] = []
        self.uploaded: dict[str, bytes] = {}
        self.error = error

        def create_repo(api: HfApi, repo_id: str, **kwargs: Any) -> Any:
            if self.error is not None:
                raise self.error
            self.created.append(repo_id)
            name = repo_id if "/" in repo_id else f"someone/{repo_id}"
            return type("Url", (), {"repo_id": name})

        def upload_folder(api: HfApi, *, repo_id: str, folder_path: Path, **kwargs: Any) -> str:
            self.uploaded = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return f"https://huggingface.co/{repo_id}/commit/1"

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)


# --- folders ------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(("channels", "image_size"), SIZES)
def test_round_trip(kind: str, channels: int, image_size: int, tmp_path: Path) -> None:
    """A folder holds the arguments of the constructor and the weights, and loads to the same bits."""
    model = network(kind, channels, image_size)
    model.save_pretrained(tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == FILES
    assert json.loads((tmp_path / "x/config.json").read_text()) == model.sizes()
    found = class_of(kind).from_pretrained(tmp_path / "x")
    assert_same(found, model)
    assert not found.training
    assert all(parameter.requires_grad for parameter in found.parameters())
    again = tmp_path / "again"
    found.save_pretrained(again)
    assert_same(class_of(kind).from_pretrained(again), model)
    assert (again / "config.json").read_bytes() == (tmp_path / "x/config.json").read_bytes()


@KINDS
def test_the_weights_file_is_an_export(kind: str, tmp_path: Path) -> None:
    """``model.safetensors`` has the plain network's keys, and ``dcgan.pretrained`` reads it."""
    from safetensors import safe_open

    model = network(kind, 3)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as content:
        metadata, keys = content.metadata(), set(content.keys())
    sizes = {name: str(size) for name, size in model.sizes().items()}
    assert metadata == {"format": "pt", "network": kind, "model": "dcgan", **sizes}
    plain = {"generator": models.Generator, "discriminator": models.Discriminator}[kind]
    assert keys == plain(**model.sizes()).state_dict().keys()
    load: Any = getattr(pretrained, kind)
    loaded = load(tmp_path / "model.safetensors")
    x = inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@KINDS
def test_defaults_are_in_the_config(kind: str) -> None:
    model = class_of(kind)(image_size=32)
    assert model._hub_mixin_config == model.sizes()


@KINDS
def test_the_kernels_run(kind: str, tmp_path: Path) -> None:
    """The engines of each layer are those of :mod:`dcgan.fast`, before and after a round trip."""
    model = network(kind)
    drop_in: Any = {"generator": fast.Generator, "discriminator": fast.Discriminator}[kind](**model.sizes())
    drop_in.eval()
    model.save_pretrained(tmp_path)
    x = inputs(model)
    expected = fast.explain(drop_in, x)
    assert {row.engine for row in expected} == {"native"}
    for one in (model, class_of(kind).from_pretrained(tmp_path), copy.deepcopy(model)):
        assert fast.explain(one, x) == expected
    assert fast.explain(model.train(), x) == fast.explain(drop_in.train(), x)


@KINDS
def test_copies_and_pickles(kind: str) -> None:
    model = network(kind)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(copied, model)
        assert copied._hub_mixin_config == model.sizes()


def test_exports_of_the_classes(tmp_path: Path) -> None:
    """They export as any drop-in does: the program runs without this package."""
    model = network("discriminator")
    export.torch_export(model, tmp_path / "x.pt2")
    program = torch.export.load(tmp_path / "x.pt2")
    assert not any("dcgan" in str(node.target) for node in program.graph.nodes)
    x = inputs(model)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(program.module()(x).double(), expected, rtol=0, atol=1e-5)


def test_dtype_and_device(tmp_path: Path) -> None:
    """The file keeps the dtype; a network is loaded in float32 onto ``map_location``."""
    model = network("generator").bfloat16()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "model.safetensors")["main.0.weight"].dtype == torch.bfloat16
    found = hub.Generator.from_pretrained(tmp_path, map_location="meta")
    assert {(p.dtype, p.device.type) for p in found.parameters()} == {(torch.float32, "meta")}


def test_a_folder_without_config(tmp_path: Path) -> None:
    """The sizes that config.json does not state are read off the weights."""
    model = network("generator")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert hub.Generator.from_pretrained(tmp_path).sizes() == model.sizes()


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    network("generator").save_pretrained(tmp_path / "g")
    with pytest.raises(InputError, match="the weights of a Generator, not of a Discriminator"):
        hub.Discriminator.from_pretrained(tmp_path / "g")
    (tmp_path / "g/config.json").write_text('{"features": 7}')
    with pytest.raises(RuntimeError, match=r"Generator\(.*features=6.* the model is .*features=7"):
        hub.Generator.from_pretrained(tmp_path / "g")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*empty/model.safetensors: No such file"):
        hub.Generator.from_pretrained(tmp_path / "empty")
    (tmp_path / "g/config.json").unlink()
    (tmp_path / "g/model.safetensors").write_bytes((tmp_path / "g/model.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"model.safetensors is truncated, damaged or not"):
        hub.Generator.from_pretrained(tmp_path / "g")


def test_changed_networks_are_not_saved(tmp_path: Path) -> None:
    model = network("generator")
    model.main[2] = nn.LeakyReLU(0.5)
    with pytest.raises(InputError, match=r"default network's weights: main.2 is LeakyReLU\(.*=0.5\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_environment_is_offline(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE a new process loads and saves a folder, and prints nothing."""
    model = network("generator")
    model.save_pretrained(tmp_path / "x")
    code = (
        "import sys, torch; from dcgan import hub; g = hub.Generator.from_pretrained('x'); "
        "g.save_pretrained('y'); torch.save(g(torch.ones(2, 5)).detach(), 'images.pt')"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert sorted(path.name for path in (tmp_path / "y").iterdir()) == FILES
    with torch.no_grad():
        expected = model(torch.ones(2, 5))
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, rtol=0, atol=1e-6)


# --- cards --------------------------------------------------------------------------------------------------


@KINDS
def test_card_of_a_run(kind: str, tmp_path: Path) -> None:
    """Header, facts, recipe and scores are those of the run; folders of the machine are not in it."""
    saved = make_run(tmp_path / "run")
    model = class_of(kind).from_run(tmp_path / "run")
    model.save_pretrained(tmp_path / "mine")
    found = ModelCard.load(tmp_path / "mine/README.md")  # parses and checks the header
    header = found.data.to_dict()
    assert (header["license"], header["library_name"]) == ("mit", "dcgan-kernels")
    assert {"dcgan", "gan", "pytorch", "pytorch_model_hub_mixin"} <= set(header["tags"])
    is_generator = kind == "generator"
    assert header.get("pipeline_tag") == ("unconditional-image-generation" if is_generator else None)
    text = found.text
    assert f"# DCGAN {kind.capitalize()}, folder, 32×32" in text
    assert f"with {sum(p.numel() for p in model.parameters()):,} parameters" in text
    assert ("The weights are a moving average" in text) == is_generator
    assert "3 epochs, 30 steps, 3,600 images seen on a CPU" in text
    assert "someone" not in str(found)
    assert str(tmp_path) not in str(found)

    recipe = yaml.safe_load(block(text, "yaml"))
    run = Settings(**saved.config)
    private = {"dataroot": run.dataroot, "netG": run.netG}
    assert recipe["netG"] == "start.pth"
    assert Settings(**recipe | private) == run
    assert set(card.KEY_SETTINGS) <= recipe.keys()

    lines = text.splitlines()
    own = ", these weights" if is_generator else ""
    scores = "0.0125 ± 0.002 | 0.75 | 0.5 | 0.875 | 0.625 |"
    assert f"| last{', these weights' if own else ''} | 3 | 30 | 4.5 | {scores}" in lines
    assert f"| best | 2 | 20 | 2.25 | {scores}" in lines
    assert "10,000 of the Generator's images, in the features 'digits'" in text
    assert red(tmp_path / "mine/samples.png") == 30
    assert "](samples.png)" in text
    assert "after 30 steps" in text
    results = results_of(found)
    metrics = ("frechet", "kernel", "precision", "recall", "density", "coverage")
    assert results == ({name: ROWS[-1][name] for name in metrics} if is_generator else {})


def test_card_of_the_best_checkpoint(tmp_path: Path) -> None:
    """The facts, the grid and the marked scores are those of the checkpoint's step."""
    make_run(tmp_path / "run")
    hub.Generator.from_run(tmp_path / "run", which="best").save_pretrained(tmp_path / "x")
    text = (tmp_path / "x/README.md").read_text()
    assert "2 epochs, 20 steps, 2,400 images seen" in text
    assert red(tmp_path / "x/samples.png") == 20
    assert "after 20 steps, from the moving average" in text
    assert "| best, these weights | 2 | 20 | 2.25 |" in text
    assert "| last | 3 | 30 | 4.5 |" in text


def test_only_scores_of_as_many_images_are_compared(tmp_path: Path) -> None:
    """An evaluation of fewer images has a biased distance, which must not be shown as the best."""
    few = {**evaluation(10, 1, 0.5), "images": 500}
    make_run(tmp_path / "run", [few, *ROWS[2:]])
    text = hub.Generator.from_run(tmp_path / "run").generate_model_card(name="x").text
    assert "| best | 2 | 20 | 2.25 |" in text
    assert "0.5 | 0.0125" not in text


def test_scores_belong_to_the_average(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    found = hub.Generator.from_run(tmp_path / "run", ema=False).generate_model_card(name="x")
    assert "these weights" not in found.text
    assert not results_of(found)
    assert "The weights are a moving average" not in found.text


def test_cards_of_other_runs(tmp_path: Path) -> None:
    """Without evaluations the pixel score is shown; without scores, grids or a run nothing of them."""
    make_run(tmp_path / "pixels", ROWS[:1], device="cuda", ema=None)
    text = hub.Generator.from_run(tmp_path / "pixels").generate_model_card(name="x").text
    assert "| last and best | 1 | 10 | 0.25 |" in text
    assert "Fréchet distance of 8×8 pixels ↓" in text
    assert "seen on a GPU" in text
    make_run(tmp_path / "bare", [], ema=None)
    shutil.rmtree(tmp_path / "bare/samples")
    model = hub.Generator.from_run(tmp_path / "bare")
    text = model.generate_model_card(name="x").text
    assert "## Scores" not in text
    assert "samples.png" not in text
    torch.save(model.state_dict(), tmp_path / "g.pth")
    text = hub.Generator.from_run(tmp_path / "g.pth").generate_model_card(name="x").text
    assert "## Training" not in text
    assert "## Use" in text


def test_scores_of_inception_features_have_their_usual_names(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [evaluation(30, 3, 12.5, features="inception")])
    results = results_of(hub.Generator.from_run(tmp_path / "run").generate_model_card(name="x"))
    assert (results["fid"], results["kid"]) == (12.5, 0.0125)
    assert "frechet" not in results


@KINDS
def test_the_cards_example_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")
    model = class_of(kind).from_run(tmp_path / "run")
    model.save_pretrained(tmp_path / "it's mine")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block(Path("it's mine/README.md").read_text(), "python"), names)
    assert_same(names[kind], model)
    shape = (16, 3, 32, 32) if kind == "generator" else (16,)
    assert names["images" if kind == "generator" else "probabilities"].shape == shape
    if kind == "generator":
        monkeypatch.chdir(tmp_path / "it's mine")
        (line,) = re.findall(r"^dcgan (generate .*)$", Path("README.md").read_text(), re.MULTILINE)
        assert invoke(*line.split()).exit_code == 0
        assert Path("images.png").is_file()


# --- the command --------------------------------------------------------------------------------------------


@KINDS
def test_command(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the folder of the network, by default beside the working directory's other files."""
    saved = make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    result = invoke("export", "run", "--to", "huggingface", "--network", kind)
    assert result.exit_code == 0, result.output
    assert f"Wrote {kind}: 0.0 MB" in result.output or f"Wrote {kind}: 0.1 MB" in result.output
    assert sorted(path.name for path in Path(kind).iterdir()) == [*FILES, "samples.png"]
    assert f'from_pretrained("{kind}")' in Path(kind, "README.md").read_text()
    expected = class_of(kind)(**class_of(kind).sizes_of(getattr(saved, kind))).eval()
    expected.load_state_dict(saved.ema if kind == "generator" else saved.discriminator)
    assert_same(class_of(kind).from_pretrained(kind), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", kind])


def test_no_ema_and_best(tmp_path: Path) -> None:
    saved = make_run(tmp_path / "run")
    given = "export", tmp_path / "run", "--to", "huggingface", "--out"
    assert invoke(*given, tmp_path / "a/b", "--no-ema").exit_code == 0
    state = hub.Generator.from_pretrained(tmp_path / "a/b").state_dict()
    assert all(torch.equal(state[key], saved.generator[key]) for key in state)
    assert invoke(*given, tmp_path / "best", "--which", "best").exit_code == 0
    best = pretrained.read(tmp_path / "run", "generator", which="best").state
    state = hub.Generator.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(state[key], best[key]) for key in state)


def test_force(tmp_path: Path) -> None:
    """A folder with files is refused before the run is read; --force replaces those of an earlier export."""
    out = tmp_path / "x"
    out.mkdir()
    make_run(tmp_path / "run")
    given = "--to", "huggingface", "--out", out
    assert invoke("export", tmp_path / "run", *given).exit_code == 0  # an empty folder is no obstacle
    old = "---\nlibrary_name: dcgan-kernels\n---\nold"
    (out / "README.md").write_text(old)
    (out / "mine.txt").write_text("kept")
    line = one_line(invoke("export", tmp_path / "gone", *given), 2)
    assert line == f"--out: {out} exists already; give another --out, or --force to overwrite"
    assert (out / "README.md").read_text() == old
    assert invoke("export", tmp_path / "run", *given, "--force").exit_code == 0
    assert "# DCGAN Generator" in (out / "README.md").read_text()
    assert (out / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (["README.md", "model.safetensors"], "has a README.md that is no model card of dcgan-kernels"),
        (["README.md", "config.json"], "has files, but no model.safetensors"),
        (["config.json"], "has files, but no model.safetensors"),
    ],
)
@pytest.mark.parametrize("force", [True, False])
def test_a_folder_of_something_else_is_refused(
    files: list[str], why: str, force: bool, tmp_path: Path
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "x").mkdir()
    for name in files:
        (tmp_path / "x" / name).write_bytes(b"mine \xff")
    given = "export", tmp_path / "run", "--to", "huggingface", "--out", tmp_path / "x", *["--force"] * force
    line = one_line(invoke(*given), 2)
    assert line == f"--out: {tmp_path / 'x'} {why}, so it is no earlier export; give another --out"
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == dict.fromkeys(
        files, b"mine \xff"
    )


def test_an_export_is_one_that_force_may_replace(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    for _ in range(2):
        given = "--to", "huggingface", "--out", tmp_path / "x", "--force"
        assert invoke("export", tmp_path / "run", *given).exit_code == 0


def test_a_failed_export_changes_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    model = pretrained.read(tmp_path / "run", "generator").module("reference")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    before = sorted(tmp_path.rglob("*"))
    given = "export", tmp_path / "nan.pth", "--to", "huggingface", "--out", tmp_path / "new/x"
    assert "network(x) is not finite" in one_line(invoke(*given), 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_networks_that_are_no_dcgan(tmp_path: Path) -> None:
    make_run(tmp_path / "run", model="mlp")
    given = "export", tmp_path / "run", "--to", "huggingface", "--out", tmp_path / "x"
    line = one_line(invoke(*given), 2)
    assert "the format huggingface is for the networks of the model dcgan" in line
    assert line.endswith("holds the generator 'mlp'; export it to safetensors, onnx or torch-export")
    assert not (tmp_path / "x").exists()


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "dcgan.hub")
    monkeypatch.delattr(sys.modules["dcgan"], "hub")
    line = one_line(invoke("export", tmp_path / "run", "--to", "huggingface", "--out", tmp_path / "x"), 2)
    assert line == "huggingface_hub is not installed; pip install 'dcgan-kernels[hub]' installs it"
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dcgan-kernels\[hub\]' installs it"):
        __import__("dcgan.hub")
    assert not (tmp_path / "x").exists()


# --- uploads ------------------------------------------------------------------------------------------------


@KINDS
def test_push_to_hub(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository receives the folder; the card's example loads it by the name of the repository."""
    make_run(tmp_path / "run")
    api, model = FakeApi(monkeypatch), class_of(kind).from_run(tmp_path / "run")
    assert model.push_to_hub("me/mine") == "https://huggingface.co/me/mine/commit/1"
    assert set(api.created) == {"me/mine"}
    assert sorted(api.uploaded) == [*FILES, "samples.png"]
    model.save_pretrained(tmp_path / "x")
    for name in ("config.json", "samples.png"):
        assert api.uploaded[name] == (tmp_path / "x" / name).read_bytes()
    assert_same_weights(api.uploaded["model.safetensors"], model)
    assert 'from_pretrained("me/mine")' in api.uploaded["README.md"].decode()
    model.push_to_hub("mine")
    assert 'from_pretrained("someone/mine")' in api.uploaded["README.md"].decode()


def test_push_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")
    api = FakeApi(monkeypatch)
    out = tmp_path / "x"
    given = "export", tmp_path / "run", "--to", "huggingface", "--out", out
    result = invoke(*given, "--push", "me/mine")
    assert result.exit_code == 0, result.output
    assert result.output.endswith("Pushed to https://huggingface.co/me/mine\n")
    assert set(api.created) == {"me/mine"}
    assert_same_weights(api.uploaded["model.safetensors"], hub.Generator.from_pretrained(out))
    assert 'from_pretrained("x")' in (out / "README.md").read_text()


def unauthorized() -> Exception:
    response: Any = type("Response", (), {"status_code": 401, "headers": {}, "request": None})()
    return HfHubHTTPError("401 Client Error\n\nInvalid username or password.", response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, ["no connections in tests"]),
        (LocalTokenNotFoundError("Token is required"), ["Token is required; log in by `hf auth login`"]),
        (unauthorized(), ["401 Client Error Invalid username or password.; log in by `hf auth login`"]),
        (OSError("disk"), ["cannot push to me/mine: disk"]),
    ],
    ids=["no network", "no token", "unauthorized", "other"],
)
def test_failed_pushes(
    error: Exception | None, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the repository and the cause; the folder has been written."""
    make_run(tmp_path / "run")
    if error is not None:
        FakeApi(monkeypatch, error)
    given = "export", tmp_path / "run", "--to", "huggingface", "--out", tmp_path / "x"
    line = one_line(invoke(*given, "--push", "me/mine"), 1)
    assert line.startswith("cannot push to me/mine: ")
    for word in words:
        assert word in line
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [*FILES, "samples.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "onnx", "--push", "me/x"], "--push requires --to huggingface, got --to onnx"),
        (["--to", "huggingface", "--push", "x"], "--push must be USER/NAME, got 'x'"),
        (["--to", "huggingface", "--push", "a/b/c"], "--push must be USER/NAME, got 'a/b/c'"),
        (["--to", "huggingface", "--push", "me/x y"], "--push must be USER/NAME, got 'me/x y'"),
        (["--to", "huggingface", "--batch", "2"], "--batch does not apply to --to huggingface"),
        (["--to", "huggingface", "--out", "file"], "--out must be a folder for --to huggingface, got the"),
        (["--to", "huggingface", "--out", "file/x"], "--out: cannot make the folder 'file'"),
        (["--to", "huggingface"], "gone: No such file"),
    ],
)
def test_usage_errors(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "gone"
    if "file/x" in arguments:  # which is noticed when the folder is made
        torch.save(network("generator").state_dict(), "g.pth")
        source = "g.pth"
    Path("file").write_text("kept")
    before = sorted(tmp_path.iterdir())
    assert words in one_line(invoke("export", source, *arguments), 2)
    assert sorted(tmp_path.iterdir()) == before


def test_pushing_a_changed_network_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeApi(monkeypatch)
    model = network("generator")
    model.main[2] = nn.LeakyReLU(0.5)
    with pytest.raises(InputError, match=r"main\.2 is LeakyReLU"):
        hub.push(model, "me/x")
    FakeApi(monkeypatch, ValueError("boom"))
    with pytest.raises(RunError, match="cannot push to me/x: boom"):
        hub.push(network("generator"), "me/x")
