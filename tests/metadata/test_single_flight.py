"""SingleFlight: one load at a time of each key, a bounded number at once, and nothing that is older than the call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import eventually

from govredis import BackendUnavailable
from govredis.metadata import single_flight as module
from govredis.metadata.renewals import Load
from govredis.metadata.single_flight import SingleFlight, Start, running


@pytest.fixture
def single_flight() -> SingleFlight:
    return SingleFlight("test")


def after_others(load: Callable[[], Any]) -> Callable[[Start], Any]:
    """As where nothing can be stored: one load at a time."""

    def go(start: Start) -> Any:
        start(True)
        return load()

    return go


class Runs:
    """Threads that run a load, and what they got."""

    def __init__(self, single_flight: SingleFlight) -> None:
        self.single_flight = single_flight
        self.got: list[Any] = []
        self.threads: list[threading.Thread] = []

    def start(self, key: str, load: Callable[[], str | None]) -> threading.Thread:
        def run() -> None:
            try:
                self.got.append(self.single_flight.run(key, after_others(load))[0])
            except Exception as error:  # noqa: BLE001
                self.got.append(error)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        return self.threads[-1]

    def join(self) -> list[Any]:
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        return self.got


def test_callers_that_come_while_a_load_runs_share_the_next(single_flight: SingleFlight) -> None:
    source, loads = ["old"], []
    entered, go = threading.Event(), threading.Event()

    def load() -> str:
        loads.append(1)
        value = source[0]
        entered.set()
        assert go.wait(20)
        return value

    runs = Runs(single_flight)
    runs.start("k", load)
    assert entered.wait(20)
    source[0] = "new"  # and its writer reads it now
    for _ in range(5):
        runs.start("k", load)
    eventually(lambda: "k" in single_flight._next)
    time.sleep(0.05)
    go.set()
    assert sorted(runs.join()) == ["new"] * 5 + ["old"]
    assert len(loads) <= 3
    assert not single_flight._started
    assert not single_flight._next


def test_an_error_is_its_own_callers(single_flight: SingleFlight) -> None:
    entered, go = threading.Event(), threading.Event()

    def first() -> str:
        entered.set()
        assert go.wait(20)
        return "first"

    def fails() -> str:
        raise KeyError("mine")

    runs = Runs(single_flight)
    runs.start("k", first)
    assert entered.wait(20)
    runs.start("k", fails)
    eventually(lambda: "k" in single_flight._next)
    runs.start("k", lambda: "passenger")
    time.sleep(0.05)
    go.set()
    got = runs.join()
    assert {repr(one) for one in got} == {"'first'", "KeyError('mine')", "'passenger'"}


def test_a_load_within_a_load_is_done_at_once(single_flight: SingleFlight) -> None:
    def outer(key: str, other: str) -> Callable[[], str | None]:
        def load() -> str | None:
            barrier.wait(20)
            return single_flight.run(other, after_others(lambda: f"{key} needs {other}"))[0]

        def run() -> str | None:
            mine = Load(single_flight, [key], {})
            with mine.running:
                return running(mine, load)

        return run

    barrier = threading.Barrier(2)
    runs = Runs(single_flight)
    runs.start("a", outer("a", "b"))
    runs.start("b", outer("b", "a"))
    assert sorted(runs.join()) == ["a needs b", "b needs a"], "and nobody waits for each other"


def test_a_bounded_number_at_once(single_flight: SingleFlight, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most = [0], [0]
    lock, go = threading.Lock(), threading.Event()

    def load() -> str:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        assert go.wait(20)
        with lock:
            at_once[0] -= 1
        return "x"

    runs = Runs(single_flight)
    for n in range(30):
        runs.start(f"k{n}", lambda: single_flight.alone(load))
    eventually(lambda: at_once[0] == 10)
    time.sleep(0.05)
    monkeypatch.setattr(module, "_PATIENCE", 0.01)
    with pytest.raises(BackendUnavailable, match="the loader of test"):
        single_flight.run("late", after_others(lambda: single_flight.alone(load)))
    go.set()
    assert runs.join() == ["x"] * 30
    assert most == [10]


def test_a_frame_that_was_blown_away_keeps_nobody_waiting(single_flight: SingleFlight) -> None:
    """An exception (a signal's, a soft time limit's) between two lines: nothing after them was run."""
    struck = module._Flight()
    single_flight._next["k"] = single_flight._started["k"] = struck
    runs = Runs(single_flight)
    with struck.flying:
        runs.start("k", lambda: "x")
        time.sleep(0.05)
        assert runs.got == []
    assert runs.join() == ["x"]
    assert single_flight.run("k", after_others(lambda: "y")) == ("y", True)
