"""What each store of windows does beyond the contract: keys and their ends, repetition, odd clocks, locks, bounds."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

import psycopg2
import pytest

from govredis import Config
from govredis.keys import sibling
from govredis.limits import Limit
from govredis.limits.local_window import LocalWindow
from govredis.limits.postgres_window import PostgresWindow
from govredis.limits.rates import MAX_COUNT
from govredis.limits.redis_window import RedisWindow
from govredis.limits.windows import Outcome
from govredis.postgres import Postgres
from govredis.testing.servers import PostgresServer

pytestmark = pytest.mark.once

SECOND = 1_000_000


def never_looser_when_set_back(store: Any) -> None:
    """Hit for a while, over several windows, with a server's clock that is set back now and then; by the true time."""
    limits = [Limit(3, 1), Limit(6, 4), Limit(10, 8)]
    chance, now = random.Random(7), 0
    admitted: list[int] = []
    for _ in range(600):
        passed = chance.choice([10_000, 200_000, 700_000])
        now += passed
        store.now += passed
        if chance.random() < 0.03:
            store.now -= chance.choice([1, 300_000, 2 * SECOND, 12 * SECOND])
        if store.window.decide("k", limits, 1, "hit").admitted:
            admitted.append(now)
    for limit in limits:
        pairs = zip(admitted, admitted[limit.count :], strict=False)
        assert all(later - first >= limit.window_us for first, later in pairs), limit
    assert len(admitted) > 50


