"""The account: sums over all processes, each told once, whatever arrives twice, late or not at all."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest
from support import PATIENT, REDIS_AWAY, eventually, in_child, redis_of

from govredis import BackendUnavailable, GovRedis, _teller
from govredis._latch import Latch
from govredis.breaker import OutageNote
from govredis.health import account as account_module
from govredis.health.account import Account
from govredis.health.account_redis import OutageRecord, RedisAccountBackend
from govredis.health.counters_check import check_counters
from govredis.health.figures import BOUNDS, Latency, Minute
from govredis.health.outage_log import joined
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]
ALWAYS = datetime(2020, 1, 1, tzinfo=timezone.utc), datetime(2100, 1, 1, tzinfo=timezone.utc)


def account_of(gov: GovRedis) -> Account:
    return gov.internal.account


def tell(gov: GovRedis, **counts: int) -> None:
    for name, n in counts.items():
        gov.counters.add(f"test.{name}", n)
    account_of(gov).flush()


def totals(gov: GovRedis) -> dict[str, int]:
    """The test's own."""
    found = account_of(gov).totals().counts
    return {name.removeprefix("test."): n for name, n in found.items() if name.startswith("test.")}


def by_minute(gov: GovRedis) -> list[dict[str, int]]:
    found = [minute.counts for minute in account_of(gov).minutes(*ALWAYS)]
    own = [{name.removeprefix("test."): n for name, n in each.items() if name.startswith("test.")} for each in found]
    return [each for each in own if each]


def rows_of(gov: GovRedis) -> list[Any]:
    """Those that wait for Redis."""
    return gov.postgres.fetch("SELECT FROM govredis_account WHERE process <> '' AND minute >= 0")


