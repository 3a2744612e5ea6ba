"""An id may be a str, an int or a UUID, which are their str everywhere. Anything else is refused, unsent."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg2
import pytest
from celery import Celery
from flask import Flask

from govredis import GovRedis
from govredis.contrib.celery import exclusive, init_celery, rate_limited
from govredis.contrib.celery._tasks import TASKS
from govredis.contrib.flask import FlaskGovRedis
from govredis.keys import check_id, check_name, id_text
from govredis.testing.servers import PostgresServer, RedisServer

GIVEN = [7, -(10**40), UUID("0b7a1e6c-0000-4000-8000-00000000c0de")]
NO_IDS = [True, 1.0, b"a", None, ("a",), 10**600]
WANTED = (
    r"; it must be (a non-empty str of at most 512 bytes of UTF-8, without [^;]*; or an int or a UUID"
    r"|the id that the request came with: a str, an int or a UUID; or None)$"
)


Use = Callable[[GovRedis, Any], Any]


def before(first: Use, then: Use) -> tuple[Use, Use]:
    return first, then


def bound(gov: GovRedis, i: Any) -> None:
    gov.sessions.bind(i, i, data={"n": 1})


def nothing(gov: GovRedis, i: Any) -> None: ...


def created(gov: GovRedis, i: Any) -> None:
    gov.agents.create(i, {"n": 1})


def cached(gov: GovRedis, i: Any) -> None:
    gov.metadata.set(i, {"n": 1})


def hit(gov: GovRedis, i: Any) -> None:
    gov.limits.hit(i, "1/hour")


def binding(found: Any) -> Any:
    return found and (found.session_id, found.agent_id, found.data)


def decision(result: Any) -> Any:
    return result.allowed, result.remaining, result.backend


def refuses(call: Callable[[], Any], error: type[Exception]) -> Any:
    try:
        return call()
    except error:
        return error


def holder(gov: GovRedis, i: Any) -> Any:
    with gov.locks.acquire(i) as held:
        found = gov.locks.holder(i)
        assert found is not None
        listed = [each.name for each in gov.locks.held()]
        return held.name, found.name, gov.locks.is_locked(i), listed, gov.locks.force_release(i), refuses_lost(held)


def refuses_lost(held: Any) -> bool:
    return bool(held.release())


def several(gov: GovRedis, i: Any) -> Any:
    with gov.locks.acquire_many([i, "other", str(i)]) as held:
        return sorted(held), held[i].name, i in held


def shared(gov: GovRedis, i: Any) -> Any:
    with gov.locks.rwlock(i).read() as read, gov.locks.semaphore(i, slots=2).acquire() as slot:
        return read.name, slot.name, [(each.kind, each.name) for each in gov.locks.held()]


def loaded(gov: GovRedis, i: Any) -> Any:
    seen: list[Any] = []
    found = [gov.metadata.get_or_load(each, lambda given: seen.append(given) or {"of": given}) for each in (i, str(i))]
    return found, seen


def many(gov: GovRedis, i: Any) -> Any:
    seen: list[Any] = []
    found = gov.metadata.get_many([i, str(i)], lambda ids: seen.extend(ids) or {i: {"n": 2}})
    return found, seen, gov.metadata.get_many([i])


def pending(gov: GovRedis, i: Any) -> Any:
    gov.metadata.invalidate_committed(i)
    return gov.metadata.get(i)


def committed(gov: GovRedis, i: Any) -> Any:
    connection = psycopg2.connect(gov.config.database_url)
    try:
        with gov.metadata.after_commit(connection) as tx, connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            tx.invalidate(i)
            tx.invalidate(str(i))
            cursor.execute("SELECT count(*), min(id) FROM public.govredis_outbox")
            noted = cursor.fetchone()
        return noted, gov.metadata.get(i)
    finally:
        connection.close()


def limited(gov: GovRedis, i: Any) -> Any:
    ran: list[str] = []
    for operation, key in ("f", lambda i: i), ("g", "{i}"):
        gov.limits.rate_limited("2/hour", key=key, operation=operation)(lambda i: ran.append(str(i)))(i)
    return ran, [gov.limits.get_count(i, 3600, operation=operation) for operation in ("f", "g")]


def locked(gov: GovRedis, i: Any) -> Any:
    return gov.locks.locked("{i}")(lambda i: [each.name for each in gov.locks.held()])(i)


def published(gov: GovRedis, i: Any) -> Any:
    gov.events.publish("thing", None, entity=i)
    return [event.entity for event in gov.events.listen("thing", after="0", timeout=0)]


#: For each public method that takes an id: the call that comes before, and the call with the id.
TAKE_IDS: dict[str, tuple[Use, Use]] = {
    "SessionCache.bind": (nothing, lambda g, i: binding(g.sessions.bind(i, i))),
    "SessionCache.get": (bound, lambda g, i: binding(g.sessions.get(i))),
    "SessionCache.get_agent_id": (bound, lambda g, i: g.sessions.get_agent_id(i)),
    "SessionCache.touch": (bound, lambda g, i: g.sessions.touch(i)),
    "SessionCache.exists": (bound, lambda g, i: g.sessions.exists(i)),
    "SessionCache.update": (bound, lambda g, i: binding(g.sessions.update(i, {"n": 2}))),
    "SessionCache.unbind": (bound, lambda g, i: (g.sessions.unbind(i), g.sessions.get(i))),
    "SessionCache.rotate": (bound, lambda g, i: (g.sessions.rotate(i) is None, g.sessions.get(i))),
    "SessionCache.start": (bound, lambda g, i: (g.sessions.start(i, replacing=i).agent_id, g.sessions.get(i))),
    "SessionCache.for_agent": (bound, lambda g, i: g.sessions.for_agent(i)),
    "SessionCache.unbind_agent": (bound, lambda g, i: g.sessions.unbind_agent(i)),
    "DistributedLock.acquire": (nothing, holder),
    "DistributedLock.holder": (nothing, holder),
    "DistributedLock.is_locked": (nothing, holder),
    "DistributedLock.look": (nothing, holder),
    "DistributedLock.force_release": (nothing, holder),
    "DistributedLock.try_acquire": (nothing, lambda g, i: g.locks.try_acquire(i).release()),  # type: ignore[union-attr]
    "DistributedLock.acquire_many": (nothing, several),
    "DistributedLock.rwlock": (nothing, shared),
    "DistributedLock.semaphore": (nothing, shared),
    "DistributedLock.locked": (nothing, locked),
    "RateLimiter.hit": (hit, lambda g, i: [decision(g.limits.hit(i, "2/hour")) for _ in range(3)]),
    "RateLimiter.peek": (hit, lambda g, i: decision(g.limits.peek(i, "2/hour"))),
    "RateLimiter.require": (nothing, lambda g, i: decision(g.limits.require(i, "2/hour"))),
    "RateLimiter.wait": (hit, lambda g, i: decision(g.limits.wait(i, "1/hour", timeout=0))),
    "RateLimiter.hit_many": (hit, lambda g, i: [decision(r) for r in g.limits.hit_many([(i, "2/hour")] * 2)]),
    "RateLimiter.hit_or_reserve": (
        hit,
        lambda g, i: decision(g.limits.hit_or_reserve(i, "2/hour", reservation="r")[0]),
    ),
    "RateLimiter.check": (hit, lambda g, i: decision(g.limits.check(i, 1, 3600))),
    "RateLimiter.record": (hit, lambda g, i: (g.limits.record(i, 3600), g.limits.get_count(i, 3600))),
    "RateLimiter.get_count": (hit, lambda g, i: g.limits.get_count(i, 3600)),
    "RateLimiter.stats": (hit, lambda g, i: g.limits.stats(i).entries),
    "RateLimiter.reset": (hit, lambda g, i: (hit(g, i), g.limits.reset(i), decision(g.limits.hit(i, "1/hour")))),
    "RateLimiter.rate_limited": (nothing, limited),
    "MetadataCache.get": (cached, lambda g, i: g.metadata.get(i)),
    "MetadataCache.set": (nothing, lambda g, i: (g.metadata.set(i, {"n": 1}), g.metadata.get(i))),
    "MetadataCache.get_or_load": (nothing, loaded),
    "MetadataCache.get_many": (nothing, many),
    "MetadataCache.invalidate": (cached, lambda g, i: (g.metadata.invalidate(i), g.metadata.get(i))),
    "MetadataCache.invalidate_committed": (cached, pending),
    "AfterCommit.invalidate": (cached, committed),
    "EventBus.publish": (nothing, published),
    "AgentStore.create": (nothing, lambda g, i: g.agents.create(i)["agent_id"]),
    "AgentStore.get": (created, lambda g, i: g.agents.get(i)["agent_id"]),  # type: ignore[index]
    "AgentStore.get_many": (created, lambda g, i: list(g.agents.get_many([i]))),
    "AgentStore.update_metadata": (created, lambda g, i: g.agents.update_metadata(i, n=2)["metadata"]),  # type: ignore[index]
    "AgentStore.archive": (created, lambda g, i: g.agents.archive(i)["status"]),  # type: ignore[index]
    "AgentStore.delete": (created, lambda g, i: (g.agents.delete(i), g.agents.get(i))),
}
#: Those that take none. A template says itself what it makes of arguments: `cached` keeps 1 and "1" apart.
TAKE_NONE = {
    *(
        "DistributedLock.check_folder",
        "DistributedLock.held",
        "DistributedLock.count_held",
        "DistributedLock.glance",
        "RateLimiter.most_denied",
    ),
    "MetadataCache.cached",
    *("MetadataCache.after_commit", "MetadataCache.invalidate_all", "MetadataCache.stats", "MetadataCache.reload"),
    *(f"{kind}.purge" for kind in ("SessionCache", "RateLimiter", "HealthMonitor")),
    *("SessionCache.verify", "RateLimiter.close", "GovRedis.cache", "GovRedis.close", "GovRedis.from_env"),
    "GovRedis.in_memory",
    *(f"HealthMonitor.{name}" for name in ("check", "snapshot", "history", "count_keys", "beat")),
    *(f"EventBus.{name}" for name in ("listen", "consume", "dead", "deliver", "close")),
    *(f"{kind}.{name}" for kind in ("EventListener", "EventConsumer") for name in ("get", "close")),
    *(f"HeldLock.{name}" for name in ("extend", "on_lost", "raise_if_lost", "release", "remaining")),
    *(f"HeldLocks.{name}" for name in ("raise_if_lost", "release", "remaining", "get", "items", "keys", "values")),
    *("ReadWriteLock.read", "ReadWriteLock.write", "Semaphore.acquire", "RateLimitResult.refund"),
    *(f"FlaskGovRedis.{name}" for name in ("init_app", "current_agent", "rate_limited")),
    *(f"FlaskGovRedis.{name}" for name in ("default_limit", "exempt", "events")),
    *(f"FlaskGovRedis.{name}" for name in ("login", "logout", "login_required")),  # tests/contrib/flask
    "FlaskGovRedis.use_for_flask_session",
}


def public_methods(*objects: object) -> set[str]:
    return {
        f"{type(obj).__name__}.{name}"
        for obj in objects
        for name in dir(type(obj))
        if not name.startswith("_") and name != "renew_after_fork"
        if callable(inspect.getattr_static(obj, name)) or isinstance(inspect.getattr_static(obj, name), classmethod)
    }


def test_the_tables_have_every_public_method(gov: GovRedis, postgres_server: PostgresServer) -> None:
    held, many = gov.locks.acquire("a"), gov.locks.acquire_many(["b"])
    connection = psycopg2.connect(postgres_server.url)
    after = gov.metadata.after_commit(connection)
    with held, many:
        features = gov.sessions, gov.locks, gov.limits, gov.metadata, gov.agents, gov.events, gov.health
        readers = gov.events.listen("a"), gov.events.consume("g", "c", "a")
        made = held, many, gov.locks.rwlock("a"), gov.locks.semaphore("a", slots=1), gov.limits.hit("a", "1/hour")
        found = public_methods(gov, *features, *readers, *made, after, FlaskGovRedis())
    connection.close()
    assert found == TAKE_IDS.keys() | TAKE_NONE
    assert not TAKE_IDS.keys() & TAKE_NONE


def test_every_parameter_that_takes_an_id_says_so(gov: GovRedis) -> None:
    for obj in gov.sessions, gov.locks, gov.limits, gov.metadata, gov.agents, gov.events:
        for name in public_methods(obj) & TAKE_IDS.keys() - {"DistributedLock.locked", "RateLimiter.hit_many"}:
            signature = inspect.signature(getattr(obj, name.split(".")[1]))
            assert any(re.search(r"\bId\b", str(p.annotation)) for p in signature.parameters.values()), name


# -- one answer, and the same keys -----------------------------------------------------------------------------------

_RANDOM = re.compile(r"[0-9a-f]{16,}|[\w-]{43}")


@pytest.mark.one_redis
@pytest.mark.parametrize("given", GIVEN, ids=["int", "long", "uuid"])
def test_an_int_or_a_uuid_is_its_str(
    gov: GovRedis, make_gov: Callable[..., GovRedis], redis_server: RedisServer, plain_redis: Any, given: Any
) -> None:
    """A change by the text is found by the int or UUID, and the other way round; the result and the keys are equal."""
    different = {}
    for name, (prepare, call) in TAKE_IDS.items():
        found = []
        for first, then in (str(given), str(given)), (str(given), given), (given, str(given)):
            one = gov if name.startswith(("AgentStore", "AfterCommit")) else make_gov(redis_url=redis_server.url)
            prepare(one, first)
            result = call(one, then)
            keys = [key for key in plain_redis.keys("*") if "govredis:" not in key]
            found.append((result, sorted({_RANDOM.sub("*", key) for key in keys})))
            plain_redis.flushall()
            if one is gov and gov.agents.get(str(given)):
                gov.agents.delete(str(given))
            with gov.postgres.transaction() as tx:
                tx.fetch("DELETE FROM govredis_outbox RETURNING 1")
        if found != [found[0]] * 3:
            different[name] = found
    assert different == {}


@pytest.mark.parametrize("bad", NO_IDS, ids=["bool", "float", "bytes", "None", "tuple", "huge"])
def test_anything_else_is_refused_before_anything_is_sent(make_gov: Callable[..., GovRedis], bad: Any) -> None:
    """Nobody could be asked: any other error would say so."""
    gov = make_gov(redis_url="redis://127.0.0.1:1", database_url="postgresql://127.0.0.1:1/x")
    # A template says what it makes of an argument, and a transaction begins on a connection: below.
    without = {"EventBus.publish"} if bad is None else set()  # an event may be about nothing
    for name in TAKE_IDS.keys() - {"DistributedLock.locked", "AfterCommit.invalidate"} - without:
        with pytest.raises(ValueError, match=WANTED):
            pytest.fail(f"{name} of {bad!r} is {TAKE_IDS[name][1](gov, bad)!r}")


def test_a_transaction_refuses_what_is_no_id(gov: GovRedis) -> None:
    for bad in NO_IDS:
        with pytest.raises(ValueError, match=WANTED):
            committed(gov, bad)


@pytest.mark.parametrize("bad", ["ab", b"ab", 7, None])
def test_several_ids_are_no_text_and_no_bytes(make_gov: Callable[..., GovRedis], bad: Any) -> None:
    """Whose parts are ids, too: bytes are ints to Python."""
    gov = make_gov(redis_url="redis://127.0.0.1:1", database_url="postgresql://127.0.0.1:1/x")
    for call in gov.locks.acquire_many, gov.metadata.get_many, gov.agents.get_many:
        with pytest.raises(ValueError, match=r"^(names|identities|agent_ids) is .*; it must be "):
            call(bad)


def test_a_template_refuses_none(gov: GovRedis) -> None:
    with pytest.raises(ValueError, match=r"^i is None, which identifies nobody$"):
        locked(gov, None)


def test_ids_that_python_takes_for_equal_are_told_apart(gov: GovRedis) -> None:
    """1 == 1.0 == True: what is remembered of the one is no answer for another."""
    gov.locks.acquire(1).release()
    assert [bool(gov.limits.hit(1, "1/hour")) for _ in range(2)] == [True, False]  # which is remembered
    for bad in True, 1.0:
        with pytest.raises(ValueError, match=WANTED):
            gov.locks.acquire(bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=WANTED):
            gov.limits.hit(bad, "1/hour")  # type: ignore[arg-type]


def test_a_cache_in_the_process_knows_texts_only(
    make_gov: Callable[..., GovRedis], redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    gov = make_gov(redis_url=redis_server.url, local_cache=True)
    cache, dropped = gov.metadata, []
    local = cache._local
    assert local is not None
    eventually(lambda: cache.get_or_load("7", lambda i: {"of": i}) and cache.stats()["local_hits"])
    before = cache.stats()["local_hits"]
    assert cache.get(7) == cache.get_or_load(7, print) == cache.get_many([7])["7"] == {"of": "7"}
    assert cache.stats()["local_hits"] == before + 3
    monkeypatch.setattr(type(local), "drop", lambda _, identity: dropped.append(identity))
    cache.set(7, {"n": 1})
    cache.invalidate(7)
    assert set(dropped) == {"7"}


def test_the_most_denied_are_named_by_text(gov: GovRedis) -> None:
    gov.limits.hit_many([(7, "1/hour"), ("7", "1/hour"), (7, "1/hour"), (7, "1/hour")])
    gov.limits.close()  # tells
    assert [(denied.identity, denied.times) for denied in gov.limits.most_denied()] == [("7", 3)]


def test_a_pending_invalidation_is_of_a_text(make_gov: Callable[..., GovRedis]) -> None:
    gov = make_gov(redis_url="redis://127.0.0.1:1")
    for i in 7, "7":
        gov.metadata.invalidate_committed(i)
    assert list(gov.metadata._pending.tokens) == ["7"]


# -- decorators and tasks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", GIVEN, ids=["int", "long", "uuid"])
def test_celerys_decorators_and_task(gov: GovRedis, given: Any) -> None:
    app = Celery("ids", broker="memory://", set_as_current=False)
    init_celery(app, gov)
    app.finalize()
    seen: list[Any] = []

    @app.task(shared=False)
    @exclusive("{i}")
    @rate_limited("2/hour", key=lambda i: i, operation="f", on_limit="skip")
    def work(i: Any) -> None:
        seen.append([each.name for each in gov.locks.held()])

    app.set_current()
    for i in given, str(given), given:
        work.apply((i,)).get()
    assert seen == [[str(given)]] * 2
    gov.metadata.set(given, {"n": 1})
    app.tasks["govredis.invalidate_metadata"](given)
    assert gov.metadata.get(str(given)) is None
    assert {name for name, (function, _) in TASKS.items() if "agent_id" in inspect.signature(function).parameters} == {
        "govredis.invalidate_metadata"
    }


@pytest.mark.parametrize("given", GIVEN, ids=["int", "long", "uuid"])
def test_flasks_limits(gov: GovRedis, given: Any) -> None:
    app = Flask("ids")
    ext = FlaskGovRedis(app, gov)

    @app.get("/")
    @ext.rate_limited("2/hour", key=lambda: given, operation="f")
    def view() -> str:
        return "ok"

    @app.get("/default")
    def by_default() -> str:
        return "ok"

    ext.default_limit(app, "2/hour", key=lambda: given, operation="d")
    for path, operation in ("/", "f"), ("/default", "d"):
        assert [app.test_client().get(path).status_code for _ in range(3)] == [200, 200, 429]
        assert gov.limits.get_count(str(given), 3600, operation=operation) == 2


# -- the one place that decides --------------------------------------------------------------------------------------


class Plan(str, enum.Enum):  # its text varies between versions of Python
    FREE = "free"


class Number(enum.IntEnum):
    SEVEN = 7


def test_the_text_of_an_id() -> None:
    assert [id_text(given) for given in ("a", *GIVEN)] == ["a", *map(str, GIVEN)]
    assert (id_text(Plan.FREE), id_text(Number.SEVEN)) == ("free", "7")
    assert type(check_id(Plan.FREE)) is str
    for bad in NO_IDS:
        with pytest.raises(ValueError, match=r"^agent_id is .*" + WANTED):
            check_id(bad, "agent_id")


@pytest.mark.parametrize("bad", [7, GIVEN[-1], None])
def test_an_operation_is_a_name_and_no_id(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^operation is .*; it must be a non-empty str [^;]*$"):
        check_name(bad, "operation")
