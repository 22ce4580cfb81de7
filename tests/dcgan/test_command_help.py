"""The help of the commands that take a trained network, at 80 columns, and the completion of their values."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

from dcgan.choices import DATASETS
from dcgan.cli.app import app

COMMANDS = ("generate", "eval", "export")
METAVARS = ("<name>", "<integer>", "<integer,…>", "<number>", "<path>", "<module:class>", "<key=value,…>")


def help_of(command: str) -> list[str]:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    return result.output.splitlines()


def place_of(lines: list[str], flag: str) -> int:
    """Return the index of the line that begins with an option."""
    (found,) = (
        i for i, line in enumerate(lines) if line.lstrip("│* ").startswith(f"{flag} ") and "-" in line[:6]
    )
    return found


def text_of(lines: list[str], flag: str) -> str:
    """Return what the last column says of an option."""
    start = place_of(lines, flag)
    end = start + 1
    while lines[end].startswith("│     "):
        end += 1
    column = max(len(line) - len(line.lstrip("│ ")) for line in lines[start + 1 : end])
    return " ".join(line[column:].rstrip("│ ") for line in lines[start:end])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable_at_80_columns(command: str) -> None:
    """No line is longer, and every type is one of a few words, whole and on the line of its option."""
    lines = help_of(command)
    assert max(map(cell_len, lines)) <= 80
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    flags = [param.opts[0] for param in parameters if param.opts[0].startswith("--")]
    assert len(flags) > 5
    for flag in flags:
        line = lines[place_of(lines, flag)]
        words = re.findall(r"<\S*", line)
        switch = any(param.opts[0] == flag and getattr(param, "is_flag", False) for param in parameters)
        assert len(words) == (0 if switch else 1), line
        assert all(word in METAVARS or re.fullmatch(r"<[a-z|]{1,16}>", word) for word in words), line
        assert not re.match(r"│ [* ]{0,3}--\S+ +(-\w +)?[A-Z][A-Z,/…]* ", line), line
    for line in lines:  # nothing is cut off
        assert "…" not in line.replace("<key=value,…>", "").replace("<integer,…>", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_what_the_commands_share(command: str) -> None:
    lines = help_of(command)
    module = text_of(lines, "--netG-module")
    assert "path/to/file.py:Class." in module
    assert "Not needed for the folder of a run, whose config.yaml names it" in module
    assert text_of(lines, "--which").endswith("[default: last]")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_allowed_values(command: str) -> None:
    """Those that are no longer in the type are in the text."""
    lines = help_of(command)
    (function,) = (one.callback for one in app.registered_commands if one.name == command)
    assert function is not None
    found = 0
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind = next(iter(get_args(parameter.annotation)), None)  # of Annotated
        for value in DATASETS if name == "dataset" else get_args(kind) if get_origin(kind) is Literal else ():
            flag = "--" + name.replace("_", "-")
            shown = lines[place_of(lines, flag)], text_of(lines, flag).partition("[default")[0]
            assert any(re.search(rf"\b{value}\b", text) for text in shown), name
            found += 1
    assert found >= 8


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dcgan eval --dataset f", ["fashion-mnist", "folder", "fake"]),
        ("dcgan eval --features ", ["auto", "inception", "digits", "pixels"]),
        ("dcgan generate --engine n", ["native"]),
        ("dcgan export --to ", ["safetensors", "onnx", "torch-export", "huggingface"]),
    ],
)
def test_completion_of_values(typed: str, expected: list[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "from dcgan.cli.app import app\napp(prog_name='dcgan')"],
        env={**os.environ, **words, "_DCGAN_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == expected, done.stderr
