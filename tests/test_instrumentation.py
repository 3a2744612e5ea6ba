"""`on_operation`: each operation that a caller makes is told to the listeners, once, and costs nothing without them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from c_fork import held_by_another_thread, in_c_child, mutexes
from strikes import strike_anywhere
from support import POSTGRES_AWAY, REDIS_AWAY, in_child, in_threads

from govredis import (
    BackendUnavailable,
    GovRedis,
    Limit,
    LockTimeout,
    RateLimitExceeded,
    SessionChanged,
    instrumentation,
)
from govredis.instrumentation import Operation, on_operation
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]
Call = Callable[[GovRedis], object]


@pytest.fixture
def heard() -> Iterator[list[Operation]]:
    found: list[Operation] = []
    end = on_operation(found.append)
    yield found
    end()


def names(heard: list[Operation]) -> list[str]:
    found = [operation.name for operation in heard]
    heard.clear()
    return found


ME = "tenant-7"


def released(gov: GovRedis) -> object:
    return gov.locks.acquire(ME).release()


#: Each operation: the calls that report it, after those with other names that they need.
CALLS: dict[str, Call] = {
    "limits.hit": lambda gov: gov.limits.hit(ME, "9/hour"),
    "limits.peek": lambda gov: gov.limits.peek(ME, "9/hour"),
    "limits.require": lambda gov: gov.limits.require(ME, "9/hour"),
    "limits.wait": lambda gov: gov.limits.wait(ME, "9/hour", timeout=1),
    "limits.hit_many": lambda gov: gov.limits.hit_many([(ME, "9/hour"), (f"{ME}b", "9/hour")]),
    "limits.hit_or_reserve": lambda gov: gov.limits.hit_or_reserve(ME, "9/hour", reservation="r"),
    "limits.check": lambda gov: gov.limits.check(ME, 9, 3600),
    "limits.record": lambda gov: gov.limits.record(ME, 3600),
    "limits.get_count": lambda gov: gov.limits.get_count(ME, 3600),
    "limits.stats": lambda gov: gov.limits.stats(ME),
    "limits.most_denied": lambda gov: gov.limits.most_denied(),
    "limits.reset": lambda gov: gov.limits.reset(ME),
    "limits.purge": lambda gov: gov.limits.purge(),
    "limits.refund": lambda gov: gov.limits.hit(ME, "9/hour").refund(),
    "locks.acquire": lambda gov: gov.locks.acquire(ME).release(),
    "locks.try_acquire": lambda gov: gov.locks.try_acquire(ME).release(),  # type: ignore[union-attr]
    "locks.acquire_many": lambda gov: gov.locks.acquire_many([ME, f"{ME}b"]).release(),
    "locks.holder": lambda gov: gov.locks.holder(ME),
    "locks.is_locked": lambda gov: gov.locks.is_locked(ME),
    "locks.held": lambda gov: gov.locks.held(),
    "locks.glance": lambda gov: gov.locks.glance(),
    "locks.force_release": lambda gov: gov.locks.force_release(ME),
    "locks.extend": lambda gov: (held := gov.locks.acquire(ME), held.extend(), held.release()),
    "locks.release": lambda gov: gov.locks.acquire(ME).release(),
    "locks.rwlock.read": lambda gov: gov.locks.rwlock(ME).read().release(),
    "locks.rwlock.write": lambda gov: gov.locks.rwlock(ME).write().release(),
    "locks.semaphore.acquire": lambda gov: gov.locks.semaphore(ME, slots=2).acquire().release(),
    "sessions.bind": lambda gov: gov.sessions.bind(ME, ME, data={"of": ME}),
    "sessions.get": lambda gov: gov.sessions.get(ME),
    "sessions.get_agent_id": lambda gov: gov.sessions.get_agent_id(ME),
    "sessions.touch": lambda gov: gov.sessions.touch(ME),
    "sessions.exists": lambda gov: gov.sessions.exists(ME),
    "sessions.update": lambda gov: (gov.sessions.bind(ME, ME), gov.sessions.update(ME, {"n": ME})),
    "sessions.rotate": lambda gov: (gov.sessions.bind(ME, ME), gov.sessions.rotate(ME)),
    "sessions.unbind": lambda gov: gov.sessions.unbind(ME),
    "sessions.start": lambda gov: gov.sessions.start(ME, replacing=ME),
    "sessions.for_agent": lambda gov: gov.sessions.for_agent(ME),
    "sessions.unbind_agent": lambda gov: gov.sessions.unbind_agent(ME),
    "sessions.purge": lambda gov: gov.sessions.purge(),
    "sessions.verify": lambda gov: gov.sessions.verify(),
    "metadata.set": lambda gov: gov.metadata.set(ME, {"of": ME}),
    "metadata.get": lambda gov: gov.metadata.get(ME),
    "metadata.get_or_load": lambda gov: gov.metadata.get_or_load(ME, lambda i: {"of": i}),
    "metadata.get_many": lambda gov: gov.metadata.get_many([ME]),
    "metadata.reload": lambda gov: gov.cache("report").cached("{me}")(lambda me: {"of": me}).refresh(ME),
    "metadata.invalidate": lambda gov: gov.metadata.invalidate(ME),
    "metadata.invalidate_all": lambda gov: gov.metadata.invalidate_all(),
    "agents.create": lambda gov: gov.agents.create(ME, {"of": ME}),
    "agents.get": lambda gov: gov.agents.get(ME),
    "agents.get_many": lambda gov: gov.agents.get_many([ME]),
    "agents.update_metadata": lambda gov: gov.agents.update_metadata(ME, n=1),
    "agents.archive": lambda gov: gov.agents.archive(ME),
    "agents.delete": lambda gov: gov.agents.delete(ME),
    "events.publish": lambda gov: gov.events.publish("agent.seen", {"of": ME}, entity=ME),
    "events.deliver": lambda gov: gov.events.deliver(),
    "events.dead": lambda gov: gov.events.dead("agent"),
    "health.check": lambda gov: gov.health.check(),
    "health.snapshot": lambda gov: gov.health.snapshot(),
    "health.history": lambda gov: gov.health.history(),
    "health.count_keys": lambda gov: gov.health.count_keys(),
    "health.beat": lambda gov: gov.health.beat(60),
    "health.purge": lambda gov: gov.health.purge(),
}

#: Public methods that ask no server themselves, or are parts of others.
NO_OPERATIONS = {
    *("RateLimiter.close", "RateLimiter.rate_limited"),
    *("DistributedLock.locked", "DistributedLock.rwlock", "DistributedLock.semaphore"),
    *("DistributedLock.check_folder", "DistributedLock.count_held"),  # of `health.check`
    "DistributedLock.look",  # a `holder`
    *("HeldLock.remaining", "HeldLock.raise_if_lost", "HeldLock.on_lost"),
    *("MetadataCache.cached", "MetadataCache.after_commit", "MetadataCache.stats"),
    "MetadataCache.invalidate_committed",  # an `invalidate`, after a commit
    *(
        "Decider.decide",
        "Decider.hit_many",
        "Decider.hit_or_reserve",
        "Decider.check",
        "Decider.reset",
        "Decider.close",
    ),
    *("EventBus.listen", "EventBus.consume"),  # their readers wait, for as long as no event comes
    *("EventBus.close", "EventBus.renew_after_fork"),
    "HealthMonitor.renew_after_fork",
}


def test_every_public_method_is_an_operation_or_named_here() -> None:
    public = {
        f"{front.of.__name__}.{name}"
        for front in instrumentation._FRONTS
        for name, value in vars(front.of).items()
        if callable(value) and not name.startswith("_")
    }
    operations = {f"{front.of.__name__}.{name}" for front in instrumentation._FRONTS for name in front.methods}
    assert public - operations == NO_OPERATIONS
    assert {f"{front.name}.{name}" for front in instrumentation._FRONTS for name in front.methods} == set(CALLS)


def test_each_operation_is_told_once_and_says_no_id(
    gov: GovRedis, redis_server: RedisServer, postgres_server: PostgresServer, heard: list[Operation]
) -> None:
    needed = {
        "limits.refund": ["limits.hit"],
        "locks.extend": ["locks.acquire"],
        "locks.release": ["locks.acquire"],
        "sessions.update": ["sessions.bind"],
        "sessions.rotate": ["sessions.bind"],
    }
    for name, call in CALLS.items():
        call(gov)
        told = [operation for operation in heard if operation.name not in needed.get(name, ())]
        releases = [operation.name for operation in told if operation.name == "locks.release"]
        assert [each.name for each in told if each.name != "locks.release"] == [name] * (name != "locks.release")
        assert len(releases) == (2 if name == "locks.acquire_many" else 1 if name in ACQUIRE else 0), name
        heard.clear()
        for operation in told:
            assert operation.error is None
            assert not operation.degraded
            assert operation.seconds > 0
            assert ME not in repr(operation)
            if name == "health.check":
                continue  # it may ask in threads of its own
            assert operation.backend in ("redis", "postgres"), name
            at = redis_server.url if operation.backend == "redis" else postgres_server.url
            assert operation.server is not None
            assert operation.server.rpartition(" ")[2].partition("/")[0] in at
    assert gov.counters.get("instrumentation.errors") == 0


ACQUIRE = {
    *("locks.acquire", "locks.try_acquire", "locks.extend", "locks.release"),
    *("locks.rwlock.read", "locks.rwlock.write", "locks.semaphore.acquire"),
}


def test_labels_are_the_names_that_the_code_has_chosen(gov: GovRedis, heard: list[Operation]) -> None:
    gov.limits.hit(ME, "9/hour")
    gov.limits.hit(ME, "9/hour", operation="kg_store").refund()
    gov.limits.hit_many([(ME, "9/hour", "mail")])
    gov.cache("report").get(ME)
    gov.sessions.get(ME)
    assert [(each.name, each.label) for each in heard] == [
        ("limits.hit", "default"),
        ("limits.hit", "kg_store"),
        ("limits.refund", "kg_store"),
        ("limits.hit_many", None),
        ("metadata.get", "report"),
        ("sessions.get", None),
    ]


def test_decorators_and_blocks_are_the_operations_that_they_make(gov: GovRedis, heard: list[Operation]) -> None:
    within: list[str] = []

    def body() -> None:
        within.extend(names(heard))

    gov.limits.rate_limited("9/hour", key="a")(body)()
    gov.limits.rate_limited("9/hour", key="a", on_limit="wait")(body)()
    gov.locks.locked("a")(body)()
    assert within == ["limits.hit", "limits.wait", "locks.acquire"]
    assert names(heard) == ["locks.release"]
    with gov.locks.acquire("b"):
        assert names(heard) == ["locks.acquire"]
    assert names(heard) == ["locks.release"]


def test_a_loaders_operations_are_told_and_those_of_ours_are_not(gov: GovRedis, heard: list[Operation]) -> None:
    def load(identity: str) -> dict[str, str]:
        gov.limits.hit(identity, "9/hour")
        gov.agents.get(identity)
        return {"of": identity}

    gov.metadata.get_or_load("a", load)
    assert names(heard) == ["limits.hit", "agents.get", "metadata.get_or_load"]
    gov.metadata.get_many(["b"], lambda ids: {i: load(i) for i in ids})
    assert names(heard) == ["limits.hit", "agents.get", "metadata.get_many"]
    report = gov.cache("report").cached("{identity}")(load)
    report("c")
    report.refresh("c")
    calls = ["limits.hit", "agents.get"]
    assert names(heard) == [*calls, "metadata.get_or_load", *calls, "metadata.reload"]
    with psycopg2.connect(gov.config.database_url) as connection, gov.metadata.after_commit(connection) as tx:
        tx.invalidate("a")
    connection.close()
    assert names(heard) == ["metadata.invalidate"]


def test_a_leased_hit_and_a_value_of_this_process_ask_no_server(
    make_gov: MakeGov, redis_server: RedisServer, heard: list[Operation], eventually: Any
) -> None:
    gov = make_gov(redis_url=redis_server.url, local_cache=True)
    gov.metadata.set("a", {"n": 1})

    def is_here() -> bool:
        gov.metadata.get("a")
        return gov.metadata.stats()["local_hits"] > 0

    eventually(is_here)
    rate = [Limit(1000, 3600, lease=300)]
    while not gov.counters.get("limits.leased"):
        gov.limits.hit("a", rate)
    here, leased = [each for each in heard if each.name == "metadata.get"][-1], heard[-1]
    assert (here.backend, here.server, here.degraded) == ("local", None, False)
    assert (leased.name, leased.backend, leased.server) == ("limits.hit", "redis", None)


def test_a_fallback_is_named(make_gov: MakeGov, postgres_server: PostgresServer, heard: list[Operation]) -> None:
    both = make_gov(redis_url=REDIS_AWAY, database_url=POSTGRES_AWAY)
    rows = make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url)
    rows.limits.hit("a", "9/hour")
    rows.sessions.bind("s", "a")
    rows.sessions.get("s")
    both.limits.hit("a", "9/hour")
    both.sessions.bind("s", "a")
    both.sessions.get("s")
    both.metadata.get_or_load("a", lambda _: 1)
    both.locks.acquire("a", timeout=60).release()
    told = [(each.name, each.backend, each.degraded) for each in heard]
    assert told == [
        *(("limits.hit", "postgres", True), ("sessions.bind", "postgres", True), ("sessions.get", "postgres", True)),
        *(("limits.hit", "local", True), ("sessions.bind", "local", True), ("sessions.get", "local", True)),
        *(("metadata.get_or_load", "local", True), ("locks.acquire", "local", True), ("locks.release", "local", False)),
    ]
    deny = make_gov(redis_url=REDIS_AWAY, limit_fallback="deny")
    deny.limits.hit("a", "9/hour")
    assert (heard[-1].backend, heard[-1].server) == ("none", None)


def test_errors_are_told_and_raised(gov: GovRedis, make_gov: MakeGov, heard: list[Operation]) -> None:
    def told(error: type[BaseException], call: Callable[[], object]) -> Operation:
        heard.clear()
        with pytest.raises(error) as raised:
            call()
        (operation,) = heard
        assert operation.error is raised.value
        return operation

    gov.limits.hit("a", "1/hour")
    assert told(RateLimitExceeded, lambda: gov.limits.require("a", "1/hour")).backend == "redis"
    with gov.locks.acquire("a"):
        assert told(LockTimeout, lambda: gov.locks.acquire("a", timeout=0)).name == "locks.acquire"
        heard.clear()
        assert gov.locks.try_acquire("a") is None
        (tried,) = heard
        assert tried.error is None, "it is no error of `try_acquire`"
    told(SessionChanged, lambda: gov.sessions.update("nobody", {}))
    assert told(ValueError, lambda: gov.sessions.get("{")).backend == "local"
    away = make_gov(redis_enabled=False, database_url=POSTGRES_AWAY)
    refused = told(BackendUnavailable, lambda: away.agents.get("a"))
    assert (refused.backend, refused.server) == ("postgres", "PostgreSQL at 127.0.0.1:1/postgres")

    def load(_: str) -> None:
        raise KeyboardInterrupt

    assert told(KeyboardInterrupt, lambda: gov.metadata.get_or_load("b", load)).name == "metadata.get_or_load"


def test_a_listener_that_fails_is_logged_once_and_counted_and_hurts_nobody(
    gov: GovRedis, caplog: pytest.LogCaptureFixture, heard: list[Operation]
) -> None:
    fails, later = [True], list[str]()

    def failing(operation: Operation) -> None:
        if fails[0]:
            raise LookupError("of the listener's")

    ends = on_operation(failing), on_operation(lambda operation: later.append(operation.name))
    with caplog.at_level(logging.ERROR, "govredis"):
        for n in range(1, 4):
            assert gov.limits.hit("a", "9/hour").remaining == 9 - n
        with pytest.raises(ValueError, match="id is"):
            gov.limits.hit("{", "9/hour")
    assert [record.message for record in caplog.records] == [
        "a listener of on_operation failed; instrumentation.errors counts its further errors"
    ]
    assert "of the listener's" in caplog.text
    assert gov.counters.get("instrumentation.errors") == 4
    assert later == names(heard) == ["limits.hit"] * 4
    for end in ends:
        end()


@pytest.mark.parametrize("name", CALLS)
def test_the_errors_of_listeners_are_counted_for_each_operation(gov: GovRedis, name: str) -> None:
    called: list[str] = []

    def failing(operation: Operation) -> None:
        called.append(operation.name)
        raise LookupError

    end = on_operation(failing)
    CALLS[name](gov)
    end()
    assert name in called
    assert gov.counters.get("instrumentation.errors") == len(called)


def test_without_listeners_the_methods_are_the_classes_own(gov: GovRedis) -> None:
    def methods() -> list[object]:
        return [vars(of)[name] for of, name, _ in instrumentation._replacements()]

    before = methods()
    assert len(before) > 50
    first, second = list[Operation](), list[Operation]()
    end_first, end_second = on_operation(first.append), on_operation(second.append)
    assert not any(now is own for now, own in zip(methods(), before, strict=True))
    bound = gov.limits.hit
    end_first()
    end_first()  # again is harmless
    gov.limits.hit("a", "9/hour")
    end_second()
    assert methods() == before
    assert bound("a", "9/hour").remaining == 7, "one that was taken meanwhile works on"
    assert (names(first), names(second)) == ([], ["limits.hit"])


def test_what_a_listener_does_is_not_told(gov: GovRedis, heard: list[Operation]) -> None:
    end = on_operation(lambda _: gov.limits.hit("listener", "9/hour"))
    gov.sessions.get("s")
    end()
    assert names(heard) == ["sessions.get"]
    assert gov.limits.get_count("listener", 3600) == 1


def test_threads_are_told_apart_while_listeners_come_and_go(gov: GovRedis, heard: list[Operation]) -> None:
    over = threading.Event()

    def come_and_go() -> int:
        times = 0
        while not over.is_set():
            on_operation(lambda _: None)()
            times += 1
        return times

    def call(me: int) -> None:
        for _ in range(50):
            gov.metadata.get_or_load(uuid.uuid4().hex, lambda i: gov.limits.hit(f"{me}", "1000/hour").remaining)

    def work() -> None:
        in_threads(*[lambda n=n: call(n) for n in range(4)])  # type: ignore[misc]
        over.set()

    times, _ = in_threads(come_and_go, work)
    assert times
    found = names(heard)
    assert found.count("limits.hit") == found.count("metadata.get_or_load") == len(found) / 2 == 200


def test_a_forked_child_has_the_listeners_of_its_parent(gov: GovRedis, heard: list[Operation]) -> None:
    def child() -> list[str]:
        heard.clear()
        mine: list[Operation] = []
        end = on_operation(mine.append)
        gov.limits.hit("a", "9/hour")
        end()
        gov.sessions.get("a")
        return [*names(heard), *names(mine)]

    found: list[str] = []
    with held_by_another_thread(mutexes(instrumentation._switch)):
        assert in_child(child) == ["limits.hit", "sessions.get", "limits.hit"]
        assert in_c_child(child) == ["limits.hit", "sessions.get", "limits.hit"]
        gov.metadata.get_or_load("b", lambda _: found.extend(in_child(child)))
    assert found == ["limits.hit", "sessions.get", "limits.hit"], "forked in a loader"
    assert names(heard) == ["metadata.get_or_load"]


@pytest.mark.once
def test_after_an_exception_anywhere_the_next_operation_is_told(make_gov: MakeGov, destructors_struck: None) -> None:
    gov = make_gov(redis_enabled=False)
    told: list[str] = []
    on_operation(lambda operation: told.append(operation.name))

    def works() -> None:
        told.clear()
        gov.limits.hit("a", "9/hour")
        assert told == ["limits.hit"]

    def operate(_: object) -> None:
        gov.metadata.get_or_load("a", lambda i: gov.limits.hit(i, "9/hour").remaining)
        on_operation(lambda _: None)()

    try:
        assert strike_anywhere(operate, works) > 30
    finally:
        instrumentation._switch.listeners = ()  # those whose ends were lost with the exception
        on_operation(lambda _: None)()


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import sys, gevent, gevent.event
from govredis import Config, GovRedis
from govredis.instrumentation import on_operation

gov = GovRedis(Config(redis_url=sys.argv[1], socket_timeout=10, connect_timeout=10))
told = []
on_operation(lambda operation: told.append(operation.name))
loading, go_on = gevent.event.Event(), gevent.event.Event()

def load(_):
    loading.set()
    go_on.wait()
    gevent.spawn(gov.limits.hit, "a", "9/hour").join()
    return 1

loads = gevent.spawn(gov.metadata.get_or_load, "a", load)
loading.wait()
gov.sessions.get("s")
go_on.set()
loads.get()
print(*told)
"""


def test_greenlets_are_told_apart(redis_server: RedisServer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GREENLETS, redis_server.url], capture_output=True, text=True, env=os.environ, timeout=180
    )
    assert done.stdout.split() == ["sessions.get", "limits.hit", "metadata.get_or_load"], done.stderr


def test_importing_govredis_does_not_import_it() -> None:
    code = "import govredis, sys; print('govredis.instrumentation' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
