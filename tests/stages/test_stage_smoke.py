"""The smoke test of the stages, on the CPU."""

from __future__ import annotations

import pytest

from tests.gpu.stages import plan, smoke


def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.run("cpu") == 0
    machine, software, product, step = capsys.readouterr().out.splitlines()
    assert machine.startswith("no GPU; ")
    assert "torch 2" in software
    assert product.startswith("product: ok (")
    assert step.startswith("step: ok (")


def test_smoke_continues_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smoke, "PRODUCT", 0.0)
    monkeypatch.setattr(smoke, "TrainStep", None)
    assert smoke.run("cpu") == 1
    _, _, product, step = capsys.readouterr().out.splitlines()
    assert product.startswith("product: error ")
    assert step.startswith("step: TypeError: ")


def test_a_broken_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def describe(device: str) -> str:
        raise RuntimeError("no driver")

    monkeypatch.setattr(smoke, "describe", describe)
    assert smoke.run("cpu") == plan.MACHINE_BROKEN
    assert capsys.readouterr().out == "the machine does not work: RuntimeError: no driver\n"
