"""PostgreSQL by every form of a DSN that libpq takes, several hosts included, where some hang."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from govredis import BackendError, BackendUnavailable, ConfigurationError, GovRedis
from govredis._resolver import Resolver
from govredis.postgres import connecting
from govredis.testing.servers import PostgresServer

pytestmark = pytest.mark.one_redis


@pytest.fixture
def hung() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def shares(hung: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the server that hangs was given. Only a moment of them is waited for.

    So the timeout of all may be long, and no stall of the machine uses it up.
    """
    given: list[float] = []
    really = connecting._is_ready

    def is_ready(connection: Any, state: int, seconds: float) -> bool:
        if connection.info.port != hung or really(connection, state, 0.2):
            return really(connection, state, seconds)
        given.append(seconds)
        return False

    monkeypatch.setattr(connecting, "_is_ready", is_ready)
    return given


@pytest.fixture(scope="module")
def read_only() -> Iterator[PostgresServer]:
    with PostgresServer(config=["default_transaction_read_only=on", "unix_socket_directories=/tmp"]) as server:
        yield server


@pytest.fixture
def connect(make_gov: Callable[..., GovRedis]) -> Callable[..., GovRedis]:
    return lambda url, **settings: make_gov(redis_enabled=False, database_url=url, **settings)


def url_of(server: PostgresServer, hosts: str, parameters: str = "") -> str:
    parts = urlsplit(server.url)
    return f"postgresql://{parts.username}:{parts.password}@{hosts}{parts.path}{parameters}"


def pairs_of(server: PostgresServer, hosts: str, ports: str) -> str:
    parts = urlsplit(server.url)
    return f"host={hosts} port={ports} user={parts.username} password='{parts.password}' dbname={parts.path[1:]}"


def port_of(gov: GovRedis) -> int:
    ((port,),) = gov.postgres.fetch("SELECT current_setting('port')::int")
    assert isinstance(port, int)
    return port


@pytest.mark.parametrize("form", ["url", "pairs", "service", "environment", "ports of the environment", "name"])
def test_a_host_that_hangs_leaves_time_for_the_others(
    connect: Callable[..., GovRedis],
    postgres_server: PostgresServer,
    hung: int,
    shares: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    form: str,
) -> None:
    live = postgres_server.port
    pairs = pairs_of(postgres_server, "127.0.0.1,127.0.0.1,127.0.0.1", f"{hung},1,{live}")
    dsn = {
        "url": url_of(postgres_server, f"127.0.0.1:{hung},127.0.0.1:1,127.0.0.1:{live}"),
        "pairs": pairs,
        "service": "service=mine",
        "environment": url_of(postgres_server, ""),
        "ports of the environment": re.sub(r"port=\S+", "", pairs),
        "name": url_of(postgres_server, f"localhost:{hung},localhost:1,localhost:{live}"),
    }[form]
    if form == "service":
        (tmp_path / "services").write_text("[mine]\n" + pairs.replace(" ", "\n").replace("'", ""))
        monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    if form == "environment":
        monkeypatch.setenv("PGHOST", "127.0.0.1,127.0.0.1,127.0.0.1")
    if "environment" in form:
        monkeypatch.setenv("PGPORT", f"{hung},1,{live}")
    gov = connect(dsn, postgres_timeout=60)
    assert port_of(gov) == live
    assert shares
    assert max(shares) <= 20
    gov.sessions.bind("s", "agent")
    assert gov.sessions.get_agent_id("s") == "agent"
    assert gov.postgres.breaker.times_opened == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("form", ["environment", "service"])
def test_a_port_that_stands_elsewhere_than_the_host(
    connect: Callable[..., GovRedis],
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    form: str,
    host: str,
) -> None:
    if form == "service":
        (tmp_path / "services").write_text(f"[mine]\nport={postgres_server.port}\n")
        monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
        gov, shown = connect(url_of(postgres_server, host, "?service=mine")), host
    else:
        monkeypatch.setenv("PGPORT", str(postgres_server.port))
        gov, shown = connect(url_of(postgres_server, host)), f"{host}:{postgres_server.port}"
    assert port_of(gov) == postgres_server.port
    assert gov.postgres.name == f"PostgreSQL at {shown}/postgres"


def test_no_host_at_all(connect: Callable[..., GovRedis], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGHOSTADDR", "PGPORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BackendUnavailable, match='connection to server on socket "'):  # in libpq's own folder
        connect("dbname=d port=1").postgres.fetch("SELECT 1")


def test_all_hang(connect: Callable[..., GovRedis], hung: int) -> None:
    gov = connect(f"postgresql://127.0.0.1:{hung},127.0.0.1:{hung}/d", postgres_timeout=0.5)
    with pytest.raises(BackendUnavailable, match="no answer within the deadline") as caught:
        gov.postgres.fetch("SELECT 1")
    assert str(caught.value).startswith(f"PostgreSQL at 127.0.0.1:{hung},127.0.0.1:{hung}/d is away")
    assert not gov.postgres.breaker.closed


