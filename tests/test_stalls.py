"""The watch for stalls, and attempts beside it."""

from __future__ import annotations

import signal
import time
from itertools import count

import pytest
import stalls
from stalls import StallWatch, undisturbed

_STALL = 1.0


class StalledWatch(StallWatch):
    """It sees a stall of the machine: it alone was stopped."""

    def __enter__(self) -> StallWatch:
        super().__enter__()
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(_STALL + 0.1)  # its slice of sleep is over then, whenever that began
        self.process.send_signal(signal.SIGCONT)
        return self


def test_the_watch_sees_a_stall() -> None:
    with StalledWatch() as watch:
        pass
    assert watch.longest >= _STALL


def test_a_failure_in_a_stall_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "StallWatch", StalledWatch)
    tried = count(1)

    def attempt() -> int:
        n = next(tried)
        assert n >= 2
        if n == 2:
            pytest.fail("the second time")
        return n

    assert undisturbed(attempt, _STALL - 0.1) == 3


def test_a_failure_in_every_attempt_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "StallWatch", StalledWatch)
    monkeypatch.setattr(stalls, "_ATTEMPTS", 2)
    tried = count(1)

    def attempt() -> None:
        raise ValueError(next(tried))

    with pytest.raises(ValueError, match="2"):
        undisturbed(attempt, _STALL - 0.1)


def test_a_failure_without_a_stall_is_raised_at_once() -> None:
    tried = count(1)

    def attempt() -> None:
        raise ValueError(next(tried))

    with pytest.raises(ValueError, match="1"):
        undisturbed(attempt, 1000)
