"""Sessions with PostgreSQL while Redis, PostgreSQL, or both are away, and after."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
from support import PATIENCE, PATIENT, Child, Gate, copied_postgres, eventually, redis_of

from govredis import GovRedis, SessionAlreadyBound, SessionStoreUnavailable
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]


def back(gov: GovRedis) -> None:
    """Wait until this process uses both of them."""
    eventually(lambda: redis_of(gov).breaker.closed and gov.postgres.breaker.closed)


def cached(gov: GovRedis) -> None:
    """Wait until this process believes the copies in Redis."""
    gov.sessions.bind("cached", "nobody")
    eventually(lambda: gov.sessions.get("cached").backend == "redis")  # type: ignore[union-attr]


@pytest.fixture
def persistent_redis(redis_binary: str) -> Iterator[RedisServer]:
    """A Redis of the test's own whose data survives a kill."""
    with RedisServer(binary=redis_binary, persistent=True) as server:
        yield server


@pytest.fixture
def two(make_gov: MakeGov, persistent_redis: RedisServer, postgres_server: PostgresServer) -> list[GovRedis]:
    """Two processes, as far as sessions go, whose Redis is to go away."""
    return [make_gov(redis_url=persistent_redis.url, database_url=postgres_server.url, **PATIENT) for _ in range(2)]


#: An X that a test can wait for. No server hangs here.
SHORT = {**PATIENT, "metadata_staleness": 3}


@pytest.fixture(scope="module")
def shared_outages(postgres_template: PostgresServer) -> Iterator[PostgresServer]:
    with copied_postgres(postgres_template) as server:
        yield server


@pytest.fixture
def fragile_postgres(shared_outages: PostgresServer) -> PostgresServer:
    """A PostgreSQL to kill and restart, with our tables, empty. (These tests share it: it takes seconds to make.)"""
    connection = psycopg2.connect(shared_outages.url)
    with connection, connection.cursor() as cursor:
        cursor.execute("TRUNCATE govredis_sessions, govredis_session_agents, govredis_outbox, govredis_epochs")
    connection.close()
    return shared_outages


READER = """
import sys
from govredis import Config, GovRedis
with GovRedis(Config(redis_url=sys.argv[1], database_url=sys.argv[2], socket_timeout=10, postgres_timeout=20)) as gov:
    for sid in sys.argv[3:]:
        print(gov.sessions.get_agent_id(sid))
"""


def read_elsewhere(redis_server: RedisServer, postgres_server: PostgresServer, *sids: str) -> list[str]:
    """The answers of another process about sessions."""
    argv = [sys.executable, "-c", READER, redis_server.url, postgres_server.url, *sids]
    return subprocess.check_output(argv, text=True).split()


