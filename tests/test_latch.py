"""Latch: set once, and a thread that is struck in it leaves it usable."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from strikes import strike_anywhere
from support import PATIENCE

from govredis import _latch
from govredis._latch import Latch


def test_it_is_waited_for_until_it_is_set() -> None:
    latch = Latch()
    assert not latch.is_set()
    assert latch.wait(0) is False
    assert latch.wait(0.01) is False
    latch.set()
    latch.set()
    assert latch.is_set()
    assert latch.wait(0) is True
    assert latch.wait(60) is True


def test_all_who_wait_are_woken(monkeypatch: Any) -> None:
    monkeypatch.setattr(_latch, "_SLICE", 1000)  # not by looking again
    latch, waiting = Latch(), threading.Barrier(9)

    def wait() -> bool:
        waiting.wait(20)
        return latch.wait(1000)

    with ThreadPoolExecutor(8) as pool:
        woken = [pool.submit(wait) for _ in range(8)]
        waiting.wait(20)
        latch.set()
        assert all(future.result(PATIENCE) for future in woken)


def test_struck_anywhere_it_can_be_set_and_waited_for() -> None:
    latches: list[Latch] = []
    with ThreadPoolExecutor(1) as pool:

        def anew() -> Latch:
            latches.append(Latch())
            return latches[-1]

        def use(latch: Latch) -> None:
            latch.wait(0.001)
            latch.set()
            latch.wait(60)

        def works() -> None:
            other: Callable[[], bool] = lambda: (latches[-1].set(), latches[-1].wait(60))[1]  # noqa: E731
            assert pool.submit(other).result(PATIENCE) is True

        assert strike_anywhere(use, works, anew) > 5
