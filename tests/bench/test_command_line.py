"""``python -m bench``: its options, and one end-to-end run."""

import argparse
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import output
from bench.__main__ import MOVED, main
from bench.compare import GENERATE
from bench.providers import PROVIDERS
from dcgan.models import Generator

ROOT = Path(__file__).resolve().parents[2]


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run an invalid command line, check that its exit status is 2 and return its error message."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["generate", "--batch", "0"], "must be a whole number from 1"),
        (["generate", "--batch", "many"], "must be a whole number from 1"),
        (["generate", "--seconds", "0"], "must be a positive number of seconds"),
        (["generate", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", "--device", "cpu", "--dtype", "tf32"], "tf32 is a setting of CUDA devices"),
        (["generate", "--image-size", "63"], "image_size must be one of"),
        (["generate", "--checkpoint", "no/such.pt"], "no/such.pt"),
        (["discriminate", "--latent-dim", "100"], "unrecognized arguments"),
        (["plot", "no/such.jsonl"], "no/such.jsonl"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in usage_error(capsys, *arguments)


def test_an_unknown_provider_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    error = usage_error(capsys, "generate", "--providers", "eager", "tensorflow")
    assert "no provider 'tensorflow'" in error
    assert all(name in error for name in PROVIDERS)
    assert "no_such_module" in usage_error(capsys, "generate", "--providers", "no_such_module:build")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no GPU here" in usage_error(capsys, "generate", "--device", "cuda")


def test_a_checkpoint_of_different_sizes_is_rejected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "g.pt"
    torch.save(Generator(latent_dim=8, features=2, image_size=32).state_dict(), file)
    error = usage_error(capsys, "generate", "--checkpoint", str(file), "--features", "4")
    assert "has features 2, not 4" in error
    torch.save({"epoch": 3}, file)
    assert "is not a state dict" in usage_error(capsys, "generate", "--checkpoint", str(file))


@pytest.mark.parametrize("name", MOVED)
def test_a_moved_command_runs_the_new_module(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", name])
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(runpy, "run_module", lambda module, **_: ran.append((module, sys.argv[1:])))
    assert main([name, "--option", "1"]) == 0
    assert ran == [(MOVED[name], ["--option", "1"])]
    assert capsys.readouterr().err == f"python -m bench {name} is now python -m {MOVED[name]}\n"
    assert importlib.util.find_spec(MOVED[name]) is not None


def test_one_case_per_dtype_and_batch() -> None:
    parser = argparse.ArgumentParser()
    GENERATE.add_arguments(parser)
    options = ["--batch", "1", "64", "1", "--dtype", "float32", "bfloat16", "--device", "cpu"]
    cases = GENERATE.cases(parser.parse_args(options))
    assert [(case.dtype, case.batch) for case in cases] == [
        ("float32", 1),
        ("float32", 64),
        ("bfloat16", 1),
        ("bfloat16", 64),
    ]


def test_end_to_end(tmp_path: Path) -> None:
    """Piped, from another folder: a wrong provider is not timed, the others are, and the status is 1."""
    file = tmp_path / "results.jsonl"
    sizes = ["--features", "2", "--image-size", "32", "--latent-dim", "8"]
    time = ["--seconds", "0.02", "--rounds", "1", "--threads", "1"]
    providers = ["eager", "fast", "fast-graph", "rogue:wrong"]
    command = [
        sys.executable,
        "-m",
        "bench",
        "generate",
        "--device",
        "cpu",
        "--batch",
        "3",
        *sizes,
        *time,
    ]
    command += ["--providers", *providers, "--json", str(file)]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("WRONG: error 3.0e-02 > 1e-05") == 1
    if not torch.cuda.is_available():
        assert done.stdout.count("no GPU here") == 2, "fast-graph and the last line"
        assert done.stdout.rstrip().endswith("cuda: no GPU here")
    assert max(map(len, done.stdout.splitlines())) <= 140
    rows = output.read(file)
    assert [row["case"]["batch"] for row in rows] == 4 * [3]
    status = {row["provider"]: row["status"] for row in rows}
    assert status == {"eager": "ok", "fast": "ok", "fast-graph": "skipped", "rogue:wrong": "wrong"}
