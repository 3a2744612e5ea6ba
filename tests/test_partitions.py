"""An old primary that is cut off from its replicas and from the majority, and still reached by clients.

A process beside it goes on with it. The test's own process reaches both sides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from partition import ClusterSplit, Remote, SentinelSplit, Split
from support import client_of, copied_postgres, eventually, redis_of

from govredis import BackendUnavailable, GovRedis, LockLost
from govredis.client import ClusterClient
from govredis.client.sentinel_client import SentinelClient
from govredis.keys import Keys
from govredis.locks import HeldLock
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

#: A process beside the old primary pays a timeout for each connect over the cut, and for none else.
BESIDE = {"socket_timeout": 10.0, "connect_timeout": 1.0, "lock_fallback": "fail"}
SPLITS = {"sentinel": SentinelSplit, "cluster": ClusterSplit}

Start = Callable[..., Split]
Beside = Callable[..., Remote]
Connect = Callable[..., GovRedis]


@pytest.fixture
def start(redis_binary: str) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:
        yield lambda kind, *config: SPLITS[kind](stack, redis_binary, config)


@pytest.fixture
def connect(make_gov: Connect) -> Iterator[Connect]:
    """Makes the GovRedis of the test's own process, whose locks are released in the end."""
    yield make_gov
    while HELD:
        HELD.popitem()[1].release()


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Beside]:
    """Starts processes beside the old primary, with a lock folder of their own."""
    with contextlib.ExitStack() as stack:

        def begin(split: Split, **settings: Any) -> Remote:
            ours = {"redis_url": split.url, "lock_folder": str(tmp_path / "beside"), **BESIDE, **settings}
            return stack.enter_context(contextlib.closing(Remote(split.network.old, ours)))

        yield begin


# -- what a process does, here or beside the old primary -----------------------------------------------------------

HELD: dict[str, HeldLock] = {}


def port(gov: GovRedis, key: str = "k") -> int:
    """The port of the server that has the key."""
    return int(client_of(gov).at(key).call("CONFIG", "GET", "port")[1])


def admitted(gov: GovRedis, identity: str) -> tuple[int, set[str]]:
    """How many of ten hits are admitted where three may be, and who decided."""
    results = [gov.limits.hit(identity, "3/hour") for _ in range(10)]
    return sum(map(bool, results)), {result.backend for result in results}


def backend(gov: GovRedis, identity: str) -> str:
    return gov.limits.hit(identity, "1000/hour").backend


def take(gov: GovRedis, name: str, timeout: float = 0, ttl: float = 600) -> int | None:
    """The token of a lock, which stays held; None: it cannot be had."""
    try:
        HELD[name] = gov.locks.acquire(name, timeout=timeout, ttl=ttl)
    except (TimeoutError, BackendUnavailable):
        return None
    return HELD[name].token


def is_held(gov: GovRedis, name: str) -> bool:
    """As its holder has it, after asking a Redis that can be asked."""
    try:
        with contextlib.suppress(BackendUnavailable):
            HELD[name].extend()
        HELD[name].raise_if_lost()
    except LockLost:
        return False
    return True


def agent(gov: GovRedis, name: str) -> Any:
    found = gov.agents.get(name)
    return found and found["metadata"]


def update(gov: GovRedis, name: str) -> None:
    gov.agents.update_metadata(name, n=3)


def bound_to(gov: GovRedis, session: str) -> str | None:
    return gov.sessions.get_agent_id(session)


# -- without PostgreSQL ----------------------------------------------------------------------------------------------


