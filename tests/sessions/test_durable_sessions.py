"""Sessions with PostgreSQL: the row is the record, whatever Redis loses, has back, or was not told."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg2
import pytest
from support import lease_of

from govredis import BackendError, ConfigurationError, GovRedis, SessionAlreadyBound
from govredis.sessions.backends.redis_backend import RedisSessionBackend
from govredis.sessions.backends.row_cache import RowCache
from govredis.sessions.backends.rows import SessionRows
from govredis.sessions.binding import BindRequest
from govredis.sessions.pending import AgentRevocation, Revocation
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

MakeGov = Callable[..., GovRedis]


def query(server: PostgresServer, sql: str, *params: Any) -> list[Any]:
    """Run a statement on a connection of its own: another client."""
    connection = psycopg2.connect(server.url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql, params or None)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def statements(gov: GovRedis) -> int:
    return gov.postgres.statements


@pytest.fixture
def other(make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer) -> GovRedis:
    """Another process, as far as sessions go."""
    return make_gov(redis_url=redis_server.url, database_url=postgres_server.url)


def backend(gov: GovRedis, sid: str) -> str | None:
    found = gov.sessions.get(sid)
    return None if found is None else found.backend


class TestHealthy:
    def test_the_wire_format_is_that_of_sessions_without_postgresql_and_a_stamp(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        bound = gov.sessions.bind("s", "agent-é", data={"list": []})
        record = json.loads(plain_redis.get("session:s"))
        stamp = record.pop("__govredis__")
        assert set(stamp) == {"epoch", "version"}
        assert record == {
            "agent_id": "agent-é",
            "bound_at": bound.bound_at.isoformat(timespec="microseconds"),
            "data": {"list": []},
            "bind_count": 1,
        }
        assert 3_590_000 < plain_redis.pttl("session:s") <= 3_600_000
        assert plain_redis.zrange("agent_sessions:agent-é", 0, -1) == ["s"]
        gov.sessions.unbind("s")
        gov.sessions.get("s")
        ours = [key for key in plain_redis.keys("*") if "session" in key]
        assert all(plain_redis.pttl(key) > 0 for key in ours), "every key ends"

    def test_a_hit_is_one_round_trip_without_a_script_and_without_a_statement(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        gov.sessions.bind("s", "a")
        gov.sessions.get("s")
        before = statements(gov)
        plain_redis.config_resetstat()
        for _ in range(20):
            assert backend(gov, "s") == "redis"
        assert statements(gov) == before
        calls = {name: stat["calls"] for name, stat in plain_redis.info("commandstats").items()}
        assert calls["cmdstat_pttl"] == 20
        assert not any("eval" in name for name in calls)
        assert gov.counters.get("sessions.hits") >= 20

    def test_each_call_costs_so_many_statements(self, gov: GovRedis, other: GovRedis, plain_redis: Any) -> None:
        gov.sessions.get("warm")

        def cost(call: Callable[[], Any]) -> int:
            before = statements(gov)
            call()
            return statements(gov) - before

        assert cost(lambda: gov.sessions.bind("s", "a")) == 2
        assert cost(lambda: gov.sessions.touch("s")) == 0, "not a tenth of the TTL has passed"
        assert cost(lambda: gov.sessions.unbind("s")) == 1
        assert cost(lambda: gov.sessions.get("s")) == 1
        other.sessions.bind("t", "a")
        assert cost(lambda: gov.sessions.get("t")) == 0, "one process reads what another bound"
        plain_redis.delete("session:t")
        assert cost(lambda: gov.sessions.get("t")) == 1
        assert cost(lambda: gov.sessions.get("t")) == 0
        assert cost(lambda: gov.sessions.for_agent("a")) == 1
        assert cost(lambda: gov.sessions.unbind_agent("a")) == 1

    def test_touch_slides_row_and_copy_after_a_tenth(
        self, gov: GovRedis, plain_redis: Any, postgres_server: PostgresServer
    ) -> None:
        def left() -> float:
            ((seconds,),) = query(
                postgres_server, "SELECT extract(epoch FROM expires_at - clock_timestamp()) FROM govredis_sessions"
            )
            return float(seconds)

        gov.sessions.bind("s", "a", ttl=3300)
        before = statements(gov)
        gov.sessions.get("s", touch=True)
        assert (statements(gov) - before, left() < 3300) == (0, True)
        gov.sessions.bind("s", "a", ttl=3200)
        before = statements(gov)
        found = gov.sessions.get("s", touch=True)
        assert statements(gov) - before == 1
        assert found is not None
        assert found.expires_at is not None
        assert (found.expires_at - datetime.now(timezone.utc)).total_seconds() > 3500
        assert left() > 3500
        assert plain_redis.pttl("session:s") > 3_500_000
        before = statements(gov)
        assert gov.sessions.touch("s")
        assert statements(gov) == before
        plain_redis.flushall()
        gov.sessions.bind("t", "a", ttl=50)
        plain_redis.flushall()
        assert gov.sessions.touch("t"), "a miss slides, too"
        assert plain_redis.pttl("session:t") > 3_500_000

    def test_a_session_that_slid_while_postgresql_was_away_goes_on(
        self, gov: GovRedis, plain_redis: Any, postgres_server: PostgresServer
    ) -> None:
        """Its row has ended by now, for want of touches, and the copy has not."""
        for sid in ("s", "t"):
            gov.sessions.bind(sid, "a")
            query(postgres_server, "UPDATE govredis_sessions SET expires_at = clock_timestamp() - interval '1 second'")
            plain_redis.pexpire(f"session:{sid}", 3_000_000)
        assert gov.sessions.touch("s")
        plain_redis.delete("govredis:guard")  # the copy is not believed any more
        lease_of(gov)._snapshot = None
        assert backend(gov, "t") == "postgres"
        assert gov.sessions.touch("t")
        plain_redis.flushall()
        assert [gov.sessions.get_agent_id(sid) for sid in ("s", "t")] == ["a", "a"]
        query(postgres_server, "UPDATE govredis_sessions SET expires_at = clock_timestamp() - interval '1 second'")
        plain_redis.flushall()
        assert [gov.sessions.touch(sid) for sid in ("s", "t")] == [False, False]

    def test_a_touch_of_a_revoked_session_ends_its_copy(
        self, gov: GovRedis, plain_redis: Any, postgres_server: PostgresServer
    ) -> None:
        """As if the revocation had not reached Redis yet: the process that finds out says so."""
        gov.sessions.bind("s", "a", ttl=50)
        query(postgres_server, "SELECT govredis_session_unbind('s', '1 hour', NULL)")
        assert gov.sessions.touch("s") is False
        assert not plain_redis.exists("session:s")

    def test_the_outbox_gets_revocations_and_rebinds(self, postgres_server: PostgresServer) -> None:
        def bind(sid: str, agent: str) -> str:
            return f"SELECT govredis_session_bind('{sid}', '{agent}', now(), '1 hour', NULL, false, 999999999, 0)"

        changes = [
            bind("s", "a"),  # not this: no cache has what was bound to nobody
            bind("s", "b"),
            "UPDATE govredis_sessions SET expires_at = now() - interval '1 minute'",
            bind("s", "b"),  # it may be alive in a cache: it slid there while PostgreSQL was away
            bind("t", "b"),
            "SELECT govredis_session_unbind('s', '1 hour', NULL)",
            "SELECT govredis_session_unbind_agent('b', NULL, 10)",
            "SELECT id, version FROM govredis_outbox WHERE namespace = 'session' ORDER BY entry",
        ]
        # With this seed random() does not have the outbox clean itself.
        noted = query(postgres_server, "DELETE FROM govredis_outbox; SELECT setseed(0.5);" + ";".join(changes))
        assert [sid for sid, _ in noted] == ["s", "s", "s", "t"]
        versions = [version for _, version in noted]
        assert versions == sorted(set(versions))

    @pytest.mark.parametrize("forgotten", [False, True], ids=["", "long after"])
    def test_the_relay_leaves_other_copies_alone(self, gov: GovRedis, plain_redis: Any, forgotten: bool) -> None:
        for agent in ("a", "b"):
            gov.sessions.bind("s", agent)
        if forgotten:
            plain_redis.delete("{session:s}:version")
        assert gov.internal.freshness is not None
        assert gov.internal.freshness.drain() is not None
        assert json.loads(plain_redis.get("session:s"))["agent_id"] == "b", "the async service goes on finding it"


class TestRedisLosesData:
    def test_flushall_logs_nobody_out(self, gov: GovRedis, other: GovRedis, plain_redis: Any) -> None:
        for n in range(20):
            gov.sessions.bind(f"s{n}", "a", data={"n": n})
        gov.sessions.unbind("s0")
        plain_redis.flushall()
        for process in (gov, other):
            found = [process.sessions.get(f"s{n}") for n in range(20)]
            assert [binding and binding.data for binding in found] == [None, *({"n": n} for n in range(1, 20))]
        assert len(gov.sessions.for_agent("a")) == 19
        assert gov.sessions.unbind_agent("a") == 19
        assert [backend(other, f"s{n}") for n in range(20)] == [None] * 20

    def test_the_async_service_finds_a_lost_session_again_once_it_was_asked_for(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        gov.sessions.bind("s", "a")
        plain_redis.flushall()
        assert backend(gov, "s") == "postgres"
        assert json.loads(plain_redis.get("session:s"))["agent_id"] == "a"
        assert backend(gov, "s") == "redis"


class TestLate:
    """Calls begun before a revocation, and carried out after it."""

    @pytest.fixture(autouse=True)
    def interruptions(self) -> Iterator[None]:
        """The interruptions that have not come yet."""
        self.to_come: set[str] = set()
        yield
        assert not self.to_come, "the calls that these interrupt were not made"

    def interrupted(self, owner: type, name: str, meanwhile: Callable[[], Any], monkeypatch: Any) -> None:
        """The next call of `owner.name` does something else first."""
        call = getattr(owner, name)
        to_come = self.to_come
        to_come.add(name)

        def interrupt(self: Any, *args: Any, **options: Any) -> Any:
            monkeypatch.setattr(owner, name, call)
            to_come.discard(name)
            meanwhile()
            return call(self, *args, **options)

        monkeypatch.setattr(owner, name, interrupt)

    @pytest.mark.parametrize("end", ["unbind", "unbind_agent"])
    @pytest.mark.parametrize(
        "step", [(SessionRows, "bind"), (RowCache, "fill_bound"), (RowCache, "lease_to_bind")], ids=str
    )
    def test_a_bind_overtaken_by_a_revocation_is_ended(
        self, gov: GovRedis, other: GovRedis, monkeypatch: pytest.MonkeyPatch, step: tuple[type, str], end: str
    ) -> None:
        def revoke() -> None:
            other.sessions.unbind("s") if end == "unbind" else other.sessions.unbind_agent("a")

        self.interrupted(*step, revoke, monkeypatch)
        gov.sessions.bind("s", "a")
        for process in (gov, other):
            assert process.sessions.get("s") is None
        assert gov.sessions.for_agent("a") == []
        assert gov.sessions.bind("s", "a").bind_count == 1
        assert other.sessions.get_agent_id("s") == "a", "a new one is bound as ever"

    @pytest.mark.parametrize("end", ["unbind", "unbind_agent"])
    def test_a_fill_overtaken_by_a_revocation_fills_nothing(
        self, gov: GovRedis, other: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch, end: str
    ) -> None:
        gov.sessions.bind("s", "a")
        plain_redis.delete("session:s")

        def revoke() -> None:
            other.sessions.unbind("s") if end == "unbind" else other.sessions.unbind_agent("a")

        self.interrupted(RowCache, "fill", revoke, monkeypatch)
        assert gov.sessions.get_agent_id("s") == "a", "it was read before"
        assert not plain_redis.exists("session:s")
        for process in (gov, other):
            assert process.sessions.get("s") is None

    def test_a_fill_without_a_lease_any_more_fills_nothing(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where the version was evicted."""
        gov.sessions.bind("s", "a")
        plain_redis.delete("session:s")

        def revoke() -> None:
            gov.sessions.unbind("s")
            plain_redis.delete("{session:s}:version")

        self.interrupted(RowCache, "fill", revoke, monkeypatch)
        gov.sessions.get("s")
        assert not plain_redis.exists("session:s")

    def test_an_older_copy_replaces_no_newer_one(
        self, gov: GovRedis, other: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.interrupted(RowCache, "fill_bound", lambda: other.sessions.bind("s", "newer"), monkeypatch)
        gov.sessions.bind("s", "older")
        for process in (gov, other):
            assert process.sessions.get_agent_id("s") == "newer"

    def test_a_fill_replaces_no_binding_made_meanwhile_by_another_client(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov.sessions.bind("s", "a")
        plain_redis.delete("session:s")
        theirs = json.dumps({"agent_id": "theirs", "bound_at": datetime.now(timezone.utc).isoformat()})
        self.interrupted(RowCache, "fill", lambda: plain_redis.set("session:s", theirs), monkeypatch)
        gov.sessions.get("s")
        assert gov.sessions.get_agent_id("s") == "theirs"

    def test_a_fill_overtaken_by_a_revocation_that_only_redis_knows_fills_nothing(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As by a process for which PostgreSQL is away."""
        gov.sessions.bind("s", "a")
        plain_redis.delete("session:s")
        assert gov.sessions._backends.primary is not None
        in_redis = gov.sessions._backends.primary.stand_in()
        assert in_redis is not None
        self.interrupted(RowCache, "fill", lambda: in_redis.unbind("s"), monkeypatch)
        gov.sessions.get("s")
        assert gov.sessions.get("s") is None

    def test_a_bind_after_such_a_revocation_stays_whatever_the_clocks_say(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        ahead = 10**6 * (int(time.time()) + 1000)
        plain_redis.set("{session:s}:revoked", ahead, px=100_000)
        gov.sessions.bind("s", "a")
        plain_redis.delete("session:s")
        assert gov.sessions.get_agent_id("s") == "a"


class TestLateInRedisAlone:
    @pytest.mark.parametrize("end", ["unbind", "unbind_agent"])
    def test_a_bind_overtaken_by_a_revocation_is_ended(
        self, make_gov: MakeGov, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, end: str
    ) -> None:
        gov, other = (make_gov(redis_url=redis_server.url) for _ in range(2))
        binding = RedisSessionBackend.binding

        def late(self: Any, *args: Any) -> Any:
            monkeypatch.undo()
            other.sessions.unbind("s") if end == "unbind" else other.sessions.unbind_agent("a")
            return binding(self, *args)

        monkeypatch.setattr(RedisSessionBackend, "binding", late)
        gov.sessions.bind("s", "a")
        assert gov.sessions.get("s") is None
        assert gov.counters.get("sessions.overtaken") == 1
        assert gov.sessions.bind("s", "a").bind_count == 1
        assert other.sessions.get_agent_id("s") == "a"

    def test_marks_rise_when_the_servers_clock_was_set_back(
        self, make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any
    ) -> None:
        gov = make_gov(redis_url=redis_server.url)
        ahead = 10**6 * (int(time.time()) + 1000)
        plain_redis.set("{session:s}:revoked", ahead, px=100_000)
        gov.sessions.bind("s", "a")
        assert gov.sessions.get_agent_id("s") == "a", "begun after that revocation, whatever the clock says"
        gov.sessions.unbind("s")
        assert int(plain_redis.get("{session:s}:revoked")) == ahead + 1

    def test_a_mark_is_kept_for_as_long_as_the_session_would_have_lived(
        self, make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any
    ) -> None:
        gov = make_gov(redis_url=redis_server.url)
        gov.sessions.bind("long", "a", ttl=7200)
        for sid in ("long", "unknown"):
            gov.sessions.unbind(sid)
        assert plain_redis.pttl("{session:long}:revoked") > 7_100_000
        assert 3_500_000 < plain_redis.pttl("{session:unknown}:revoked") <= 3_600_000


class TestOthersWithoutRows:
    """The async service, and govredis without PostgreSQL."""

    @staticmethod
    def record(agent: str, seconds_ago: float = 0.0) -> str:
        at = datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)
        return json.dumps({"agent_id": agent, "bound_at": at.isoformat(), "bind_count": 3, "api_key_hash": "x"})

    def test_foreign_bindings_are_found_and_checked_once_an_epoch(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("session:s", self.record("theirs"), ex=50)
        before = statements(gov)
        for _ in range(20):
            found = gov.sessions.get("s")
            assert found is not None
            assert (found.agent_id, found.bind_count, found.backend) == ("theirs", 3, "redis")
        assert statements(gov) - before <= 10, "one look, and a run of the relay"
        before = statements(gov)
        assert gov.sessions.touch("s")
        assert plain_redis.pttl("session:s") > 3_500_000
        assert statements(gov) == before + 1, "it has a row now, which slides"
        with pytest.raises(SessionAlreadyBound):
            gov.sessions.bind("s", "b", if_absent=True)
        assert gov.sessions.bind("s", "b").bind_count == 4
        assert gov.sessions.unbind("s") is True

    def test_a_foreign_binding_counts_if_it_is_newer_than_the_row(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.sessions.bind("s", "ours")
        gov.sessions.bind("t", "ours")
        gov.sessions.unbind("t")
        for sid in ("s", "t"):
            plain_redis.set(f"session:{sid}", self.record("newer"))
            assert gov.sessions.get_agent_id(sid) == "newer"

    def test_a_foreign_binding_does_not_come_back_from_older_data(self, gov: GovRedis, plain_redis: Any) -> None:
        """As if Redis had lost the relay's notes, too; test_newest_binding.py restores it for real."""
        gov.sessions.bind("s", "ours")
        gov.sessions.bind("t", "ours")
        gov.sessions.unbind("t")
        gov.sessions.unbind("unknown")
        plain_redis.flushall()
        for sid, agent in (("s", "ours"), ("t", None), ("unknown", None)):
            plain_redis.set(f"session:{sid}", self.record("older", 60))
            assert gov.sessions.get_agent_id(sid) == agent
            assert plain_redis.exists(f"session:{sid}") == (agent is not None), "and is not shown to others either"

    def test_a_session_bound_before_there_was_postgresql_goes_on(
        self, make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        """PostgreSQL is configured later: nobody is logged out, and `unbind_agent` finds them by the index."""
        before = make_gov(redis_url=redis_server.url)
        before.sessions.bind("s", "a")
        before.sessions.bind("t", "a")
        after = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
        assert after.sessions.get_agent_id("s") == "a"
        assert after.sessions.unbind_agent("a") == 2
        assert after.sessions.get("s") is None

    @pytest.mark.parametrize("raw", [b"x", b"[]", b'{"agent_id": 5}'], ids=repr)
    def test_an_unreadable_record_is_an_error_until_bound_over(
        self, gov: GovRedis, plain_redis: Any, raw: bytes
    ) -> None:
        plain_redis.set("session:s", raw)
        with pytest.raises(BackendError, match="record of session 's'"):
            gov.sessions.get("s")
        assert gov.sessions.bind("s", "a").bind_count == 2
        assert gov.sessions.get_agent_id("s") == "a"

    @pytest.mark.parametrize("member", [5, None, {}, {"epoch": "x", "version": 1}, {"epoch": 1}], ids=repr)
    def test_a_bad_stamp_makes_a_record_foreign(self, gov: GovRedis, plain_redis: Any, member: Any) -> None:
        gov.sessions.bind("s", "ours")
        theirs = {"agent_id": "theirs", "__govredis__": member}
        plain_redis.set("session:s", json.dumps(theirs))
        assert gov.sessions.get_agent_id("s") == "theirs", "it has come after ours, whatever it says"
        gov.sessions.bind("s", "ours")
        plain_redis.delete("{session:s}:version")
        plain_redis.set("session:s", json.dumps(theirs))
        assert gov.sessions.get_agent_id("s") == "ours", "who can tell? Without a bound_at it is older than any row"
        plain_redis.set("session:t", json.dumps(theirs))
        assert gov.sessions.get_agent_id("t") == "theirs"

    def test_a_stamp_of_another_epoch_is_not_believed(
        self, gov: GovRedis, plain_redis: Any, postgres_server: PostgresServer
    ) -> None:
        gov.sessions.bind("s", "a")
        record = json.loads(plain_redis.get("session:s"))
        for epoch, agent in ((record["__govredis__"]["epoch"], "forged"), (1, "a")):
            record["agent_id"], record["__govredis__"]["epoch"] = "forged", epoch
            plain_redis.set("session:s", json.dumps(record))
            assert gov.sessions.get_agent_id("s") == agent
        assert gov.sessions.get_agent_id("s") == "a"


class TestHashedIds:
    def test_neither_redis_nor_postgresql_holds_the_id(
        self, make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer, plain_redis: Any
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, session_hash_ids=True)
        secret = "a-session-id-that-logs-in"
        gov.sessions.bind(secret, "a", data=1)
        gov.sessions.get(secret)
        rotated = gov.sessions.rotate(secret)
        assert rotated is not None
        gov.sessions.unbind(secret)
        gov.sessions.bind("another", "b")
        dump = [*plain_redis.keys("*")]
        for key in dump[:]:
            if plain_redis.type(key) == "string":
                dump.append(plain_redis.get(key))
            if plain_redis.type(key) == "zset":
                dump += plain_redis.zrange(key, 0, -1)
        dump += [str(row) for row in query(postgres_server, "SELECT * FROM govredis_sessions")]
        dump += [str(row) for row in query(postgres_server, "SELECT * FROM govredis_outbox")]
        assert len(dump) > 10
        for sid in (secret, rotated, "another"):
            assert not any(sid in text for text in dump)
        hashed = hashlib.sha256(rotated.encode()).hexdigest()
        assert plain_redis.exists(f"session:{hashed}")
        assert gov.sessions.for_agent("a") == [hashed]
        found = gov.sessions.get(rotated)
        assert found is not None
        assert (found.session_id, found.agent_id) == (rotated, "a")
        with pytest.raises(SessionAlreadyBound) as refused:
            gov.sessions.bind(rotated, "b", if_absent=True)
        assert refused.value.existing is not None
        assert refused.value.existing.session_id == rotated


class TestTable:
    def test_purge_deletes_rows_of_sessions_that_are_over(
        self, gov: GovRedis, plain_redis: Any, postgres_server: PostgresServer
    ) -> None:
        for sid in ("ended", "alive", "revoked", "revoked long ago"):
            gov.sessions.bind(sid, "a")
        gov.sessions.bind("x", "of-revoked")
        gov.sessions.unbind("revoked")
        gov.sessions.unbind("revoked long ago")
        gov.sessions.unbind_agent("of-revoked")
        query(
            postgres_server,
            "UPDATE govredis_sessions SET expires_at = now() - interval '61 minutes' WHERE session IN"
            " ('ended', 'revoked long ago');"
            "UPDATE govredis_sessions SET expires_at = now() - interval '59 minutes' WHERE session = 'alive';"
            "INSERT INTO govredis_sessions SELECT 'many' || n, 'a', now(), now(), now() - interval '1 day', 1, NULL,"
            " false, 1 FROM generate_series(1, 2500) n;"
            "INSERT INTO govredis_session_agents VALUES ('old', 1, now() - interval '2 days')",
        )
        plain_redis.delete("session:ended")
        assert gov.sessions.purge() == 2502
        left = {sid for (sid,) in query(postgres_server, "SELECT session FROM govredis_sessions")}
        assert left == {"alive", "revoked", "x"}, "a revoked one is remembered until it would have ended"
        assert query(postgres_server, "SELECT agent FROM govredis_session_agents") == [("of-revoked",)]
        assert gov.sessions.purge() == 0

    def test_unbind_agent_also_revokes_sessions_whose_row_has_ended_and_whose_copy_may_live(
        self, gov: GovRedis, postgres_server: PostgresServer
    ) -> None:
        for sid in ("alive", "over"):
            gov.sessions.bind(sid, "a")
        query(postgres_server, "UPDATE govredis_sessions SET expires_at = now() WHERE session = 'over'")
        assert gov.sessions.unbind_agent("a") == 2, "it did live there"
        assert query(postgres_server, "SELECT count(*) FROM govredis_sessions WHERE NOT revoked") == [(0,)]
        assert [gov.sessions.get(sid) for sid in ("alive", "over")] == [None, None]

    def test_thousands_of_an_agent_end_in_one_call(self, gov: GovRedis, postgres_server: PostgresServer) -> None:
        query(
            postgres_server,
            "INSERT INTO govredis_sessions SELECT 's' || n, 'a', now(), now(), now() + interval '1 hour', 1, NULL,"
            " false, 1 FROM generate_series(1, 3500) n",
        )
        gov.sessions.bind("other", "b")
        assert gov.sessions.unbind_agent("a") == 3500
        assert gov.sessions.for_agent("a") == []
        assert gov.sessions.for_agent("b") == ["other"]

    def test_without_postgresql_there_is_nothing_to_purge(self, make_gov: MakeGov, redis_server: RedisServer) -> None:
        assert make_gov(redis_url=redis_server.url).sessions.purge() == 0

    def test_missing_tables_are_said(
        self, make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        unmigrated = postgres_server.url.removesuffix("/postgres") + "/template1"
        gov = make_gov(redis_url=redis_server.url, database_url=unmigrated)
        for call in (
            lambda: gov.sessions.get("s"),
            lambda: gov.sessions.bind("s", "a"),
            lambda: gov.sessions.unbind("s"),
            lambda: gov.sessions.purge(),
        ):
            with pytest.raises(ConfigurationError, match="govredis migrate"):
                call()

    def test_a_prefix_keeps_two_apart(
        self, make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        one, two = (
            make_gov(redis_url=redis_server.url, database_url=postgres_server.url, key_prefix=prefix)
            for prefix in ("one:", "two:")
        )
        one.sessions.bind("s", "a")
        one.sessions.bind("s", "a")
        assert two.sessions.get("s") is None
        assert two.sessions.unbind_agent("a") == 0
        assert two.sessions.for_agent("a") == []
        assert one.sessions.for_agent("a") == ["s"]
        assert (one.sessions.verify().rows, two.sessions.verify().rows) == (1, 0)
        assert redis_server.command("EXISTS", "one:session:s") == 1

    def test_the_relay_ends_copies_under_a_prefix(
        self, make_gov: MakeGov, redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url, key_prefix="p:")
        gov.sessions.bind("s", "a")
        for row in ("p:\x1fs", "p:\x1f", "p:\x1f" + 512 * "x"):
            query(postgres_server, "SELECT govredis_session_unbind(%s, '1 hour', NULL)", row)
        assert gov.sessions.get_agent_id("s") == "a", "not told yet"
        assert gov.internal.freshness is not None
        gov.internal.freshness.drain()
        assert gov.sessions.get("s") is None
        assert redis_server.command("EXISTS", "p:session:s") == 0

    def test_verify(self, gov: GovRedis, plain_redis: Any, postgres_server: PostgresServer) -> None:
        for sid in ("same", "not asked for", "theirs", "revoked", "behind"):
            gov.sessions.bind(sid, "a")
        gov.sessions.unbind("revoked")
        plain_redis.delete("session:not asked for")
        plain_redis.set("session:theirs", TestOthersWithoutRows.record("them"))
        parity = gov.sessions.verify()
        assert (parity.rows, parity.bound, parity.copied, parity.others, parity.differing) == (5, 4, 2, 1, ())
        query(postgres_server, "UPDATE govredis_sessions SET version = version + 100 WHERE session = 'behind'")
        query(
            postgres_server,
            "INSERT INTO govredis_sessions SELECT 'many' || n, 'a', now(), now(), now() + interval '1 hour', 1, NULL,"
            " false, 1 FROM generate_series(1, 1200) n",
        )
        query(postgres_server, "UPDATE govredis_sessions SET revoked = true WHERE session = 'same'")
        parity = gov.sessions.verify()
        assert (parity.rows, parity.copied, parity.differing) == (1205, 0, ("behind", "same"))

    def test_verify_needs_both(self, make_gov: MakeGov, redis_server: RedisServer) -> None:
        with pytest.raises(ConfigurationError):
            make_gov(redis_url=redis_server.url).sessions.verify()


def test_a_bind_told_late_gives_way_to_later_binds(gov: GovRedis, postgres_server: PostgresServer) -> None:
    """As of a process cut off: by the clocks, since it has seen nothing."""
    now = datetime.now(timezone.utc)
    rows = gov.sessions._backends.primary._rows
    assert rows is not None

    def told(sid: str, agent: str, at: datetime) -> str:
        return rows.bind(BindRequest(sid, agent, at, 60_000, None, True), None)[0]

    gov.sessions.bind("s", "a")
    assert told("s", "b", now + timedelta(hours=1)) == "held", "somebody else has it"
    gov.sessions.unbind("s")
    assert told("s", "b", now) == "overtaken"
    gov.sessions.unbind_agent("b")
    assert told("new", "b", now) == "overtaken"
    assert query(postgres_server, "SELECT count(*) FROM govredis_sessions WHERE session = 'new'") == [(0,)]
    assert told("s", "b", now + timedelta(hours=1)) == "bound"
    assert told("s", "b", now + timedelta(hours=1)) == "held", "it arrives twice"
    assert gov.sessions.get_agent_id("s") == "b"


def test_a_revocation_told_late_is_as_old_as_it_is(gov: GovRedis) -> None:
    rows = gov.sessions._backends.primary._rows
    assert rows is not None
    at = datetime.now(timezone.utc) - timedelta(minutes=1)
    rows.unbind("s", Revocation(at))
    rows.unbind_agent("a", AgentRevocation(at, frozenset()))
    order = BindRequest("s", "a", at + timedelta(seconds=1), 60_000, None, True)
    assert rows.bind(order, None)[0] == "bound"
    assert rows.bind(order._replace(session_id="t", bound_at=at - timedelta(seconds=1)), None)[0] == "overtaken"
