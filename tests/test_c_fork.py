"""A fork in C, as uWSGI's: each operation of each feature notices that it is in another process before anything else.

While the parent forks, another thread of it holds every mutex there is; the children begin in several threads at once.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import threading
import uuid
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from c_fork import CForkedChild, held_by_another_thread, in_c_child, mutexes
from celery import Celery
from flask import Flask
from support import eventually, in_threads, redis_of

from govredis import BackendUnavailable, GovRedis, LockLost, _fork
from govredis.client import node as client_module
from govredis.client import pack_command
from govredis.contrib.celery import exclusive, init_celery, rate_limited
from govredis.contrib.flask import FlaskGovRedis
from govredis.limits.parked import Arrival
from govredis.locks.renewal import renewer
from govredis.testing.servers import PostgresServer, RedisServer

MakeGov = Callable[..., GovRedis]
CHILDREN, THREADS = 4, 3


@pytest.fixture
def everything(make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer) -> GovRedis:
    """All features, each with all that it can keep in a process."""
    return make_gov(
        redis_url=redis_server.url, database_url=postgres_server.url, limit_mirror=0.1, local_cache=True, lock_ttl=60
    )


# -- what is done with each feature: returns what is wrong, or nothing


def sessions(gov: GovRedis, me: str) -> object:
    gov.sessions.bind(me, f"agent-{me}", data={"of": me})
    new = gov.sessions.rotate(me)
    assert new is not None
    right = gov.sessions.get_agent_id(new) == f"agent-{me}" and gov.sessions.for_agent(f"agent-{me}") == [new]
    return not right or gov.sessions.unbind_agent(f"agent-{me}") != 1


def locks(gov: GovRedis, me: str) -> object:
    with gov.locks.acquire(me, timeout=0) as held:
        held.raise_if_lost()
        held.extend(50)
        wrong = gov.locks.try_acquire(me) is not None or gov.locks.holder(me) is None
    with gov.locks.rwlock(me).read(), gov.locks.semaphore(me, slots=2).acquire():
        wrong = wrong or not {me} <= {holder.name for holder in gov.locks.held()}
    return wrong or gov.locks.is_locked(me)


def limits(gov: GovRedis, me: str) -> object:
    hits = [gov.limits.hit(me, "2/hour").allowed for _ in range(4)]
    many = [result.allowed for result in gov.limits.hit_many([(f"{me}-many", "1/hour")] * 2)]
    counts = gov.limits.get_count(me, 3600), gov.limits.get_count(f"{me}-many", 3600)
    gov.limits.reset(me)
    first = gov.limits.hit(me, "1/hour")
    return (hits, many, counts, first.refund(), gov.limits.get_count(me, 3600)) != (
        [True, True, False, False],
        [True, False],
        (2, 1),
        True,
        0,
    )


def metadata(gov: GovRedis, me: str) -> object:
    cache = gov.cache("report")
    found = [cache.get_or_load(me, lambda i: {"of": i}) for _ in range(3)]
    found += cache.get_many([me]).values()
    cache.invalidate(me)
    return found != [{"of": me}] * 4 or cache.get(me) is not None or not cache.stats()["invalidated"]


def agents(gov: GovRedis, me: str) -> object:
    gov.agents.create(me, {"of": me})
    gov.agents.update_metadata(me, n=1)
    read = gov.metadata.get_or_load(me, gov.agents.get)
    return read is None or read["metadata"] != {"of": me, "n": 1} or not gov.agents.delete(me)


def events(gov: GovRedis, me: str) -> object:
    identity = gov.events.publish("agent", me)
    heard = [e.id for e in gov.events.listen("agent", after="0", timeout=0) if e.payload == me]
    with gov.events.consume(me, me, "agent", timeout=0) as consumer:
        taken = [e.id for e in consumer if e.payload == me]
    return not (heard == taken == [identity])


def health(gov: GovRedis, me: str) -> object:
    return gov.health.snapshot().status != "pass"


def postgres(gov: GovRedis, me: str) -> object:
    with gov.postgres.transaction() as tx:
        return tx.fetch("SELECT %s, %s", (me, os.getpid())) != [(me, os.getpid())]


def client(gov: GovRedis, me: str) -> object:
    redis = redis_of(gov)
    assert redis is not None
    redis.pipeline([("SET", me, me), ("RPUSH", f"{me}-l", me)])
    with contextlib.closing(redis.push_stream()) as stream:
        stream.send([("ECHO", me)])
        pushed = stream.read(20)[0]
    return (redis.call("GET", me), redis.pop(f"{me}-l", 59), pushed) != (me.encode(), me.encode(), [me.encode()])


def parked(gov: GovRedis, me: str) -> object:
    assert gov.internal.parked is not None
    lot = gov.internal.parked.lot(me)
    lot.park(Arrival(me), 0, me.encode())
    taken, _ = lot.take()
    return [one.message for one in taken] != [me.encode()]


#: Werkzeug compiles a syntax tree for each route, which CPython 3.11 bears in one thread at a time.
_compiling = threading.Lock()


def flask(gov: GovRedis, me: str) -> object:
    with _compiling:
        app = Flask("shop")
        ext = FlaskGovRedis(app, gov)

        @app.get("/")
        @ext.rate_limited("1/hour", key=lambda: me)
        def view() -> str:
            return "seen"

        app.url_map.update()
        app.test_client().get("/nowhere")

    browser = app.test_client()
    return [browser.get(path).status_code for path in ("/", "/", "/govredis/ready")] != [200, 429, 200]


def celery(gov: GovRedis, me: str) -> object:
    app = Celery("shop", set_as_current=False)
    app.conf.task_always_eager = True
    init_celery(app, gov)

    @app.task(shared=False)  # else every app made later in this process would have it, too
    @exclusive("{who}")
    @rate_limited("1/hour", key="{who}", on_limit="raise")
    def work(who: str) -> str:
        return who

    return [work.apply((me,)).state for _ in range(2)] != ["SUCCESS", "FAILURE"]


def counters(gov: GovRedis, me: str) -> object:
    gov.counters.add(me)
    gov.counters.add_each(me, me)
    return gov.counters.get(me) != 3 or gov.counters.read()[me] != 3


OPERATIONS = [
    *(sessions, locks, limits, metadata, agents, events, health, postgres, client, parked, flask, celery, counters),
]


@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_children_work_and_their_parent_too(
    everything: GovRedis,
    redis_server: RedisServer,
    operation: Callable[[GovRedis, str], object],
    used: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gov = everything
    if operation is client:  # an element that comes late, on a machine that is busy or stalls, is gone
        monkeypatch.setattr(client_module, "LONGEST_POP", 60.0)
    if used:
        assert not any(in_threads(*[lambda: operation(gov, uuid.uuid4().hex)] * THREADS))
    before = connections(redis_server), backends(gov)

    def work() -> list[Any]:
        return in_threads(*[lambda: operation(gov, uuid.uuid4().hex)] * THREADS)

    with held_by_another_thread(mutexes(gov, renewer)):
        children = [CForkedChild(work) for _ in range(CHILDREN)]
        assert [child.result() for child in children] == [[False] * THREADS] * CHILDREN
    # Nobody has closed them, or asked anything over them.
    assert connections(redis_server) >= before[0]
    assert backends(gov) >= before[1]
    assert not operation(gov, uuid.uuid4().hex)


def connections(server: RedisServer) -> set[str]:
    """Their ids."""
    listed = server.command("CLIENT", "LIST")
    if isinstance(listed, str):
        listed = [dict(word.split("=", 1) for word in line.split(" ")) for line in listed.splitlines()]
    return {c["id"] for c in listed if c["cmd"] != "client" and not c["cmd"].startswith("client|")}


def backends(gov: GovRedis) -> set[int]:
    return {connection.info.backend_pid for connection in gov.postgres._pool.live}


# -- nobody gets another's answer, and nobody takes another's place


def test_no_answer_is_anothers(make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer) -> None:
    for url in (None, postgres_server.url):
        gov = make_gov(redis_url=redis_server.url, database_url=url)
        for n in range(50):
            gov.sessions.bind(f"s{n}", f"agent-{n}")
        in_threads(*[lambda gov=gov: gov.sessions.get("s1")] * THREADS)  # type: ignore[misc]

        def wrong(me: int, gov: GovRedis = gov) -> int:
            ids = [(me * 7 + n) % 50 for n in range(200)]
            return sum(gov.sessions.get_agent_id(f"s{n}") != f"agent-{n}" for n in ids)

        def work(wrong: Callable[[int], int] = wrong) -> list[Any]:
            return in_threads(*[lambda n=n: wrong(n + os.getpid()) for n in range(THREADS)])  # type: ignore[misc]

        children = [CForkedChild(work) for _ in range(CHILDREN)]
        assert work() == [0] * THREADS
        assert [child.result() for child in children] == [[0] * THREADS] * CHILDREN


def test_tokens_and_nonces_differ(everything: GovRedis) -> None:
    gov = everything

    def tokens() -> list[Any]:
        with gov.locks.acquire(uuid.uuid4().hex) as held, gov.locks.semaphore("s", slots=9).acquire() as slot:
            owners = [held._lease.owner, slot._lease.owner]
        gov.limits.hit("all", "1000/hour")
        gov.metadata.get_or_load(uuid.uuid4().hex, lambda _: None)
        return [*owners, gov.metadata._backend.new_lease()]

    tokens()
    children = [CForkedChild(lambda: in_threads(*[tokens] * THREADS)) for _ in range(CHILDREN)]
    found = [tokens(), *(tokens for child in children for tokens in child.result())]
    told = [token for some in found for token in some]
    assert len(set(told)) == len(told) == 3 * (1 + CHILDREN * THREADS)
    assert gov.limits.get_count("all", 3600) == 2 + CHILDREN * THREADS  # a member that comes again is not counted


def test_one_child_at_a_time_is_inside(make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any) -> None:
    gov = make_gov(redis_url=redis_server.url, lock_ttl=60)
    with gov.locks.acquire("counter"):
        assert gov.limits.hit("all", "10/hour")

    def work() -> list[Any]:
        return in_threads(*[count] * THREADS)

    def count() -> tuple[int, int]:
        redis, inside, admitted = redis_of(gov), 0, 0
        assert redis is not None
        for _ in range(10):
            with gov.locks.acquire("counter", timeout=60):
                inside += redis.call("INCR", "inside") != 1
                assert gov.locks.try_acquire("counter") is None  # and by that nobody else gets in
                redis.call("SET", "count", str(int(redis.call("GET", "count") or 0) + 1))
                redis.call("DECR", "inside")
            admitted += bool(gov.limits.hit("all", "10/hour"))
        return inside, admitted

    children = [CForkedChild(work) for _ in range(CHILDREN)]
    found = [counted for child in children for counted in child.result()]
    assert sum(inside for inside, _ in found) == 0
    assert plain_redis.get("count") == str(10 * THREADS * CHILDREN)
    assert sum(admitted for _, admitted in found) == 9


# -- what belongs to the parent


class Ended:
    """Has a thread that has ended, and that nobody joined: the child lets go of it, as it renews itself."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = threading.Thread(target=int, daemon=True)
        self.thread.start()
        eventually(lambda: self.thread is not None and not self.thread.is_alive())
        _fork.renew_in_child(self)

    def renew_after_fork(self) -> None:
        self.thread = None


