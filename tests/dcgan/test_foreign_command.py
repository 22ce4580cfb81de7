"""Networks that the user has written, on the command line: training, resuming, generation, errors."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

from dcgan import checkpoint as checkpoints
from dcgan import foreign, generation, models, pretrained
from dcgan.batchnorm import SyncBatchNorm2d
from dcgan.cli.app import app
from dcgan.cli.options import arguments
from dcgan.data import Images
from dcgan.errors import InputError
from dcgan.foreign import Foreign
from dcgan.networks import Architecture
from dcgan.settings import Settings, read_file
from dcgan.training import Config, TrainStep, optimizers, train_step
from dcgan.training.run import Run
from tests.support import foreign_networks, train_runs

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = foreign_networks.__name__
FILE = Path(foreign_networks.__file__)
TINY = [
    *("--dataset=fake", "--limit=20", "--channels=1", "--batch-size=8", "--image-size=32", "--ngf=4"),
    *("--ndf=4", "--nz=6", "--epochs=2", "--device=cpu", "--no-tensorboard"),
]
ONE_STEP = ["--epochs=1", "--limit=8"]
PAIRS: dict[str, dict[str, Any]] = {
    "both": {
        "netG_module": f"{MODULE}:Generator",
        "netG_args": {"width": 5},
        "netD_module": f"{MODULE}:Discriminator",
        "netD_args": {"width": 3, "dropout": 0.25},
    },
    "a Generator of rows": {"netG_module": f"{MODULE}:RowGenerator", "netG_args": {"widths": [5, 3]}},
    "a Discriminator": {"netD_module": f"{FILE}:SequentialDiscriminator"},
}


def invoke(*arguments: object) -> Any:
    env = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "RANK": None, "WORLD_SIZE": None}
    return CliRunner().invoke(app, list(map(str, arguments)), env=env)


def one_line(result: Any) -> str:
    """Check that a command failed with one line, as for an InputError, and return it."""
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line]
    return str(line)


def spelled(pair: dict[str, Any]) -> list[str]:
    """Return the options of a command line."""
    words = []
    for name, value in pair.items():
        text = value
        if isinstance(value, dict):
            text = ",".join(f"{key}={json.dumps(one)}" for key, one in value.items())
        words += [f"--{name.replace('_', '-')}", text]
    return words


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both foreign networks with a moving average."""
    out = tmp_path_factory.mktemp("trained") / "run"
    result = invoke("train", *TINY, *spelled(PAIRS["both"]), "--ema=0.5", "--out", out)
    assert result.exit_code == 0, result.output
    return out


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("pair", PAIRS)
def test_training(pair: str, engine: str, tmp_path: Path) -> None:
    out, given = tmp_path / "run", PAIRS[pair]
    result = invoke("train", *TINY, *spelled(given), "--engine", engine, "--out", out)
    assert result.exit_code == 0, result.output
    names = [given.get("netG_module", "dcgan"), given.get("netD_module", "dcgan")]
    assert f"Training {' and '.join(names)} on 20 images" in result.output
    settings = Settings.of(read_file(out / "config.yaml"))
    assert {name: getattr(settings, name) for name in given} == given
    content = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    assert content["version"] == 1
    saved = train_runs.final(out)
    assert saved.step == 6
    for name, own, prefix in (("generator", "foreign_g", "netG"), ("discriminator", "foreign_d", "netD")):
        recorded = getattr(saved.architecture, own)
        state = getattr(saved, name)
        if f"{prefix}_module" not in given:
            assert recorded is None
            assert own not in content["architecture"]
            kind = {
                "generator": models.Generator(6, 1, 4, 32),
                "discriminator": models.Discriminator(1, 4, 32),
            }
            kind[name].load_state_dict(state)
            continue
        assert recorded == Foreign(given[f"{prefix}_module"], given.get(f"{prefix}_args", {}))
        assert content["architecture"][own] == {"spec": recorded.spec, "args": recorded.args}
        network = recorded.load("")(**recorded.args)
        network.load_state_dict(state)
        start = recorded.load("")(**recorded.args).state_dict()
        assert all(not torch.equal(value, start[key]) for key, value in network.named_parameters())


