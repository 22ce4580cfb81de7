"""Tests of races with a tiny network: correct providers are timed, faulty ones rejected and isolated."""

import dataclasses
import pathlib
from typing import Any, ClassVar

import pytest
import torch

from bench import providers, race, worker
from bench.cases import Case, Materials, Prepared
from dcgan import fast
from dcgan.kernels import ops
from tests.support.native import NEEDED

TINY = Case("generate", 2, "float32", "cpu", 1, {"features": 2, "image_size": 32, "latent_dim": 8})
QUICK = race.Settings(seconds=0.02, rounds=2)


@pytest.fixture(autouse=True)
def rogues(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(pathlib.Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)


def outcomes(*names: str, settings: race.Settings = QUICK) -> dict[str, race.Outcome]:
    found = race.race([(TINY, one) for one in providers.find_all(names)], settings, lambda line: None)
    assert [o.provider.name for o in found] == list(names)
    return {o.provider.name: o for o in found}


@pytest.fixture(scope="module")
def mixed() -> dict[str, race.Outcome]:
    """Race correct and faulty providers together."""
    folder = str(pathlib.Path(__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", folder)
        rogue = [f"rogue:{name}" for name in ("wrong", "stale", "raises", "dies", "dies_later")]
        return outcomes("eager", *rogue, "cudnn-graph", "fast")


def test_correct_provider_is_timed(mixed: dict[str, race.Outcome]) -> None:
    eager = mixed["eager"]
    assert eager.status == "ok"
    assert eager.error is not None
    assert 0 < eager.error < TINY.tolerance
    warm = eager.spreads["warm"]
    assert 0 < warm.q1 <= warm.median <= warm.q3 < 1
    assert warm.count >= 6, "three calls in each of two bursts"
    assert eager.peak_bytes is not None
    assert eager.peak_bytes < 1 << 30


@NEEDED
def test_note_names_the_engine(mixed: dict[str, race.Outcome]) -> None:
    assert mixed["fast"].note.startswith("native ")
    assert mixed["eager"].note == ""


@pytest.mark.parametrize("name", ["wrong", "stale"])
def test_wrong_provider_is_not_timed(mixed: dict[str, race.Outcome], name: str) -> None:
    outcome = mixed[f"rogue:{name}"]
    assert outcome.status == "wrong"
    assert not outcome.spreads
    assert outcome.reason.startswith("error ")
    assert outcome.reason.endswith("> 1e-05")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "RuntimeError: no kernel"),
        ("dies", "exited with status 7"),
        ("dies_later", "exited with status 7"),
    ],
)
def test_failures_are_reported(mixed: dict[str, race.Outcome], name: str, reason: str) -> None:
    outcome = mixed[f"rogue:{name}"]
    assert (outcome.status, outcome.reason) == ("failed", reason)
    assert not outcome.spreads


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_provider_is_skipped_without_a_gpu(mixed: dict[str, race.Outcome]) -> None:
    assert (mixed["cudnn-graph"].status, mixed["cudnn-graph"].reason) == ("skipped", "no GPU here")


def test_hanging_provider_times_out() -> None:
    settings = race.Settings(seconds=0.02, rounds=1, prepare_seconds=1.0)
    outcome = outcomes("rogue:hangs", settings=settings)["rogue:hangs"]
    assert (outcome.status, outcome.reason) == ("failed", "timed out after 1 s")


def test_missing_package_makes_a_provider_unavailable() -> None:
    absent = providers.Provider(
        "absent", providers.PROVIDERS["eager"].build, package="no_such_package.at_all"
    )
    assert absent.unavailable(TINY) == "not installed"
    assert providers.PROVIDERS["openvino"].unavailable(TINY) in (None, "not installed")


def test_unsupported_dtype_makes_a_provider_unavailable() -> None:
    half = Case("generate", 2, "bfloat16", "cpu", 1)
    assert providers.PROVIDERS["onnxruntime"].unavailable(half) in (
        "does not support bfloat16",
        "not installed",
    )


