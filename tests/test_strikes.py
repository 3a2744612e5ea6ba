"""Every public call, struck by an exception everywhere: the process goes on as if it had not been called."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psycopg2
import pytest
from strikes import PACKAGE, lost_mutexes, strike_anywhere
from support import redis_of

from govredis import BackendError, GovRedis, HeldLock, Limit, LockTimeout
from govredis.locks import renewal
from govredis.locks.held import HeldLocks
from govredis.locks.lease import LockLease
from govredis.metadata import entry_keys
from govredis.testing.servers import RedisServer

pytestmark = [
    pytest.mark.once,
    pytest.mark.one_redis,
    # A thread that was struck while it started; a connection whose frame was blown away.
    pytest.mark.usefixtures("destructors_struck"),
    # A handle whose release was struck before it began.
    pytest.mark.filterwarnings("ignore:lock .* was collected while held:ResourceWarning"),
]

#: Takes a GovRedis, a name, and a list of all that must be released where it was struck.
Operation = Callable[[GovRedis, str, list[Any]], object]
RATE = "1000000/hour"


def held(take: Callable[[GovRedis, str], Any]) -> Operation:
    def operation(gov: GovRedis, name: str, kept: list[Any]) -> None:
        kept.append(take(gov, name))
        kept[-1].release()

    return operation


def extended(gov: GovRedis, name: str, kept: list[Any]) -> None:
    kept.append(gov.locks.acquire(name, ttl=1000))
    kept[-1].extend(500)
    kept[-1].remaining()
    kept[-1].on_lost(print)
    kept[-1].raise_if_lost()
    kept[-1].release()


def contended(gov: GovRedis, name: str, kept: list[Any]) -> None:
    kept.append(gov.locks.acquire(name, ttl=1000))
    for wait in 0, 0.01:
        with suppress(LockTimeout):
            kept.append(gov.locks.acquire(name, timeout=wait))
    kept[0].release()


def decorated(gov: GovRedis, name: str, kept: list[Any]) -> None:
    gov.locks.locked("{name}", ttl=1000)(lambda name: kept.append(Nothing()))(name)


class Nothing:
    def release(self) -> None:
        pass


def committed(gov: GovRedis, name: str, _: list[Any]) -> None:
    connection = psycopg2.connect(gov.config.database_url)
    try:
        with gov.metadata.after_commit(connection) as commit:
            commit.invalidate(name)
    finally:
        connection.close()


def published(gov: GovRedis, name: str, _: list[Any]) -> None:
    connection = psycopg2.connect(gov.config.database_url)
    try:
        gov.events.publish("struck", name, connection)
        connection.commit()
    finally:
        connection.close()


def consume(gov: GovRedis, name: str) -> None:
    gov.events.publish("struck", name)
    with gov.events.consume("g", "c", "struck", deliveries=1_000_000) as events:
        events.get(0.001)


def snapshot(gov: GovRedis, _: str, __: list[Any]) -> None:
    gov.health._last = None  # it is cached for a second
    gov.health.snapshot()


def call(what: Callable[[GovRedis, str], object]) -> Operation:
    return lambda gov, name, _: what(gov, name)


def bind(gov: GovRedis, name: str) -> None:
    gov.sessions.bind(name, "agent")


def load(gov: GovRedis, name: str) -> None:
    gov.metadata.get_or_load(name, lambda _: {"a": 1})


def create(gov: GovRedis, name: str) -> None:
    gov.agents.delete(name)
    gov.agents.create(name, {"a": 1})


def cached(gov: GovRedis, name: str) -> None:
    gov.cache("report", ttl=60).cached("{name}", shared=True)(lambda name: {"of": name})(name)


def limited(gov: GovRedis, name: str) -> None:
    gov.limits.rate_limited(RATE, key="{name}")(lambda name: name)(name)


def leased(gov: GovRedis, name: str) -> None:
    rate = Limit(1000, 3600, lease=100)
    for _ in range(4):
        gov.limits.hit(name, rate, cost=2)
    gov.limits.reset(name)


OPERATIONS: dict[str, Operation] = {
    "lock": held(lambda gov, name: gov.locks.acquire(name, ttl=1000)),
    "try_acquire": held(lambda gov, name: gov.locks.try_acquire(name, ttl=1000) or Nothing()),
    "acquire_many": held(lambda gov, name: gov.locks.acquire_many([name, f"{name}'"], ttl=1000)),
    "read": held(lambda gov, name: gov.locks.rwlock(name).read(ttl=1000)),
    "write": held(lambda gov, name: gov.locks.rwlock(name).write(ttl=1000)),
    "semaphore": held(lambda gov, name: gov.locks.semaphore(name, slots=1).acquire(ttl=1000)),
    "extend": extended,
    "contended": contended,
    "locked": decorated,
    "holder": call(lambda gov, name: gov.locks.holder(name)),
    "held": call(lambda gov, name: gov.locks.held()),
    "force_release": call(lambda gov, name: gov.locks.force_release(name)),
    "bind": call(bind),
    "get session": call(lambda gov, name: gov.sessions.get(name, touch=True)),
    "exists": call(lambda gov, name: gov.sessions.exists(name)),
    "update": call(lambda gov, name: gov.sessions.update(name, lambda _: {"a": 1})),
    "touch": call(lambda gov, name: gov.sessions.touch(name)),
    "rotate": call(lambda gov, name: gov.sessions.rotate(name)),
    "for_agent": call(lambda gov, name: gov.sessions.for_agent("agent")),
    "unbind": call(lambda gov, name: gov.sessions.unbind(name)),
    "start": call(lambda gov, name: gov.sessions.start(name)),
    "unbind_agent": call(lambda gov, name: gov.sessions.unbind_agent("agent")),
    "hit and refund": call(lambda gov, name: gov.limits.hit(name, RATE).refund()),
    "deny": call(lambda gov, name: [gov.limits.hit(name, "1/hour") for _ in range(2)]),
    "peek": call(lambda gov, name: gov.limits.peek(name, RATE)),
    "require": call(lambda gov, name: gov.limits.require(name, RATE)),
    "wait": call(lambda gov, name: gov.limits.wait(name, RATE, timeout=1)),
    "hit_many": call(lambda gov, name: gov.limits.hit_many([(name, RATE), ("another", RATE)])),
    "get_count": call(lambda gov, name: gov.limits.get_count(name, 3600)),
    "rate_limited": call(limited),
    "leased": call(leased),
    "reset": call(lambda gov, name: gov.limits.reset(name)),
    "most_denied": call(lambda gov, name: gov.limits.most_denied()),
    "get_or_load": call(load),
    "get": call(lambda gov, name: gov.metadata.get(name)),
    "set": call(lambda gov, name: gov.metadata.set(name, {"a": 2})),
    "get_many": call(lambda gov, name: gov.metadata.get_many([name, "b"], lambda ids: {i: {} for i in ids})),
    "invalidate": call(lambda gov, name: gov.metadata.invalidate(name)),
    "invalidate_all": call(lambda gov, name: gov.metadata.invalidate_all()),
    "cached": call(cached),
    "after_commit": committed,
    "create": call(create),
    "get agent": call(lambda gov, name: gov.agents.get(name)),
    "get_many agents": call(lambda gov, name: gov.agents.get_many([name, "another"])),
    "update_metadata": call(lambda gov, name: gov.agents.update_metadata(name, a=2)),
    "archive": call(lambda gov, name: gov.agents.archive(name)),
    "delete": call(lambda gov, name: gov.agents.delete(name)),
    "publish": call(lambda gov, name: gov.events.publish("struck", name)),
    "publish with a transaction": published,
    "listen": call(lambda gov, name: gov.events.listen("struck").get(0)),
    "consume": call(consume),
    "snapshot": snapshot,
}
#: The call that an operation needs before it, by the same name.
BEFORE: dict[str, Callable[[GovRedis, str], object]] = {
    **dict.fromkeys(
        ["get session", "exists", "update", "touch", "rotate", "for_agent", "unbind", "unbind_agent"], bind
    ),
    **dict.fromkeys(["get agent", "update_metadata", "archive", "delete"], create),
    **dict.fromkeys(["invalidate", "invalidate_all", "get"], load),
}
#: Those by which values of this process are read.
LOCAL = {"get_or_load", "get", "invalidate", "invalidate_all"}
CASES = [*((what, False) for what in OPERATIONS), *((what, True) for what in LOCAL)]


@pytest.fixture
def other() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Has something done by another thread, within a time in which nothing that goes on is late."""
    pool = ThreadPoolExecutor(1)

    def do(what: Callable[[], Any]) -> Any:
        future: Future[Any] = pool.submit(what)
        return future.result(60)

    yield do
    pool.shutdown(wait=False)