def test_a_foreign_network_keeps_its_own_initialization(tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ["--lr=1e-12", "--seed=5", *ONE_STEP, "--out", out]
    result = invoke("train", *TINY, "--netG-module", f"{MODULE}:Generator", *given)
    assert result.exit_code == 0, result.output
    torch.manual_seed(5)
    expected, saved = foreign_networks.Generator(), train_runs.final(out)
    for name, value in expected.named_parameters():
        torch.testing.assert_close(saved.generator[name], value.detach(), atol=1e-10, rtol=0)
    assert 0.019 < saved.discriminator["main.5.weight"].std() < 0.021  # this project's is initialized


def kill_in_step(number: int) -> None:
    """Make this process kill itself after its n-th step."""
    step: Any = TrainStep._step
    count = 0

    def counting(self: TrainStep, *inputs: Any) -> Any:
        nonlocal count
        count += 1
        result = step(self, *inputs)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    TrainStep._step = counting  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("pair", ["both", "a Generator of rows"])
def test_a_killed_run_resumes_with_the_same_bits(pair: str, tmp_path: Path) -> None:
    given = train_runs.TINY | PAIRS[pair] | {"ema": 0.9, "limit": 20}
    runs = [train_runs.start(tmp_path / "whole", given, False)]
    runs.append(train_runs.start(tmp_path / "killed", given, False, functools.partial(kill_in_step, 5)))
    for process in runs:
        process.join()
    assert [process.exitcode for process in runs] == [0, -signal.SIGKILL]
    resumed = train_runs.start(tmp_path / "killed", {}, True)
    resumed.join()
    assert resumed.exitcode == 0
    train_runs.assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_the_networks_cannot_change_on_resume(trained: Path) -> None:
    before = (trained / "config.yaml").read_text()
    given = ["train", "--resume", "--out", trained]
    assert invoke(*given, *spelled(PAIRS["both"])).exit_code == 0
    for option, value, name in (
        ("--netG-module", f"{MODULE}:RowGenerator", "netG_module"),
        ("--netG-args", "width=6", "netG_args"),
    ):
        line = one_line(invoke(*given, option, value))
        assert f"{option} is {PAIRS['both'][name]!r} in the run to be resumed" in line
    assert (trained / "config.yaml").read_text() == before
    saved = train_runs.final(trained)
    other = Architecture(**{**vars(saved.architecture), "foreign_g": Foreign(f"{MODULE}:RowGenerator")})
    saved.architecture = other
    with pytest.raises(InputError, match=r"the checkpoint has foreign_g=.*RowGenerator.*the run has"):
        Run(Settings.of(saved.config), images(32), torch.device("cpu"), saved=saved)


def images(size: int) -> Images:
    return Images(torch.randint(0, 256, (20, 1, size, size), dtype=torch.uint8), "noise")


def test_foreign_networks_may_have_any_image_size() -> None:
    args = {"size": 28}
    own = {"netG_module": f"{MODULE}:Generator", "netD_module": f"{MODULE}:Discriminator"}
    given: dict[str, Any] = {**own, "netG_args": args, "netD_args": args, "image_size": 28}
    settings = Settings(**given, nz=6, batch_size=8)
    run = Run(settings, images(28), torch.device("cpu"))
    run.step(*run.inputs())
    assert run.samples().shape == (64, 1, 28, 28)
    assert Architecture.of(run.architecture.to_dict()) == run.architecture
    for lacking in ("netG_module", "netD_module"):
        half = {key: value for key, value in given.items() if not key.startswith(lacking[:4])}
        with pytest.raises(InputError, match="image_size must be one of 32, 64, 128, 256, got 28"):
            Run(Settings(**half, nz=6, batch_size=8), images(28), torch.device("cpu"))
    with pytest.raises(InputError, match="image_size must be one of 32, 64, 128, 256, got 28"):
        Settings(image_size=28)


def test_batchnorms_of_foreign_networks_are_synchronized() -> None:
    given = PAIRS["both"] | {
        "nz": 6,
        "batch_size": 8,
        "image_size": 32,
        "sync_batchnorm": True,
        "model": "mlp",
    }
    run = Run(Settings(**given), images(32), torch.device("cpu"))
    run.step(*run.inputs())
    for network in (run.generator, run.discriminator):
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms
        assert all(isinstance(norm, SyncBatchNorm2d) for norm in norms)
    with pytest.raises(InputError, match="sync_batchnorm requires model dcgan, got model 'mlp'"):
        Run(Settings(model="mlp", sync_batchnorm=True, batch_size=8), images(64), torch.device("cpu"))


def test_initial_weights_from_a_plain_state_dict(trained: Path, tmp_path: Path) -> None:
    pair = spelled(PAIRS["both"])
    given, dry = ["train", *TINY, *pair, "--netG", tmp_path / "g.pth"], ["--lr=1e-12", *ONE_STEP]
    network = foreign_networks.Generator(width=5)
    nn.init.normal_(network.out.weight)
    torch.save(network.state_dict(), tmp_path / "g.pth")
    # D starts from the last checkpoint of another run.
    result = invoke(*given, *dry, "--netD", trained, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    saved, before = train_runs.final(tmp_path / "run"), train_runs.final(trained)
    for name, value in network.named_parameters():
        torch.testing.assert_close(saved.generator[name], value.detach(), atol=1e-10, rtol=0)
    conv = "conv2.weight"
    torch.testing.assert_close(saved.discriminator[conv], before.discriminator[conv], atol=1e-10, rtol=0)

    torch.save(foreign_networks.Generator(width=6).state_dict(), tmp_path / "g.pth")
    line = one_line(invoke(*given, "--out", tmp_path / "other"))
    assert f"g.pth does not fit --netG-module '{MODULE}:Generator': " in line
    assert "size mismatch for project.weight" in line
    torch.save({"state": network.state_dict()}, tmp_path / "g.pth")
    line = one_line(invoke(*given, "--out", tmp_path / "other"))
    assert "g.pth is not a state dict, in which every value is a tensor" in line


# --- the step -----------------------------------------------------------------------------------------------


class Returning(foreign_networks.SequentialDiscriminator):
    """Returns its probabilities in another shape."""

    shape: tuple[int, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).reshape(len(input), *self.shape)  # type: ignore[no-any-return]


class WithLogits(Returning):
    """Has logits too, in the same shape."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(input))

    def logits(self, input: Tensor) -> Tensor:
        return nn.Sequential(*list(self)[:-1])(input).reshape(len(input), *self.shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Returning, WithLogits])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_the_step_takes_every_shape_of_probabilities(kind: type[Returning], shape: tuple[int, ...]) -> None:
    """The result and the gradients are those of the reference step with probabilities [N], in float64."""
    real, noise = torch.rand(5, 1, 32, 32).double() * 2 - 1, torch.randn(5, 6, 1, 1).double()
    generator, ends, results = foreign_networks.Generator().double(), [], []
    d = kind().double()
    states = generator.state_dict(), d.state_dict()
    states = tuple({key: value.clone() for key, value in state.items()} for state in states)  # type: ignore[assignment]
    for own in (False, True):
        generator.load_state_dict(states[0])
        d.load_state_dict(states[1])
        d.shape = shape if own else ()
        adams = optimizers(generator, d, Config())
        if own:
            results.append(TrainStep(generator, d, *adams)(real, noise))
        else:
            results.append(train_step(generator, d, *adams, real, noise))
        ends.append([p.detach().clone() for p in (*generator.parameters(), *d.parameters())])
    for expected, found in zip(*results, strict=True):
        assert found.shape == ()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (None, None),
        ([], None),
        ([""], {}),
        (["width=8"], {"width": 8}),
        (["width=8,bias=false", "rate=1e-3"], {"width": 8, "bias": False, "rate": 1e-3}),
        (["widths=[8, 16],name=up,pad=null"], {"widths": [8, 16], "name": "up", "pad": None}),
        (["widths=[8,16],table={a: 1}"], {"widths": [8, 16], "table": {"a": 1}}),
        (["text='3', empty="], {"text": "3", "empty": None}),
        (["sum=a=b"], {"sum": "a=b"}),
    ],
)
def test_arguments(texts: list[str] | None, expected: dict[str, Any] | None) -> None:
    found = arguments("--netG-args", texts)
    assert found == expected
    assert {key: type(value) for key, value in (found or {}).items()} == {
        key: type(value) for key, value in (expected or {}).items()
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width", "--netG-args must be key=value, separated by commas, got 'width'"),
        ("8=width", "got '8=width'"),
        ("a=1,a=2", "--netG-args must give a once, got 'a=1,a=2'"),
        ("a=[1", "--netG-args must be key=value with a YAML value, got 'a=[1'"),
        ("a=!!python/name:os.system", "with a YAML value"),
    ],
)
def test_invalid_arguments(text: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        arguments("--netG-args", [text])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_settings_files(suffix: str, tmp_path: Path) -> None:
    """Arguments are a table in a file, and are replaced as a whole on the command line."""
    path, out = tmp_path / f"run{suffix}", tmp_path / "run"
    if suffix == ".toml":
        path.write_text(f'netG_module = "{MODULE}:RowGenerator"\n[netG-args]\nwidths = [5, 3]\n')
    else:
        path.write_text(
            yaml.safe_dump({"netG_module": f"{MODULE}:RowGenerator", "netG_args": {"widths": [5, 3]}})
        )
    assert Settings.of(read_file(path)).foreign_g == Foreign(f"{MODULE}:RowGenerator", {"widths": [5, 3]})
    given = ["--netG-args", "channels=1", "--netG-args", "widths=[6, 2]", *ONE_STEP, "--out", out]
    result = invoke("train", *TINY, "--config", path, *given)
    assert result.exit_code == 0, result.output
    recorded = train_runs.final(out).architecture.foreign_g
    assert recorded == Foreign(f"{MODULE}:RowGenerator", {"channels": 1, "widths": [6, 2]})
    path.write_text("netG_module: a:B\nnetG_args: {day: 2020-01-01}\n")
    with pytest.raises(InputError, match=r"netG_args must be a table of numbers, strings, .*, got .*date"):
        Settings.of(yaml.safe_load(path.read_text()))


def test_files_and_modules_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file finds its neighbours, and G and D of one file are of one module."""
    folder = tmp_path / "my nets"
    folder.mkdir()
    (folder / "gan_parts.py").write_text(f"from {MODULE} import Generator\n")
    (folder / "pair.py").write_text(
        "from gan_parts import Generator\n"
        f"from {MODULE} import SequentialDiscriminator\n"
        "COUNT = []\nCOUNT.append(1)\n"
        "class G(Generator): pass\n"
        "class D(SequentialDiscriminator): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    given = ["--netG-module", "my nets/pair.py:G", "--netD-module", "my nets/pair.py:D", *ONE_STEP]
    result = invoke("train", *TINY, *given, "--out", "a")
    assert result.exit_code == 0, result.output
    kinds = [Foreign(f"my nets/pair.py:{name}").load("") for name in "GD"]
    assert kinds[0].__module__ == kinds[1].__module__
    assert sys.modules[kinds[0].__module__].COUNT == [1]

    result = invoke("generate", "a")
    assert result.exit_code == 0, result.output
    assert "imported from my nets/pair.py:G as a/config.yaml says" in " ".join(result.output.split())

    monkeypatch.chdir(folder)
    result = invoke("train", *TINY, "--netG-module", "gan_parts:Generator", "--dry-run", "--out", "b")
    assert result.exit_code == 0, result.output
    line = one_line(invoke("generate", tmp_path / "a"))
    assert (
        f"a/config.yaml has netG_module 'my nets/pair.py:G', and there is no such file as seen from {folder}:"
        in line
    )
    assert line.endswith("or pass --netG-module")
    line = one_line(invoke("generate", tmp_path / "a" / "checkpoints"))
    assert line.endswith("pass --netG-module 'my nets/pair.py:G'")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["--netG-module", "nets"],
            "--netG-module must be pkg.module:Class or path/to/file.py:Class, got 'nets'",
        ),
        (
            ["--netD-module", ":G"],
            "--netD-module must be pkg.module:Class or path/to/file.py:Class, got ':G'",
        ),
        (
            ["--netG-module", "no_such.nets:G"],
            "--netG-module: cannot import 'no_such.nets:G': ModuleNotFoundError: No module named 'no_such'",
        ),
        (
            ["--netG-module", "none/nets.py:G"],
            "--netG-module: cannot import 'none/nets.py:G': FileNotFoundError",
        ),
        (
            ["--netG-module", f"{MODULE}:Gen"],
            f"--netG-module: cannot use '{MODULE}:Gen': it has no Gen; {MODULE} defines Generator, RowG",
        ),
        (["--netG-module", f"{MODULE}:build"], "build is not a class derived from torch.nn.Module"),
        (["--netD-module", f"{MODULE}:F"], "F is not a class derived from torch.nn.Module"),
        (
            ["--netG-module", f"{MODULE}:Generator", "--netG-args", "height=3"],
            f"--netG-module: '{MODULE}:Generator' cannot be constructed with height=3 (--netG-args): TypeErr",
        ),
        (
            ["--netD-module", f"{MODULE}:Discriminator", "--netD-args", "width=-1"],
            "with width=-1 (--netD-args)",
        ),
        (["--netG-module", f"{MODULE}:Empty"], "has no parameters to train"),
        (["--netG-args", "width=3"], "--netG-args requires --netG-module, got {'width': 3}"),
        (["--netG-module", f"{MODULE}:Generator", "--netG-args", "width"], "--netG-args must be key=value"),
        (
            ["--netG-module", f"{MODULE}:Generator", "--netG-args", "size=48"],
            f"--netG-module: '{MODULE}:Generator' must return images [2, 1, 32, 32], by the images' channels "
            "and --image-size 32, but for z [2, 6, 1, 1] it returns [2, 1, 48, 48], and for z [2, 6] it ra",
        ),
        (
            ["--netG-module", f"{MODULE}:Generator", "--netG-args", "nz=7"],
            "for z [2, 6, 1, 1] it raises RuntimeError: ",
        ),
        (
            ["--netD-module", f"{MODULE}:Logits"],
            f"--netD-module: '{MODULE}:Logits' must end in a Sigmoid: it returns values outside [0, 1]",
        ),
        (
            ["--netD-module", f"{MODULE}:LateLogits"],
            f"--netD-module: '{MODULE}:LateLogits' must end in a Sigmoid",
        ),
        (
            ["--netD-module", f"{MODULE}:Flat"],
            f"--netD-module: '{MODULE}:Flat' must return 2 probabilities, [2], [2, 1] or [2, 1, 1, 1], for "
            "images [2, 1, 32, 32], but it returns [2, 2]",
        ),
        (["--netD-module", f"{MODULE}:Failing"], "but it raises KeyError: 'nothing here'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[1:])[:40],
)
def test_errors(given: list[str], expected: str, tmp_path: Path) -> None:
    line = one_line(invoke("train", *TINY, *given, "--out", tmp_path / "run"))
    assert expected in line
    assert len(line) < 900
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('usage: nets')", "SystemExit: usage: nets"),
        ("class G(", "SyntaxError: "),
        ("from torch import nn\nclass H(nn.Module): pass", "it has no G; {path} defines H"),
        ("G = 3", "G is not a class derived from torch.nn.Module"),
        ("class G: pass", "G is not a class derived from torch.nn.Module"),
    ],
)
def test_errors_of_a_file(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text(text)
    line = one_line(invoke("train", *TINY, "--netG-module", f"{path}:G", "--out", tmp_path / "run"))
    assert f"--netG-module: cannot {'import' if 'Error' in expected or 'Exit' in expected else 'use'}" in line
    assert expected.format(path=path) in line


def test_errors_of_unknown_classes_come_before_the_dataset(tmp_path: Path) -> None:
    given = ["--dataset=folder", f"--dataroot={tmp_path / 'none'}", "--netG-module", "no_such:G"]
    assert "No module named 'no_such'" in one_line(invoke("train", *given, "--out", tmp_path / "run"))


def test_the_dry_run_changes_nothing() -> None:
    torch.manual_seed(1)
    network = Foreign(f"{MODULE}:Counting").generator("--netG-module", 6, (1, 32, 32))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    expected = foreign_networks.Counting()
    assert torch.equal(after, torch.get_rng_state())
    assert all(module.training for module in network.modules())
    found = network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())
    assert foreign.latent_shape(network) == (6, 1, 1)
    rows = Foreign(f"{MODULE}:RowGenerator").generator("--netG-module", 6, (1, 32, 32))
    assert foreign.latent_shape(rows) == (6,)
    assert foreign.shaped(rows, torch.zeros(3, 6, 1, 1)).shape == (3, 6)
    assert foreign.shaped(network, torch.zeros(3, 6)).shape == (3, 6, 1, 1)
    own = models.Generator(6, 1, 4, 32)
    assert foreign.shaped(own, torch.zeros(3, 6)).shape == (3, 6)