def test_the_end_of_a_parents_thread_touches_no_thread_of_the_childs() -> None:
    """The C library gives one of the child's first threads the number of the parent's."""
    ended = Ended()

    def work() -> bool:
        go_on = threading.Event()
        mine = [threading.Thread(target=go_on.wait) for _ in range(50)]
        for thread in mine:
            thread.start()
        _fork.notice_fork()
        assert ended.thread is None
        go_on.set()
        for thread in mine:
            thread.join()
        return True

    gc.collect()  # threads that nobody has any more end here, not in the child
    assert in_c_child(work) is True


def test_the_parents_lock_is_not_the_childs(make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any) -> None:
    gov = make_gov(redis_url=redis_server.url, lock_ttl=60)
    handles = [gov.locks.acquire("x"), gov.locks.rwlock("y").read(), gov.locks.semaphore("z", slots=2).acquire()]

    def each_noticing(look: Callable[[Any], object]) -> list[Any]:
        """In a child of its own for each handle, where it comes first."""
        return [in_c_child(lambda held=held: look(held)) for held in handles]  # type: ignore[misc]

    def lost(call: Callable[[], object]) -> bool:
        with pytest.raises(LockLost, match="it belongs to the parent process"):
            call()
        return True

    def leave(held: Any) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with held:  # says nothing: it was over before
                pass
        return True

    def collect(_: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            handles.clear()
            gc.collect()
        return [str(w.message) for w in warned]

    def hear(held: Any) -> list[str]:
        heard: list[str] = []
        held.on_lost(lambda: heard.append("lost"))
        return heard

    with held_by_another_thread(mutexes(gov, renewer, [held._lease for held in handles])):
        assert each_noticing(lambda held: held.release()) == [False] * 3
        assert each_noticing(lambda held: held.remaining()) == [0] * 3
        assert each_noticing(lambda held: lost(held.raise_if_lost)) == [True] * 3
        assert each_noticing(lambda held: lost(held.extend)) == [True] * 3
        assert each_noticing(lambda held: lost(lambda: held.extend(90))) == [True] * 3
        assert each_noticing(hear) == [["lost"]] * 3
        assert each_noticing(leave) == [True] * 3
        assert all("over" in text for text in each_noticing(repr))
        assert in_c_child(lambda: collect(None)) == []
        assert in_c_child(lambda: gov.locks.try_acquire("x") is None)
    for held in handles:
        held.raise_if_lost()
        assert held.release()


def test_the_parents_transaction_is_not_the_childs(everything: GovRedis) -> None:
    with everything.postgres.transaction() as tx:
        tx.fetch("CREATE TEMP TABLE mine ON COMMIT DROP AS SELECT 1 AS n")

        def child() -> bool:
            with pytest.raises(BackendUnavailable, match="the parent process's"):
                tx.fetch("INSERT INTO mine VALUES (2)")
            return everything.postgres.fetch("SELECT 5") == [(5,)]

        assert in_c_child(child)
        assert tx.fetch("SELECT n FROM mine") == [(1,)]


def test_a_reply_that_the_parent_awaits_is_not_the_childs(make_gov: MakeGov, redis_server: RedisServer) -> None:
    redis = redis_of(make_gov(redis_url=redis_server.url))
    assert redis is not None
    redis.pop("nothing", 0.01)
    pending = redis.send(pack_command(("ECHO", "for the parent")))

    def child() -> bool:
        with pytest.raises(BackendUnavailable):
            pending.reply()
        return bool(redis.call("ECHO", "x") == b"x")

    assert in_c_child(child)
    assert pending.reply() == b"for the parent"


def test_an_outage_that_the_parent_is_in(make_gov: MakeGov, mortal_redis: RedisServer) -> None:
    """Its probe's thread is not the child's."""
    gov = make_gov(redis_url=mortal_redis.url)
    gov.sessions.bind("s", "a")
    mortal_redis.kill()
    assert gov.sessions.get_agent_id("s") == "a"
    assert gov.sessions.unbind("s")
    gov.limits.hit("all", "5/hour")
    child = CForkedChild(lambda: in_threads(*[lambda: came_back(gov)] * THREADS))
    mortal_redis.start()
    assert child.result() == [True] * THREADS
    assert came_back(gov)


def came_back(gov: GovRedis) -> bool:
    redis = redis_of(gov)
    assert redis is not None
    while not redis.breaker.closed:
        with contextlib.suppress(BackendUnavailable):
            redis.call("PING")
    return bool(redis.call("PING") == b"PONG")


# -- no operation is left out


class Noticed(BaseException):
    pass


#: The arguments of each method that does not take just any string for each parameter without a default.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "SessionCache.bind": ("s", "a"),
    "SessionCache.for_agent": ("a",),
    "SessionCache.unbind_agent": ("a",),
    "DistributedLock.acquire_many": (["x"],),
    "RateLimiter.hit": ("a", "1/hour"),
    "RateLimiter.peek": ("a", "1/hour"),
    "RateLimiter.require": ("a", "1/hour"),
    "RateLimiter.wait": ("a", "1/hour"),
    "RateLimiter.hit_many": ([("a", "1/hour")],),
    "RateLimiter.hit_or_reserve": ("a", "1/hour"),
    "RateLimiter.check": ("a", 1, 60),
    "RateLimiter.record": ("a", 60),
    "RateLimiter.get_count": ("a", 60),
    "MetadataCache.set": ("m", {}),
    "MetadataCache.get_or_load": ("m", dict),
    "MetadataCache.reload": ("m", dict),
    "MetadataCache.get_many": (["m"],),
    "AgentStore.get_many": (["a"],),
    "HealthMonitor.beat": (15,),
    "EventBus.consume": ("g", "c", "a"),
    "Postgres.fetch": ("SELECT 1",),
    "Counters.add_each": ("a.b",),
    "HeldLock.on_lost": (print,),
}
KEYWORDS = {"RateLimiter.wait": {"timeout": 1}, "RateLimiter.hit_or_reserve": {"reservation": "b"}}
#: They make something that has what it is made of, register a callback, or are decorators: they touch nothing.
NOTHING_SHARED = {
    *("DistributedLock.check_folder", "DistributedLock.locked", "DistributedLock.rwlock", "DistributedLock.semaphore"),
    *("RateLimiter.rate_limited", "MetadataCache.cached", "MetadataCache.after_commit"),
    *("GovRedis.from_env", "GovRedis.in_memory", "Postgres.on_recovery"),
}