class TestRedisAway:
    def test_the_rows_answer(self, two: list[GovRedis], persistent_redis: RedisServer) -> None:
        gov, other = two
        gov.sessions.bind("s", "a", data=[1])
        persistent_redis.kill()
        for process in two:
            found = process.sessions.get("s")
            assert found is not None
            assert (found.agent_id, found.data, found.backend) == ("a", [1], "postgres")
            assert process.sessions.get("unknown") is None, "the rows know"
        assert gov.sessions.bind("t", "a").backend == "postgres"
        assert other.sessions.get_agent_id("t") == "a"
        assert other.sessions.for_agent("a") == ["s", "t"]
        with pytest.raises(SessionAlreadyBound):
            other.sessions.bind("t", "b", if_absent=True)
        assert other.sessions.touch("t")
        assert other.sessions.unbind("t") is True
        assert gov.sessions.get("t") is None
        assert gov.sessions.unbind_agent("a") == 1
        assert other.sessions.get("s") is None
        assert gov.counters.get("sessions.degraded.postgres") > 0
        assert gov.counters.get("sessions.degraded.get") == 0

    @pytest.mark.parametrize("data", ["keep", "empty"])
    def test_a_session_revoked_meanwhile_stays_revoked_in_every_process(
        self, two: list[GovRedis], persistent_redis: RedisServer, postgres_server: PostgresServer, data: Any
    ) -> None:
        gov, other = two
        for sid in ("revoked", "of-revoked-agent", "moved", "kept"):
            gov.sessions.bind(sid, "gone" if sid == "of-revoked-agent" else "a")
            other.sessions.get(sid)
        persistent_redis.kill()
        gov.sessions.unbind("revoked")
        gov.sessions.unbind_agent("gone")
        gov.sessions.bind("moved", "b")
        persistent_redis.restart(data)
        expected = ["None", "None", "b", "a"]
        sids = ["revoked", "of-revoked-agent", "moved", "kept"]
        back(gov)
        assert [str(gov.sessions.get_agent_id(sid)) for sid in sids] == expected, "who revoked it sees it at once"
        # The run of the relay in this process has told Redis for all.
        back(other)
        assert [str(other.sessions.get_agent_id(sid)) for sid in sids] == expected
        assert read_elsewhere(persistent_redis, postgres_server, *sids) == expected

    def test_redis_is_not_used_again_before_it_was_told(
        self, make_gov: MakeGov, persistent_redis: RedisServer, postgres_server: PostgresServer
    ) -> None:
        """A pause shorter than the freshness lease: the copies in Redis would be believed."""
        own = {"postgres_timeout": 20, "metadata_staleness": 60}
        gov = make_gov(redis_url=persistent_redis.url, database_url=postgres_server.url, **own)
        cached(gov)
        gov.sessions.bind("s", "a")
        assert gov.sessions.get("s").backend == "redis"  # type: ignore[union-attr]
        persistent_redis.pause()
        assert gov.sessions.unbind("s") is True
        persistent_redis.resume()
        seen = set()
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            seen.add(gov.sessions.get_agent_id("s"))
        assert seen == {None}
        back(gov)

    def test_a_single_refusal_is_no_outage_and_redis_is_told_all_the_same(
        self, two: list[GovRedis], persistent_redis: RedisServer
    ) -> None:
        gov, _ = two
        cached(gov)
        gov.sessions.bind("s", "a")
        persistent_redis.kill()
        assert gov.sessions.unbind("s") is True
        persistent_redis.restart("keep")
        assert gov.sessions.get("s") is None
        back(gov)
        assert gov.sessions.get("s") is None

    def test_redis_out_of_memory_forgets_all_the_same(self, two: list[GovRedis], persistent_redis: RedisServer) -> None:
        gov, other = two
        cached(other)
        for sid in ("s", "t"):
            gov.sessions.bind(sid, "a")
            other.sessions.get(sid)
        persistent_redis.command("CONFIG", "SET", "maxmemory", "1")
        assert gov.sessions.unbind("s") is True
        assert gov.sessions.unbind_agent("a") == 1
        assert persistent_redis.command("EXISTS", "session:s", "session:t") == 0
        assert gov.sessions.bind("u", "a").backend == "postgres"
        assert other.sessions.get_agent_id("u") == "a"