@pytest.mark.parametrize("hosts", ["{read_only},{live}", "{hung},{read_only},{live}", "{read_only},{hung},{live}"])
def test_the_host_that_may_be_used(
    connect: Callable[..., GovRedis],
    postgres_server: PostgresServer,
    read_only: PostgresServer,
    hung: int,
    shares: list[float],
    hosts: str,
    tmp_path: Path,
) -> None:
    passwords = tmp_path / "passwords"  # each server has its own
    passwords.write_text("".join(f"*:{s.port}:*:*:{urlsplit(s.url).password}\n" for s in (read_only, postgres_server)))
    passwords.chmod(0o600)
    where = hosts.format(
        read_only=f"127.0.0.1:{read_only.port}", hung=f"127.0.0.1:{hung}", live=f"127.0.0.1:{postgres_server.port}"
    )
    wanted = f"target_session_attrs=read-write&passfile={passwords}"
    gov = connect(f"postgresql://postgres@{where}/postgres?{wanted}", postgres_timeout=60)
    assert port_of(gov) == postgres_server.port
    assert bool(shares) == ("{hung}" in hosts)
    assert all(share <= 30 for share in shares)


def test_a_sockets_folder(connect: Callable[..., GovRedis], read_only: PostgresServer) -> None:
    for dsn in (pairs_of(read_only, "/tmp", str(read_only.port)), url_of(read_only, f"%2Ftmp:{read_only.port}")):
        gov = connect(dsn)
        assert gov.postgres.fetch("SELECT inet_client_addr()") == [(None,)]


def test_a_name_server_that_hangs(
    connect: Callable[..., GovRedis],
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
) -> None:
    real, answer, addresses = socket.getaddrinfo, threading.Event(), Resolver.addresses
    given: list[float] = []

    def ask(host: Any, *others: Any, **named: Any) -> Any:
        answer.wait(60)
        return real("127.0.0.1" if host == "db.example" else host, *others, **named)

    def moment(resolver: Resolver, seconds: float) -> list[str]:
        """As with `shares`: long timeouts, for the stalls of the machine, that are not waited for."""
        if threading.current_thread() is threading.main_thread():  # else it is a probe, of the other client
            given.append(seconds)
        return addresses(resolver, min(seconds, 0.5))

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(Resolver, "addresses", moment)
    gov = connect(url_of(postgres_server, f"db.example:{postgres_server.port}"), postgres_timeout=60)
    try:
        with pytest.raises(BackendUnavailable, match=r"no name server has told where db\.example is"):
            gov.postgres.fetch("SELECT 1")
        assert not gov.postgres.breaker.closed
        # Another that has an address is reached all the same.
        both = f"db.example:1,127.0.0.1:{postgres_server.port}"
        given.clear()
        other = connect(url_of(postgres_server, both), postgres_timeout=60)
        assert port_of(other) == postgres_server.port
        assert given
        assert max(given) <= 20
    finally:
        answer.set()
    eventually(lambda: gov.postgres.breaker.closed)
    assert port_of(gov) == postgres_server.port


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://127.0.0.1:1,127.0.0.1:2,127.0.0.1:3/d?host=127.0.0.1,127.0.0.2",
        "host=127.0.0.1,127.0.0.1 port=1,2,3",
        "host=127.0.0.1 target_session_attrs=writable",
        "service=nosuch",
    ],
)
def test_a_dsn_that_libpq_refuses_later_is_a_mistake_and_no_outage(connect: Callable[..., GovRedis], dsn: str) -> None:
    gov = connect(dsn)
    with pytest.raises(BackendError, match="rejects us") as caught:
        gov.postgres.fetch("SELECT 1")
    assert not isinstance(caught.value, BackendUnavailable)
    assert gov.postgres.breaker.closed


@pytest.mark.parametrize("dsn", ["host=h nosuch=1", "host=h password='hunter2", "host=h password hunter2 port=1"])
def test_a_dsn_that_libpq_does_not_take_is_refused_without_its_password(
    connect: Callable[..., GovRedis], dsn: str
) -> None:
    with pytest.raises(ConfigurationError, match=r"^GOVREDIS_DATABASE_URL is .*keywords and values") as caught:
        connect(dsn)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("dsn", "name"),
    [
        ("postgresql://u:p@h1:1,[::1],h2:2/d", "h1:1,::1:5432,h2:2/d"),
        ("host=/run/postgresql dbname=d", "/run/postgresql:5432/d"),
        ("postgresql://%2Ftmp/d", "/tmp:5432/d"),
        ("hostaddr=127.0.0.1 port=7", "127.0.0.1:7/"),
        ("service=mine password=p", "service mine"),
        ("dbname='postgresql://u:hunter2@h/d'", "localhost:***@h/d"),
        ("host=h dbname=d%0a", "h:5432/d%0a"),
        ("host=h service=mine", "h/"),
        ("postgresql://h/d%0a", r"h:5432/d\n"),
    ],
)
def test_its_name(connect: Callable[..., GovRedis], dsn: str, name: str) -> None:
    assert connect(dsn).postgres.name == f"PostgreSQL at {name}"
