"""Turns of threads are short while many leases are renewed, and at no other time."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from govredis import GovRedis, HeldLock
from govredis.client import RedisNode
from govredis.locks import turns
from govredis.locks.turns import ShortTurns, short_turns
from govredis.testing.servers import RedisServer

RenewNow = Callable[[list[HeldLock]], None]
USUAL = 0.004


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(USUAL)
    yield
    sys.setswitchinterval(before)


@pytest.mark.once
@pytest.mark.parametrize(("many", "turn"), [(9, USUAL), (10, turns._SHORT)])
def test_during_a_renewal_of_many(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    renew_now: RenewNow,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
    many: int,
    turn: float,
) -> None:
    locks = make_gov(redis_url=redis_server.url).locks
    held = [locks.acquire(f"x{n}", ttl=1000) for n in range(many)]
    before = {lock.name: lock._lease.deadline for lock in held}
    eventually(lambda: len(locks.held()) == many)
    seen: list[tuple[int, float]] = []
    send = RedisNode.pipeline

    def pipeline(client: RedisNode, commands: Any, *args: Any, **options: Any) -> list[Any]:
        if threading.current_thread().name == "govredis-renewal":
            seen.append((len(commands), sys.getswitchinterval()))
        return send(client, commands, *args, **options)

    monkeypatch.setattr(RedisNode, "pipeline", pipeline)
    renew_now(held)
    eventually(lambda: all(lock._lease.deadline > before[lock.name] for lock in held))
    assert (many + 1, pytest.approx(turn)) in seen
    eventually(lambda: sys.getswitchinterval() == pytest.approx(USUAL))
    assert all(lock.release() for lock in held)


def test_they_end_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), short_turns:
        assert sys.getswitchinterval() == pytest.approx(turns._SHORT)
        _ = 1 / 0
    assert sys.getswitchinterval() == pytest.approx(USUAL)


@pytest.mark.parametrize("other", [0.001, 0.02])
def test_an_interval_that_the_application_sets_meanwhile_stays(other: float) -> None:
    with short_turns:
        sys.setswitchinterval(other)
    assert sys.getswitchinterval() == pytest.approx(other)


def test_an_application_that_sets_what_it_has_read_meanwhile_is_not_believed() -> None:
    """It saves our interval during a renewal, and restores it after."""
    its_own = ShortTurns()
    with its_own:
        saved = sys.getswitchinterval()
        sys.setswitchinterval(0.02)
    sys.setswitchinterval(saved)
    with its_own:
        pass
    assert sys.getswitchinterval() == pytest.approx(USUAL)


def test_a_fork_or_an_exception_within_leaves_a_child_the_usual_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    its_own = ShortTurns()
    set_interval = sys.setswitchinterval

    def struck(interval: float) -> None:
        set_interval(interval)
        raise InterruptedError

    monkeypatch.setattr(sys, "setswitchinterval", struck)
    with pytest.raises(InterruptedError):
        its_own.__enter__()
    monkeypatch.undo()
    its_own.renew_after_fork()
    assert sys.getswitchinterval() == pytest.approx(USUAL)


def test_a_shorter_one_is_left_alone() -> None:
    sys.setswitchinterval(0.0001)
    with short_turns:
        assert sys.getswitchinterval() == pytest.approx(0.0001)
    assert sys.getswitchinterval() == pytest.approx(0.0001)


def test_a_child_that_is_forked_meanwhile_has_the_usual_turns() -> None:
    its_own = ShortTurns()
    with its_own:
        child = os.fork()
        if child == 0:
            os._exit(0 if abs(sys.getswitchinterval() - USUAL) < 1e-6 else 1)
        assert sys.getswitchinterval() == pytest.approx(turns._SHORT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
