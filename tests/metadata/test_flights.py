"""Flights: one load at a time of each key, a bounded number at once, and nothing that is older than the call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from govredis import BackendUnavailable
from govredis.metadata import flights as module
from govredis.metadata.flights import Flights


@pytest.fixture
def flights() -> Flights:
    return Flights("test")


class Runs:
    """Threads that run a load, and what they got."""

    def __init__(self, flights: Flights) -> None:
        self.flights = flights
        self.got: list[Any] = []
        self.threads: list[threading.Thread] = []

    def start(self, key: str, load: Callable[[], str | None]) -> threading.Thread:
        def run() -> None:
            try:
                self.got.append(self.flights.run(key, load))
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


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_comes_while_a_load_runs_shares_the_next(flights: Flights) -> None:
    source, loads = ["old"], []
    entered, go = threading.Event(), threading.Event()

    def load() -> str:
        loads.append(1)
        value = source[0]
        entered.set()
        assert go.wait(20)
        return value

    runs = Runs(flights)
    runs.start("k", load)
    assert entered.wait(20)
    source[0] = "new"  # and whoever wrote it reads it now
    for _ in range(5):
        runs.start("k", load)
    until(lambda: "k" in flights._next)
    time.sleep(0.05)
    go.set()
    assert sorted(runs.join()) == ["new"] * 5 + ["old"]
    assert len(loads) <= 3
    assert not flights._started
    assert not flights._next


def test_an_error_is_its_own_callers(flights: Flights) -> None:
    entered, go = threading.Event(), threading.Event()

    def first() -> str:
        entered.set()
        assert go.wait(20)
        return "first"

    def fails() -> str:
        raise KeyError("mine")

    runs = Runs(flights)
    runs.start("k", first)
    assert entered.wait(20)
    runs.start("k", fails)
    until(lambda: "k" in flights._next)
    runs.start("k", lambda: "passenger")
    time.sleep(0.05)
    go.set()
    got = runs.join()
    assert {repr(one) for one in got} == {"'first'", "KeyError('mine')", "'passenger'"}


def test_a_load_within_a_load_is_done_at_once(flights: Flights) -> None:
    def outer(key: str, other: str) -> Callable[[], str | None]:
        def load() -> str | None:
            barrier.wait(20)
            return flights.run(other, lambda: f"{key} needs {other}")

        return load

    barrier = threading.Barrier(2)
    runs = Runs(flights)
    runs.start("a", outer("a", "b"))
    runs.start("b", outer("b", "a"))
    assert sorted(runs.join()) == ["a needs b", "b needs a"], "and nobody waits for each other"


def test_a_bounded_number_at_once(flights: Flights, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = [0], [0]
    lock, go = threading.Lock(), threading.Event()

    def load() -> str:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        assert go.wait(20)
        with lock:
            running[0] -= 1
        return "x"

    runs = Runs(flights)
    for n in range(30):
        runs.start(f"k{n}", load)
    until(lambda: running[0] == 10)
    time.sleep(0.05)
    monkeypatch.setattr(module, "_PATIENCE", 0.01)
    with pytest.raises(BackendUnavailable, match="the loader of test"):
        flights.run("late", load)
    go.set()
    assert runs.join() == ["x"] * 30
    assert most == [10]


def test_a_frame_that_was_blown_away_keeps_nobody_waiting(flights: Flights) -> None:
    """An exception (a signal's, a soft time limit's) between two lines: nothing after them was run."""
    slot = module._Slot()
    flights._next["k"] = flights._started["k"] = module._Flight(slot)
    runs = Runs(flights)
    runs.start("k", lambda: "x")
    time.sleep(0.05)
    assert runs.got == []
    del slot
    assert runs.join() == ["x"]
    assert flights.run("k", lambda: "y") == "y"