def test_several_cases_in_one_contest() -> None:
    """Each case uses separate materials."""
    cases = [dataclasses.replace(TINY, batch=batch) for batch in (1, 3)]
    whole = cases[1].materials()
    requested: list[int] = []

    def materials(case: Case) -> Materials:
        requested.append(case.batch)
        return whole.first(case.batch)

    entries = [(case, providers.PROVIDERS["eager"]) for case in cases]
    log: list[str] = []
    found = race.race(entries, QUICK, log.append, materials)
    assert [outcome.status for outcome in found] == ["ok", "ok"]
    assert requested == [1, 3]
    assert log[0] == f"{cases[0].title}: eager: building and checking"


class FakeProcess:
    """A fake process: building takes one second of a fake clock, or forever for the provider 'hangs'."""

    now = 0.0
    events: ClassVar[list[str]] = []

    def __init__(self, threads: int, worker: str) -> None:
        self._request: tuple[Any, ...] = ()

    def send(self, method: str, *arguments: Any) -> None:
        self._request = method, *arguments
        if method == "prepare":
            self.events.append(f"send {arguments[1]}")

    def receive(self, timeout: float) -> Any:
        _, _, name, _ = self._request
        self.events.append(f"receive {name}")
        if name == "hangs":
            FakeProcess.now += timeout
            raise race.WorkerFailed(f"timed out after {timeout:.0f} s")
        if timeout == 0:
            raise race.WorkerFailed("timed out after 0 s")
        FakeProcess.now += 1
        return Prepared(0.0, "")

    def ask(self, timeout: float, method: str, *arguments: Any) -> Any:
        return {"warm": [1e-3]}, 0

    def close(self) -> None:
        if self._request:
            self.events.append(f"close {self._request[2]}")


def race_fakes(monkeypatch: pytest.MonkeyPatch, settings: race.Settings, *names: str) -> list[race.Outcome]:
    """Race fake processes; providers whose names start with 's' search."""
    monkeypatch.setattr(race, "Process", FakeProcess)
    monkeypatch.setattr(race.time, "monotonic", lambda: FakeProcess.now)
    monkeypatch.setattr(FakeProcess, "now", 0.0)
    monkeypatch.setattr(FakeProcess, "events", [])
    eager = providers.PROVIDERS["eager"]
    listed = [dataclasses.replace(eager, name=name, searches=name.startswith("s")) for name in names]
    return race.race([(TINY, one) for one in listed], settings, lambda line: None)


def test_parallel_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers are built in parallel, except that those which search run alone afterwards."""
    together = dataclasses.replace(QUICK, together=True)
    found = race_fakes(monkeypatch, together, "s1", "a", "s2", "b")
    assert [outcome.provider.name for outcome in found] == ["s1", "a", "s2", "b"]
    assert [outcome.status for outcome in found] == 4 * ["ok"]
    assert FakeProcess.events[:8] == [
        "send a",
        "send b",
        "receive a",
        "receive b",
        "send s1",
        "receive s1",
        "send s2",
        "receive s2",
    ]
    race_fakes(monkeypatch, QUICK, "s1", "a")
    assert FakeProcess.events[:4] == ["send s1", "receive s1", "send a", "receive a"]


def test_build_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers that miss the deadline are killed before others search."""
    settings = dataclasses.replace(QUICK, together=True, prepare_seconds=20.0, until=30.0)
    first, hung, last = race_fakes(monkeypatch, settings, "a", "hangs", "s")
    assert (first.status, last.status) == ("ok", "ok")
    assert hung.reason == "timed out after 19 s", "20 s from the request"
    assert FakeProcess.events.index("close hangs") < FakeProcess.events.index("send s")
    settings = dataclasses.replace(settings, until=5.0 + race.SEARCH_SECONDS)
    first, hung, last = race_fakes(monkeypatch, settings, "a", "hangs", "s")
    assert (first.status, last.status) == ("ok", "ok")
    assert hung.reason == "timed out after 4 s", "the search time is reserved"
    settings = dataclasses.replace(settings, until=0.0)
    assert {o.reason for o in race_fakes(monkeypatch, settings, "a", "s")} == {"timed out after 0 s"}


def test_note_of_the_reference_engine() -> None:
    network = fast.convert(TINY.network())
    with ops.use_engine("reference"):
        note = worker.engines(network, TINY.inputs()[0])
    assert note == "reference: engine 'reference' is forced"
    assert worker.engines(TINY.network(), TINY.inputs()[0]) == ""
