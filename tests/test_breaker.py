"""CircuitBreaker, with a clock moved by hand, and with its thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest
from support import PATIENCE, eventually, in_child

from govredis import breaker as breaker_module
from govredis._sole import SoleMark
from govredis.breaker import CircuitBreaker, Rejected
from govredis.errors import BackendUnavailable


class Away(Exception):
    pass


class Probe:
    """The probe that the breaker calls: it counts, and answers as it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.up = False
        self.during: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        self.calls += 1
        self.during()
        if not self.up:
            raise Away(f"probe {self.calls} failed")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(probe: Probe, clock: Clock) -> CircuitBreaker:
    """Without a thread, on the clock of the test."""
    return CircuitBreaker("Redis at h:1", probe, clock=clock, threads=False)


@pytest.fixture
def threaded(probe: Probe) -> Iterator[CircuitBreaker]:
    breaker = CircuitBreaker("Redis at h:1", probe)
    yield breaker
    breaker.close()


def fail(breaker: CircuitBreaker, reason: str = "refused", *, timed_out: bool = False) -> None:
    breaker.failed(breaker.period, reason, timed_out=timed_out)


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "govredis" and r.levelno == level]


# -- opening


def test_closed_to_begin_with(breaker: CircuitBreaker, probe: Probe) -> None:
    assert breaker.closed
    breaker.check()
    assert breaker.away_for() == 0
    assert probe.calls == 0


def test_opens_on_the_first_timeout(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, "no answer", timed_out=True)
    assert not breaker.closed
    with pytest.raises(BackendUnavailable, match=r"^Redis at h:1 is away: no answer$"):
        breaker.check()
    clock.now += 0.25
    assert breaker.away_for() == 0.25
    assert breaker.times_opened == 1


def test_opens_on_the_second_refusal_in_a_row(breaker: CircuitBreaker) -> None:
    fail(breaker)
    breaker.check()
    breaker.succeeded()
    fail(breaker)
    assert breaker.closed
    fail(breaker)
    assert not breaker.closed


def test_a_late_failure_of_an_older_generation_is_ignored(breaker: CircuitBreaker, probe: Probe, clock: Clock) -> None:
    older = breaker.period
    fail(breaker, timed_out=True)
    assert breaker.period > older
    probe.up = True
    clock.now += 10
    breaker.check()
    assert breaker.closed
    for _ in range(3):
        breaker.failed(older, "sent before the outage", timed_out=True)
    assert breaker.closed
    fail(breaker, timed_out=True)
    assert not breaker.closed


def test_a_late_success_closes_nothing(breaker: CircuitBreaker) -> None:
    fail(breaker, timed_out=True)
    breaker.succeeded()
    assert not breaker.closed
    with pytest.raises(BackendUnavailable):
        breaker.check()


def test_failures_while_open_do_not_open_it_again(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, "first", timed_out=True)
    period, opened_at = breaker.period, breaker.opened_at
    clock.now += 1
    fail(breaker, "second", timed_out=True)
    assert (breaker.period, breaker.opened_at, breaker.reason, breaker.times_opened) == (
        period,
        opened_at,
        "first",
        1,
    )


def test_refusals_are_counted_anew_after_an_outage(breaker: CircuitBreaker, probe: Probe, clock: Clock) -> None:
    fail(breaker)
    fail(breaker)
    probe.up = True
    clock.now += 10
    breaker.check()
    fail(breaker)
    assert breaker.closed


# -- probing, where no thread runs


def test_an_overdue_caller_probes_and_nobody_before(breaker: CircuitBreaker, probe: Probe, clock: Clock) -> None:
    fail(breaker, timed_out=True)
    probe.up = True
    clock.now += 0.549
    with pytest.raises(BackendUnavailable):
        breaker.check()
    assert probe.calls == 0
    clock.now += 0.002
    breaker.check()
    assert probe.calls == 1
    assert breaker.closed
    assert breaker.away_for() == 0
    assert breaker.opened_at is None


def test_the_schedule_slows_down_to_400_ms_with_jitter(breaker: CircuitBreaker, probe: Probe, clock: Clock) -> None:
    fail(breaker, timed_out=True)
    assert breaker._next_probe == clock.now + 0.05
    for slowest in (0.1, 0.2, 0.4, 0.4, 0.4):
        clock.now += 10
        with pytest.raises(BackendUnavailable, match=f"is away: probe {probe.calls + 1} failed"):
            breaker.check()
        wait = breaker._next_probe - clock.now
        assert 0.75 * slowest - 1e-9 <= wait <= slowest + 1e-9
    assert probe.calls == 5
    # A new outage begins fast again.
    probe.up = True
    clock.now += 10
    breaker.check()
    clock.now += 1
    fail(breaker, timed_out=True)
    assert breaker._next_probe == clock.now + 0.05