class SetClock:
    """The wall clock, moved by the test."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def time(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def sleep(self, seconds: float) -> None:
        self.ahead += seconds


class TestTotals:
    def test_are_the_sum_over_processes(self, gov: GovRedis, make_gov: MakeGov) -> None:
        other = make_gov(redis_url=gov.config.redis_url)
        tell(gov, a=1, b=2)
        tell(other, a=10)
        tell(gov, a=100)
        in_child(lambda: tell(gov, a=1000))
        for reader in gov, other:
            assert totals(reader) == {"a": 1111, "b": 2}
        assert account_of(other).totals().backend == "redis"

    def test_a_call_that_arrives_twice_or_late_adds_nothing(self, gov: GovRedis) -> None:
        account, client, sent = account_of(gov), redis_of(gov), list[Any]()
        pipeline = client.pipeline

        def twice(commands: Any, *args: Any, **options: Any) -> Any:
            sent.append((commands, args, options))
            pipeline(commands, *args, **options)
            return pipeline(commands, *args, **options)

        client.pipeline = twice  # type: ignore[method-assign]
        tell(gov, a=1)
        tell(gov, a=1, b=1)
        for commands, args, options in sent:  # the older one last
            pipeline(commands, *args, **options)
        client.pipeline = pipeline  # type: ignore[method-assign]
        for commands, args, options in sent[:1]:
            pipeline(commands, *args, **options)
        assert totals(gov) == {"a": 2, "b": 1}
        assert sum(each.get("a", 0) for each in by_minute(gov)) == 2
        assert account.totals().latencies["redis"].count > 0

    def test_an_answer_that_was_lost(self, gov: GovRedis) -> None:
        """The call was carried out, and the process does not know."""
        client = redis_of(gov)
        tell(gov, a=1)
        pipeline = client.pipeline

        def cut(*args: Any, **options: Any) -> Any:
            pipeline(*args, **options)
            raise BackendUnavailable("cut")

        client.pipeline = cut  # type: ignore[method-assign]
        tell(gov, a=1)
        client.pipeline = pipeline  # type: ignore[method-assign]
        assert totals(gov) == {"a": 2}
        tell(gov, a=1)
        assert totals(gov) == {"a": 3}

    def test_a_redis_that_lost_its_data_begins_anew(self, gov: GovRedis, plain_redis: Any) -> None:
        tell(gov, a=5)
        before = account_of(gov).totals()
        plain_redis.flushall()
        tell(gov, a=2)
        assert totals(gov) == {"a": 2}
        since = account_of(gov).totals().since
        assert before.since is not None
        assert since is not None
        assert before.since < since

    def test_names_beyond_the_room_are_left_out(self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("govredis.health.account_redis.ROOM", 3)
        tell(gov, a=1, b=1, c=1, d=1)
        tell(gov, a=1, d=1)
        assert len(totals(gov)) <= 3
        assert not account_of(gov).has_pending()

    def test_a_value_of_others_is_no_count(self, gov: GovRedis, plain_redis: Any) -> None:
        tell(gov, a=1)
        plain_redis.hset("{govredis:account}:totals", mapping={"test.a": "x", "test.b": "1e400"})
        assert totals(gov) == {}
        tell(gov, a=1)
        assert totals(gov) == {"a": 1}

    def test_a_redis_that_refuses_is_left_alone_for_a_while(self, gov: GovRedis, plain_redis: Any) -> None:
        plain_redis.set("{govredis:account}:totals", "x")
        tell(gov, a=1)
        assert "WRONGTYPE" in str(account_of(gov).problem)
        assert not account_of(gov).has_pending()
        assert account_of(gov).totals().backend in {"memory", "postgres"}
        plain_redis.delete("{govredis:account}:totals")
        account_of(gov)._refused_until = 0
        account_of(gov).flush()
        assert (account_of(gov).problem, totals(gov)) == (None, {"a": 1})

    def test_keys_are_bounded(self, gov: GovRedis, plain_redis: Any) -> None:
        tell(gov, a=1)
        ttls = {key.rsplit(":", 1)[0]: plain_redis.ttl(key) for key in plain_redis.keys("*account*")}
        assert ttls.pop("{govredis:account}") == -1, "the totals"
        assert len(ttls) == 3
        assert all(25 * 3600 < ttl <= 27 * 3600 for ttl in ttls.values())
        gov.counters.add("test.a")
        gov.close()
        assert gov.internal.account.process
        (record,) = plain_redis.keys("*process*")
        assert plain_redis.ttl(record) > 0

    def test_a_process_that_has_told_nothing_before_it_ends_leaves_its_record_for_minutes(
        self, gov: GovRedis, plain_redis: Any
    ) -> None:
        gov.counters.add("test.a")
        gov.close()
        (record,) = plain_redis.keys("*process*")
        assert plain_redis.ttl(record) <= 900
        assert totals(gov) == {"a": 1}


class TestTheThread:
    def test_tells_in_the_background_and_ends(self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_teller, "INTERVAL", 0.01)
        before = set(threading.enumerate())
        gov.counters.add("test.a")
        eventually(lambda: totals(gov) == {"a": 1})

        def tellers() -> list[str]:
            return [t.name for t in set(threading.enumerate()) - before if t.name == "govredis-teller"]

        eventually(lambda: not tellers())
        told = redis_of(gov).latency.buckets[:]
        assert gov.counters.on_add is not None
        gov.counters.add("test.a")
        eventually(lambda: totals(gov) == {"a": 2})
        assert told != redis_of(gov).latency.buckets

    def test_an_addition_costs_one_look_while_the_thread_runs(self, gov: GovRedis) -> None:
        gov.counters.add("test.a")
        assert gov.counters.on_add is None
        gov.internal.context.teller.close()
        assert gov.counters.on_add is not None

    def test_what_is_added_while_the_thread_ends_is_told(self, gov: GovRedis) -> None:
        teller, rounds = gov.internal.context.teller, list[int]()

        def wait(stopped: Latch) -> bool:
            rounds.append(1)
            return len(rounds) > 20

        teller._wait = wait  # type: ignore[method-assign]
        pending = teller.has_pending

        def has_pending() -> bool:
            if len(rounds) < 3:
                gov.counters.add("test.late")
            return pending()

        teller.has_pending = has_pending  # type: ignore[method-assign]
        gov.counters.add("test.late")
        eventually(lambda: len(rounds) >= 3 and not pending())
        assert totals(gov)["late"] >= 2

    def test_a_uwsgi_master_that_forks_beside_threads_gets_none(
        self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker would hang for ever if the thread had the GIL at the fork."""
        monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(opt={"master": True}, worker_id=lambda: 0))
        before = threading.active_count()
        gov.counters.add("test.a")
        assert threading.active_count() == before
        gov.internal.context.teller.write_pending()
        assert totals(gov) == {"a": 1}

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_thread_that_fails_is_followed_by_another(self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_teller, "INTERVAL", 0.01)
        account, failures = account_of(gov), list[int]()
        take = account.take

        def fail(*, last: bool) -> Any:
            failures.append(1)
            monkeypatch.setattr(account, "take", take)
            raise ZeroDivisionError

        monkeypatch.setattr(account, "take", fail)
        gov.counters.add("test.a")
        eventually(lambda: failures and gov.counters.on_add is not None)
        gov.counters.add("test.a")
        eventually(lambda: totals(gov) == {"a": 2})

    def test_a_child_is_another_process(self, gov: GovRedis) -> None:
        tell(gov, a=1)
        mine = account_of(gov).process
        assert in_child(lambda: account_of(gov).process) != mine
        assert in_child(lambda: (tell(gov, a=1), totals(gov))[1]) == {"a": 2}
        tell(gov, a=1)
        assert totals(gov) == {"a": 3}