def test_sentinel_without_min_replicas(
    start: Start, beside: Beside, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Both sides serve: each limit once a store, a lock on each side. The heal ends the old side's."""
    caplog.set_level("INFO", "govredis")
    split = start("sentinel")
    assert isinstance(split, SentinelSplit)
    here = connect(redis_url=split.url, lock_fallback="fail")
    there = beside(split)
    assert here.limits.hit("a", "3/hour").backend == "redis"
    assert take(here, "before") is not None
    assert there(take, "before") is None
    assert split.old.command("WAIT", 2, 60_000) == 2
    new = split.cut()

    eventually(lambda: port(here) == new.port)
    assert split.named_by(split.sentinels[0]) == split.old.address, "the Sentinel beside the old one knows of nothing"
    client = redis_of(here)
    assert isinstance(client, SentinelClient)
    for _ in range(5):
        client._primary.doubt()  # so that the next call waits for the answers of all
        assert port(here) == new.port
    assert caplog.text.count("the primary is at") == 1, "its word leads nobody back"
    assert there(port) == split.old.port

    assert admitted(here, "a") == (2, {"redis"})
    assert there(admitted, "a") == (2, {"redis"}), "never more than the limit on each side"
    assert is_held(here, "before")
    assert there(take, "before") is None, "the old primary has its lease too, until it ends"
    old_token = eventually(lambda: there(take, "after"))
    new_token = eventually(lambda: take(here, "after"))
    assert new_token > old_token, "a resource that checks tokens refuses the old side's holder from then on"

    split.heal()
    eventually(lambda: there(port) == new.port)
    eventually(lambda: not there(is_held, "after"))
    assert is_held(here, "after")
    assert is_held(here, "before")
    assert there(take, "after") is None


def test_sentinel_with_min_replicas(start: Start, beside: Beside, connect: Connect) -> None:
    """The old primary takes no writes any more: there is one side."""
    split = start("sentinel", "min-replicas-to-write 1", "min-replicas-max-lag 1")
    here = connect(redis_url=split.url, lock_fallback="fail")
    there = beside(split)
    eventually(lambda: there(take, "x", 0, 5))
    new = split.cut()
    eventually(lambda: refuses(split.old))
    assert there(backend, "a") == "local"
    assert there(take, "free") is None
    eventually(lambda: not there(is_held, "x"))
    eventually(lambda: take(here, "x", 5))
    assert port(here) == new.port
    assert there(take, "x") is None
    assert refuses(split.old)


def refuses(old: RedisServer) -> bool:
    try:
        old.command("SET", "k", "v")
    except redis.ResponseError as error:
        return "NOREPLICAS" in str(error)
    return False


def test_cluster(start: Start, beside: Beside, connect: Connect) -> None:
    """A primary in the minority stops by itself, after cluster-node-timeout."""
    split, keys = start("cluster"), Keys()
    here = connect(redis_url=split.url, lock_fallback="fail")
    there = beside(split)
    a = split.id_on_old(lambda name: keys.rate_limit("default", name), "a")
    x, y = (split.id_on_old(keys.lock, prefix) for prefix in "xy")
    assert here.limits.hit(a, "3/hour").backend == "redis"
    assert take(here, x) is not None
    eventually(lambda: there(take, y, 0, 5))
    assert split.old.command("WAIT", 1, 60_000) == 1
    new = split.cut()

    eventually(lambda: here.limits.peek(a, "3/hour").backend == "redis" and port(here, keys.lock(x)) == new.port)
    client = client_of(here)
    assert isinstance(client, ClusterClient)
    for _ in range(5):
        client._topology.refresh()
        assert port(here, keys.lock(x)) == new.port
    assert admitted(here, a) == (2, {"redis"})
    assert is_held(here, x)

    eventually(lambda: there(backend, a) == "local")
    assert there(take, x) is None
    eventually(lambda: not there(is_held, y))
    eventually(lambda: take(here, y, 5))
    assert there(take, y) is None

    split.heal()
    eventually(lambda: there(backend, a) == "redis")
    assert there(take, y) is None
    assert is_held(here, x)
    assert is_held(here, y)


# -- with PostgreSQL -------------------------------------------------------------------------------------------------


@pytest.fixture
def postgres_url(postgres_template: PostgresServer) -> Iterator[str]:
    """A PostgreSQL on a unix socket: processes on any host reach it."""
    with copied_postgres(postgres_template, ["unix_socket_directories=/tmp"]) as server:
        parts = urlsplit(server.url)
        yield f"host=/tmp port={server.port} user={parts.username} password='{parts.password}' dbname=postgres"


@pytest.mark.parametrize("kind", SPLITS)
def test_with_postgresql_nothing_stale_is_read_and_nobody_is_logged_out(
    kind: str, postgres_url: str, start: Start, beside: Beside, connect: Connect
) -> None:
    """For no longer than metadata_staleness, on either side."""
    split, keys = start(kind), Keys()
    stores = {"database_url": postgres_url, "metadata_ttl": 3600, "metadata_staleness": 5}
    here = connect(redis_url=split.url, **stores)
    there = beside(split, **stores)
    sides: list[Callable[..., Any]] = [lambda function, *args: function(here, *args), there]
    a = split.id_on_old(lambda name: keys.cached("agent_meta", name), "a")
    goes, stays = (split.id_on_old(keys.session, prefix) for prefix in ("goes", "stays"))
    here.agents.create(a, {"n": 1})
    for session in goes, stays:
        here.sessions.bind(session, "ann")
    for ask in sides:
        assert ask(agent, a) == {"n": 1}
        assert ask(bound_to, goes) == ask(bound_to, stays) == "ann"
    split.cut()

    here.agents.update_metadata(a, n=2)
    here.sessions.unbind(goes)
    for ask in sides:
        eventually(lambda ask=ask: ask(agent, a) == {"n": 2})  # type: ignore[misc]
        eventually(lambda ask=ask: ask(bound_to, goes) is None)  # type: ignore[misc]
    for _ in range(20):
        for ask in sides:
            assert ask(agent, a) == {"n": 2}
            assert ask(bound_to, goes) is None
            assert ask(bound_to, stays) == "ann"

    there(update, a)
    for ask in sides:
        eventually(lambda ask=ask: ask(agent, a) == {"n": 3})  # type: ignore[misc]
        assert ask(bound_to, goes) is None
        assert ask(bound_to, stays) == "ann"
