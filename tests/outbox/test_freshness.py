"""The freshness lease: whatever fails, no hit is more than X behind what is committed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from clocked_pair import Clock, X, cached, name_of
from support import PATIENCE, PATIENT, Background, eventually, in_child, lease_of, redis_of

from govredis import BackendUnavailable, ConfigurationError, GovRedis
from govredis.keys import sibling
from govredis.outbox import node_lease
from govredis.outbox.node_lease import NodeLease
from govredis.outbox.relay import FreshnessRecord, OutboxRelay
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.once

Pair = tuple[GovRedis, GovRedis]
INSERT = "INSERT INTO govredis_agents (agent_id, metadata) VALUES ('{}', '{{\"name\": \"{}\"}}')"
UPDATE = "UPDATE govredis_agents SET metadata = '{{\"name\": \"{1}\"}}' WHERE agent_id = '{0}'"


def drain(gov: GovRedis) -> int | None:
    assert gov.internal.freshness is not None
    return gov.internal.freshness.drain()


def record_of(server: RedisServer) -> FreshnessRecord | None:
    raw = server.command("GET", "govredis:guard")
    return FreshnessRecord.parse(None if raw is None else raw.encode())


def counted(gov: GovRedis, name: str) -> int:
    return gov.counters.get(name)


class TestWritesOfOthers:
    """psql, another service: nobody calls `invalidate`."""

    @pytest.fixture(autouse=True)
    def warm(self, sql: Callable[..., Any], pair: Pair) -> None:
        sql(INSERT.format("a", "old"))
        for gov in pair:
            assert name_of(gov) == "old"
            assert cached(gov) == "old"

    @pytest.mark.parametrize(
        ("write", "then"),
        [
            (UPDATE.format("a", "new"), "new"),
            ("DELETE FROM govredis_agents", None),
            ("UPDATE govredis_agents SET agent_id = 'b'", None),
            ("TRUNCATE govredis_agents", None),
            (f"DELETE FROM govredis_agents; {INSERT.format('a', 'new')}", "new"),
            (f"TRUNCATE govredis_agents; {INSERT.format('a', 'new')}", "new"),
            (f"BEGIN; SAVEPOINT s; {UPDATE.format('a', 'new')}; RELEASE s; COMMIT", "new"),
        ],
    )
    def test_writes_are_seen_within_x_of_the_commit(
        self, sql: Callable[..., Any], pair: Pair, clock: Clock, write: str, then: str | None
    ) -> None:
        one, two = pair
        sql(write)
        assert name_of(one) == "old", "nobody has told Redis"
        clock.sleep(X)
        assert name_of(one) == then
        assert name_of(two) == then

    def test_writes_are_seen_when_somebody_drains(self, sql: Callable[..., Any], pair: Pair) -> None:
        one, two = pair
        sql(UPDATE.format("a", "new"))
        assert drain(two) == 1
        assert name_of(one) == "new"
        assert drain(two) == 0, "told once"
        assert cached(one) == "new"
        assert sql("SELECT count(*) FROM govredis_outbox") == [(0,)]

    def test_writes_that_are_rolled_back_invalidate_nothing(
        self, sql: Callable[..., Any], pair: Pair, clock: Clock
    ) -> None:
        one, two = pair
        sql(f"BEGIN; {UPDATE.format('a', 'never')}; ROLLBACK")
        sql(f"BEGIN; SAVEPOINT s; {UPDATE.format('a', 'never')}; ROLLBACK TO s; COMMIT")
        assert drain(two) == 0
        clock.sleep(X)
        assert cached(one) == "old"

    def test_both_ids_of_a_row_that_changes_its_id_are_invalidated(self, sql: Callable[..., Any], pair: Pair) -> None:
        one, two = pair
        one.metadata.get_or_load("b", lambda _: {"metadata": {"name": "made up"}})
        sql("UPDATE govredis_agents SET agent_id = 'b'")
        drain(two)
        assert (cached(one, "a"), cached(one, "b")) == (None, None)
        assert name_of(one, "b") == "old"

    def test_a_long_transaction_that_commits_late(
        self, sql: Callable[..., Any], connect: Callable[[], Any], pair: Pair
    ) -> None:
        """Its entry is older, by number and time, than those that were told before it."""
        one, two = pair
        late = connect()
        late.cursor().execute(UPDATE.format("a", "late"))
        sql(INSERT.format("b", "b"))
        assert drain(two) == 1
        assert drain(two) == 0
        late.commit()
        assert drain(two) == 1
        assert name_of(one) == "late"

    def test_more_than_a_thousand_begin_a_new_epoch(self, sql: Callable[..., Any], pair: Pair) -> None:
        one, two = pair
        one.metadata.get_or_load("kept", lambda _: 1)
        sql("INSERT INTO govredis_agents (agent_id, metadata) SELECT 'n' || n, '{}' FROM generate_series(1, 1001) n")
        epochs = counted(two, "guard.epochs")
        drain(two)
        assert counted(two, "guard.epochs") == epochs + 1
        one.internal.freshness.drain()  # type: ignore[union-attr]
        lease_of(two)._snapshot = lease_of(one)._snapshot = None
        assert one.metadata.get("kept") is None
        assert name_of(one) == "old", "loaded"
        assert cached(two) == "old", "and cached anew"
        eventually(lambda: drain(two) is not None and sql("SELECT count(*) FROM govredis_outbox") == [(0,)])

    def test_so_do_many_entries_but_not_many_of_one_id(self, sql: Callable[..., Any], pair: Pair) -> None:
        one, two = pair
        one.metadata.get_or_load("kept", lambda _: 1)
        sql("SELECT govredis_outbox_add('agent_meta', 'a', NULL) FROM generate_series(1, 2000)")
        assert drain(two) == 1
        assert (cached(one), one.metadata.get("kept")) == (None, 1)
        epochs = counted(two, "guard.epochs")
        sql("SELECT govredis_outbox_add('agent_meta', 'a', NULL) FROM generate_series(1, 20001)")
        drain(two)
        assert counted(two, "guard.epochs") == epochs + 1
        left = [20001]

        def all_deleted() -> bool:
            # A transaction of PostgreSQL's own that is older, autovacuum's say, delays what a run deletes.
            left.append(sql("SELECT count(*) FROM govredis_outbox")[0][0])
            drain(two)
            return left[-1] == 0

        eventually(all_deleted)
        assert {before - after for before, after in pairwise(left)} - {0} == {20000, 1}, "a bounded number by each run"

    def test_a_key_that_cannot_be_invalidated_begins_a_new_epoch(
        self, sql: Callable[..., Any], pair: Pair, redis_server: RedisServer
    ) -> None:
        two = pair[1]
        redis_server.command("SET", "broken", "no number")
        two.internal.freshness.watch("agent_meta", lambda entries: [("INCR", "broken")])  # type: ignore[union-attr]
        sql(UPDATE.format("a", "new"))
        assert drain(two) == 1
        lease_of(two)._snapshot = None
        assert cached(two) is None
        assert counted(two, "guard.failed") == 1

    def test_a_foreign_value_of_another_type_is_invalidated(
        self, sql: Callable[..., Any], pair: Pair, redis_server: RedisServer
    ) -> None:
        redis_server.command("DEL", "agent_meta:a")
        redis_server.command("LPUSH", "agent_meta:a", "x")
        redis_server.command("LPUSH", sibling("agent_meta:a", "tombstone"), "x")
        sql(UPDATE.format("a", "new"))
        drain(pair[0])
        assert redis_server.command("EXISTS", "agent_meta:a") == 0
        assert counted(pair[0], "guard.failed") == 0

    def test_ids_under_which_nothing_is_cached_are_passed_over(self, sql: Callable[..., Any], pair: Pair) -> None:
        sql("SELECT govredis_outbox_add(n, i, 1) FROM (VALUES ('agent_meta', ''), ('agent_meta', '{'), ('a:b', 'x'),"
            " ('session', 'x')) v(n, i)")  # fmt: skip
        sql(UPDATE.format("a", "new"))
        assert drain(pair[1]) == 5
        assert name_of(pair[0]) == "new"
        assert counted(pair[1], "guard.epochs") + counted(pair[0], "guard.epochs") == 1


class TestLosses:
    @pytest.fixture
    def server(self, persistent_redis: RedisServer) -> RedisServer:
        return persistent_redis

    @pytest.fixture
    def govs(self, make_pair: Callable[..., Pair], server: RedisServer) -> Pair:
        one, two = make_pair(server)
        one.agents.create("a", {"name": "old"})
        assert name_of(one) == name_of(two) == "old"
        drain(two)
        return one, two

    def test_an_invalidation(self, govs: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its writer died between commit and invalidation, say."""
        one, two = govs
        monkeypatch.setattr(one.metadata, "invalidate", lambda *_, **__: None)
        one.agents.update_metadata("a", name="new")
        assert name_of(two) == "old"
        clock.sleep(X)
        assert name_of(two) == "new"

    @pytest.mark.parametrize("how", ["FLUSHALL", "empty", "old", "older than the last run", "lease evicted"])
    def test_data(self, govs: Pair, server: RedisServer, clock: Clock, how: str) -> None:
        one, two = govs
        server.snapshot_data()
        if how == "older than the last run":
            drain(two)
        one.agents.update_metadata("a", name="new")
        drain(one)
        assert name_of(two) == "new"
        if how == "FLUSHALL":
            server.command("FLUSHALL")
        elif how == "lease evicted":
            server.command("DEL", "govredis:guard")
        else:
            server.kill()
            server.restart("empty" if how == "empty" else "old")
        if how not in {"old", "older than the last run"}:  # which has its own lease: it may be used until then
            assert name_of(one) == name_of(two) == "new"
        clock.sleep(X)
        assert name_of(one) == name_of(two) == "new"

    def test_old_data_is_used_for_no_longer_than_its_own_lease_lives(
        self, govs: Pair, server: RedisServer, clock: Clock
    ) -> None:
        """A reader's lease is younger than that of a server which was restarted with older data."""
        one, two = govs
        server.snapshot_data()
        clock.sleep(X * 0.8)
        one.agents.update_metadata("a", name="new")
        drain(two)
        lease_of(two)._snapshot = None
        assert name_of(two) == "new"
        seen = lease_of(two)._snapshot
        assert seen is not None
        server.kill()
        server.restart("old")
        clock.sleep(X * 0.3)
        assert seen.until > lease_of(two)._clock(), "by itself it would be good for longer"
        assert cached(two) is None
        assert name_of(two) == "new"

    def test_old_data_begins_a_new_epoch_at_the_next_run(self, govs: Pair, server: RedisServer) -> None:
        one, two = govs
        server.snapshot_data()
        one.agents.update_metadata("a", name="new")
        drain(two)
        server.kill()
        server.restart("old")
        before = record_of(server)
        drain(two)
        after = record_of(server)
        assert before is not None
        assert after is not None
        assert after.epoch != before.epoch
        assert name_of(two) == name_of(one) == "new"

    def test_kept_data_does_not(self, govs: Pair, server: RedisServer) -> None:
        before = record_of(server)
        server.kill()
        server.restart("keep")
        assert cached(govs[0]) == "old"
        drain(govs[0])
        after = record_of(server)
        assert before is not None
        assert after is not None
        assert after.epoch == before.epoch

    def test_a_lease_of_older_data_stores_nothing_for_the_new_epoch(self, govs: Pair, server: RedisServer) -> None:
        one, two = govs
        one.metadata.invalidate("a")

        def load(agent: str) -> Any:
            record = one.agents.get(agent)
            server.snapshot_data()  # with the lease
            two.agents.update_metadata("a", name="new")
            drain(two)
            server.kill()
            server.restart("old")
            drain(two)
            return record

        one.metadata.get_or_load("a", load)
        assert server.command("EXISTS", "agent_meta:a") == 1, "it was stored"
        assert name_of(two) == name_of(one) == "new"

    @pytest.mark.parametrize("told", range(4))
    def test_data_as_of_the_middle_of_a_run(
        self, sql: Callable[..., Any], govs: Pair, server: RedisServer, monkeypatch: pytest.MonkeyPatch, told: int
    ) -> None:
        """A run tells Redis three things; some of them are on its disk when it restarts, the run being over."""
        one, two = govs
        sql(UPDATE.format("a", "new"))
        with monkeypatch.context() as patch:
            halve_runs(patch, one, told, server.snapshot_data)
            assert drain(one) == 1
        server.kill()
        server.restart("old")
        drain(two)
        assert name_of(two) == name_of(one) == "new"

    @pytest.mark.parametrize("told", [1, 2])
    def test_data_lost_in_the_middle_of_a_run(
        self, sql: Callable[..., Any], govs: Pair, server: RedisServer, monkeypatch: pytest.MonkeyPatch, told: int
    ) -> None:
        one, two = govs
        server.snapshot_data()
        sql(UPDATE.format("a", "new"))

        def lose() -> None:
            server.kill()
            server.restart("old")

        with monkeypatch.context() as patch:
            halve_runs(patch, one, told, lose)
            assert drain(one) is None
        assert sql("SELECT count(*) FROM govredis_outbox") == [(1,)], "it was not acknowledged"
        drain(two)
        assert name_of(two) == name_of(one) == "new"

    def test_data_of_the_middle_of_a_run_that_are_back_before_its_end(
        self, sql: Callable[..., Any], govs: Pair, server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first number is there, and the invalidation is not."""
        one, two = govs
        sql(UPDATE.format("a", "new"))
        pipeline = redis_of(one).pipeline

        def in_two(commands: Any, *args: Any, **options: Any) -> Any:
            before = pipeline(commands[:1], *args, **options)
            server.snapshot_data()
            after = pipeline(commands[1:], *args, **options)
            server.kill()
            server.restart("old")
            return before + after

        with monkeypatch.context() as patch:
            patch.setattr(redis_of(one), "pipeline", in_two)
            assert drain(one) is None
        assert sql("SELECT count(*) FROM govredis_outbox") == [(1,)], "it was not acknowledged"
        drain(two)
        assert name_of(two) == name_of(one) == "new"

    def test_a_lagging_replica_that_is_promoted(
        self, make_pair: Callable[..., Pair], make_gov: Callable[..., GovRedis], redis_binary: str, clock: Clock,
        postgres_server: PostgresServer,
    ) -> None:  # fmt: skip
        with RedisServer(binary=redis_binary) as master, RedisServer(binary=redis_binary) as replica:
            one, _ = make_pair(master)
            one.agents.create("a", {"name": "old"})
            name_of(one)
            replica.command("REPLICAOF", "127.0.0.1", master.port)
            while replica.command("GET", "agent_meta:a") is None:
                pass
            replica.command("REPLICAOF", "NO", "ONE")  # it hears nothing of what follows
            one.agents.update_metadata("a", name="new")
            drain(one)
            master.kill()
            after, _ = make_pair(replica)
            clock.sleep(X)
            assert name_of(after) == "new"
            assert counted(after, "guard.epochs") == 1


def halve_runs(patch: pytest.MonkeyPatch, gov: GovRedis, told: int, between: Callable[[], None]) -> None:
    """`between` comes after so many of the three things that a run tells Redis before it tells PostgreSQL."""
    redis = redis_of(gov)
    assert redis is not None
    pipeline, confirm = redis.pipeline, OutboxRelay._confirm

    def in_two(commands: Any, *args: Any, **options: Any) -> Any:
        assert len(commands) == 2
        before = pipeline(commands[:told], *args, **options)
        if told < 3:
            between()
        return before + pipeline(commands[told:], *args, **options)

    def after_all(*args: Any) -> None:
        if told == 3:
            between()
        confirm(*args)

    patch.setattr(redis, "pipeline", in_two)
    patch.setattr(OutboxRelay, "_confirm", after_all)


class TestRuns:
    @pytest.fixture(autouse=True)
    def warm(self, sql: Callable[..., Any], pair: Pair) -> None:
        sql(INSERT.format("a", "old"))
        assert name_of(pair[0]) == "old"

    @pytest.mark.parametrize("struck", ["_tell", "_confirm", "_set"])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_relay_that_dies_on_the_way_leaves_nothing_wrong(
        self, sql: Callable[..., Any], pair: Pair, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch,
        struck: str, when: str,
    ) -> None:  # fmt: skip
        one, two = pair
        sql(UPDATE.format("a", "new"))
        carry_out = getattr(OutboxRelay, struck)

        def dies(self: OutboxRelay, *args: Any) -> Any:
            if when == "after":
                carry_out(self, *args)
            raise KeyboardInterrupt

        before = record_of(redis_server)
        with monkeypatch.context() as patched:
            patched.setattr(OutboxRelay, struck, dies)
            with pytest.raises(KeyboardInterrupt):
                drain(one)
        sql(UPDATE.format("a", "newer"))
        drain(two)
        assert name_of(one) == name_of(two) == "newer"
        after = record_of(redis_server)
        assert before is not None
        assert after is not None
        assert after.epoch == before.epoch, "nothing was lost, so nothing else is dropped"

    def test_a_relay_that_stopped_within_changes_nothing_when_it_goes_on(
        self, sql: Callable[..., Any], pair: Pair, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both relays have read the same lease, but only one of them writes it."""
        one, two = pair
        pipeline = redis_of(one).pipeline

        def stops(*args: Any, **options: Any) -> Any:
            sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'")
            assert drain(two) == 0
            return pipeline(*args, **options)

        monkeypatch.setattr(redis_of(one), "pipeline", stops)
        assert drain(one) is None
        record = record_of(redis_server)
        assert record is not None
        assert sql("SELECT epoch, tick FROM govredis_epochs") == [(record.epoch, record.run)]

    def test_postgres_ends_the_transaction_of_one_that_stops(
        self, sql: Callable[..., Any], pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = pair
        lease_of(one).relay._patience_ms = "50"
        pipeline, stopped = redis_of(one).pipeline, []

        def stops(*args: Any, **options: Any) -> Any:
            stopped.append(True)
            while drain(two) is None:  # "somebody else is at it"
                pass
            return pipeline(*args, **options)

        monkeypatch.setattr(redis_of(one), "pipeline", stops)
        while not stopped:  # on a busy machine PostgreSQL may end it before it comes to Redis
            assert drain(one) is None
        assert counted(two, "guard.ticks") == 1

    def test_two_at_once(self, sql: Callable[..., Any], pair: Pair) -> None:
        told: list[int | None] = []
        for _ in range(20):
            sql(UPDATE.format("a", "new"))
            threads = [threading.Thread(target=lambda gov=gov: told.append(drain(gov))) for gov in pair * 2]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert drain(pair[0]) is not None
        assert sql("SELECT count(*) FROM govredis_outbox") == [(0,)]
        assert sum(counted(gov, "guard.epochs") for gov in pair) == 1
        assert name_of(pair[0]) == "new"

    def test_each_redis_and_each_prefix_is_told(
        self, sql: Callable[..., Any], pair: Pair, make_pair: Callable[..., Pair], redis_server: RedisServer,
        mortal_redis: RedisServer,
    ) -> None:  # fmt: skip
        elsewhere = make_pair(mortal_redis)[0]
        prefixed = make_pair(redis_server, key_prefix="p:")[0]
        prefixed.agents.create("a", {"name": "old"})
        watched = prefixed.cache("user_meta"), pair[0].cache("user_meta")
        for gov in (elsewhere, prefixed):
            assert name_of(gov) == "old"
        for cache in watched:
            cache.get_or_load("u", lambda _: 1)
        sql('UPDATE govredis_agents SET metadata = \'{"name": "new"}\'')  # of both prefixes
        sql("SELECT govredis_outbox_add('user_meta', 'u', 1)")
        for gov in (pair[0], elsewhere, prefixed):
            assert drain(gov) == 3
            assert drain(gov) == 0
            assert name_of(gov) == "new"
        assert [cache.get("u") for cache in watched] == [None, None]
        assert sql("SELECT count(*) FROM govredis_outbox") == [(0,)]

    def test_a_redis_that_is_gone_is_forgotten_and_begins_anew_when_it_returns(
        self, sql: Callable[..., Any], pair: Pair, make_pair: Callable[..., Pair], mortal_redis: RedisServer
    ) -> None:
        gone = make_pair(mortal_redis)[0]
        assert name_of(gone) == "old"
        sql("UPDATE govredis_epochs SET at = at - interval '601 seconds'")
        sql(UPDATE.format("a", "new"))
        drain(pair[0])
        assert sql("SELECT count(*) FROM govredis_epochs") == [(1,)]
        assert sql("SELECT count(*) FROM govredis_outbox") == [(0,)], "nothing is kept for it"
        drain(gone)
        lease_of(gone)._snapshot = None
        assert cached(gone) is None
        assert name_of(gone) == "new"

    def test_a_database_in_anothers_place_begins_a_new_epoch(self, sql: Callable[..., Any], pair: Pair) -> None:
        """A dump restored elsewhere: its snapshots count other transactions, and would see entries yet to come."""
        sql("UPDATE govredis_epochs SET seen = '9999999999:9999999999:'")
        sql(UPDATE.format("a", "new"))
        drain(pair[1])
        assert counted(pair[1], "guard.epochs") == 1
        lease_of(pair[0])._snapshot = None
        assert name_of(pair[0]) == "new"

    def test_a_clock_that_is_set_back_is_noticed(
        self, sql: Callable[..., Any], pair: Pair, clock: Clock, redis_server: RedisServer
    ) -> None:
        one, two = pair
        drain(one)
        clock.stepped = -3600
        sql(UPDATE.format("a", "new"))
        clock.sleep(X)
        assert name_of(two) == name_of(one) == "new"

    def test_the_outbox_cleans_itself_where_no_relay_runs(self, sql: Callable[..., Any]) -> None:
        sql("SELECT govredis_outbox_add('x', n::text, 1) FROM generate_series(1, 3000) n")

        def is_clean() -> bool:
            sql("DELETE FROM govredis_epochs")  # each time: a process of an earlier test may have run a relay just now
            for _ in range(200):
                sql("SELECT govredis_outbox_add('x', 'y', 1)")
            return bool(sql("SELECT count(*) < 2000 FROM govredis_outbox")[0][0])

        eventually(is_clean)

    def test_an_uncommitted_entry_is_never_cleaned_away(
        self, sql: Callable[..., Any], connect: Callable[[], Any], pair: Pair
    ) -> None:
        """Nobody used cached values when it was written; somebody may when it is committed."""
        sql("DELETE FROM govredis_epochs")
        late = connect()
        cursor = late.cursor()
        cursor.execute(UPDATE.format("a", "new"))
        cursor.execute("SELECT govredis_outbox_clean(1000)")
        lease_of(pair[0])._snapshot = None
        drain(pair[1])
        assert name_of(pair[0]) == "old"
        late.commit()
        assert drain(pair[1]) == 1
        assert name_of(pair[0]) == "new"


class TestReading:
    def test_the_lease_is_asked_for_once(self, pair: Pair, plain_redis: Any) -> None:
        gov = pair[0]
        gov.metadata.get_or_load("a", lambda _: 1)
        asked = plain_redis.info("commandstats")["cmdstat_time"]["calls"]
        for _ in range(100):
            assert gov.metadata.get("a") == 1
        assert plain_redis.info("commandstats")["cmdstat_time"]["calls"] == asked
        assert lease_of(gov).look().epoch == lease_of(gov).last_epoch

    def test_in_the_last_third_of_its_life_it_is_renewed_in_the_background(
        self, pair: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov = pair[0]
        freshness = lease_of(gov)
        gov.metadata.get_or_load("a", lambda _: 1)
        clock.stop()
        freshness._threads = True
        first = freshness._snapshot
        clock.sleep(X * 0.5)
        gov.metadata.get("a")
        assert freshness._thread is None
        clock.sleep(X * 0.2)
        renewed = threading.Event()
        renew = NodeLease._renew
        monkeypatch.setattr(NodeLease, "_renew", lambda self: (renew(self), renewed.set()))
        statements = threading.current_thread(), gov.postgres.statements
        assert gov.metadata.get("a") == 1
        assert renewed.wait(20)
        assert freshness._snapshot is not first
        assert gov.postgres.statements > statements[1]
        clock.sleep(X * 0.5)
        monkeypatch.setattr(freshness, "_find", None)
        assert gov.metadata.get("a") == 1, "valid, and nobody has waited for it"

    def test_an_answer_that_another_thread_has_overtaken_takes_nothing_back(
        self, pair: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        freshness = lease_of(pair[0])
        clock.stop()
        pair[0].metadata.get_or_load("a", lambda _: 1)
        clock.sleep(X * 0.7)
        read = freshness.relay.read

        def read_and_be_overtaken() -> tuple[int, bytes | None]:
            answer = read()
            monkeypatch.setattr(freshness.relay, "read", read)
            freshness._renew()
            return answer

        monkeypatch.setattr(freshness.relay, "read", read_and_be_overtaken)
        freshness._ask()
        clock.sleep(X * 0.5)
        assert freshness._snapshot is not None
        assert freshness.stands(freshness._snapshot)

    def test_a_lease_that_another_process_has_renewed_is_only_asked_for(self, pair: Pair, clock: Clock) -> None:
        one, two = pair
        clock.stop()
        one.metadata.get_or_load("a", lambda _: 1)
        clock.sleep(X * 0.9)
        drain(two)
        ticks = counted(one, "guard.ticks")
        lease_of(one)._renew()
        clock.sleep(X * 0.5)
        assert one.metadata.get("a") == 1
        assert counted(one, "guard.ticks") == ticks

    def test_the_reader_runs_the_relay_where_threads_do_not_start(
        self, pair: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov = pair[0]
        clock.stop()
        gov.metadata.get_or_load("a", lambda _: 1)
        lease_of(gov)._threads = True

        def refuses(_: Any) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuses)
        clock.sleep(X * 0.9)
        assert gov.metadata.get("a") == 1
        clock.sleep(X)
        assert gov.metadata.get("a") == 1
        assert counted(gov, "guard.ticks") == 2

    def test_one_run_at_a_time_in_a_process_but_a_struck_run_keeps_nobody_for_long(
        self, pair: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov = pair[0]
        monkeypatch.setattr(node_lease, "_PATIENCE", 0.02)
        assert lease_of(gov)._claim()
        # An exception strikes here: between this line and the next there is none that gives it back.
        assert gov.metadata.get_or_load("a", lambda _: 1) == 1
        assert gov.metadata.stats()["bypassed"] == 1
        clock.sleep(5)
        assert gov.metadata.get_or_load("a", lambda _: 2) == 2
        assert gov.metadata.get("a") == 2

    def test_a_connect_between_the_lease_and_the_value_has_both_read_again(
        self, pair: Pair, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lease made valid after the value was read says nothing of it."""
        one, two = pair
        one.agents.create("a", {"name": "old"})
        assert name_of(one) == "old"
        call = redis_of(one).call
        reads = []

        def meanwhile(*command: Any) -> Any:
            raw = call(*command)
            reads.append(raw)
            if len(reads) == 1:
                two.agents.update_metadata("a", name="new")
                redis_of(one).connects += 1
            return raw

        monkeypatch.setattr(redis_of(one), "call", meanwhile)
        assert name_of(one) == "new"
        assert b"old" in reads[0][0]

    def test_a_read_is_a_miss_where_connections_change_at_every_read(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gov = pair[0]
        gov.metadata.get_or_load("a", lambda _: 1)
        monkeypatch.setattr(NodeLease, "stands", lambda *_: False)
        assert gov.metadata.get("a") is None
        assert gov.metadata.get_or_load("a", lambda _: 2) == 2

    def test_a_value_of_another_epoch_or_of_none_is_a_miss(
        self, pair: Pair, make_gov: Callable[..., GovRedis], redis_server: RedisServer
    ) -> None:
        gov = pair[0]
        without = make_gov(redis_url=redis_server.url)
        without.metadata.set("a", "no epoch")
        assert gov.metadata.get("a") is None
        assert gov.metadata.get_many(["a"]) == {}
        assert gov.metadata.get_or_load("a", lambda _: "mine") == "mine"
        assert without.metadata.get("a") == "mine", "without PostgreSQL every value may be used"

    def test_a_child_asks_for_itself(self, pair: Pair) -> None:
        gov = pair[0]
        gov.metadata.get_or_load("a", lambda _: 1)
        assert in_child(lambda: (lease_of(gov)._snapshot, gov.metadata.get("a"))) == (None, 1)

    def test_missing_tables_are_named(
        self, make_gov: Callable[..., GovRedis], redis_server: RedisServer, postgres_server: PostgresServer
    ) -> None:
        unmigrated = postgres_server.url.rsplit("/", 1)[0] + "/template1"
        gov = make_gov(redis_url=redis_server.url, database_url=unmigrated)
        for call in (
            lambda: gov.metadata.get("a"),
            lambda: gov.metadata.set("a", 1),
            lambda: gov.metadata.get_or_load("a", lambda _: 1),
            lambda: gov.metadata.get_many(["a"]),
            lambda: drain(gov),
        ):
            with pytest.raises(ConfigurationError, match="govredis migrate"):
                call()


HELD = "SELECT {}(hashtextextended('govredis govredis:guard', 0))"


class TestBypass:
    """PostgreSQL works, and still there is no lease: another relay has been running for ever, say."""

    @pytest.fixture(autouse=True)
    def no_relay_can_run(self, sql: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(node_lease, "_PATIENCE", 0.02)
        sql(HELD.format("pg_advisory_lock"))

    def test_values_are_loaded_and_none_is_stored(self, pair: Pair, redis_server: RedisServer) -> None:
        gov = pair[0]
        assert gov.metadata.get_or_load("a", lambda _: 1) == 1
        assert gov.metadata.get_many(["a", "b"], lambda ids: dict.fromkeys(ids, 2)) == {"a": 2, "b": 2}
        assert gov.metadata.get("a") is None
        assert gov.metadata.set("a", 1) is False
        assert redis_server.command("KEYS", "*") == []
        stats = gov.metadata.stats()
        assert (stats["bypassed"], stats["loads"]) == (4, 3)

    def test_it_ends_when_the_relay_runs(self, pair: Pair, sql: Callable[..., Any]) -> None:
        gov = pair[0]
        assert gov.metadata.get_or_load("a", lambda _: 1) == 1
        sql(HELD.format("pg_advisory_unlock"))
        assert gov.metadata.get_or_load("a", lambda _: 2) == 2
        assert gov.metadata.get("a") == 2

    def test_one_load_at_a_time_for_each_id(self, pair: Pair) -> None:
        gov = pair[0]
        loads, entered, go = [], threading.Event(), threading.Event()

        def load(_: str) -> int:
            loads.append(1)
            entered.set()
            assert go.wait(20)
            return len(loads)

        found: list[Any] = []
        read = [threading.Thread(target=lambda: found.append(gov.metadata.get_or_load("a", load))) for _ in range(20)]
        read[0].start()
        assert entered.wait(20)
        for thread in read[1:]:
            thread.start()
        while gov.metadata.stats().get("waits", 0) < 19:
            time.sleep(0.001)
        go.set()
        for thread in read:
            thread.join()
        assert len(loads) <= 3, "the first; that of those who came while it ran; and of who came while that one did"
        assert found.count(1) == 1, "those who came later may follow a write that the first load has not seen"

    def test_other_redis_errors_pass(
        self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, postgres_server: PostgresServer
    ) -> None:
        from govredis import BackendError

        mortal_redis.command("ACL", "SETUSER", "ann", "on", ">pw", "~agent_meta:*", "+@all")
        url = mortal_redis.url.replace("//", "//ann:pw@")
        with pytest.raises(BackendError, match=r"(?i)no permissions"):
            make_gov(redis_url=url, database_url=postgres_server.url).metadata.get("a")


class TestPostgresAway:
    @pytest.fixture
    def away(self, make_gov: Callable[..., GovRedis], mortal_redis: RedisServer, mortal_postgres: PostgresServer,
             clock: Clock) -> GovRedis:  # fmt: skip
        where = {"redis_url": mortal_redis.url, "database_url": mortal_postgres.url, "metadata_staleness": X, **PATIENT}
        gov = clock.adopt(make_gov(**where))
        gov.agents.create("a", {"name": "x"})
        assert name_of(gov) == "x"
        mortal_postgres.kill()
        return gov

    def test_values_are_used_until_their_ttl_and_flagged(
        self, away: GovRedis, clock: Clock, mortal_postgres: PostgresServer
    ) -> None:
        assert cached(away) == "x"
        assert "degraded.unguarded" not in away.metadata.stats(), "the lease is valid still"
        clock.sleep(X)
        assert name_of(away) == cached(away) == "x"
        assert away.metadata.get_many(["a"])["a"]["metadata"] == {"name": "x"}
        assert away.metadata.stats()["degraded.unguarded"] == 3
        assert counted(away, "guard.degraded.postgres") >= 1
        assert away.metadata.set("b", 1) is True
        assert away.metadata.get_or_load("c", lambda _: 1) == away.metadata.get("c") == 1
        with pytest.raises(BackendUnavailable):
            away.metadata.get_or_load("unknown", away.agents.get)
        assert drain(away) is None
        mortal_postgres.start()
        clock.sleep(2)
        while not away.postgres.breaker.closed:
            pass
        assert cached(away) == "x"
        assert lease_of(away).blind is False
        assert away.metadata.get_many(["b", "c"]) == {}, "nobody watched over these"

    @pytest.mark.parametrize("many", [False, True])
    def test_a_load_that_finds_it_out_gives_what_is_cached(
        self, away: GovRedis, clock: Clock, monkeypatch: pytest.MonkeyPatch, many: bool
    ) -> None:
        """Another process was about to renew the lease, so nobody here knew."""
        clock.sleep(X)

        def found(agent_id: str) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(lease_of(away).relay, "run", lambda: None)
                assert lease_of(away).look() is None

                def load(by: Callable[[Any], Any], asked: Any) -> Any:
                    patch.undo()
                    return by(asked)

                if many:
                    return away.metadata.get_many([agent_id], lambda ids: load(away.agents.get_many, ids))[agent_id]
                return away.metadata.get_or_load(agent_id, lambda asked: load(away.agents.get, asked))

        assert found("a")["metadata"] == {"name": "x"}
        assert away.metadata.stats()["degraded.loads"] == 1
        with pytest.raises(BackendUnavailable):
            found("unknown")

    def test_a_load_gives_what_is_cached_while_the_relay_still_waits_for_postgres(
        self, away: GovRedis, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """PostgreSQL hangs. The relay, in another thread, asked it before the load did, and gives up after it."""
        assert away.internal.freshness is not None
        clock.sleep(X)
        waits, ended = threading.Event(), threading.Event()

        def wait() -> None:
            waits.set()
            assert ended.wait(PATIENCE)

        monkeypatch.setattr(lease_of(away).relay, "run", wait)
        relay = Background(lease_of(away).look)
        assert waits.wait(PATIENCE)
        try:
            for _ in range(2):  # a single refusal proves nothing
                with pytest.raises(BackendUnavailable):
                    away.agents.get("a")
            assert name_of(away) == "x"
            with pytest.raises(BackendUnavailable):
                away.metadata.get_or_load("unknown", away.agents.get)
        finally:
            ended.set()
            relay.result()

    def test_postgres_is_asked_once_a_second(self, away: GovRedis) -> None:
        assert away.internal.freshness is not None
        now = [lease_of(away)._clock() + X]
        lease_of(away)._clock = lambda: now[0]
        redis_of(away).call("DEL", "govredis:guard")
        for tries in (1, 1, 1, 2, 2):
            if tries > counted(away, "guard.degraded.postgres"):
                now[0] += 1
            cached(away)
            assert counted(away, "guard.degraded.postgres") == tries

    def test_a_strict_cache_raises(self, away: GovRedis, clock: Clock) -> None:
        strict = away.cache("agent_meta", strict=True)
        assert strict.get("a") is not None
        clock.sleep(X)
        for call in (
            lambda: strict.get("a"),
            lambda: strict.get_or_load("a", lambda _: 1),
            lambda: strict.get_many(["a"]),
            lambda: strict.set("a", 1),
        ):
            with pytest.raises(BackendUnavailable, match="may be stale"):
                call()

    def test_strict_needs_postgres(self, make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> None:
        with pytest.raises(ConfigurationError, match="GOVREDIS_DATABASE_URL"):
            make_gov(redis_url=redis_server.url).cache("x", strict=True)


def test_redis_away_is_counted_by_a_drain(
    make_gov: Callable[..., GovRedis], postgres_server: PostgresServer, mortal_redis: RedisServer
) -> None:
    gov = make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url, **PATIENT)
    mortal_redis.kill()
    assert drain(gov) is None
    assert counted(gov, "guard.degraded.redis") == 1
    assert lease_of(gov).blind is False
