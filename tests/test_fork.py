"""Objects that renew themselves in a forked child."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import time

import pytest
from c_fork import in_c_child
from support import in_child, in_threads

from govredis import _fork
from govredis._counters import Counters
from govredis._fork import notice_fork, renew_in_child


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
        return one.pids == other.pids == [parent, me] and in_child(lambda: one.pids == [parent, me, os.getpid()])

    assert in_child(renewed)
    assert one.pids == [parent]


@pytest.fixture(params=["wiped page", "pid"])
def mark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark that tells a child: as on this kernel, and where the kernel wipes nothing."""
    if request.param == "pid":
        monkeypatch.setattr(_fork, "_renewed_here", _fork._Pid())
        _fork._renewed_here[0] = 1
    else:
        assert not isinstance(_fork._renewed_here, _fork._Pid), "Linux 4.14 and newer have it"


def test_a_single_thread_renews_and_the_others_wait_where_no_hook_runs(mark: None) -> None:
    renewed = Renewed()
    parent = os.getpid()

    def see() -> list[int]:
        notice_fork()
        return list(renewed.pids)

    def children() -> bool:
        me = os.getpid()
        assert renewed.pids == [parent], "no hook has run"
        assert in_threads(*[see] * 8) == [[parent, me]] * 8
        found: list[int] = in_c_child(lambda: [*see(), os.getpid()])
        return found[:3] == [parent, me, found[3]]

    assert in_c_child(children)
    assert renewed.pids == [parent]
    # A child of a child that Python was told of, and the other way round.
    assert in_child(lambda: len(in_c_child(see)) == 3)
    assert in_c_child(lambda: len(see()) == 2 and in_child(lambda: len(renewed.pids) == 3))
    assert renewed.pids == [parent]


def test_a_thread_that_comes_while_another_renews_waits(mark: None) -> None:
    begun, go_on, came = (threading.Event() for _ in range(3))

    class Slow(Renewed):
        def renew_after_fork(self) -> None:
            begun.set()
            assert go_on.wait(20)
            super().renew_after_fork()

    slow = Slow()

    def second() -> int:
        assert begun.wait(20)
        came.set()
        notice_fork()
        return len(slow.pids)

    def third() -> int:
        assert came.wait(20)
        time.sleep(0.05)  # it would be through by now
        renewed = len(slow.pids)
        go_on.set()
        return renewed

    assert in_c_child(lambda: in_threads(notice_fork, second, third)) == [None, 2, 1]


def test_a_renewal_that_an_exception_cut_short_is_made_all_the_same(mark: None) -> None:
    class Struck(BaseException):
        pass

    class Fragile(Renewed):
        def renew_after_fork(self) -> None:
            super().renew_after_fork()
            if len(self.pids) == 2:
                raise Struck

    fragile = [Fragile() for _ in range(3)]

    def struck() -> int:
        times = 0
        while True:
            try:
                notice_fork()
            except Struck:
                times += 1
            else:
                return times

    assert in_c_child(lambda: (struck(), [len(f.pids) > 2 for f in fragile])) == (3, [True] * 3)


def test_an_object_made_in_a_child_is_not_renewed_there(mark: None) -> None:
    old = Renewed()

    def make() -> tuple[int, int]:
        new = Renewed()
        notice_fork()
        return len(old.pids), len(new.pids)

    assert in_c_child(make) == (2, 1)


def test_a_kernel_that_says_yes_to_any_advice_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Emulated(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            pass

    monkeypatch.setattr(_fork.mmap, "mmap", Emulated)
    assert isinstance(_fork._make_mark(), _fork._Pid)


def test_an_object_is_not_kept_alive() -> None:
    renewed = Renewed()
    pids = renewed.pids
    del renewed
    gc.collect()
    assert in_child(lambda: len(pids) == 1)


def test_counters_count_by_process() -> None:
    counters = Counters()
    counters.add("a.b")
    counters.add("a.b", 4)

    def fresh() -> bool:
        counters.add("a.b")
        return counters.read() == {"a.b": 1}

    with counters._lock:  # another thread was counting when we forked
        assert in_child(fresh)
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