class TestOldData:
    def test_a_restart_with_old_data_logs_nobody_out_and_revives_nobody(
        self, make_gov: MakeGov, redis_binary: str, postgres_server: PostgresServer
    ) -> None:
        with RedisServer(binary=redis_binary, persistent=True) as redis:
            gov, other = (make_gov(redis_url=redis.url, database_url=postgres_server.url, **SHORT) for _ in range(2))
            cached(gov)
            for sid in ("revoked", "of-revoked-agent", "moved", "kept"):
                gov.sessions.bind(sid, "gone" if sid == "of-revoked-agent" else "a")
                other.sessions.get(sid)
            redis.kill()
            redis.snapshot_data()
            redis.restart("keep")
            back(gov)
            gov.sessions.unbind("revoked")
            gov.sessions.unbind_agent("gone")
            gov.sessions.bind("moved", "b")
            gov.sessions.bind("new", "a")
            assert other.sessions.get("revoked") is None
            redis.kill()
            redis.restart("old")
            eventually(lambda: redis_of(gov).breaker.closed)
            began = time.monotonic()
            expected = {"revoked": None, "of-revoked-agent": None, "moved": "b", "new": "a", "kept": "a"}
            worst = 0.0
            while time.monotonic() < began + 5:
                for process in (gov, other):
                    asked = time.monotonic()
                    found = {sid: process.sessions.get_agent_id(sid) for sid in expected}
                    assert found["kept"] == "a"
                    assert found["new"] == "a"
                    if found != expected:
                        worst = asked - began
            assert worst < 4, "X is 3 s"

    def test_a_server_restarted_with_old_data_is_not_believed(
        self, make_gov: MakeGov, redis_binary: str, postgres_server: PostgresServer
    ) -> None:
        """X after the revocation there is no excuse, though the snapshot that this process has is still valid."""
        with RedisServer(binary=redis_binary, persistent=True) as redis:
            gov = make_gov(redis_url=redis.url, database_url=postgres_server.url, **{**SHORT, "metadata_staleness": 1})
            gov.sessions.bind("s", "a")
            cached(gov)
            redis.kill()
            redis.snapshot_data()
            redis.restart("keep")
            back(gov)
            gov.sessions.unbind("s")
            time.sleep(1.1)
            cached(gov)
            redis.kill()
            redis.restart("old")
            assert gov.sessions.get("s") is None


class TestPostgresAway:
    def test_redis_answers_with_all_that_it_has(
        self, make_gov: MakeGov, redis_server: RedisServer, fragile_postgres: PostgresServer
    ) -> None:
        gov, other = (
            make_gov(redis_url=redis_server.url, database_url=fragile_postgres.url, **SHORT) for _ in range(2)
        )
        gov.sessions.bind("s", "a")
        for n in range(3):
            gov.sessions.bind(f"r{n}", "gone" if n == 2 else "a")
            other.sessions.get(f"r{n}")
        fragile_postgres.kill()
        redis_server.command("DEL", "govredis:guard")  # as after a while
        assert other.sessions.get_agent_id("s", touch=True) == "a"
        assert gov.sessions.for_agent("a") == ["r0", "r1", "s"]
        with pytest.raises(SessionStoreUnavailable):
            other.sessions.get("unknown")
        assert gov.sessions.unbind("r0") is True
        assert gov.sessions.unbind_agent("gone") == 1
        bound = gov.sessions.bind("new", "a", data=[])
        assert bound.backend == "local", "nothing has recorded it yet"
        rebound = gov.sessions.bind("r1", "b")
        assert (rebound.bind_count, rebound.backend) == (2, "local")
        # Others see it in Redis.
        assert [other.sessions.get_agent_id(sid) for sid in ("r0", "r1", "r2", "new")] == [None, "b", None, "a"]
        assert [gov.sessions.get_agent_id(sid) for sid in ("r0", "r1", "r2", "new")] == [None, "b", None, "a"]
        assert other.counters.get("sessions.degraded.unguarded") > 0
        assert gov.counters.get("sessions.degraded.bind") == 2
        redis_server.command("FLUSHALL")
        fragile_postgres.restart()
        back(gov)
        back(other)
        for process in (gov, other):
            found = [process.sessions.get_agent_id(sid) for sid in ("s", "r0", "r1", "r2", "new")]
            assert found == ["a", None, "a", None, "a"], "r1 was still bound to a: theirs stands"
        assert gov.counters.get("sessions.replays_refused") == 1
        assert gov.sessions._memory.pending() == ([], [], [])

    def test_a_revocation_outlives_the_process_that_made_it(
        self, make_gov: MakeGov, redis_server: RedisServer, fragile_postgres: PostgresServer
    ) -> None:
        gov, other = (
            make_gov(redis_url=redis_server.url, database_url=fragile_postgres.url, **SHORT) for _ in range(2)
        )
        gov.sessions.bind("s", "a")
        other.sessions.bind("again", "a")
        fragile_postgres.kill()
        gov.sessions.unbind("s")
        gov.sessions.unbind("again")
        gov.sessions._memory.renew_after_fork()  # it is gone, and its pending writes with it
        fragile_postgres.restart()
        back(other)
        assert other.sessions.get("s") is None, "the mark in Redis says so"
        other.sessions.bind("again", "a")
        assert other.sessions.get_agent_id("again") == "a"
        redis_server.command("FLUSHALL")
        assert other.sessions.get("s") is None, "and then the row does"
        assert other.sessions.get_agent_id("again") == "a"

    def test_postgres_is_not_used_before_it_was_told(
        self, make_gov: MakeGov, redis_server: RedisServer, fragile_postgres: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=fragile_postgres.url, **SHORT)
        gov.sessions.bind("s", "a")
        fragile_postgres.kill()
        gov.sessions.unbind("s")
        redis_server.command("FLUSHALL")  # the mark, too
        fragile_postgres.restart()
        seen = set()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not gov.postgres.breaker.closed:
            seen.add(gov.sessions.get("s"))
        back(gov)
        assert seen | {gov.sessions.get("s")} == {None}