# --- checkpoints --------------------------------------------------------------------------------------------


def test_checkpoints_without_foreign_networks_are_as_before(tmp_path: Path) -> None:
    """They have no new fields, and those of earlier versions are read with the defaults."""
    own = Architecture(latent_dim=6, features_g=4, features_d=4, image_size=32)
    states = own.generator().state_dict(), own.discriminator().state_dict()
    checkpoints.write(checkpoints.Checkpoint(own, *states), tmp_path / "run.pt")
    names = ["model", "latent_dim", "channels", "features_g", "features_d", "image_size"]
    assert list(torch.load(tmp_path / "run.pt", weights_only=True)["architecture"]) == names
    read = checkpoints.read(tmp_path / "run.pt").architecture
    assert (read, read.foreign_g, read.foreign_d) == (own, None, None)
    old = Settings().to_dict()
    for name in ("netG_module", "netG_args", "netD_module", "netD_args"):
        del old[name]
    assert Settings.of(old) == Settings()


@pytest.mark.parametrize("value", [{"spec": 3, "args": {}}, {"spec": "a:B", "args": [1]}, {"other": 1}, 7])
def test_damaged_records_of_foreign_networks(value: Any, tmp_path: Path, trained: Path) -> None:
    content = torch.load(trained / "checkpoints" / "last.pt", weights_only=True)
    content["architecture"]["foreign_g"] = value
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(checkpoints.CheckpointError, match=r"bad\.pt is a damaged checkpoint"):
        checkpoints.read(tmp_path / "bad.pt")


