"""README and docs: snippets run, commands parse, links resolve, every environment variable is listed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
import typer

from bench import __main__ as bench_main
from dcgan import extras
from dcgan.cli.app import app
from dcgan.settings import tomllib
from examples.networks import DcganG

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Snippet(NamedTuple):
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Snippet]:
    """The fenced blocks of a language on all pages."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(Snippet(str(page.relative_to(ROOT)), line, match[1]))
    return found


def commands() -> list[Snippet]:
    """The lines of all shell blocks, and the commands quoted in the text."""
    found = []
    for block in blocks("sh"):
        for i, line in enumerate(block.text.splitlines(), 1):
            if command := line.split("  #")[0].strip():
                found.append(Snippet(block.page, block.line + i, command))
    programs = (
        r"make |dcgan |torchrun |pip install |(?:\.venv/bin/)?python (?:-m |examples/)|TRITON_INTERPRET=1 "
    )
    quoted = rf"`((?:{programs})[^`]+)`"
    for page in PAGES:
        for i, line in enumerate(page.read_text().splitlines(), 1):
            matches = re.finditer(quoted, line)
            found.extend(Snippet(str(page.relative_to(ROOT)), i, match[1]) for match in matches)
    return found


def test_every_fenced_block_is_of_a_language_that_is_tested() -> None:
    languages = {
        m for page in PAGES for m in re.findall(r"^```(\w*)\n(?:.*?)^```", page.read_text(), re.M | re.S)
    }
    assert languages == {"python", "sh"}


@pytest.mark.parametrize("snippet", blocks("python"), ids=str)
def test_python_snippets_run(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(DcganG().state_dict(), "netG.pth")
    exec(compile(snippet.text, str(snippet), "exec"), {"__name__": "__main__"})


def check_dcgan(arguments: list[str]) -> None:
    """Parse a command line of ``dcgan`` without running it."""
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    if name.startswith("-"):
        assert any(name in param.opts for param in group.params), name
        return
    command = group.commands[name]
    if rest not in ([], ["--help"]):
        command.make_context(name, rest)


def check_bench(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line of ``python -m bench`` without running it."""
    name, *rest = arguments
    assert name in (*bench_main.COMMANDS, "--help")
    if rest:
        check_script("bench.__main__", arguments, monkeypatch)


def check_script(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line of a module's ``main`` without running it."""

    class ParsedError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parsed(*args: Any) -> NoReturn:
        parse(*args)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(ParsedError):
        importlib.import_module(module).main(arguments)


@pytest.mark.parametrize("snippet", commands(), ids=str)
def test_commands_parse(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(snippet.text)
    while "=" in words[0]:  # environment variables
        words.pop(0)
    program = words.pop(0)
    if program == "make":
        targets = [word for word in words if "=" not in word and not word.startswith("-")]
        makefile = (ROOT / "Makefile").read_text()
        for target in [] if "-C" in words else targets:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    elif program == "pip":
        wanted = re.findall(r"\[([\w,]+)\]", snippet.text)
        assert {extra for group in wanted for extra in group.split(",")} <= extras.EXTRAS.keys() | {"dev"}
    elif program == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif program == "dcgan":
        check_dcgan(words)
    elif program == "torchrun":
        check_dcgan(words[words.index("dcgan") + 1 :])
    else:
        assert program.endswith("python"), "a command of a kind that no test checks"
        if words[0] != "-m":
            script = Path(words[0])
            assert script.parent == Path("examples")
            check_script(f"examples.{script.stem}", words[1:], monkeypatch)
            return
        module, *arguments = words[1:]
        if module == "bench":
            check_bench(arguments, monkeypatch)
        elif module == "dcgan":
            check_dcgan(arguments)
        elif module.startswith(("tests.", "dcgan.kernels.gpu.tools.")):
            found = importlib.util.find_spec(module)
            assert found is not None
            package = found.submodule_search_locations is not None
            check_script(f"{module}.__main__" if package else module, arguments, monkeypatch)
        else:
            assert module == "pytest"
            assert all((ROOT / path).exists() for path in arguments if not path.startswith("-"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)#]+\.md|[^)#]+/kernels)\)", page.read_text()):
            path = (page.parent / target).resolve()
            path = path / "README.md" if path.is_dir() else path
            if path.is_file() and path not in seen:
                todo.append(path)
    assert set(PAGES) <= seen


def test_every_environment_variable_is_listed() -> None:
    listed = set(re.findall(r"`(DCGAN_[A-Z_]+)`", (ROOT / "docs/environment.md").read_text()))
    code = [*(ROOT / "dcgan").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "setup.py"]
    read = r"(?:environ(?:\.get\(|\[)|getenv\()\"(DCGAN_[A-Z_]+)\""
    used = {name for path in code for name in re.findall(read, path.read_text())}
    assert listed == used


def test_extras_are_those_of_the_distribution() -> None:
    """dcgan/extras.py has the module of each package that an extra in pyproject.toml adds, and no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = {
        "pillow": "PIL",
        "pyyaml": "yaml",
        "scikit-learn": "sklearn",
        "torch-fidelity": "torch_fidelity",
    }
    for extra, ours in extras.EXTRAS.items():
        packages = [
            re.split(r"[\[>=<;]", line)[0].strip() for line in project["optional-dependencies"][extra]
        ]
        expected = {modules.get(name, name) for name in packages if name != "dcgan-kernels"}
        assert set(ours) == expected, extra