def test_a_server_that_fails_again_right_after_its_return_is_asked_later_each_time(
    breaker: CircuitBreaker, probe: Probe, clock: Clock
) -> None:
    """It answers probes, but not what is asked of it, so longer waits let fewer callers find out."""
    probe.up = True
    for wait in (0.05, 0.1, 0.2, 0.4, 0.4):
        fail(breaker, timed_out=True)
        assert breaker._next_probe - clock.now == pytest.approx(wait)
        clock.now += wait + 0.51
        breaker.check()
        assert breaker.closed
        clock.now += 0.99
    breaker.trip("something was noted")
    assert breaker._next_probe - clock.now == pytest.approx(0.05), "that is no failure"
    clock.now += 1
    breaker.check()
    fail(breaker, timed_out=True)
    probe.up = False
    clock.now += 6
    with pytest.raises(BackendUnavailable):
        breaker.check()
    assert breaker._next_probe - clock.now <= 0.4, "away after all: its return is not to be missed"
    probe.up = True
    clock.now += 6
    breaker.check()
    clock.now += 1
    fail(breaker, timed_out=True)
    assert breaker._next_probe - clock.now == pytest.approx(0.05), "it was well for a second"


def test_the_schedule_is_jittered(probe: Probe) -> None:
    waits = set()
    for _ in range(5):
        clock = Clock()
        breaker = CircuitBreaker("h", probe, clock=clock, threads=False)
        fail(breaker, timed_out=True)
        clock.now += 10
        with pytest.raises(BackendUnavailable):
            breaker.check()
        waits.add(breaker._next_probe - clock.now)
    assert len(waits) > 1


def test_only_one_overdue_caller_probes(breaker: CircuitBreaker, probe: Probe, clock: Clock) -> None:
    def others() -> None:
        with pytest.raises(BackendUnavailable):
            breaker.check()  # does not wait for the probe that is running

    fail(breaker, timed_out=True)
    probe.up = True
    probe.during = others
    clock.now += 10
    breaker.check()
    assert probe.calls == 1