def test_nothing_that_a_file_names_is_imported(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "checkpoints" / "last.pt", weights_only=True)
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")
    spec = f"{tmp_path / 'evil.py'}:G"
    for name in ("foreign_g", "foreign_d"):
        content["architecture"][name]["spec"] = spec
    torch.save(content, tmp_path / "run.pt")
    path = tmp_path / "run.pt"
    advice = f"and a class that a file names is not imported: pass --netG-module {spec}"
    for command in (
        ("generate", path, "--out", tmp_path / "x.png"),
        ("eval", path, "--dataset", "digits"),
        ("export", path, "--to", "onnx", "--out", tmp_path / "x.onnx"),
        ("export", path, "--to", "safetensors", "--out", tmp_path / "x.safetensors"),
        ("train", *TINY, "--netG", path, "--out", tmp_path / "run"),
    ):
        assert advice in one_line(invoke(*command))
    line = one_line(invoke("export", path, "--to", "onnx", "--network", "discriminator"))
    assert f"pass --netD-module {spec}" in line
    assert not (tmp_path / "evil.py.ran").exists()
    # The user's class is used instead.
    result = invoke("generate", path, "--netG-module", f"{MODULE}:Generator", "--out", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "evil.py.ran").exists()


# --- the folder of a run ------------------------------------------------------------------------------------