class TestRedis:
    def test_every_key_lives_a_minute_longer_than_the_widest_window(self, redis_store: Any) -> None:
        ttls = lambda: [redis_store.server.command("PTTL", k) for k in ("k", sibling("k", "window"))]  # noqa: E731
        redis_store.window.decide("k", [Limit(9, 1)], 1, "hit")
        assert all(60_000 < ttl <= 61_000 for ttl in ttls())
        redis_store.window.decide("k", [Limit(9, 100), Limit(9, 1)], 1, "hit")
        assert all(159_000 < ttl <= 160_000 for ttl in ttls())
        redis_store.server.command("PEXPIRE", "k", 5000)
        redis_store.server.command("PEXPIRE", sibling("k", "window"), 5000)
        redis_store.window.decide("k", [Limit(9, 1)], 1, "hit")
        assert all(159_000 < ttl <= 160_000 for ttl in ttls()), "the widest ever, not the one of this call"
        assert sorted(redis_store.server.command("KEYS", "*")) == sorted(["k", sibling("k", "window")])

    def test_a_refusal_touches_not_even_the_ttl(self, redis_store: Any) -> None:
        redis_store.window.decide("k", [Limit(1, 1)], 1, "hit")
        redis_store.server.command("PEXPIRE", "k", 5000)
        redis_store.server.command("PEXPIRE", sibling("k", "window"), 5000)
        before = redis_store.everything("k")
        assert not redis_store.window.decide("k", [Limit(1, 99)], 1, "hit").admitted
        redis_store.window.decide("k", [Limit(9, 99)], 1, "peek")
        assert redis_store.everything("k") == before
        assert redis_store.server.command("PTTL", "k") <= 5000
        assert redis_store.server.command("PTTL", sibling("k", "window")) <= 5000

    @pytest.mark.parametrize("cost", [1, 3])
    def test_a_hit_that_arrives_twice_counts_once(self, redis_store: Any, cost: int) -> None:
        script, keys = redis_store.window._script, ("k", sibling("k", "window"))
        run = lambda member: redis_store.window._client.run(  # noqa: E731
            script, keys, "hit", cost, member, "", cost, SECOND
        )
        first = run("m")
        assert first == [1, 1, 0, 0, SECOND]
        before = redis_store.everything("k")
        redis_store.now += 1000
        assert run("m")[:4] == [1, 1, 0, 0], "admitted already, though the limit is used up now"
        assert redis_store.everything("k") == before
        assert run("other")[0] == 0

    def test_members_are_unique_and_the_scores_server_seconds(self, redis_store: Any) -> None:
        for _ in range(3):
            redis_store.window.decide("k", [Limit(9, 1)], 2, "hit")
        assert redis_store.server.command("ZCARD", "k") == 6
        assert redis_store.entries("k") == [redis_store.now] * 6

    def test_the_server_clock_decides(self, redis_store: Any) -> None:
        client = redis_store.window._client
        RedisWindow(_Plain(client)).decide("k", [Limit(9, 1)], 1, "hit")  # type: ignore[arg-type]
        seconds, micros = redis_store.server.command("TIME")
        assert 0 <= int(seconds) * SECOND + int(micros) - redis_store.entries("k")[0] < 30 * SECOND

    def test_entries_of_other_clients_count(self, redis_store: Any) -> None:
        whole = redis_store.now // SECOND
        redis_store.server.command("ZADD", "k", whole, "theirs", whole - 1, "older")
        refused = redis_store.window.decide("k", [Limit(1, 1)], 1, "hit")
        assert refused == Outcome(False, 0, 0, whole * SECOND + SECOND - redis_store.now, refused.retry_after_us)
        assert redis_store.window.count("k", 2 * SECOND) == 2
        redis_store.now += refused.retry_after_us
        assert redis_store.window.decide("k", [Limit(1, 1)], 1, "hit").admitted

    def test_a_plain_client_of_whole_seconds_and_we_count_each_other(self, redis_store: Any) -> None:
        """One that does ZREMRANGEBYSCORE, ZCARD and ZADD by its own clock, in whole seconds, one member a second."""
        redis, limit, window = redis_store.server.command, 4, 10

        def theirs() -> bool:
            now = redis_store.now // SECOND
            redis("ZREMRANGEBYSCORE", "k", 0, now - window)
            if redis("ZCARD", "k") >= limit:
                return False
            redis("ZADD", "k", now, f"{now}")
            redis("EXPIRE", "k", window)
            return True

        def ours() -> bool:
            return bool(redis_store.window.decide("k", [Limit(limit, window)], 1, "hit").admitted)

        start = redis_store.now
        assert [ours(), theirs()] == [True, True]
        redis_store.now += 2 * SECOND
        assert [ours(), theirs()] == [True, True]
        assert [ours(), theirs()] == [False, False], "four, two of each, for both"
        # Theirs of the first second counts from its whole second on: it goes first, and then ours.
        redis_store.now = start // SECOND * SECOND + 10 * SECOND - 1
        assert [ours(), theirs()] == [False, False]
        redis_store.now += 1
        assert ours()
        assert not theirs()
        redis_store.now = start + 10 * SECOND - 1
        assert not ours()
        redis_store.now += SECOND  # they prune by whole seconds, so up to a second late
        assert theirs()
        assert not ours()
        assert redis("ZCARD", "k") == 4

    @pytest.mark.parametrize("fraction", ["0.1234561", "0.1234562", "0.1234563", "0.1234568", "0.7777773", "0.9999999"])
    def test_retry_after_is_not_too_early_for_scores_between_two_microseconds(
        self, redis_store: Any, fraction: str
    ) -> None:
        redis_store.server.command("ZADD", "k", f"{redis_store.now // SECOND}{fraction[1:]}", "theirs")
        redis_store.now += 500_000
        wait = redis_store.window.decide("k", [Limit(1, 1)], 1, "peek").retry_after_us
        redis_store.now += wait
        assert redis_store.window.decide("k", [Limit(1, 1)], 1, "peek").admitted
        redis_store.now -= 1
        assert not redis_store.window.decide("k", [Limit(1, 1)], 1, "peek").admitted

    def test_entries_from_the_future_count(self, redis_store: Any) -> None:
        redis_store.server.command("ZADD", "k", redis_store.now // SECOND + 5, "theirs")
        assert not redis_store.window.decide("k", [Limit(1, 1)], 1, "hit").admitted
        assert redis_store.window.count("k", SECOND) == 1

    def test_a_clock_set_back_is_stricter(self, redis_store: Any) -> None:
        redis_store.window.decide("k", [Limit(2, 1)], 2, "hit")
        redis_store.now -= 10 * SECOND
        refused = redis_store.window.decide("k", [Limit(2, 1)], 1, "hit")
        assert refused == Outcome(False, 0, 0, 11 * SECOND, 11 * SECOND)

    def test_a_clock_set_back_again_and_again_is_never_looser(self, redis_store: Any) -> None:
        never_looser_when_set_back(redis_store)

    def test_a_child_makes_other_members(self, redis_store: Any) -> None:
        window = redis_store.window
        before = window._nonce
        window.renew_after_fork()
        assert window._nonce != before


class TestCountersInRedis:
    COUNTER = sibling("k", "counter")

    @pytest.mark.parametrize("cost", [1, 3])
    def test_a_hit_that_arrives_twice_counts_once(self, redis_store: Any, cost: int) -> None:
        script = redis_store.window._counter_script
        run = lambda member: redis_store.window._client.run(  # noqa: E731
            script, (self.COUNTER,), "hit", cost, member, "", cost + 20, SECOND
        )
        first = run("m1")
        assert first[:4] == [1, 1, 20, 0]
        for n in range(12):
            assert run(f"other{n:0>20}")[0] == (1 if (n + 2) * cost <= cost + 20 else 0)
        before = redis_store.server.command("HGETALL", self.COUNTER)
        assert run("m1")[0] == 1, "admitted already, though the limit is used up now"
        assert run("m")[0] == run("1")[0] == run("m1m1")[0], "the others are not taken for it"
        if cost == 3:
            assert redis_store.server.command("HGETALL", self.COUNTER) == before

    def test_a_refund_that_arrives_twice_gives_back_once(self, redis_store: Any) -> None:
        limits = [Limit(9, 60, "sliding_window_counter")]
        outcome = redis_store.window.decide("k", limits, 2, "hit")
        redis_store.window.decide("k", limits, 3, "hit")
        assert redis_store.window.refund("k", outcome.entries, 2)
        assert redis_store.window.refund("k", outcome.entries, 2), "the answer of the first"
        assert redis_store.window.count("k", 60 * SECOND) == 3

    def test_its_memory_does_not_grow_with_what_it_counts(self, redis_store: Any) -> None:
        for n in range(2000):
            redis_store.now += 40_000 + n
            assert redis_store.window.decide("k", [Limit(10**12, 60, "sliding_window_counter")], 10**6, "hit").admitted
        assert redis_store.server.command("MEMORY", "USAGE", self.COUNTER) < 2000
        assert redis_store.server.command("KEYS", "*") == [self.COUNTER]

    def test_lives_a_minute_longer_than_what_counts_in_it(self, redis_store: Any) -> None:
        ttl = lambda: redis_store.server.command("PTTL", self.COUNTER)  # noqa: E731
        redis_store.window.decide("k", [Limit(9, 6, "sliding_window_counter")], 1, "hit")
        assert 66_000 - 1000 < ttl() <= 66_100
        redis_store.window.decide("k", [Limit(9, 600, "sliding_window_counter")], 1, "hit")
        redis_store.window.decide("k", [Limit(9, 6, "sliding_window_counter")], 1, "hit")
        assert 660_000 - 1000 < ttl() <= 670_000, "the widest, not the one of this call"

    def test_a_refusal_touches_not_even_the_ttl(self, redis_store: Any) -> None:
        redis_store.window.decide("k", [Limit(1, 1, "sliding_window_counter")], 1, "hit")
        redis_store.server.command("PEXPIRE", self.COUNTER, 5000)
        before = redis_store.server.command("HGETALL", self.COUNTER)
        assert not redis_store.window.decide("k", [Limit(1, 1, "sliding_window_counter")], 1, "hit").admitted
        redis_store.window.decide("k", [Limit(9, 99, "sliding_window_counter")], 1, "peek")
        assert redis_store.server.command("HGETALL", self.COUNTER) == before
        assert redis_store.server.command("PTTL", self.COUNTER) <= 5000

    def test_a_window_that_is_used_no_more_is_dropped_once_it_has_ended(self, redis_store: Any) -> None:
        fields = lambda: set(redis_store.server.command("HKEYS", self.COUNTER))  # noqa: E731
        for window in (1, 2, 600):
            redis_store.window.decide("k", [Limit(9, window, "sliding_window_counter")], 1, "hit")
        assert fields() == {"calls", "1000000", "2000000", "600000000"}
        redis_store.now += 2 * SECOND
        redis_store.window.decide("k", [Limit(9, 600, "sliding_window_counter")], 1, "hit")
        assert fields() == {"calls", "2000000", "600000000"}


class _Plain:
    """The client without a clock of the test's."""

    def __init__(self, clocked: Any) -> None:
        self._run = clocked.run

    def run(self, script: Any, keys: Any, *args: Any) -> Any:
        return self._run(script, keys, *(b"" if arg == "" else arg for arg in args))


class TestPostgres:
    def test_a_clock_set_back_is_stricter_and_keeps_the_log_sorted(self, postgres_store: Any) -> None:
        start = postgres_store.now
        postgres_store.window.decide("k", [Limit(3, 1)], 2, "hit")
        postgres_store.now -= 10 * SECOND
        assert postgres_store.window.decide("k", [Limit(3, 1)], 1, "hit").admitted
        assert postgres_store.entries("k") == [start] * 3, "an entry stands at the newest time known"
        refused = postgres_store.window.decide("k", [Limit(3, 1)], 1, "hit")
        assert refused == Outcome(False, 0, 0, 11 * SECOND, 11 * SECOND)

    def test_a_decision_is_one_statement(self, postgres_store: Any) -> None:
        for mode in ("hit", "hit", "peek", "record"):
            postgres_store.window.decide("k", [Limit(1, 1), Limit(9, 60)], 1, mode)
        assert postgres_store.postgres.statements == 4

    def test_a_clock_set_back_again_and_again_is_never_looser(self, postgres_store: Any) -> None:
        never_looser_when_set_back(postgres_store)

    def test_a_refusal_takes_no_lock_and_an_admission_waits_for_it(self, postgres_server: PostgresServer) -> None:
        postgres = Postgres(Config(database_url=postgres_server.url, postgres_timeout=20))
        window = PostgresWindow(postgres)
        window.decide("k", [Limit(2, 3600)], 1, "hit")
        done = threading.Event()
        outcomes: list[Outcome] = []

        def admit() -> None:
            outcomes.append(window.decide("k", [Limit(2, 3600)], 1, "hit"))
            done.set()

        holder = psycopg2.connect(postgres_server.url)
        try:
            with holder.cursor() as cursor:
                cursor.execute("SELECT 1 FROM govredis_limit_windows WHERE key = 'k' FOR UPDATE")
                assert not window.decide("k", [Limit(2, 3600)], 2, "hit").admitted
                assert window.decide("k", [Limit(2, 3600)], 1, "peek").admitted
                assert window.count("k", SECOND) == 1
                thread = threading.Thread(target=admit)
                thread.start()
                assert not done.wait(0.3)
            holder.rollback()
            assert done.wait(20)
            thread.join()
        finally:
            holder.close()
            postgres.close()
        assert outcomes[0].admitted

    def test_an_admission_is_decided_anew_once_it_has_the_lock(self, postgres_server: PostgresServer) -> None:
        """Both saw one place; the second finds it taken when its turn comes."""
        postgres = Postgres(Config(database_url=postgres_server.url, postgres_timeout=20))
        window = PostgresWindow(postgres)
        window.decide("k", [Limit(2, 3600)], 1, "hit")
        outcomes: list[Outcome] = []
        holder = psycopg2.connect(postgres_server.url)
        watcher = psycopg2.connect(postgres_server.url)
        watcher.autocommit = True
        try:
            with holder.cursor() as cursor, watcher.cursor() as look:
                cursor.execute("UPDATE govredis_limit_windows SET entries = entries || entries WHERE key = 'k'")
                thread = threading.Thread(
                    target=lambda: outcomes.append(window.decide("k", [Limit(2, 3600)], 1, "hit"))
                )
                thread.start()
                deadline = time.monotonic() + 20
                while True:
                    look.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
                    if look.fetchone() != (0,):
                        break
                    assert time.monotonic() < deadline
            holder.commit()
            thread.join()
            assert not outcomes[0].admitted
            assert window.count("k", 3600 * SECOND) == 2, "and wrote nothing"
        finally:
            holder.close()
            watcher.close()
            postgres.close()

    def test_no_refusal_counts_what_is_younger_than_it(self, postgres_store: Any) -> None:
        """A call held up between looking and reading the clock, as a busy machine may; an entry comes meanwhile."""
        window, first = postgres_store.window, postgres_store.now
        window.decide("k", [Limit(2, 1)], 1, "hit")
        postgres_store.now = first + SECOND - 1
        postgres_store.sql(
            "CREATE OR REPLACE FUNCTION testclock.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql VOLATILE AS $$"
            " DECLARE found bigint := (SELECT us FROM testclock.t); BEGIN"
            " PERFORM pg_advisory_lock(1), pg_advisory_unlock(1);"
            " RETURN 'epoch'::timestamptz + found * interval '1 microsecond'; END $$; SELECT pg_advisory_lock(1)"
        )
        outcomes: list[Outcome] = []
        thread = threading.Thread(target=lambda: outcomes.append(window.decide("k", [Limit(2, 1)], 1, "hit")))
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while postgres_store.sql("SELECT count(*) FROM pg_locks WHERE NOT granted") == [(0,)]:
                assert time.monotonic() < deadline
            postgres_store.now = first + SECOND + 5
            postgres_store.sql("UPDATE govredis_limit_windows SET entries = entries || %s::bigint", postgres_store.now)
        finally:
            postgres_store.sql("SELECT pg_advisory_unlock(1)")
            thread.join()
        assert outcomes == [Outcome(True, 0, 0, 0, SECOND)], "the two entries were never within one window"

    def test_the_table_cleans_itself(self, postgres_store: Any) -> None:
        for n in range(5):
            postgres_store.window.decide(f"old{n}", [Limit(1, 1)], 1, "hit")
        postgres_store.now += 20 * 60 * SECOND
        postgres_store.window.decide("wide", [Limit(10, 86400)], 1, "hit")
        postgres_store.now += 3600 * SECOND
        # One admission in a hundred sweeps: 3,000 miss it once in 10^13 runs; it stops at the first that did not.
        for n in range(3000):
            postgres_store.window.decide(f"new{n % 5}", [Limit(10_000, 1)], 1, "hit")
            if n % 20 == 0 and not postgres_store.entries("old0"):
                break
        kept = {key for (key,) in postgres_store.sql("SELECT key FROM govredis_limit_windows WHERE key !~ '^new'")}
        assert kept == {"wide"}

    def test_a_process_of_the_version_before_shares_the_window(self, postgres_store: Any) -> None:
        ask = "SELECT * FROM govredis_limit_decide('k', 2, 'hit', '{3}', '{1000000}')"
        assert postgres_store.postgres.fetch(ask) == [(True, 1, 1, 0, SECOND)]
        assert postgres_store.window.decide("k", [Limit(3, 1)], 1, "hit").admitted
        assert postgres_store.postgres.fetch(ask) == [(False, 1, 0, SECOND, SECOND)]

    def test_the_table_is_unlogged(self, postgres_store: Any) -> None:
        found = postgres_store.sql("SELECT relpersistence FROM pg_class WHERE relname = 'govredis_limit_windows'")
        assert found == [("u",)]


class TestCountersInPostgres:
    def test_a_refusal_takes_no_lock_and_an_admission_is_decided_anew(self, postgres_server: PostgresServer) -> None:
        postgres = Postgres(Config(database_url=postgres_server.url, postgres_timeout=20))
        window, limits = PostgresWindow(postgres), [Limit(2, 3600, "sliding_window_counter")]
        window.decide("k", limits, 1, "hit")
        outcomes: list[Outcome] = []
        holder = psycopg2.connect(postgres_server.url)
        watcher = psycopg2.connect(postgres_server.url)
        watcher.autocommit = True
        try:
            with holder.cursor() as cursor, watcher.cursor() as look:
                cursor.execute("SELECT govredis_counter_admit('k', 1, 'hit', '{9}', '{3600000000}')")
                assert not window.decide("k", limits, 2, "hit").admitted
                thread = threading.Thread(target=lambda: outcomes.append(window.decide("k", limits, 1, "hit")))
                thread.start()
                deadline = time.monotonic() + 20
                while True:
                    look.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
                    if look.fetchone() != (0,):
                        break
                    assert time.monotonic() < deadline
            holder.commit()
            thread.join()
            assert not outcomes[0].admitted, "it saw one place, and finds it taken when its turn comes"
            assert window.count("k", 3600 * SECOND) == 2, "and wrote nothing"
        finally:
            holder.close()
            watcher.close()
            postgres.close()

    def test_what_no_window_needs_is_deleted(self, postgres_store: Any) -> None:
        limits = [Limit(9, 1, "sliding_window_counter")]
        rows = "SELECT count(*) FROM govredis_limit_counters"
        for _ in range(200):
            postgres_store.window.decide("k", limits, 1, "hit")
            postgres_store.now += SECOND // 10
        assert postgres_store.sql(rows)[0][0] <= 11
        postgres_store.window.decide("wide", [Limit(9, 86400, "sliding_window_counter")], 1, "hit")
        # By anybody, a little at a time: 3,000 hits miss it once in 10^13 runs.
        postgres_store.now += 3600 * SECOND
        for n in range(3000):
            postgres_store.window.decide("other", limits, 1, "record")
            gone = postgres_store.sql("SELECT 1 FROM govredis_limit_counters WHERE key = 'k'") == []
            if n % 20 == 0 and gone:
                break
        assert gone
        assert postgres_store.window.count("wide", 86400 * SECOND) == 1

    def test_the_table_is_unlogged(self, postgres_store: Any) -> None:
        found = postgres_store.sql("SELECT relpersistence FROM pg_class WHERE relname = 'govredis_limit_counters'")
        assert found == [("u",)]


@pytest.mark.parametrize("algorithm", MAX_COUNT)
def test_no_store_exceeds_a_limit_under_threads(store: Any, algorithm: Any) -> None:
    admitted: list[bool] = []

    def hammer() -> None:
        for _ in range(50):
            admitted.append(store.window.decide("k", [Limit(100, 3600, algorithm)], 1, "hit").admitted)

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(admitted) == 100


class TestLocal:
    def test_forgets_the_identity_used_longest_ago_beyond_its_bound(self) -> None:
        window = LocalWindow(2, clock=lambda: 100.0)
        one = [Limit(1, 60)]
        window.decide("a", one, 1, "hit")
        window.decide("b", one, 1, "hit")
        assert not window.decide("a", one, 1, "hit").admitted, "a refusal is a use: others cannot push it out"
        window.decide("c", one, 1, "hit")
        assert not window.decide("a", one, 1, "hit").admitted
        assert window.decide("b", one, 1, "peek").admitted
        assert len(window._logs) == 2

    def test_forgets_the_counter_used_longest_ago_beyond_its_bound(self) -> None:
        window = LocalWindow(2, clock=lambda: 100.0)
        one = [Limit(1, 60, "sliding_window_counter")]
        window.decide("a", one, 1, "hit")
        window.decide("b", one, 1, "hit")
        assert not window.decide("a", one, 1, "hit").admitted, "a refusal is a use: others cannot push it out"
        window.decide("c", one, 1, "hit")
        assert not window.decide("a", one, 1, "hit").admitted
        assert window.decide("b", one, 1, "peek").admitted

    def test_a_counter_keeps_what_counts_only(self) -> None:
        clock = [100.0]
        window = LocalWindow(2, clock=lambda: clock[0])
        window.decide("k", [Limit(1, 0.5, "sliding_window_counter")], 1, "hit")
        for _ in range(500):
            clock[0] += 0.01
            window.decide("k", [Limit(500, 1, "sliding_window_counter")], 1, "hit")
        (counters,) = window._counters._counters.values()
        assert list(counters) == [SECOND]
        assert len(counters[SECOND]._counts) <= 61

    def test_threads_do_not_exceed_the_limit(self) -> None:
        window = LocalWindow(10)
        admitted: list[bool] = []

        def hammer() -> None:
            for _ in range(300):
                admitted.append(window.decide("k", [Limit(500, 3600)], 1, "hit").admitted)

        threads = [threading.Thread(target=hammer) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(admitted) == 500

    def test_a_child_starts_empty(self) -> None:
        window = LocalWindow(10)
        window.decide("k", [Limit(1, 3600)], 1, "hit")
        pid = os.fork()
        if pid == 0:
            ok = window.decide("k", [Limit(1, 3600)], 1, "hit").admitted
            os._exit(0 if ok else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert not window.decide("k", [Limit(1, 3600)], 1, "hit").admitted
