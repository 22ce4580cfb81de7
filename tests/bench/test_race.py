"""Races of a tiny network: who is timed, who is refused, and that one's fault is no other's."""

import dataclasses
import pathlib
from typing import Any, ClassVar

import pytest
import torch
from native import NEEDED

from bench import providers, race, worker
from bench.cases import Case, Materials, Prepared
from dcgan import fast
from dcgan.kernels import ops

TINY = Case("generate", 2, "float32", "cpu", 1, {"features": 2, "image_size": 32, "latent_dim": 8})
QUICK = race.Settings(seconds=0.02, rounds=2)


@pytest.fixture(autouse=True)
def rogues(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(pathlib.Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)


def outcomes(*names: str, settings: race.Settings = QUICK) -> dict[str, race.Outcome]:
    found = race.race(TINY, providers.find_all(names), settings, log=lambda line: None)
    assert [o.provider.name for o in found] == list(names)
    return {o.provider.name: o for o in found}


@pytest.fixture(scope="module")
def mixed() -> dict[str, race.Outcome]:
    """One race of the well-behaved among rogues."""
    folder = str(pathlib.Path(__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", folder)
        rogue = [f"rogue:{name}" for name in ("wrong", "stale", "raises", "dies", "dies_later")]
        return outcomes("eager", *rogue, "cudnn-graph", "fast")


def test_a_right_provider_is_timed(mixed: dict[str, race.Outcome]) -> None:
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
def test_our_row_says_what_ran(mixed: dict[str, race.Outcome]) -> None:
    assert mixed["fast"].note.startswith("native ")
    assert mixed["eager"].note == ""


@pytest.mark.parametrize("name", ["wrong", "stale"])
def test_a_wrong_provider_is_not_timed(mixed: dict[str, race.Outcome], name: str) -> None:
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
def test_a_failure_is_a_row(mixed: dict[str, race.Outcome], name: str, reason: str) -> None:
    outcome = mixed[f"rogue:{name}"]
    assert (outcome.status, outcome.reason) == ("failed", reason)
    assert not outcome.spreads


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_row_without_a_gpu(mixed: dict[str, race.Outcome]) -> None:
    assert (mixed["cudnn-graph"].status, mixed["cudnn-graph"].reason) == ("skipped", "no GPU here")


def test_a_hanging_provider_is_given_up() -> None:
    settings = race.Settings(seconds=0.02, rounds=1, prepare_seconds=1.0)
    outcome = outcomes("rogue:hangs", settings=settings)["rogue:hangs"]
    assert (outcome.status, outcome.reason) == ("failed", "no answer in 1 s")


def test_what_is_not_installed_is_skipped() -> None:
    absent = providers.Provider(
        "absent", providers.PROVIDERS["eager"].build, package="no_such_package.at_all"
    )
    assert absent.unavailable(TINY) == "not installed"
    assert providers.PROVIDERS["openvino"].unavailable(TINY) in (None, "not installed")


def test_a_dtype_a_runtime_has_not() -> None:
    half = Case("generate", 2, "bfloat16", "cpu", 1)
    assert providers.PROVIDERS["onnxruntime"].unavailable(half) in ("no bfloat16", "not installed")


def test_several_cases_in_one_contest() -> None:
    """Each with the materials of its own."""
    cases = [dataclasses.replace(TINY, batch=batch) for batch in (1, 3)]
    whole = Materials.of(cases[1])
    asked: list[int] = []

    def materials(case: Case) -> Materials:
        asked.append(case.batch)
        return whole.first(case.batch)

    entries = [(case, providers.PROVIDERS["eager"]) for case in cases]
    log: list[str] = []
    found = race.contest(entries, materials, QUICK, log.append)
    assert [outcome.status for outcome in found] == ["ok", "ok"]
    assert asked == [1, 3]
    assert log[0] == f"{cases[0].title}: eager: building and checking"


class Acts:
    """Stands in for a process: takes a second of a clock to build, but 'hangs' for ever."""

    now = 0.0
    events: ClassVar[list[str]] = []

    def __init__(self, threads: int, worker: str) -> None:
        self._asked: tuple[Any, ...] = ()

    def tell(self, method: str, *arguments: Any) -> None:
        self._asked = method, *arguments
        if method == "prepare":
            self.events.append(f"tell {arguments[1]}")

    def hear(self, timeout: float) -> Any:
        _, _, name, _ = self._asked
        self.events.append(f"hear {name}")
        if name == "hangs":
            Acts.now += timeout
            raise race.WorkerFailed(f"no answer in {timeout:.0f} s")
        if timeout == 0:
            raise race.WorkerFailed("no answer in 0 s")
        Acts.now += 1
        return Prepared(0.0, "")

    def ask(self, timeout: float, method: str, *arguments: Any) -> Any:
        return {"warm": [1e-3]}, 0

    def close(self) -> None:
        if self._asked:
            self.events.append(f"close {self._asked[2]}")


def acted(monkeypatch: pytest.MonkeyPatch, settings: race.Settings, *names: str) -> list[race.Outcome]:
    """A race of such processes; of the providers' names, those with an 's' search."""
    monkeypatch.setattr(race, "Process", Acts)
    monkeypatch.setattr(race.time, "monotonic", lambda: Acts.now)
    monkeypatch.setattr(Acts, "now", 0.0)
    monkeypatch.setattr(Acts, "events", [])
    eager = providers.PROVIDERS["eager"]
    listed = [dataclasses.replace(eager, name=name, searches=name.startswith("s")) for name in names]
    return race.race(TINY, listed, settings, lambda line: None)


def test_built_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that search among algorithms: nothing else runs then."""
    together = dataclasses.replace(QUICK, together=True)
    found = acted(monkeypatch, together, "s1", "a", "s2", "b")
    assert [outcome.provider.name for outcome in found] == ["s1", "a", "s2", "b"]
    assert [outcome.status for outcome in found] == 4 * ["ok"]
    assert Acts.events[:8] == [
        "tell a",
        "tell b",
        "hear a",
        "hear b",
        "tell s1",
        "hear s1",
        "tell s2",
        "hear s2",
    ]
    acted(monkeypatch, QUICK, "s1", "a")
    assert Acts.events[:4] == ["tell s1", "hear s1", "tell a", "hear a"]


def test_who_is_not_ready_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended before others search; nobody is waited for any longer."""
    settings = dataclasses.replace(QUICK, together=True, prepare_seconds=20.0, until=30.0)
    first, hung, last = acted(monkeypatch, settings, "a", "hangs", "s")
    assert (first.status, last.status) == ("ok", "ok")
    assert hung.reason == "no answer in 19 s", "20 from when it was told"
    assert Acts.events.index("close hangs") < Acts.events.index("tell s")
    settings = dataclasses.replace(settings, until=5.0 + race.SEARCH_SECONDS)
    first, hung, last = acted(monkeypatch, settings, "a", "hangs", "s")
    assert (first.status, last.status) == ("ok", "ok")
    assert hung.reason == "no answer in 4 s", "the time to search is kept"
    settings = dataclasses.replace(settings, until=0.0)
    assert {o.reason for o in acted(monkeypatch, settings, "a", "s")} == {"no answer in 0 s"}


def test_a_note_on_the_reference() -> None:
    network = fast.convert(TINY.network())
    with ops.use_engine("reference"):
        note = worker.engines(network, TINY.inputs()[0])
    assert note == "reference: engine 'reference' was asked for"
    assert worker.engines(TINY.network(), TINY.inputs()[0]) == ""
