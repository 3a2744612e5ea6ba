"""Through a PgBouncer in transaction mode, whose one connection to PostgreSQL we share with the application."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
from cutting_proxy import CuttingProxy
from pgbouncer import PgBouncer
from support import PATIENCE

from govredis import BackendError, BackendUnavailable, ConfigurationError, GovRedis
from govredis.postgres import postgres as postgres_module
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

#: All that a session may keep when a transaction of it has ended, as texts.
_SESSION = """
SELECT 'session ' || pg_backend_pid()
UNION ALL SELECT name || ' = ' || setting FROM pg_settings WHERE name NOT LIKE 'plpgsql.%'
UNION ALL SELECT l::text FROM pg_locks l WHERE locktype = 'advisory'
UNION ALL SELECT p::text FROM pg_prepared_statements p UNION ALL SELECT c::text FROM pg_cursors c WHERE name <> ''
UNION ALL SELECT 'listens ' || pg_listening_channels()
UNION ALL SELECT 'temporary ' || relname FROM pg_class WHERE relpersistence = 't'
"""


@pytest.fixture
def bouncer(
    postgres_server: PostgresServer, system_binary: Callable[[str], str], tmp_path: Path
) -> Iterator[PgBouncer]:
    bouncer = PgBouncer(system_binary("pgbouncer"), postgres_server.url, tmp_path)
    yield bouncer
    bouncer.close()


@pytest.fixture
def application(bouncer: PgBouncer) -> Iterator[Any]:
    connection = psycopg2.connect(bouncer.url, application_name="application")
    connection.autocommit = True
    with connection.cursor() as cursor:
        yield cursor
    connection.close()


def use_everything(gov: GovRedis, redis_away: bool) -> None:
    gov.sessions.bind("s", "agent", data={"role": "admin"})
    assert gov.sessions.get_agent_id("s", touch=True) == "agent"
    new = gov.sessions.rotate("s")
    assert gov.sessions.for_agent("agent") == [new]
    assert gov.sessions.unbind_agent("agent") == 1
    with gov.locks.acquire("l") as held:
        assert held.degraded == redis_away
    assert [bool(gov.limits.hit("i", "2/hour")) for _ in range(3)] == [True, True, False]
    assert gov.limits.peek("i", "2/hour").remaining == 0
    gov.agents.create("a", {"n": 1})
    gov.agents.update_metadata("a", n=2)
    loaded = gov.agents.get("a")
    assert loaded is not None
    assert gov.metadata.get_or_load("a", lambda _: loaded["metadata"]) == loaded["metadata"]
    gov.agents.delete("a")
    gov.health.snapshot()
    assert {check.name: check.status for check in gov.health.check().checks}["postgres"] == "pass"
    with gov.postgres.transaction(timeout=60) as tx:  # longer than the settings'
        assert tx.fetch("SHOW transaction_isolation") == [("read committed",)]
    with pytest.raises(BackendError, match="division by zero"):
        gov.postgres.fetch("SELECT 1 / 0")
    with pytest.raises(BackendError, match="division by zero"), gov.postgres.transaction() as tx:
        tx.fetch("SELECT 1 / 0")


@pytest.mark.parametrize("redis_away", [False, True], ids=["redis", "redis away"])
def test_the_application_finds_its_session_as_it_was(
    bouncer: PgBouncer, application: Any, make_gov: Callable[..., GovRedis], redis_server: RedisServer, redis_away: bool
) -> None:
    def session() -> set[str]:
        application.execute(_SESSION)
        return {text for (text,) in application}

    before = session()
    gov = make_gov(redis_url=redis_server.url, redis_enabled=not redis_away, database_url=bouncer.url)
    assert gov.postgres.migrate() == []
    ((ours,),) = gov.postgres.fetch("SELECT pg_backend_pid()")
    assert f"session {ours}" in before
    use_everything(gov, redis_away)
    assert session() == before
    gov.close()
    assert session() == before


def test_the_applications_slow_statement_is_its_own_business(
    bouncer: PgBouncer, application: Any, make_gov: Callable[..., GovRedis], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A statement of ours may take a second. We wait for longer: a stall of the machine must not be an outage.
    monkeypatch.setattr(postgres_module, "_SERVER_SHARE", 1 / PATIENCE)
    gov = make_gov(redis_enabled=False, database_url=bouncer.url, postgres_timeout=PATIENCE)
    gov.limits.hit("i", "2/hour")
    with gov.postgres.transaction():
        pass
    application.execute("SELECT pg_sleep(1.5)")
    gov.close()
    application.execute("SELECT pg_sleep(1.5)")


def test_the_applications_settings_are_not_ours(
    bouncer: PgBouncer, application: Any, make_gov: Callable[..., GovRedis]
) -> None:
    # Two of ours begin under this timeout, before it is set: a short timeout would end them on a machine that stalls.
    application.execute(f"SET statement_timeout = '{PATIENCE:.0f}s'; SET default_transaction_isolation = serializable")
    application.execute("SET search_path = nowhere")
    gov = make_gov(redis_enabled=False, database_url=bouncer.url, postgres_timeout=2 * PATIENCE)
    use_everything(gov, redis_away=True)
    settings = "SELECT current_setting('transaction_isolation'), current_setting('statement_timeout')::interval"
    ours = ("read committed", timedelta(seconds=2 * PATIENCE * 0.9))
    assert gov.postgres.fetch(settings) == [ours]
    with gov.postgres.transaction() as tx:
        assert tx.fetch(settings) == [ours]


def test_a_statement_is_one_message_and_one_reply(bouncer: PgBouncer, make_gov: Callable[..., GovRedis]) -> None:
    port = urlsplit(bouncer.url).port
    assert port is not None
    with CuttingProxy(port) as proxy:
        gov = make_gov(
            redis_enabled=False, database_url=bouncer.url.replace(f":{port}", f":{urlsplit(proxy.url).port}")
        )
        gov.postgres.fetch("SELECT 1")
        before = len(proxy.exchanges)
        for n in range(5):
            gov.limits.hit("i", "9/hour", cost=1 + n % 2)
        assert len(proxy.exchanges) == before + 5


def test_migrate(bouncer: PgBouncer, make_gov: Callable[..., GovRedis]) -> None:
    gov = make_gov(redis_enabled=False, database_url=bouncer.url, schema="another")
    try:
        missing = gov.postgres.missing_migrations()
        assert len(missing) > 10
        assert gov.postgres.migrate() == missing
        use_everything(gov, redis_away=True)
    finally:
        gov.postgres.fetch("DROP SCHEMA another CASCADE")


def test_a_startup_parameter_that_it_refuses_is_a_mistake_and_no_outage(
    bouncer: PgBouncer, make_gov: Callable[..., GovRedis]
) -> None:
    gov = make_gov(redis_enabled=False, database_url=f"{bouncer.url}?options=-c%20work_mem%3D64MB")
    for _ in range(3):
        with pytest.raises(BackendError, match=r"rejects us: .*unsupported startup parameter") as caught:
            gov.postgres.fetch("SELECT 1")
        assert not isinstance(caught.value, BackendUnavailable)
    for right, wrong, said in (
        ("/postgres", "/nosuch", "no such database"),
        ("//anybody", "//nobody", "no such user|authentication failed"),
    ):
        gov = make_gov(redis_enabled=False, database_url=bouncer.url.replace(right, wrong))
        with pytest.raises(BackendError, match=f"rejects us: .*(?:{said})"):
            gov.postgres.fetch("SELECT 1")


def test_a_server_that_hangs_behind_it_is_away_until_it_answers(
    mortal_postgres: PostgresServer,
    system_binary: Callable[[str], str],
    tmp_path: Path,
    make_gov: Callable[..., GovRedis],
    eventually: Callable[..., Any],
) -> None:
    bouncer = PgBouncer(system_binary("pgbouncer"), mortal_postgres.url, tmp_path)
    try:
        postgres = make_gov(redis_enabled=False, database_url=bouncer.url, postgres_timeout=20).postgres
        assert postgres.fetch("SELECT 1") == [(1,)]
        mortal_postgres.pause()
        postgres._timeout = 1  # only now: else a stall of the machine would be an outage
        with pytest.raises(BackendUnavailable):
            postgres.fetch("SELECT 1")
        probes: list[BaseException] = []
        real = postgres._ask

        def ask(sql: str) -> Any:
            try:
                return real(sql)
            except BaseException as error:
                probes.append(error)
                raise

        postgres._ask = ask  # type: ignore[method-assign]
        eventually(lambda: len(probes) > 1)
        assert not postgres.breaker.closed
        postgres._timeout = 20
        mortal_postgres.resume()
        eventually(lambda: postgres.breaker.closed)
        assert postgres.breaker.times_opened == 1
        assert postgres.fetch("SELECT 1") == [(1,)]
    finally:
        bouncer.close()


def test_a_mode_without_transactions_is_refused_in_words(
    postgres_server: PostgresServer,
    system_binary: Callable[[str], str],
    tmp_path: Path,
    make_gov: Callable[..., GovRedis],
) -> None:
    bouncer = PgBouncer(system_binary("pgbouncer"), postgres_server.url, tmp_path, mode="statement")
    try:
        postgres = make_gov(redis_enabled=False, database_url=bouncer.url).postgres
        for _ in range(3):
            with pytest.raises(ConfigurationError, match="pool_mode must be"), postgres.transaction():
                pass
            report = make_gov(redis_enabled=False, database_url=bouncer.url).health.check()
            (check,) = [check for check in report.checks if check.name == "postgres"]
            assert (report.status, check.status) == ("fail", "fail")
            assert "pool_mode must be" in check.output
        assert postgres.breaker.closed
    finally:
        bouncer.close()