class TestMinutes:
    def test_counts_are_of_the_minute_in_which_they_were_told(self, gov: GovRedis) -> None:
        tell(gov, a=1)
        tell(gov, b=2)
        minute = account_of(gov).minutes(*ALWAYS)[-1]
        assert minute.at.second == 0
        assert abs(datetime.now(timezone.utc) - minute.at) < timedelta(minutes=2)
        assert account_of(gov).minutes(ALWAYS[0], minute.at - timedelta(minutes=2)) == []
        assert account_of(gov).minutes(minute.at + timedelta(seconds=60), ALWAYS[1]) == []
        assert minute.latencies["redis"].count == sum(minute.latencies["redis"].buckets)

    def test_earlier_minutes_are_told_as_such(self, gov: GovRedis, plain_redis: Any) -> None:
        backend = RedisAccountBackend(gov.internal.context.keys, redis_of(gov))
        this = int(time.time() // 60)
        commands = [
            *backend.add("p", this - 2, {"test.a": (5, 7)}),
            *backend.add("p", this - 1, {"test.a": (5, 10), "test.b": (0, 1)}),
            *backend.add("p", this + 9, {"test.a": (5, 11)}),  # by a clock that is ahead: counted now
            *backend.add("p", this - 3, {"test.a": (5, 6)}),  # late
            *backend.add("p", this - 9999, {"test.c": (0, 4)}),  # too old for a minute of its own
        ]
        redis_of(gov).pipeline(commands, backend.scripts)
        assert by_minute(gov) == [{"a": 2}, {"a": 3, "b": 1}, {"a": 1}]
        assert totals(gov) == {"a": 6, "b": 1, "c": 4}
        assert account_of(gov).recent().day.counts["test.a"] == 6

    def test_recent_is_of_the_last_minute_hour_and_day(self, gov: GovRedis) -> None:
        backend = RedisAccountBackend(gov.internal.context.keys, redis_of(gov))
        this = int(time.time() // 60)
        told = 0
        commands = []
        for ago, n in (1500, 1), (300, 10), (30, 100), (0, 1000):
            commands += backend.add("p", this - ago, {"test.a": (0, told + n)})
            told += n
        redis_of(gov).pipeline(commands, backend.scripts)
        recent = account_of(gov).recent()
        found = [span.counts.get("test.a") for span in (recent.minute, recent.hour, recent.day)]
        assert found == [1000, 1100, 1110]
        assert recent.hour.backend == "redis"


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`away(gov)`: its calls do not reach Redis, until `away(gov, False)`."""

    def refuse(*_: Any, **__: Any) -> None:
        raise BackendUnavailable("away")

    def set_away(gov: GovRedis, is_away: bool = True) -> None:
        client = redis_of(gov)
        if is_away:
            client._round_trip = refuse  # type: ignore[method-assign]
        else:
            del client._round_trip  # type: ignore[method-assign]

    return set_away


class TestWhileRedisIsAway:
    @pytest.fixture
    def pair(self, gov: GovRedis, make_gov: MakeGov, clock: SetClock) -> tuple[GovRedis, GovRedis]:
        other = make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)
        for each in gov, other:
            each.internal.account._clock = clock
        return gov, other

    def test_minutes_wait_in_the_process_and_are_told_as_they_were(
        self, make_gov: MakeGov, redis_server: RedisServer, away: Any
    ) -> None:
        gov = make_gov(redis_url=redis_server.url)
        account, clock = account_of(gov), SetClock()
        account._clock = clock
        clock.ahead = -300.0
        away(gov)
        for n in range(1, 4):
            tell(gov, a=n)
            clock.ahead += 60
        assert by_minute(gov) == [{"a": 1}, {"a": 2}, {"a": 3}]
        assert (totals(gov), account.totals().backend) == ({"a": 6}, "memory")
        away(gov, False)
        tell(gov, a=10)
        assert [sum(each.values()) for each in by_minute(gov)] == [1, 2, 3, 10]
        assert totals(gov) == {"a": 16}

    def test_minutes_are_bounded_and_no_count_is_lost(
        self, gov: GovRedis, away: Any, monkeypatch: pytest.MonkeyPatch, clock: SetClock
    ) -> None:
        monkeypatch.setattr(account_module, "_MINUTES", 3)
        account = account_of(gov)
        account._clock = clock
        clock.ahead = -3600.0
        away(gov)
        for _ in range(9):
            tell(gov, a=1)
            clock.ahead += 60
        assert len(account._minutes) == 3
        away(gov, False)
        account.flush()
        assert [each["a"] for each in by_minute(gov)] == [7, 1, 1]

    def test_others_read_it_in_postgresql(self, pair: tuple[GovRedis, GovRedis], away: Any) -> None:
        gov, other = pair
        tell(gov, a=1)
        assert totals(other) == {"a": 1}
        away(gov)
        away(other)
        tell(gov, a=10)
        tell(other, a=100)
        for reader in gov, other, gov:
            assert totals(reader) == {"a": 111}
            assert account_of(reader).totals().backend == "postgres"
        assert sum(each["a"] for each in by_minute(other)) == 110, "which has not read the minute before"
        assert account_of(other).recent().hour.counts["test.a"] == 110
        assert check_counters({}, account_of(other)).data["source"] == "postgres"

    def test_its_return_merges_the_dead_once(self, pair: tuple[GovRedis, GovRedis], away: Any, clock: SetClock) -> None:
        gov, other = pair
        tell(gov, a=1)
        clock.ahead = -120.0
        away(gov)
        tell(gov, a=10)
        clock.ahead = -60.0
        tell(gov, a=100)
        rows = gov.postgres.fetch("SELECT process, minute, counts ->> 'test.a' FROM govredis_account ORDER BY minute")
        assert [counts for _, _, counts in rows] == ["[1, 11]", "[1, 111]"]
        # From here on `gov` is dead, and `other` finds its rows.
        clock.ahead = 0.0
        kept = other.postgres.fetch("SELECT * FROM govredis_account WHERE process <> ''")
        assert totals(other) == {"a": 111}
        assert [each["a"] for each in by_minute(other)] == [10, 100, 1]
        assert rows_of(other) == []
        # A merger that was killed before its commit: the rows are still there.
        for key, process, minute, counts, changed in kept:
            other.postgres.fetch(
                "INSERT INTO govredis_account VALUES (%s, %s, %s, %s::jsonb, %s)",
                (key, process, minute, json.dumps(counts), changed),
            )
        assert totals(other) == {"a": 111}
        assert sum(each["a"] for each in by_minute(other)) == 111

    def test_a_living_process_whose_rows_another_merged_is_not_counted_twice(
        self, pair: tuple[GovRedis, GovRedis], away: Any
    ) -> None:
        gov, other = pair
        away(gov)
        tell(gov, a=10)
        assert totals(other) == {"a": 10}
        tell(gov, a=5)
        away(gov, False)
        account_of(gov).flush()
        assert totals(other) == {"a": 15}
        assert rows_of(other) == []

    def test_rows_that_another_merged_count_once_while_redis_is_away_for_their_process(
        self, pair: tuple[GovRedis, GovRedis], away: Any
    ) -> None:
        gov, other = pair
        tell(gov, a=1)
        away(gov)
        for n in range(1, 4):
            tell(gov, a=10)
            expected = {"a": 1 + 10 * n}
            assert [totals(gov), totals(other), totals(gov)] == [expected] * 3
        away(gov, False)
        tell(gov, a=1)
        assert (totals(gov), totals(other)) == ({"a": 32}, {"a": 32})
        away(gov)
        tell(gov, a=10)
        assert totals(gov) == {"a": 42}, "its mark is older"

    def test_who_has_not_seen_the_return_finds_no_smaller_totals(
        self, pair: tuple[GovRedis, GovRedis], away: Any
    ) -> None:
        gov, other = pair
        tell(gov, a=1)
        assert totals(other) == {"a": 1}
        away(gov)
        away(other)
        tell(gov, a=10)
        tell(other, a=100)
        assert (totals(gov), totals(other)) == ({"a": 111}, {"a": 111})
        away(other, False)
        account_of(other).flush()
        assert rows_of(other) == []
        assert totals(gov) == {"a": 111}

    def test_the_marks_of_merged_rows_go(self, pair: tuple[GovRedis, GovRedis], away: Any) -> None:
        gov, other = pair
        marks = "SELECT FROM govredis_account WHERE minute < 0"
        away(gov)
        tell(gov, a=1)
        account_of(other)._merge()
        assert len(other.postgres.fetch(marks)) == 1
        other.postgres.fetch("UPDATE govredis_account SET changed_at = now() - interval '25 hours'")
        account_of(other)._merge()
        assert len(other.postgres.fetch(marks)) == 1
        other.postgres.fetch("UPDATE govredis_account SET changed_at = now() - interval '27 hours'")
        account_of(other)._merge()
        assert other.postgres.fetch(marks) == []

    def test_the_first_process_that_begins_merges_them(self, pair: tuple[GovRedis, GovRedis], away: Any) -> None:
        gov, other = pair
        away(gov)
        tell(gov, a=10)
        tell(other, b=1)
        assert rows_of(other) == []
        assert totals(other) == {"a": 10, "b": 1}

    def test_a_process_that_sees_the_return_merges_those_of_others(
        self, pair: tuple[GovRedis, GovRedis], away: Any
    ) -> None:
        gov, other = pair
        tell(other, b=1)
        away(gov)
        tell(gov, a=10)
        tell(other, b=1)
        assert len(rows_of(other)) == 1, "it looks for none each second"
        account_of(other)._log._note("redis", OutageNote(time.time() - 1, "refused", time.time()))
        account_of(other).flush()
        assert rows_of(other) == []
        assert totals(other) == {"a": 10, "b": 2}

    def test_a_failure_of_postgresql_is_counted_and_nothing_is_lost(
        self, make_gov: MakeGov, redis_server: RedisServer, away: Any
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url="postgresql://127.0.0.1:1/x")
        away(gov)
        tell(gov, a=1)
        assert gov.counters.get("account.unwritten") > 0
        away(gov, False)
        tell(gov, a=1)
        assert totals(gov) == {"a": 2}

    def test_a_process_that_ends_writes_its_last_second(self, pair: tuple[GovRedis, GovRedis], away: Any) -> None:
        gov, other = pair
        away(gov)
        tell(gov, a=1)
        gov.counters.add("test.a")
        gov.internal.context.teller.write_pending()
        assert totals(other) == {"a": 2}


class TestOutages:
    def test_a_hung_redis_is_a_record(
        self, make_gov: MakeGov, mortal_redis: RedisServer, postgres_server: PostgresServer
    ) -> None:
        settings = {"database_url": postgres_server.url, "socket_timeout": 0.5, "connect_timeout": 10.0}
        gov = make_gov(redis_url=mortal_redis.url, postgres_timeout=20.0, **{k: settings[k] for k in settings})
        gov.limits.hit("a", "1000/hour")
        began = datetime.now(timezone.utc)
        mortal_redis.pause()
        try:
            for _ in range(20):
                assert gov.limits.hit("a", "1000/hour").backend in {"postgres", "redis"}
            account_of(gov).flush()
            (open_now,) = account_of(gov).outages(*ALWAYS)
            assert (open_now.server, open_now.ended, open_now.kind) == ("redis", None, "hung")
            ((kind, ended, served),) = gov.postgres.fetch("SELECT kind, ended, served FROM govredis_outages")
            assert (kind, ended, served > 0) == ("hung", None, True)
        finally:
            mortal_redis.resume()
        eventually(lambda: redis_of(gov).breaker.closed)
        account_of(gov).flush()
        (outage,) = account_of(gov).outages(*ALWAYS)
        assert outage.ended is not None
        assert began - timedelta(seconds=1) <= outage.began <= outage.ended <= datetime.now(timezone.utc)
        assert outage.served == gov.counters.get("limits.degraded.postgres") > 0
        assert outage.slowest >= 0.5
        assert outage.noticed_by.split(":")[1].split()[0].isdecimal()
        assert account_of(gov).totals().counts["outages.redis"] == 1
        found = redis_of(gov).call("ZRANGE", "{govredis:account}:outages", "0", "-1")
        assert len(found) == 1

    def test_other_processes_read_it_and_overlapping_ones_are_one(self, gov: GovRedis, make_gov: MakeGov) -> None:
        other = make_gov(redis_url=gov.config.redis_url)
        now = time.time()
        for each, (began, ended, served) in (gov, (now - 9, now - 5, 3)), (other, (now - 8, now - 4, 4)):
            note = OutageNote(began, "refused", slowest=began - now + 10)
            account_of(each)._log._note("redis", note)
            each.counters.add("limits.degraded.memory", served)
            note.ended = ended
            account_of(each).flush()
        for reader in gov, other:
            (outage,) = account_of(reader).outages(*ALWAYS)
            assert (outage.served, outage.slowest) == (7, pytest.approx(2))
            assert outage.ended is not None
            assert (outage.began.timestamp(), outage.ended.timestamp()) == (
                pytest.approx(now - 9, abs=0.01),
                pytest.approx(now - 4, abs=0.01),
            )
            assert account_of(reader).totals().counts["outages.redis"] == 1

    def test_one_whose_process_was_killed_ended_when_it_said_so_last(
        self, gov: GovRedis, make_gov: MakeGov, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = make_gov(redis_url=gov.config.redis_url)
        account_of(gov)._log._note("redis", OutageNote(time.time(), "refused"))
        account_of(gov).flush()
        (outage,) = account_of(other).outages(*ALWAYS)
        assert outage.ended is None
        monkeypatch.setattr("govredis.health.outage_log.SILENT", -1.0)
        (outage,) = account_of(other).outages(*ALWAYS)
        assert outage.ended is not None

    def test_one_of_redis_whose_processes_were_all_killed_is_counted_on_its_return(
        self, gov: GovRedis, make_gov: MakeGov, away: Any
    ) -> None:
        other = make_gov(redis_url=gov.config.redis_url, database_url=gov.config.database_url)
        away(gov)
        account_of(gov)._log._note("redis", OutageNote(time.time(), "hung"))
        account_of(gov).flush()
        assert "outages.redis" not in account_of(other).totals().counts
        other.postgres.fetch("UPDATE govredis_outages SET changed_at = changed_at - interval '1 hour'")
        for _ in range(2):
            assert account_of(other).totals().counts["outages.redis"] == 1
        assert other.postgres.fetch("SELECT ended = changed_at FROM govredis_outages") == [(True,)]

    def test_a_redis_that_cannot_write_is_one_too(self, make_gov: MakeGov, mortal_redis: RedisServer) -> None:
        gov = make_gov(redis_url=mortal_redis.url, **PATIENT)
        gov.limits.hit("a", "9/hour")
        mortal_redis.command("CONFIG", "SET", "min-replicas-to-write", "1")
        for _ in range(3):
            assert gov.limits.hit("a", "9/hour").degraded
        account_of(gov).flush()
        (outage,) = account_of(gov).outages(*ALWAYS)
        assert (outage.kind, outage.ended, outage.served) == ("cannot write", None, 3)
        mortal_redis.command("CONFIG", "SET", "min-replicas-to-write", "0")
        account_of(gov)._log._now = lambda: time.time() + 60
        account_of(gov).flush()
        (outage,) = account_of(gov).outages(*ALWAYS)
        assert outage.ended is not None
        assert not account_of(gov)._log.has_any()

    def test_postgresql_away_is_one_too(
        self, make_gov: MakeGov, redis_server: RedisServer, mortal_postgres: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=mortal_postgres.url, **PATIENT)
        gov.postgres.fetch("SELECT 1")
        mortal_postgres.kill()
        for _ in range(3):
            with pytest.raises(BackendUnavailable):
                gov.postgres.fetch("SELECT 1")
        account_of(gov).flush()
        (outage,) = account_of(gov).outages(*ALWAYS)
        assert (outage.server, outage.kind, outage.ended) == ("postgres", "refused", None)
        mortal_postgres.restart()
        eventually(lambda: gov.postgres.breaker.closed)
        account_of(gov).flush()
        (outage,) = account_of(gov).outages(*ALWAYS)
        assert outage.ended is not None
        assert account_of(gov).totals().counts["outages.postgres"] == 1
        assert redis_of(gov).call("ZCARD", "{govredis:account}:outages") == 1, "the open one is gone"

    def test_calls_that_rows_served_are_of_redis(
        self, make_gov: MakeGov, mortal_redis: RedisServer, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=mortal_redis.url, database_url=postgres_server.url, **PATIENT)
        gov.sessions.bind("s", "a")
        mortal_redis.kill()
        eventually(lambda: gov.sessions.get("s") and not redis_of(gov).breaker.closed)
        before = account_of(gov).outages(*ALWAYS)[0].served
        for _ in range(3):
            assert gov.sessions.get("s") is not None
        gov.counters.add("guard.degraded.redis")  # a thread's, and no call
        gov.counters.add("health.degraded.census")
        (outage,) = account_of(gov).outages(*ALWAYS)
        assert (outage.server, outage.served) == ("redis", before + 3)

    def test_calls_that_redis_served_are_of_postgresql(
        self, make_gov: MakeGov, redis_server: RedisServer, mortal_postgres: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=redis_server.url, database_url=mortal_postgres.url, **PATIENT)
        gov.sessions.bind("s", "a")
        mortal_postgres.kill()
        eventually(lambda: gov.sessions.for_agent("a") and not gov.postgres.breaker.closed)
        before = account_of(gov).outages(*ALWAYS)[0].served
        gov.sessions.for_agent("a")
        gov.sessions.bind("t", "a")
        (outage,) = account_of(gov).outages(*ALWAYS)
        assert (outage.server, outage.served) == ("postgres", before + 2)

    def test_a_child_tells_of_its_parents_outage_that_goes_on(
        self, make_gov: MakeGov, postgres_server: PostgresServer
    ) -> None:
        gov = make_gov(redis_url=REDIS_AWAY, database_url=postgres_server.url)
        for _ in range(3):
            gov.limits.hit("a", "9/hour")

        def served() -> list[int]:
            gov.limits.hit("a", "9/hour")
            account_of(gov).flush()
            return [record.served for _, record in account_of(gov)._log.records("child")]

        assert in_child(served) == [1]
        account_of(gov).flush()
        (outage,) = account_of(gov).outages(*ALWAYS)
        assert (outage.served, outage.kind) == (3, "refused"), "the breaker opened at the second refusal"

    def test_a_trip_is_none(self, gov: GovRedis) -> None:
        redis_of(gov).breaker.trip("something to replay")
        eventually(lambda: redis_of(gov).breaker.closed)
        account_of(gov).flush()
        assert account_of(gov).outages(*ALWAYS) == []

    def test_records_are_bounded_and_what_others_planted_is_left_out(
        self, gov: GovRedis, plain_redis: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("govredis.health.account_redis._OUTAGES", 3)
        key = "{govredis:account}:outages"
        plain_redis.zadd(key, {"planted": time.time() * 1e6, '{"server": "redis", "ended": 1e300}': 1, "[1]": 2})
        for n in range(5):
            account_of(gov)._log._note(
                "redis", OutageNote(time.time() - 100 + n * 10, "refused", time.time() - 99 + n * 10)
            )
            account_of(gov).flush()
        assert plain_redis.zcard(key) == 3
        assert {outage.kind for outage in account_of(gov).outages(*ALWAYS)} == {"refused"}


def record(began: float, ended: float | None, server: str = "redis", kind: str = "refused") -> OutageRecord:
    until = None if ended is None else round(ended * 1e6)
    return OutageRecord(
        f"p{began}", server, round(began * 1e6), until, kind, f"h:{began:g} p", 1, began, until or 10**8
    )


def test_joined() -> None:
    of_redis = record(30, 40), record(10, 20), record(15, 35, kind="hung"), record(90, None)
    found = joined([*of_redis, record(12, 13, "postgres")], 100.0)
    assert [(o.server, o.began.timestamp(), o.ended and o.ended.timestamp()) for o in found] == [
        ("redis", 10, 40),
        ("postgres", 12, 13),
        ("redis", 90, None),
    ]
    assert (found[0].kind, found[0].noticed_by, found[0].served, found[0].slowest) == ("hung", "h:10 p", 3, 30)
    assert len(joined([record(1, 2), record(2.5, 3)], 100.0)) == 1, "a relapse"
    assert len(joined([record(1, 2), record(9, 10)], 100.0)) == 2


def test_a_process_that_ended_in_an_outage_leaves_none_that_goes_on() -> None:
    gone, lives = replace(record(15, None), changed=16 * 10**6), replace(record(20, None), changed=39 * 10**6)
    (outage,) = joined([record(10, 30), gone], 40.0)
    assert outage.ended is not None
    assert outage.ended.timestamp() == 30
    assert joined([record(10, 30), gone, lives], 40.0)[0].ended is None, "it said so after the return"
    assert joined([record(10, 30, "postgres"), gone], 40.0)[1].ended is None


def test_quantiles() -> None:
    def of(*seconds: float) -> Latency:
        buckets = [0] * (len(BOUNDS) + 1)
        for each in seconds:
            buckets[next((n for n, bound in enumerate(BOUNDS) if each <= bound), len(BOUNDS))] += 1
        return Latency(len(seconds), sum(seconds), tuple(buckets))

    assert Latency().quantile(0.5) is None
    assert of(0.0003).quantile(0.5) == pytest.approx(0.000375)
    many = of(*[0.002] * 99, 3.0)
    assert 0.001 < (many.quantile(0.5) or 0) <= 0.0025
    assert many.quantile(0.99) == pytest.approx(0.0025)
    assert many.quantile(1.0) == 5.0
    assert of(60.0).quantile(0.5) == BOUNDS[-1]
    assert of(0.002) + of(3.0) == of(0.002, 3.0)


def test_a_minute_is_data() -> None:
    at = datetime.now(timezone.utc)
    assert replace(Minute(at, {}, {}), counts={"a": 1}).counts == {"a": 1}