def public_operations(*objects: object) -> list[tuple[str, Callable[..., Any]]]:
    return [
        (f"{type(obj).__name__}.{name}", getattr(obj, name))
        for obj in objects
        for name in dir(type(obj))
        if name in {"__exit__", "__del__"} or not (name.startswith("_") or name == "renew_after_fork")
        if inspect.ismethod(getattr(obj, name, None))
    ]


def call(name: str, operation: Callable[..., Any]) -> None:
    taken = inspect.signature(operation).parameters.values()
    strings = ["a"] * sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in taken)
    entered = operation(*ARGUMENTS.get(name, strings), **KEYWORDS.get(name, {}))
    if hasattr(entered, "__enter__"):
        with entered:
            pass


def test_every_operation_notices_first(make_gov: MakeGov, monkeypatch: pytest.MonkeyPatch) -> None:
    gov = make_gov(redis_url="redis://127.0.0.1:1", database_url="postgresql://127.0.0.1:1/x")
    local = make_gov(redis_enabled=False)
    gc.collect()  # what other tests have left notices, too, when it goes
    features = gov.sessions, gov.locks, gov.limits, gov.metadata, gov.agents, gov.health, gov.postgres, gov.counters
    events = gov.events, gov.events.listen("a", after="0"), gov.events.consume("g", "c", "a")
    with local.locks.acquire("x") as held, monkeypatch.context() as patch:
        made = held, gov.locks.rwlock("x"), gov.locks.semaphore("x", slots=1), local.limits.hit("a", "1/hour")
        operations = dict(public_operations(gov, *features, *events, *made))
        assert operations.keys() >= {*ARGUMENTS, *NOTHING_SHARED}
        patch.setattr(_fork, "_renewed_here", [0])  # as a child finds it

        def notice() -> None:
            raise Noticed

        patch.setattr(_fork, "_renew", notice)
        for name in operations.keys() - NOTHING_SHARED:
            with pytest.raises(Noticed):
                call(name, operations[name])
                pytest.fail(f"{name} does not notice a fork")
