"""Each backend beyond the contract: keys and their ends, repetition, odd clocks, locks, bounds."""

from __future__ import annotations

import random
import threading
from typing import Any

import psycopg2
import pytest
from support import PATIENCE, eventually, in_child

from govredis import Config
from govredis.keys import Keys, sibling
from govredis.limits import Limit
from govredis.limits.backends.backend import Outcome
from govredis.limits.backends.memory_backend import MemoryLimitBackend
from govredis.limits.backends.postgres_backend import PostgresLimitBackend
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.limits.rates import MAX_COUNT
from govredis.postgres import Postgres
from govredis.testing.servers import PostgresServer

pytestmark = pytest.mark.once

SECOND = 1_000_000


def waits_for_a_lock(cursor: Any) -> bool:
    """Whether any session of PostgreSQL does."""
    cursor.execute("SELECT pid FROM pg_locks WHERE NOT granted")
    return bool(cursor.fetchall())


def never_looser_when_set_back(clocked: Any) -> None:
    """Hit for a while, over several windows, with a server's clock that is set back now and then; by the true time."""
    limits = [Limit(3, 1), Limit(6, 4), Limit(10, 8)]
    chance, now = random.Random(7), 0
    admitted: list[int] = []
    for _ in range(600):
        passed = chance.choice([10_000, 200_000, 700_000])
        now += passed
        clocked.now += passed
        if chance.random() < 0.03:
            clocked.now -= chance.choice([1, 300_000, 2 * SECOND, 12 * SECOND])
        if clocked.backend.decide("k", limits, 1, "hit").admitted:
            admitted.append(now)
    for limit in limits:
        pairs = zip(admitted, admitted[limit.count :], strict=False)
        assert all(later - first >= limit.window_us for first, later in pairs), limit
    assert len(admitted) > 50