@pytest.fixture(autouse=True)
def renewal_does_not_look_by_itself(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It has to be woken."""
    with monkeypatch.context() as patched:
        patched.setattr(renewal, "_IDLE", 1000)
        yield
    renewal.renewer._ring()


@pytest.fixture(autouse=True)
def a_struck_loader_is_not_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_keys, "LEASE_MS", "100")


#: Leases of whose handles nobody has any: struck before their release began. They end at their ttl, as promised.
ABANDONED: list[LockLease] = []


@pytest.fixture(autouse=True)
def those_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LockLease, "abandon", lambda lease: ABANDONED.append(lease))


def leases(kept: list[Any]) -> list[Any]:
    """The leases that were held when it was struck."""
    handles = [handle for taken in kept for handle in (taken.values() if isinstance(taken, HeldLocks) else [taken])]
    return [*ABANDONED, *(handle._lease for handle in handles if isinstance(handle, HeldLock))]


def end(kept: list[Any]) -> None:
    """Release them as a caller that has a handle does."""
    while kept:
        kept.pop().release()
    while ABANDONED:
        ABANDONED.pop().end()


def connections_lost(gov: GovRedis) -> list[str]:
    """Those that are neither idle nor used by anybody."""
    gc.collect()
    redis = redis_of(gov)
    pools = {
        "redis": redis._pool,
        "waiting": redis._waiting,
        "blocking": redis._blocking,
        "postgres": gov.postgres._pool,
    }
    lost = {name: sum(1 for _ in pool.live) - len(pool.idle) for name, pool in pools.items()}
    return [name for name, n in lost.items() if n]


def lock_files(gov: GovRedis) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    # The process keeps that it lives in a file of its own.
    return [p for p in found if p.startswith(gov.locks._file_backend.path) and not p.endswith("/living")]


def threads() -> Counter[str]:
    """Those that run: one that was struck while it started may stand for ever before it does."""
    return Counter(t.name for t in threading.enumerate() if t.name.startswith("govredis-") and t.is_alive())


def intact(gov: GovRedis, other: Any, eventually: Any) -> None:
    eventually(lambda: not connections_lost(gov))
    eventually(lambda: not lock_files(gov))
    eventually(lambda: max(threads().values(), default=1) == 1)
    assert not lost_mutexes()
    with other(lambda: gov.locks.acquire("renewed", ttl=1000)) as lock:
        first = lock._lease.deadline
        eventually(lambda: lock._lease.due > first - 1000 + 1)  # it was woken for it, and is not for a while
        lock._lease._next = lock._lease.due = 0.0
        renewal.renewer.add(lock._lease)
        eventually(lambda: lock._lease.deadline > first)
    assert not renewal.renewer.leases()


@pytest.mark.parametrize(("what", "local_cache"), sorted(CASES))
def test_any_call_that_is_struck_goes_on_in_another_thread_and_leaves_nothing(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    postgres_server: Any,
    other: Callable[[Callable[[], Any]], Any],
    eventually: Callable[..., Any],
    what: str,
    local_cache: bool,
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, local_cache=local_cache)
    operation, before = OPERATIONS[what], BEFORE.get(what, lambda gov, name: None)
    kept: list[Any] = []
    n = [0]

    def next_one() -> str:
        end(kept)
        n[0] += 1
        before(gov, f"x{n[0]}")
        return f"x{n[0]}"

    def works() -> None:
        assert not lost_mutexes(leases(kept)), "the renewal thread may be waiting for it, and then stands for ever"
        end(kept)
        name, mine = f"x{n[0]}", list[Any]()
        before(gov, name)
        other(lambda: operation(gov, name, mine))

    operation(gov, next_one(), kept)
    assert strike_anywhere(lambda name: operation(gov, name, kept), works, next_one) > 10
    gc.collect()  # A handle in a cycle, a traceback's, is abandoned only when that is collected.
    end(kept)
    intact(gov, other, eventually)


def test_a_breaker_that_is_struck_while_it_is_open_closes_again(
    make_gov: Callable[..., GovRedis],
    mortal_redis: RedisServer,
    other: Callable[[Callable[[], Any]], Any],
    eventually: Callable[..., Any],
) -> None:
    gov = make_gov(redis_url=mortal_redis.url)
    client = redis_of(gov)
    assert client is not None
    client.call("PING")
    mortal_redis.kill()

    def ask() -> None:
        with suppress(BackendError):
            client.call("PING")

    def overdue() -> None:
        """As where threads cannot run."""
        ask()
        client.breaker._next_probe = 0.0
        ask()
        with suppress(BackendError):
            client.replay_soon("it was struck")

    assert strike_anywhere(lambda _: overdue(), lambda: other(overdue)) > 20
    assert not client.breaker.closed
    assert not lost_mutexes()
    mortal_redis.restart(data="empty")
    eventually(lambda: client.breaker.closed)
    assert other(lambda: client.call("PING")) is not None


LOSES = """
import threading
class Owner:
    def __init__(self, made):
        self.mutex = threading.RLock()
        made.append(self)
    def by_acquire(self):
        self.mutex.acquire()
        try:
            len("")
        finally:
            self.mutex.release()
    def by_condition(self):
        with threading.Condition(self.mutex):
            len("")
    def by_with(self):
        with self.mutex:
            len("")
"""


@pytest.mark.parametrize(("how", "is_lost"), [("by_acquire", True), ("by_condition", True), ("by_with", False)])
def test_the_check_itself(how: str, is_lost: bool) -> None:
    module: dict[str, Any] = {"__name__": "govredis.of_this_test"}
    exec(compile(LOSES, f"{PACKAGE}/of_this_test.py", "exec"), module)
    made: list[Any] = []

    def works() -> None:
        pass

    assert strike_anywhere(lambda _: getattr(module["Owner"](made), how)(), works) > 1
    lost = lost_mutexes(within=0.1)
    assert bool(lost) is is_lost
    assert {"Owner.mutex"} >= set(lost)