def test_a_probe_interrupted_by_a_signal_leaves_the_next_one_free(
    breaker: CircuitBreaker, probe: Probe, clock: Clock
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    fail(breaker, timed_out=True)
    probe.during = interrupt
    clock.now += 10
    with pytest.raises(KeyboardInterrupt):
        breaker.check()
    assert not breaker.closed
    probe.during = lambda: None
    probe.up = True
    breaker.check()
    assert breaker.closed


# -- trip


def test_trip_opens(breaker: CircuitBreaker) -> None:
    breaker.trip("a write is pending")
    with pytest.raises(BackendUnavailable, match=r"a write is pending"):
        breaker.check()


def test_only_a_call_or_a_probe_finds_the_server_away(breaker: CircuitBreaker, probe: Probe, clock: Clock) -> None:
    assert not breaker.is_away()
    breaker.trip("a write is pending")
    assert not breaker.is_away()
    clock.now += 10
    with pytest.raises(BackendUnavailable):
        breaker.check()
    assert breaker.is_away(), "the probe has failed"
    probe.up = True
    clock.now += 10
    breaker.check()
    assert not breaker.is_away()
    fail(breaker, timed_out=True)
    assert breaker.is_away()
    breaker.give_up("the password is wrong")
    assert not breaker.is_away()


def test_a_quiet_trip_is_logged_only_where_its_probe_fails(
    breaker: CircuitBreaker, probe: Probe, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A Cluster's node that takes slots over is well: it only has its replays first."""
    caplog.set_level(logging.INFO, "govredis")
    probe.up = True
    breaker.trip("it has slots of another", quiet=True)
    clock.now += 10
    breaker.check()
    assert breaker.closed
    assert caplog.records == []
    probe.up = False
    breaker.trip("it has slots of another", quiet=True)
    clock.now += 10
    with pytest.raises(BackendUnavailable):
        breaker.check()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    probe.up = True
    clock.now += 10
    breaker.check()
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


def test_trip_during_a_probe_has_another_whole_probe_run(breaker: CircuitBreaker, probe: Probe, clock: Clock) -> None:
    fail(breaker, timed_out=True)
    probe.up = True
    probe.during = lambda: breaker.trip("noted too late for this probe") if probe.calls == 1 else None
    clock.now += 10
    with pytest.raises(BackendUnavailable):
        breaker.check()
    assert probe.calls == 1
    clock.now += 10
    breaker.check()
    assert probe.calls == 2
    assert breaker.times_opened == 1


def test_trip_before_a_probe_needs_no_second_one(breaker: CircuitBreaker, probe: Probe, clock: Clock) -> None:
    breaker.trip("a write is pending")
    breaker.trip("another is pending")
    probe.up = True
    clock.now += 10
    breaker.check()
    assert (breaker.closed, probe.calls, breaker.times_opened) == (True, 1, 1)


def test_callers_wait_for_the_probe_while_writes_are_pending(
    threaded: CircuitBreaker, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has found the server away: what is asked of it must not be done elsewhere."""
    monkeypatch.setattr(breaker_module, "_DRAIN", PATIENCE)  # no stall of the machine outlasts it
    probing, go_on = threading.Event(), threading.Event()
    probe.up, probe.during = True, lambda: (probing.set(), go_on.wait(20))
    threaded.trip("a write is pending")
    assert probing.wait(20)
    came: list[bool] = []
    others = [threading.Thread(target=lambda: (threaded.check(), came.append(threaded.closed))) for _ in range(3)]
    for other in others:
        other.start()
    go_on.set()
    for other in others:
        other.join(20)
    assert came == [True, True, True]


def test_a_caller_that_waits_for_that_probe_is_told_that_it_has_failed(threaded: CircuitBreaker, probe: Probe) -> None:
    threaded.trip("a write is pending")
    with pytest.raises(BackendUnavailable):
        threaded.check()
    eventually(lambda: probe.calls >= 1)
    assert not threaded._tripped, "nobody waits for the next ones"
    probe.up = True
    eventually(lambda: threaded.closed)


# -- with its thread


def test_the_thread_closes_it_without_any_caller(threaded: CircuitBreaker, probe: Probe) -> None:
    fail(threaded, timed_out=True)
    eventually(lambda: probe.calls >= 2)
    assert not threaded.closed
    probe.up = True
    eventually(lambda: threaded.closed)
    threaded.check()
    eventually(lambda: threaded._thread is None)


def test_one_thread_per_outage_and_again_for_the_next(threaded: CircuitBreaker, probe: Probe) -> None:
    def alive() -> int:
        return sum(t.name == "govredis-probe" for t in threading.enumerate())

    before = alive()
    for _ in range(3):
        probe.up = False
        for _ in range(5):
            fail(threaded, timed_out=True)
            threaded.trip("a write is pending")
        assert alive() == before + 1
        probe.up = True
        eventually(lambda: threaded.closed)
    eventually(lambda: alive() == before)
    assert threaded.times_opened == 3


def test_a_trip_during_the_threads_probe(threaded: CircuitBreaker, probe: Probe) -> None:
    tripped = []

    def during() -> None:
        if not tripped:
            tripped.append(probe.calls)
            threaded.trip("noted too late for this probe")

    probe.during, probe.up = during, True
    fail(threaded, timed_out=True)
    eventually(lambda: threaded.closed)
    assert probe.calls == tripped[0] + 1


def test_callers_do_not_probe_while_the_thread_does(probe: Probe) -> None:
    hung = threading.Event()
    callers: list[str] = []
    probe.during = lambda: (callers.append(threading.current_thread().name), hung.wait(20), None)[-1]
    breaker = CircuitBreaker("h", probe)
    try:
        fail(breaker, timed_out=True)
        eventually(lambda: callers)
        breaker._next_probe -= 10  # long overdue
        for _ in range(100):
            with pytest.raises(BackendUnavailable):
                breaker.check()
        assert callers == ["govredis-probe"]
    finally:
        hung.set()
        breaker.close()


@pytest.mark.parametrize(
    "hiding",
    [RuntimeError("release unlocked lock"), KeyError("of threads that have not begun")],
    ids=["struck while it waits", "struck once it runs"],
)
def test_a_strike_that_the_start_of_the_thread_hides_is_raised(
    probe: Probe, clock: Clock, monkeypatch: pytest.MonkeyPatch, hiding: Exception
) -> None:
    class Struck(BaseException):
        pass

    def start(thread: threading.Thread) -> None:
        try:
            raise Struck
        finally:
            raise hiding  # as threading.Condition does, and Thread.start itself

    monkeypatch.setattr(threading.Thread, "start", start)
    breaker = CircuitBreaker("Redis", probe, clock=clock)
    with pytest.raises(Struck):
        breaker.failed(breaker.period, "struck", timed_out=True)
    assert not breaker.closed


def test_callers_probe_where_threads_cannot_start(probe: Probe, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    breaker = CircuitBreaker("h", probe, clock=clock)
    fail(breaker, timed_out=True)
    assert not breaker.closed
    with pytest.raises(BackendUnavailable):
        breaker.check()
    probe.up = True
    clock.now += 10
    breaker.check()
    assert breaker.closed


def test_the_open_path_costs_next_to_nothing(breaker: CircuitBreaker, probe: Probe) -> None:
    """No lock, no probe: it works while somebody holds the lock and probes."""
    fail(breaker, timed_out=True)
    breaker._probing.holder = SoleMark
    with breaker._lock:
        for _ in range(1000):
            with pytest.raises(BackendUnavailable):
                breaker.check()
    assert probe.calls == 0


def test_close_ends_the_thread_and_keeps_the_state(probe: Probe) -> None:
    breaker = CircuitBreaker("h", probe)
    fail(breaker, timed_out=True)
    thread = breaker._thread
    assert thread is not None and thread.daemon
    breaker.close()
    assert not thread.is_alive()
    assert not breaker.closed
    breaker.close()
    # Used again nevertheless: an overdue caller probes.
    probe.up = True
    breaker._next_probe -= 10
    breaker.check()
    assert breaker.closed


def test_the_first_user_after_close_alone_pays_for_a_probe(probe: Probe) -> None:
    breaker = CircuitBreaker("h", probe)
    fail(breaker, timed_out=True)
    breaker.close()
    breaker._next_probe -= 10
    with pytest.raises(BackendUnavailable):
        breaker.check()
    probe.up = True
    eventually(lambda: breaker.closed)
    breaker.close()


# -- fork


def test_a_child_forked_while_open_recovers_by_itself(threaded: CircuitBreaker, probe: Probe) -> None:
    fail(threaded, timed_out=True)

    def child() -> None:
        with pytest.raises(BackendUnavailable):
            threaded.check()  # starts a thread of the child's own
        assert threaded._thread is not None
        probe.up = True
        eventually(lambda: threaded.closed)

    threaded._probing.holder = SoleMark
    with threaded._lock:  # whatever the parent's threads were doing
        in_child(child)
    assert not threaded.closed


def test_a_child_forked_while_open_finds_it_back_at_its_first_call(threaded: CircuitBreaker, probe: Probe) -> None:
    fail(threaded, timed_out=True)

    def child() -> None:
        probe.up = True
        threaded.check()
        assert threaded.closed

    in_child(child)


def test_a_child_forked_while_closed_opens_for_itself(threaded: CircuitBreaker) -> None:
    def child() -> None:
        fail(threaded, timed_out=True)
        assert not threaded.closed

    in_child(child)
    assert threaded.closed


# -- log


def test_one_warning_per_outage_and_one_info_on_recovery(
    breaker: CircuitBreaker, probe: Probe, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "govredis")
    for _ in range(2):
        probe.up = False
        for _ in range(3):
            fail(breaker, "no answer", timed_out=True)
            breaker.trip("a write is pending")
            clock.now += 1
            with pytest.raises(BackendUnavailable):
                breaker.check()
        probe.up = True
        clock.now += 1
        breaker.check()
    assert messages(caplog, logging.WARNING) == ["Redis at h:1 is away (no answer): fallbacks take over"] * 2
    assert messages(caplog, logging.INFO) == ["Redis at h:1 is back after 4.0 s"] * 2
    assert len(caplog.records) == 4


def test_a_log_handler_may_use_what_the_breaker_guards(breaker: CircuitBreaker) -> None:
    seen = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            breaker.trip("the log's own pending write")
            breaker.succeeded()
            seen.append(record.getMessage())

    handler = Handler()
    logging.getLogger("govredis").addHandler(handler)
    try:
        fail(breaker, timed_out=True)
    finally:
        logging.getLogger("govredis").removeHandler(handler)
    assert len(seen) == 1


def test_the_applications_random_numbers_are_left_alone(probe: Probe, clock: Clock) -> None:
    import random

    random.seed(7)
    before = random.getstate()
    breaker = CircuitBreaker("Redis at h:1", probe, clock=clock, threads=False)
    breaker.failed(0, "gone", timed_out=True)
    clock.now += 10
    with pytest.raises(BackendUnavailable):
        breaker.check()
    assert probe.calls == 1
    assert random.getstate() == before


# -- given up


def test_given_up_it_is_open_for_good_and_says_why(
    breaker: CircuitBreaker, probe: Probe, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    period = breaker.period
    for _ in range(2):
        breaker.give_up("Redis at h:1 is something else")
    probe.up = True
    for _ in range(3):
        clock.now += 60
        with pytest.raises(Rejected, match=r"^Redis at h:1 is something else$"):
            breaker.check()
        fail(breaker, timed_out=True)
        breaker.trip("a test")
        breaker.renew_after_fork()
    assert (probe.calls, breaker.times_opened, breaker.away_for()) == (0, 0, 0)
    assert breaker.period > period
    assert messages(caplog, logging.WARNING) == ["Redis at h:1 is something else"]


def test_given_up_during_a_probe_it_stays_so(threaded: CircuitBreaker, probe: Probe) -> None:
    probe.up = True
    probe.during = lambda: threaded.give_up("something else")
    fail(threaded, timed_out=True)
    eventually(lambda: threaded._given_up and threaded._thread is None)
    with pytest.raises(Rejected):
        threaded.check()