class TestBothAway:
    def test_sessions_known_here_are_found(
        self, make_gov: MakeGov, persistent_redis: RedisServer, fragile_postgres: PostgresServer
    ) -> None:
        gov, other = (
            make_gov(redis_url=persistent_redis.url, database_url=fragile_postgres.url, **SHORT) for _ in range(2)
        )
        for sid in ("s", "r", "again"):
            gov.sessions.bind(sid, "a")
        other.sessions.bind("unseen", "a")
        persistent_redis.kill()
        fragile_postgres.kill()
        found = gov.sessions.get("s")
        assert found is not None
        assert (found.agent_id, found.backend) == ("a", "local")
        for call in (gov.sessions.get, gov.sessions.rotate):
            with pytest.raises(SessionStoreUnavailable):
                call("unseen")
        with pytest.raises(SessionStoreUnavailable):
            gov.sessions.for_agent("a")
        with pytest.raises(SessionStoreUnavailable):
            gov.sessions.bind("unseen", "a", if_absent=True)
        gov.sessions.unbind("r")
        gov.sessions.unbind("unseen")
        assert gov.sessions.bind("new", "a").backend == "local"
        gov.sessions.unbind("again")
        gov.sessions.bind("again", "a")
        gov.sessions.bind("of-agent", "gone")
        gov.sessions.unbind_agent("gone")
        gov.sessions.bind("of-agent", "gone")
        persistent_redis.restart("keep")
        eventually(lambda: redis_of(gov).breaker.closed)
        # Redis is back, and has them still; but this process has revoked them.
        assert [gov.sessions.get(sid) for sid in ("r", "unseen")] == [None, None]
        assert gov.sessions.get_agent_id("s") == "a"
        fragile_postgres.restart()
        back(gov)
        back(other)
        sids = ("s", "r", "unseen", "new", "again", "of-agent")
        for process in (gov, other):
            assert [process.sessions.get_agent_id(sid) for sid in sids] == ["a", None, None, "a", "a", "gone"]
        assert read_elsewhere(persistent_redis, fragile_postgres, *sids) == ["a", "None", "None", "a", "a", "gone"]

    def test_a_child_does_not_tell_its_parents_pending_writes(
        self, make_gov: MakeGov, redis_server: RedisServer, fragile_postgres: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=fragile_postgres.url, **SHORT)
        gov.sessions.bind("s", "a")
        fragile_postgres.kill()
        gov.sessions.unbind("s")
        go = Gate()

        def come_back_late() -> None:
            """After the parent has paid, and bound anew."""
            go.wait()
            gov.sessions._backends.tell_soon()
            eventually(lambda: _recorded(gov))

        child = Child(come_back_late)
        fragile_postgres.restart()
        back(gov)
        gov.sessions.bind("s", "b")
        go.open()
        child.result()
        assert gov.sessions.get_agent_id("s") == "b"
        assert gov.sessions.get_agent_id("child") == "a"


def _recorded(gov: GovRedis) -> bool:
    return gov.sessions.bind("child", "a").backend != "local"