class TestRedis:
    def test_every_key_lives_a_minute_longer_than_the_widest_window(self, clocked_redis: Any) -> None:
        ttls = lambda: [clocked_redis.server.command("PTTL", k) for k in ("k", sibling("k", "window"))]  # noqa: E731
        clocked_redis.backend.decide("k", [Limit(9, 1)], 1, "hit")
        assert all(60_000 < ttl <= 61_000 for ttl in ttls())
        clocked_redis.backend.decide("k", [Limit(9, 100), Limit(9, 1)], 1, "hit")
        assert all(159_000 < ttl <= 160_000 for ttl in ttls())
        clocked_redis.server.command("PEXPIRE", "k", 5000)
        clocked_redis.server.command("PEXPIRE", sibling("k", "window"), 5000)
        clocked_redis.backend.decide("k", [Limit(9, 1)], 1, "hit")
        assert all(159_000 < ttl <= 160_000 for ttl in ttls()), "the widest ever, not the one of this call"
        assert sorted(clocked_redis.server.command("KEYS", "*")) == sorted(["k", sibling("k", "window")])

    def test_a_refusal_touches_not_even_the_ttl(self, clocked_redis: Any) -> None:
        clocked_redis.backend.decide("k", [Limit(1, 1)], 1, "hit")
        clocked_redis.server.command("PEXPIRE", "k", 5000)
        clocked_redis.server.command("PEXPIRE", sibling("k", "window"), 5000)
        before = clocked_redis.everything("k")
        assert not clocked_redis.backend.decide("k", [Limit(1, 99)], 1, "hit").admitted
        clocked_redis.backend.decide("k", [Limit(9, 99)], 1, "peek")
        assert clocked_redis.everything("k") == before
        assert clocked_redis.server.command("PTTL", "k") <= 5000
        assert clocked_redis.server.command("PTTL", sibling("k", "window")) <= 5000

    @pytest.mark.parametrize("cost", [1, 3])
    def test_a_hit_that_arrives_twice_counts_once(self, clocked_redis: Any, cost: int) -> None:
        script, keys = clocked_redis.backend._script, ("k", sibling("k", "window"))
        run = lambda member: clocked_redis.backend._client.run(  # noqa: E731
            script, keys, "hit", cost, member, "", cost, SECOND
        )
        first = run("m")
        assert first == [1, 1, 0, 0, SECOND]
        before = clocked_redis.everything("k")
        clocked_redis.now += 1000
        assert run("m")[:4] == [1, 1, 0, 0], "admitted already, though the limit is used up now"
        assert clocked_redis.everything("k") == before
        assert run("other")[0] == 0

    def test_members_are_unique_and_the_scores_server_seconds(self, clocked_redis: Any) -> None:
        for _ in range(3):
            clocked_redis.backend.decide("k", [Limit(9, 1)], 2, "hit")
        assert clocked_redis.server.command("ZCARD", "k") == 6
        assert clocked_redis.entries("k") == [clocked_redis.now] * 6

    def test_the_server_clock_decides(self, clocked_redis: Any) -> None:
        def now() -> int:
            seconds, micros = clocked_redis.server.command("TIME")
            return int(seconds) * SECOND + int(micros)

        backend, before = RedisLimitBackend(_Plain(clocked_redis.backend._client)), now()  # type: ignore[arg-type]
        backend.decide("k", [Limit(9, 1)], 1, "hit")
        assert before <= clocked_redis.entries("k")[0] <= now()

    def test_entries_of_other_clients_count(self, clocked_redis: Any) -> None:
        whole = clocked_redis.now // SECOND
        clocked_redis.server.command("ZADD", "k", whole, "theirs", whole - 1, "older")
        refused = clocked_redis.backend.decide("k", [Limit(1, 1)], 1, "hit")
        assert refused == Outcome(False, 0, 0, whole * SECOND + SECOND - clocked_redis.now, refused.retry_after_us)
        assert clocked_redis.backend.count("k", 2 * SECOND) == 2
        clocked_redis.now += refused.retry_after_us
        assert clocked_redis.backend.decide("k", [Limit(1, 1)], 1, "hit").admitted

    def test_a_plain_client_of_whole_seconds_and_we_count_each_other(self, clocked_redis: Any) -> None:
        """A client that does ZREMRANGEBYSCORE, ZCARD, ZADD by its own clock, in whole seconds, one member a second."""
        redis, limit, window = clocked_redis.server.command, 4, 10

        def theirs() -> bool:
            now = clocked_redis.now // SECOND
            redis("ZREMRANGEBYSCORE", "k", 0, now - window)
            if redis("ZCARD", "k") >= limit:
                return False
            redis("ZADD", "k", now, f"{now}")
            redis("EXPIRE", "k", window)
            return True

        def ours() -> bool:
            return bool(clocked_redis.backend.decide("k", [Limit(limit, window)], 1, "hit").admitted)

        start = clocked_redis.now
        assert [ours(), theirs()] == [True, True]
        clocked_redis.now += 2 * SECOND
        assert [ours(), theirs()] == [True, True]
        assert [ours(), theirs()] == [False, False], "four, two of each, for both"
        # Theirs of the first second counts from its whole second on: it goes first, and then ours.
        clocked_redis.now = start // SECOND * SECOND + 10 * SECOND - 1
        assert [ours(), theirs()] == [False, False]
        clocked_redis.now += 1
        assert ours()
        assert not theirs()
        clocked_redis.now = start + 10 * SECOND - 1
        assert not ours()
        clocked_redis.now += SECOND  # they prune by whole seconds, so up to a second late
        assert theirs()
        assert not ours()
        assert redis("ZCARD", "k") == 4

    @pytest.mark.parametrize("fraction", ["0.1234561", "0.1234562", "0.1234563", "0.1234568", "0.7777773", "0.9999999"])
    def test_retry_after_is_not_too_early_for_scores_between_two_microseconds(
        self, clocked_redis: Any, fraction: str
    ) -> None:
        clocked_redis.server.command("ZADD", "k", f"{clocked_redis.now // SECOND}{fraction[1:]}", "theirs")
        clocked_redis.now += 500_000
        wait = clocked_redis.backend.decide("k", [Limit(1, 1)], 1, "peek").retry_after_us
        clocked_redis.now += wait
        assert clocked_redis.backend.decide("k", [Limit(1, 1)], 1, "peek").admitted
        clocked_redis.now -= 1
        assert not clocked_redis.backend.decide("k", [Limit(1, 1)], 1, "peek").admitted

    def test_entries_from_the_future_count(self, clocked_redis: Any) -> None:
        clocked_redis.server.command("ZADD", "k", clocked_redis.now // SECOND + 5, "theirs")
        assert not clocked_redis.backend.decide("k", [Limit(1, 1)], 1, "hit").admitted
        assert clocked_redis.backend.count("k", SECOND) == 1

    def test_a_clock_set_back_is_stricter(self, clocked_redis: Any) -> None:
        clocked_redis.backend.decide("k", [Limit(2, 1)], 2, "hit")
        clocked_redis.now -= 10 * SECOND
        refused = clocked_redis.backend.decide("k", [Limit(2, 1)], 1, "hit")
        assert refused == Outcome(False, 0, 0, 11 * SECOND, 11 * SECOND)

    def test_a_clock_set_back_again_and_again_is_never_looser(self, clocked_redis: Any) -> None:
        never_looser_when_set_back(clocked_redis)

    def test_a_child_makes_other_members(self, clocked_redis: Any) -> None:
        backend = clocked_redis.backend
        before = backend._nonce
        backend.renew_after_fork()
        assert backend._nonce != before


class TestCountersInRedis:
    COUNTER = sibling("k", "counter")

    @pytest.mark.parametrize("cost", [1, 3])
    def test_a_hit_that_arrives_twice_counts_once(self, clocked_redis: Any, cost: int) -> None:
        script = clocked_redis.backend._counter_script
        run = lambda member: clocked_redis.backend._client.run(  # noqa: E731
            script, (self.COUNTER,), "hit", cost, member, "", cost + 20, SECOND
        )
        first = run("m1")
        assert first[:4] == [1, 1, 20, 0]
        for n in range(12):
            assert run(f"other{n:0>20}")[0] == (1 if (n + 2) * cost <= cost + 20 else 0)
        before = clocked_redis.server.command("HGETALL", self.COUNTER)
        assert run("m1")[0] == 1, "admitted already, though the limit is used up now"
        assert run("m")[0] == run("1")[0] == run("m1m1")[0], "the others are not taken for it"
        if cost == 3:
            assert clocked_redis.server.command("HGETALL", self.COUNTER) == before

    def test_a_refund_that_arrives_twice_gives_back_once(self, clocked_redis: Any) -> None:
        limits = [Limit(9, 60, "sliding_window_counter")]
        outcome = clocked_redis.backend.decide("k", limits, 2, "hit")
        clocked_redis.backend.decide("k", limits, 3, "hit")
        assert clocked_redis.backend.refund("k", outcome.entries, 2)
        assert clocked_redis.backend.refund("k", outcome.entries, 2), "the answer of the first"
        assert clocked_redis.backend.count("k", 60 * SECOND) == 3

    def test_its_memory_does_not_grow_with_what_it_counts(self, clocked_redis: Any) -> None:
        for n in range(2000):
            clocked_redis.now += 40_000 + n
            assert clocked_redis.backend.decide(
                "k", [Limit(10**12, 60, "sliding_window_counter")], 10**6, "hit"
            ).admitted
        assert clocked_redis.server.command("MEMORY", "USAGE", self.COUNTER) < 2000
        assert clocked_redis.server.command("KEYS", "*") == [self.COUNTER]

    def test_lives_a_minute_longer_than_what_counts_in_it(self, clocked_redis: Any) -> None:
        ttl = lambda: clocked_redis.server.command("PTTL", self.COUNTER)  # noqa: E731
        clocked_redis.backend.decide("k", [Limit(9, 6, "sliding_window_counter")], 1, "hit")
        assert 66_000 - 1000 < ttl() <= 66_100
        clocked_redis.backend.decide("k", [Limit(9, 600, "sliding_window_counter")], 1, "hit")
        clocked_redis.backend.decide("k", [Limit(9, 6, "sliding_window_counter")], 1, "hit")
        assert 660_000 - 1000 < ttl() <= 670_000, "the widest, not the one of this call"

    def test_a_refusal_touches_not_even_the_ttl(self, clocked_redis: Any) -> None:
        clocked_redis.backend.decide("k", [Limit(1, 1, "sliding_window_counter")], 1, "hit")
        clocked_redis.server.command("PEXPIRE", self.COUNTER, 5000)
        before = clocked_redis.server.command("HGETALL", self.COUNTER)
        assert not clocked_redis.backend.decide("k", [Limit(1, 1, "sliding_window_counter")], 1, "hit").admitted
        clocked_redis.backend.decide("k", [Limit(9, 99, "sliding_window_counter")], 1, "peek")
        assert clocked_redis.server.command("HGETALL", self.COUNTER) == before
        assert clocked_redis.server.command("PTTL", self.COUNTER) <= 5000

    def test_a_window_that_is_used_no_more_is_dropped_once_it_has_ended(self, clocked_redis: Any) -> None:
        fields = lambda: set(clocked_redis.server.command("HKEYS", self.COUNTER))  # noqa: E731
        for window in (1, 2, 600):
            clocked_redis.backend.decide("k", [Limit(9, window, "sliding_window_counter")], 1, "hit")
        assert fields() == {"calls", "1000000", "2000000", "600000000"}
        clocked_redis.now += 2 * SECOND
        clocked_redis.backend.decide("k", [Limit(9, 600, "sliding_window_counter")], 1, "hit")
        assert fields() == {"calls", "2000000", "600000000"}


class _Plain:
    """The client without a clock of the test's."""

    def __init__(self, clocked: Any) -> None:
        self._run = clocked.run

    def run(self, script: Any, keys: Any, *args: Any) -> Any:
        return self._run(script, keys, *(b"" if arg == "" else arg for arg in args))


class TestPostgres:
    def test_a_clock_set_back_is_stricter_and_keeps_the_log_sorted(self, clocked_postgres: Any) -> None:
        start = clocked_postgres.now
        clocked_postgres.backend.decide("k", [Limit(3, 1)], 2, "hit")
        clocked_postgres.now -= 10 * SECOND
        assert clocked_postgres.backend.decide("k", [Limit(3, 1)], 1, "hit").admitted
        assert clocked_postgres.entries("k") == [start] * 3, "an entry stands at the newest time known"
        refused = clocked_postgres.backend.decide("k", [Limit(3, 1)], 1, "hit")
        assert refused == Outcome(False, 0, 0, 11 * SECOND, 11 * SECOND)

    def test_a_decision_is_one_statement(self, clocked_postgres: Any) -> None:
        for mode in ("hit", "hit", "peek", "record"):
            clocked_postgres.backend.decide("k", [Limit(1, 1), Limit(9, 60)], 1, mode)
        assert clocked_postgres.postgres.statements == 4

    def test_a_clock_set_back_again_and_again_is_never_looser(self, clocked_postgres: Any) -> None:
        never_looser_when_set_back(clocked_postgres)

    def test_a_refusal_takes_no_lock_and_an_admission_waits_for_it(self, postgres_server: PostgresServer) -> None:
        postgres = Postgres(Config(database_url=postgres_server.url, postgres_timeout=PATIENCE))
        backend = PostgresLimitBackend(postgres, Keys())
        backend.decide("k", [Limit(2, 3600)], 1, "hit")
        done = threading.Event()
        outcomes: list[Outcome] = []

        def admit() -> None:
            outcomes.append(backend.decide("k", [Limit(2, 3600)], 1, "hit"))
            done.set()

        holder = psycopg2.connect(postgres_server.url)
        watcher = psycopg2.connect(postgres_server.url)
        watcher.autocommit = True
        try:
            with holder.cursor() as cursor, watcher.cursor() as look:
                cursor.execute("SELECT 1 FROM govredis_limit_windows WHERE key = 'k' FOR UPDATE")
                assert not backend.decide("k", [Limit(2, 3600)], 2, "hit").admitted
                assert backend.decide("k", [Limit(2, 3600)], 1, "peek").admitted
                assert backend.count("k", SECOND) == 1
                thread = threading.Thread(target=admit)
                thread.start()
                eventually(lambda: waits_for_a_lock(look))
                assert not done.is_set()
            holder.rollback()
            assert done.wait(PATIENCE)
            thread.join()
        finally:
            holder.close()
            watcher.close()
            postgres.close()
        assert outcomes[0].admitted

    def test_an_admission_is_decided_anew_once_it_has_the_lock(self, postgres_server: PostgresServer) -> None:
        """Both saw one place; the second finds it taken when its turn comes."""
        postgres = Postgres(Config(database_url=postgres_server.url, postgres_timeout=PATIENCE))
        backend = PostgresLimitBackend(postgres, Keys())
        backend.decide("k", [Limit(2, 3600)], 1, "hit")
        outcomes: list[Outcome] = []
        holder = psycopg2.connect(postgres_server.url)
        watcher = psycopg2.connect(postgres_server.url)
        watcher.autocommit = True
        try:
            with holder.cursor() as cursor, watcher.cursor() as look:
                cursor.execute("UPDATE govredis_limit_windows SET entries = entries || entries WHERE key = 'k'")
                thread = threading.Thread(
                    target=lambda: outcomes.append(backend.decide("k", [Limit(2, 3600)], 1, "hit"))
                )
                thread.start()
                eventually(lambda: waits_for_a_lock(look))
            holder.commit()
            thread.join()
            assert not outcomes[0].admitted
            assert backend.count("k", 3600 * SECOND) == 2, "and wrote nothing"
        finally:
            holder.close()
            watcher.close()
            postgres.close()

    def test_no_refusal_counts_what_is_younger_than_it(self, clocked_postgres: Any) -> None:
        """A call held up between looking and reading the clock, as a busy machine may; an entry comes meanwhile."""
        backend, first = clocked_postgres.backend, clocked_postgres.now
        backend.decide("k", [Limit(2, 1)], 1, "hit")
        clocked_postgres.now = first + SECOND - 1
        clocked_postgres.sql(
            "CREATE OR REPLACE FUNCTION testclock.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql VOLATILE AS $$"
            " DECLARE found bigint := (SELECT us FROM testclock.t); BEGIN"
            " PERFORM pg_advisory_lock(1), pg_advisory_unlock(1);"
            " RETURN 'epoch'::timestamptz + found * interval '1 microsecond'; END $$; SELECT pg_advisory_lock(1)"
        )
        outcomes: list[Outcome] = []
        thread = threading.Thread(target=lambda: outcomes.append(backend.decide("k", [Limit(2, 1)], 1, "hit")))
        thread.start()
        try:
            eventually(lambda: clocked_postgres.sql("SELECT pid FROM pg_locks WHERE NOT granted"))
            clocked_postgres.now = first + SECOND + 5
            clocked_postgres.sql(
                "UPDATE govredis_limit_windows SET entries = entries || %s::bigint", clocked_postgres.now
            )
        finally:
            clocked_postgres.sql("SELECT pg_advisory_unlock(1)")
            thread.join()
        assert outcomes == [Outcome(True, 0, 0, 0, SECOND)], "the two entries were never within one window"

    def test_the_table_cleans_itself(self, clocked_postgres: Any) -> None:
        for n in range(5):
            clocked_postgres.backend.decide(f"old{n}", [Limit(1, 1)], 1, "hit")
        clocked_postgres.now += 20 * 60 * SECOND
        clocked_postgres.backend.decide("wide", [Limit(10, 86400)], 1, "hit")
        clocked_postgres.now += 3600 * SECOND
        # Each hundredth admission sweeps: 3,000 miss it once in 10^13 runs; the test stops at the first sweep.
        for n in range(3000):
            clocked_postgres.backend.decide(f"new{n % 5}", [Limit(10_000, 1)], 1, "hit")
            if n % 20 == 0 and not clocked_postgres.entries("old0"):
                break
        kept = {key for (key,) in clocked_postgres.sql("SELECT key FROM govredis_limit_windows WHERE key !~ '^new'")}
        assert kept == {"wide"}

    def test_a_process_of_the_version_before_shares_the_window(self, clocked_postgres: Any) -> None:
        ask = "SELECT * FROM govredis_limit_decide('k', 2, 'hit', '{3}', '{1000000}')"
        assert clocked_postgres.postgres.fetch(ask) == [(True, 1, 1, 0, SECOND)]
        assert clocked_postgres.backend.decide("k", [Limit(3, 1)], 1, "hit").admitted
        assert clocked_postgres.postgres.fetch(ask) == [(False, 1, 0, SECOND, SECOND)]

    def test_the_table_is_unlogged(self, clocked_postgres: Any) -> None:
        found = clocked_postgres.sql("SELECT relpersistence FROM pg_class WHERE relname = 'govredis_limit_windows'")
        assert found == [("u",)]


class TestCountersInPostgres:
    def test_a_refusal_takes_no_lock_and_an_admission_is_decided_anew(self, postgres_server: PostgresServer) -> None:
        postgres = Postgres(Config(database_url=postgres_server.url, postgres_timeout=PATIENCE))
        backend, limits = PostgresLimitBackend(postgres, Keys()), [Limit(2, 3600, "sliding_window_counter")]
        backend.decide("k", limits, 1, "hit")
        outcomes: list[Outcome] = []
        holder = psycopg2.connect(postgres_server.url)
        watcher = psycopg2.connect(postgres_server.url)
        watcher.autocommit = True
        try:
            with holder.cursor() as cursor, watcher.cursor() as look:
                cursor.execute("SELECT govredis_counter_admit('k', 1, 'hit', '{9}', '{3600000000}')")
                assert not backend.decide("k", limits, 2, "hit").admitted
                thread = threading.Thread(target=lambda: outcomes.append(backend.decide("k", limits, 1, "hit")))
                thread.start()
                eventually(lambda: waits_for_a_lock(look))
            holder.commit()
            thread.join()
            assert not outcomes[0].admitted, "it saw one place, and finds it taken when its turn comes"
            assert backend.count("k", 3600 * SECOND) == 2, "and wrote nothing"
        finally:
            holder.close()
            watcher.close()
            postgres.close()

    def test_entries_that_no_window_needs_are_deleted(self, clocked_postgres: Any) -> None:
        limits = [Limit(9, 1, "sliding_window_counter")]
        rows = "SELECT count(*) FROM govredis_limit_counters"
        for _ in range(200):
            clocked_postgres.backend.decide("k", limits, 1, "hit")
            clocked_postgres.now += SECOND // 10
        assert clocked_postgres.sql(rows)[0][0] <= 11
        clocked_postgres.backend.decide("wide", [Limit(9, 86400, "sliding_window_counter")], 1, "hit")
        # By anybody, a little at a time: 3,000 hits miss it once in 10^13 runs.
        clocked_postgres.now += 3600 * SECOND
        for n in range(3000):
            clocked_postgres.backend.decide("other", limits, 1, "record")
            gone = clocked_postgres.sql("SELECT 1 FROM govredis_limit_counters WHERE key = 'k'") == []
            if n % 20 == 0 and gone:
                break
        assert gone
        assert clocked_postgres.backend.count("wide", 86400 * SECOND) == 1

    def test_the_table_is_unlogged(self, clocked_postgres: Any) -> None:
        found = clocked_postgres.sql("SELECT relpersistence FROM pg_class WHERE relname = 'govredis_limit_counters'")
        assert found == [("u",)]


@pytest.mark.parametrize("algorithm", MAX_COUNT)
def test_no_backend_exceeds_a_limit_under_threads(clocked: Any, algorithm: Any) -> None:
    admitted: list[bool] = []

    def hammer() -> None:
        for _ in range(50):
            admitted.append(clocked.backend.decide("k", [Limit(100, 3600, algorithm)], 1, "hit").admitted)

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(admitted) == 100


class TestLocal:
    def test_forgets_the_identity_used_longest_ago_beyond_its_bound(self) -> None:
        backend = MemoryLimitBackend(2, clock=lambda: 100.0)
        one = [Limit(1, 60)]
        backend.decide("a", one, 1, "hit")
        backend.decide("b", one, 1, "hit")
        assert not backend.decide("a", one, 1, "hit").admitted, "a refusal is a use: others cannot push it out"
        backend.decide("c", one, 1, "hit")
        assert not backend.decide("a", one, 1, "hit").admitted
        assert backend.decide("b", one, 1, "peek").admitted
        assert len(backend._logs) == 2

    def test_forgets_the_counter_used_longest_ago_beyond_its_bound(self) -> None:
        backend = MemoryLimitBackend(2, clock=lambda: 100.0)
        one = [Limit(1, 60, "sliding_window_counter")]
        backend.decide("a", one, 1, "hit")
        backend.decide("b", one, 1, "hit")
        assert not backend.decide("a", one, 1, "hit").admitted, "a refusal is a use: others cannot push it out"
        backend.decide("c", one, 1, "hit")
        assert not backend.decide("a", one, 1, "hit").admitted
        assert backend.decide("b", one, 1, "peek").admitted

    def test_a_counter_keeps_what_counts_only(self) -> None:
        clock = [100.0]
        backend = MemoryLimitBackend(2, clock=lambda: clock[0])
        backend.decide("k", [Limit(1, 0.5, "sliding_window_counter")], 1, "hit")
        for _ in range(500):
            clock[0] += 0.01
            backend.decide("k", [Limit(500, 1, "sliding_window_counter")], 1, "hit")
        (counters,) = backend._counters._counters.values()
        assert list(counters) == [SECOND]
        assert len(counters[SECOND]._counts) <= 61

    def test_threads_do_not_exceed_the_limit(self) -> None:
        backend = MemoryLimitBackend(10)
        admitted: list[bool] = []

        def hammer() -> None:
            for _ in range(300):
                admitted.append(backend.decide("k", [Limit(500, 3600)], 1, "hit").admitted)

        threads = [threading.Thread(target=hammer) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(admitted) == 500

    def test_a_child_starts_empty(self) -> None:
        backend = MemoryLimitBackend(10)
        backend.decide("k", [Limit(1, 3600)], 1, "hit")
        assert in_child(lambda: backend.decide("k", [Limit(1, 3600)], 1, "hit").admitted)
        assert not backend.decide("k", [Limit(1, 3600)], 1, "hit").admitted