def test_a_run_needs_no_module(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a run loads both networks as its config.yaml says, and each command names the class."""
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    saved, config = train_runs.final(trained), trained / "config.yaml"
    for name, cls in (("generator", "Generator"), ("discriminator", "Discriminator")):
        found = pretrained.read(trained, name)  # type: ignore[arg-type]
        assert found.config == config
        assert found.foreign == Foreign(f"{MODULE}:{cls}", PAIRS["both"][f"net{cls[0]}_args"])
    assert (found.has_average, found.averaged) == (False, False)
    state = pretrained.generator(trained).state_dict()
    assert saved.ema is not None
    assert all(torch.equal(state[key], value) for key, value in saved.ema.items())
    d = pretrained.discriminator(trained).state_dict()
    assert all(torch.equal(d[key], value) for key, value in saved.discriminator.items())

    result = invoke("generate", trained, "--format=npy", "--num=3", "--out", tmp_path / "a.npy")
    assert result.exit_code == 0, result.output
    network = foreign_networks.Generator(width=5)
    assert_close(tmp_path / "a.npy", expected_pixels(network, saved.ema, 3, 0))
    words = "(epoch 2, step 6), moving average of decay 0.5, "
    imported = f"imported from {MODULE}:Generator as {config} says"
    assert words + imported in " ".join(result.output.split())
    given = ["--dataset=digits", "--num=20", "--features=pixels", "--device=cpu"]
    result = invoke("eval", trained, *given)
    assert result.exit_code == 0, result.output
    assert imported in " ".join(result.output.split())
    result = invoke("export", trained, "--to", "safetensors", "--out", tmp_path / "g.safetensors")
    assert result.exit_code == 0, result.output
    assert imported in " ".join(result.output.split())


def copy_of_run(run: Path, out: Path, **changes: Any) -> Path:
    """Copy a run with changed settings in its ``config.yaml``; None removes a setting."""
    shutil.copytree(run, out, symlinks=True)
    values = yaml.safe_load((out / "config.yaml").read_text()) | changes
    (out / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"netG_module": "{evil}:Generator"},
            "config.yaml has netG_module '{evil}:Generator', but {file} records '{module}:Generator': pass",
        ),
        (
            {"netG_module": None, "netG_args": None},
            "config.yaml has netG_module None, but {file} records '{module}:Generator': pass --netG-module",
        ),
        (
            {"netG_args": {"width": 6}},
            "config.yaml has netG_args {{'width': 6}}, but {file} records {{'width': 5}}: pass --netG-module",
        ),
        ({"lr": "fast"}, "config.yaml: lr must be a positive number, got 'fast'"),
    ],
    ids=["another class", "no class", "other arguments", "an invalid setting"],
)
def test_a_run_whose_settings_and_checkpoint_differ(
    changes: dict[str, Any], expected: str, trained: Path, tmp_path: Path
) -> None:
    evil = tmp_path / "evil.py"
    evil.write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")
    changes = {k: v.format(evil=evil) if isinstance(v, str) else v for k, v in changes.items()}
    run = copy_of_run(trained, tmp_path / "run", **changes)
    file = run / "checkpoints" / "step-000000006.pt"
    line = one_line(invoke("generate", run, "--out", tmp_path / "x.png"))
    assert expected.format(evil=evil, file=file, module=MODULE) in line
    assert not (tmp_path / "evil.py.ran").exists()
    result = invoke("generate", run, "--netG-module", f"{MODULE}:Generator", "--out", tmp_path / "x.png")
    assert result.exit_code == 0, result.output


def test_only_the_folder_of_a_run_names_a_class(trained: Path, tmp_path: Path) -> None:
    """Not its checkpoints, nor a folder without ``config.yaml`` or without ``checkpoints``."""
    bare = copy_of_run(trained, tmp_path / "bare")
    (bare / "config.yaml").unlink()
    flat = copy_of_run(trained, tmp_path / "flat")
    for file in (flat / "checkpoints").iterdir():
        file.rename(flat / file.name)
    (flat / "checkpoints").rmdir()
    inner = trained / "checkpoints"
    for source in (inner, inner / "last.pt", inner / "step-000000006.pt", bare, flat):
        for network, option in (("generator", "--netG"), ("discriminator", "--netD")):
            with pytest.raises(InputError, match=f"that a file names is not imported: pass {option}-module "):
                pretrained.read(source, network)  # type: ignore[arg-type]


def test_errors_of_a_class_that_a_run_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the user's code names the settings file that led to it."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(f"from {MODULE} import Generator\nclass G(Generator): pass\n")
    assert invoke("train", *TINY, "--netG-module=nets.py:G", *ONE_STEP, "--out=run").exit_code == 0
    for name in [name for name in sys.modules if name.startswith("nets_")]:
        monkeypatch.delitem(sys.modules, name)
    Path("nets.py").write_text("1 / 0\n")
    line = one_line(invoke("generate", "run"))
    assert "run/config.yaml: --netG-module: cannot import 'nets.py:G': ZeroDivisionError" in line
    Path("nets.py").unlink()
    line = one_line(invoke("generate", "run"))
    assert (
        f"run/config.yaml has netG_module 'nets.py:G', and there is no such file as seen from {tmp_path}"
        in line
    )
    with pytest.raises(
        InputError, match=r"^engine must be one of auto, reference, triton, native, got 'fast'"
    ):
        pretrained.Pretrained(
            Path("a.pt"), "generator", Architecture(), {}, config=Path("run/config.yaml")
        ).module("fast")  # type: ignore[arg-type]
    assert not Path("generated.png").exists()


# --- generation ---------------------------------------------------------------------------------------------


def expected_pixels(network: nn.Module, state: Any, n: int, seed: int, rows: bool = False) -> np.ndarray:
    network.load_state_dict(state)
    z = generation.latents(range(n), 6, seed=seed).double()
    with torch.no_grad():
        found = network.double().eval()(z if rows else z[:, :, None, None])
    return generation.to_uint8(found).permute(0, 2, 3, 1).numpy()


def assert_close(path: Path, expected: np.ndarray) -> None:
    difference = np.abs(np.load(path).astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_generation(engine: str, trained: Path, tmp_path: Path) -> None:
    out, saved = tmp_path / "a.npy", train_runs.final(trained)
    given = ["generate", trained, "--format=npy", "--num=10", "--batch-size=4", "--seed=3", "--device=cpu"]
    given += ["--engine", engine, "--out", out, "--netG-module", f"{FILE}:Generator"]
    result = invoke(*given)
    assert result.exit_code == 0, result.output
    assert "moving average of decay 0.5; engine" in " ".join(result.output.split())
    network = foreign_networks.Generator(width=5)  # the width is the checkpoint's
    assert_close(out, expected_pixels(network, saved.ema, 10, 3))
    given.append("--force")
    assert invoke(*given, "--no-ema").exit_code == 0
    assert_close(out, expected_pixels(network, saved.generator, 10, 3))

    line = one_line(invoke(*given, "--netG-args", "width=6"))
    assert f"does not fit --netG-module '{FILE}:Generator': " in line
    given[-2] = f"{MODULE}:RowGenerator"
    line = one_line(invoke(*given))
    assert f"'{MODULE}:RowGenerator' cannot be constructed with width=5 (--netG-args): TypeError" in line
    line = one_line(invoke(*given, "--netG-args", ""))
    assert f"does not fit --netG-module '{MODULE}:RowGenerator': " in line
    assert "--netG-args requires --netG-module" in one_line(invoke("generate", trained, "--netG-args", "a=1"))


def test_other_formats_and_a_generator_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pair = spelled(PAIRS["a Generator of rows"])
    assert invoke("train", *TINY, *pair, *ONE_STEP, "--out", "run").exit_code == 0
    given = ["generate", "run", *pair[:2], "--device=cpu"]
    assert invoke(*given, "--format=npy", "--num=5", "--out=a.npy").exit_code == 0
    network = foreign_networks.RowGenerator(widths=(5, 3))
    assert_close(
        tmp_path / "a.npy", expected_pixels(network, train_runs.final(Path("run")).generator, 5, 0, True)
    )
    assert invoke(*given, "--num=4").exit_code == 0
    assert invoke(*given, "--format=strip", "--steps=2").exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["generated.png", "interpolation.png"]


def test_evaluation(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCGAN_CACHE", str(tmp_path / "cache"))
    given = ["eval", trained, "--dataset=digits", "--num=20", "--features=pixels", "--device=cpu"]
    result = invoke(*given, "--netG-module", f"{MODULE}:Generator", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "a.json").read_text())["scores"]["generated"]["frechet"] > 0


def test_loading_from_python(trained: Path, tmp_path: Path) -> None:
    saved, module = train_runs.final(trained), f"{MODULE}:Generator"
    found = pretrained.generator(trained, module=module)
    assert isinstance(found, foreign_networks.Generator)
    assert not found.training
    state = found.state_dict()
    assert saved.ema is not None
    assert all(torch.equal(state[key], value) for key, value in saved.ema.items())
    d = pretrained.discriminator(trained, module=f"{MODULE}:Discriminator", args={"width": 3})
    with torch.no_grad():
        assert d(torch.zeros(2, 1, 32, 32)).shape == (2, 1)
    torch.save(saved.ema, tmp_path / "g.pth")
    with pytest.raises(InputError, match=r"--netG-module applies to a run, .*g\.pth does not"):
        pretrained.read(tmp_path / "g.pth", "generator", module=module)
    # A class of the user's may take the weights of this project's network.
    own = Architecture(latent_dim=6, features_g=4, features_d=4, image_size=32)
    states = own.generator().state_dict(), own.discriminator().state_dict()
    checkpoints.write(checkpoints.Checkpoint(own, *states), tmp_path / "own.pt")
    sizes = {"latent_dim": 6, "features": 4, "image_size": 32}
    network = pretrained.generator(tmp_path / "own.pt", module="dcgan.models:Generator", args=sizes)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in states[0].items())
