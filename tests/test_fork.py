"""What renews itself in a forked child."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable

from govredis._counters import Counters
from govredis._fork import renew_in_child


def child(check: Callable[[], bool]) -> bool:
    """What `check()` says in a forked child."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class Renewed:
    def __init__(self) -> None:
        self.pids = [os.getpid()]
        renew_in_child(self)

    def renew_after_fork(self) -> None:
        self.pids.append(os.getpid())


def test_objects_are_renewed_in_the_child_only_and_in_its_children() -> None:
    one, other = Renewed(), Renewed()
    parent = os.getpid()

    def renewed() -> bool:
        me = os.getpid()
        return one.pids == other.pids == [parent, me] and child(lambda: one.pids == [parent, me, os.getpid()])

    assert child(renewed)
    assert one.pids == [parent]


def test_an_object_is_not_kept_alive() -> None:
    renewed = Renewed()
    pids = renewed.pids
    del renewed
    gc.collect()
    assert child(lambda: len(pids) == 1)


def test_counters_count_by_process() -> None:
    counters = Counters()
    counters.add("a.b")
    counters.add("a.b", 4)

    def fresh() -> bool:
        counters.add("a.b")
        return counters.read() == {"a.b": 1}

    with counters._lock:  # another thread was counting when we forked
        assert child(fresh)
    assert counters.get("a.b") == 5
    assert counters.get("nothing") == 0
    assert counters.read() == {"a.b": 5}


def test_counters_lose_nothing_to_threads() -> None:
    counters = Counters()

    def count() -> None:
        for _ in range(2000):
            counters.add("n")

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.get("n") == 16_000
