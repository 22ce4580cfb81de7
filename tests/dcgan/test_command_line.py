"""The application: start-up without PyTorch, help, version, completion, and how errors name an option."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from rich.cells import cell_len
from typer import rich_utils
from typer.testing import CliRunner

import dcgan
from dcgan.cli import options
from dcgan.cli.app import app
from dcgan.cli.train import EXAMPLES, GROUPS
from dcgan.errors import InputError, RunError
from dcgan.settings import Settings

COMMANDS = ("train", "generate", "eval", "export")
SLOW = ("torch", "numpy", "scipy", "PIL", "torchvision", "matplotlib", "sklearn", "tensorboard")
"""Modules that take long to import."""


def run(code: str, **environment: str) -> str:
    """Run Python code in a process in which the slow modules cannot be imported; return its output."""
    blocked = f"import sys\nfor name in {SLOW}: sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- start-up -----------------------------------------------------------------------------------------------


def test_help_and_version_need_no_slow_module() -> None:
    """All of them in one process: the help of each command, and the version."""
    output = run(
        "from dcgan.cli.app import app\n"
        f"for words in ['--help'], *([name, '--help'] for name in {COMMANDS}), ['--version']:\n"
        "    try:\n"
        "        app(words, prog_name='dcgan')\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, words\n"
    )
    for name in COMMANDS:
        assert f"Usage: dcgan {name} " in output
    assert output.endswith(f"dcgan {dcgan.__version__}\n")


def test_the_start_imports_rich_only_for_help() -> None:
    assert run("import dcgan.cli.app\nprint('rich' in sys.modules)") == "False\n"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dcgan ", ["train", "generate", "eval", "export"]),
        ("dcgan train --batch", ["--batch-size", "--batchSize"]),
        ("dcgan train --dataset f", ["fashion-mnist", "folder", "fake"]),
        ("dcgan train --loss ", ["non-saturating", "minimax"]),
    ],
)
def test_completion_needs_no_slow_module(typed: str, expected: list[str]) -> None:
    output = run(
        "from dcgan.cli.app import app\napp(prog_name='dcgan')",
        _DCGAN_COMPLETE="complete_bash",
        COMP_WORDS=typed,
        COMP_CWORD=str(len(typed.split(" ")) - 1),
    )
    assert output.split() == expected


# --- help ---------------------------------------------------------------------------------------------------


@pytest.fixture
def train_help(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 80)
    result = CliRunner().invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    return result.output


def panels(text: str) -> Iterator[tuple[str, str]]:
    """Yield the title and content of each panel, with white space collapsed."""
    title, lines = "", list[str]()
    for line in text.splitlines():
        if line.startswith("╭─ "):
            title, lines = line.strip("╭─╮ "), []
        elif line.startswith("│"):
            lines.append(line.strip("│ "))
        elif line.startswith("╰"):
            yield title, " ".join(" ".join(lines).split())


def test_every_setting_is_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(Settings.model_fields)


def test_every_option_of_train_is_in_its_panel(train_help: str) -> None:
    found = dict(panels(train_help))
    assert list(found) == ["Options", *GROUPS]
    for flag in ("--out", "--resume", "--dry-run", "--config", "--help"):
        assert f"{flag} " in found["Options"]
    for group, names in GROUPS.items():
        for name in names:
            assert f"--{name.replace('_', '-')} " in found[group]


def test_train_help_is_readable_at_80_columns(train_help: str) -> None:
    assert max(map(cell_len, train_help.splitlines())) <= 80
    for line in train_help.splitlines():  # options and types are never cut off, and types are no letters
        assert "…" not in line.replace("<name,…>", "").replace("<key=value,…>", "")
        assert not re.match(r"│ --\S+ +[A-Z] ", line)
    for word in ("<bool>", "<str>", "<int>", "<float>", "<text>"):
        assert word not in train_help
    for word in ("<integer>", "<number>", "<path>", "<dcgan|mlp>", "<auto|cpu|cuda>"):
        assert word in train_help


@pytest.mark.parametrize(("name", "field"), Settings.model_fields.items())
def test_the_help_of_a_setting_is_sentences_with_its_default(name: str, field: Any, train_help: str) -> None:
    text = " ".join(str(field.description).split())
    assert text[0].isupper()
    assert text.endswith(".")
    words = f"{field.default}."
    if field.default is None or isinstance(field.default, bool):
        words = {True: "on; ", False: "off.", None: ""}[field.default]
    assert ("Default: " in text) == (field.default is None)
    (panel,) = (title for title, names in GROUPS.items() if name in names)
    shown = dict(panels(train_help))[panel].partition(f"--{name.replace('_', '-')} ")[2]
    assert f"Default: {words}" in shown
    assert shown.partition("Default: ")[0].split()[-3:] == text.partition("Default: ")[0].split()[-3:]


def test_the_epilogue_names_the_options_of_pytorch_examples(train_help: str) -> None:
    body, _, epilogue = train_help.rpartition("╯")
    for flag in (*(flag for flags in EXAMPLES.values() for flag in flags), "--outf", "--cuda", "--accel"):
        assert flag in epilogue
        assert f"{flag} " not in body


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_no_switch_has_a_type(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    assert "<bool>" not in result.output


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"dcgan {dcgan.__version__}\n")


# --- errors -------------------------------------------------------------------------------------------------


def failing(error: Exception, *typed: str) -> str:
    """Return the report of a command that raises an error, with these words on its command line."""
    small = typer.Typer(pretty_exceptions_enable=False)

    @small.command(cls=options.Command)
    @options.reporting
    def command(
        source: Annotated[str, typer.Argument()] = "run",
        batch_size: Annotated[int, typer.Option("--batch-size", "--batchSize")] = 1,
        num: Annotated[int, typer.Option("--num", "-n", parser=options.integer(1))] = 1,
        ema: Annotated[bool, typer.Option("--ema/--no-ema")] = True,
        dataroot: Annotated[str, typer.Option()] = "data",
        netG_module: Annotated[str, typer.Option("--netG-module")] = "",
        out: Annotated[str, typer.Option()] = "",
    ) -> None:
        raise error

    result = CliRunner().invoke(small, typed)
    assert result.exit_code == (1 if isinstance(error, RunError) else 2)
    line = result.stderr
    assert line.startswith("Error: ")
    assert line.count("\n") == 1
    return line.removeprefix("Error: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("typed", "message", "expected"),
    [
        ([], "batch_size must be 1, got 2", "--batch-size must be 1, got 2"),
        (["--batch-size=3"], "batch_size must be 1", "--batch-size must be 1"),
        (["--batchSize", "3"], "batch_size must be 1", "--batchSize must be 1"),
        (["--batchSize=3", "--batch-size=4"], "batch_size: no", "--batch-size: no"),
        (["--batch-size=3", "--batchSize=4"], "batch_size: no", "--batchSize: no"),
        (["-n", "3"], "num is 3", "-n is 3"),
        (["--no-ema"], "ema requires an average", "--no-ema requires an average"),
        ([], "root '/a b/c' does not exist; create it", "--dataroot '/a b/c' does not exist; create it"),
        ([], 'root "it\'s" cannot be read: no', '--dataroot "it\'s" cannot be read: no'),
        ([], "num two requires a batch_size, got 3", "--num two requires a --batch-size, got 3"),
        ([], "num must be 1 for netG_module", "--num must be 1 for --netG-module"),
        # A message that begins with another word, a file or a value is left as it is.
        ([], "cannot read batch_size", "cannot read batch_size"),
        ([], "source must be a folder", "source must be a folder"),
        ([], "out/x.pt is damaged", "out/x.pt is damaged"),
        ([], "out cannot be exported", "out cannot be exported"),
        (["out"], "out is a folder without checkpoints", "out is a folder without checkpoints"),
        (["--dataroot=num"], "num is an empty folder", "num is an empty folder"),
    ],
)
def test_an_error_names_the_option_as_typed(typed: list[str], message: str, expected: str) -> None:
    assert failing(InputError(message), *typed) == expected
    assert options.spelled(message) == message  # outside a command


def test_an_error_of_the_run_is_left_as_it_is() -> None:
    assert failing(RunError("num is nan at step 3")) == "num is nan at step 3"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--num", "0"], "--num must be an integer of at least 1, got '0'"),
        (["-n", "many"], "-n must be an integer of at least 1, got 'many'"),
        (["--batchSize=x"], "--batchSize: "),
    ],
)
def test_an_error_of_the_parser_names_the_option_as_typed(typed: list[str], expected: str) -> None:
    assert failing(InputError("not reached"), *typed).startswith(expected)


def test_spellings_end_with_the_command() -> None:
    failing(InputError("num is 3"), "-n", "3")
    failing(InputError("not reached"), "-n", "many")
    options.respell({"num": "file: num"})  # which applies to a running command only
    assert options.spelling("num") == "num"


# --- folders ------------------------------------------------------------------------------------------------


def test_undoing_removes_what_was_made(tmp_path: Path) -> None:
    """What was named and has been made goes, and then new folders; everything else stays."""
    old, new = tmp_path / "old", tmp_path / "a" / "b"
    old.mkdir()
    (old / "kept").write_text("kept")
    names = "kept", "sub", "link", "file", "never made"
    undos = [options.undoing(folder, *names) for folder in (old, new)]
    new.mkdir(parents=True)
    for folder in (old, new):
        (folder / "sub").mkdir()
        (folder / "sub" / "file").touch()
        (folder / "link").symlink_to(old)
        (folder / "file").touch()
    (old / "somebody else's").touch()
    for undo in undos:
        undo()
    assert sorted(tmp_path.rglob("*")) == [old, old / "kept", old / "somebody else's"]


def test_undoing_leaves_a_parent_that_others_use(tmp_path: Path) -> None:
    undo = options.undoing(tmp_path / "a" / "b")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "other").touch()
    undo()
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "other"]
