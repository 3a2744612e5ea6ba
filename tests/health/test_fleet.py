"""Fleet: workers, beats and queues, as any process's report shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from support import REDIS_AWAY

from govredis import BackendUnavailable, GovRedis
from govredis.health import Check
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.one_redis

MakeGov = Callable[..., GovRedis]

#: Seconds from one note to the next: no machine stalls for so long.
EVERY = 1000.0
BROKER = "redis://broker:6379/0"


@pytest.fixture
def gov(make_gov: MakeGov, redis_server: RedisServer, plain_redis: Any) -> GovRedis:
    return make_gov(redis_url=redis_server.url)


@pytest.fixture
def plant(gov: GovRedis, plain_redis: Any) -> Callable[..., None]:
    """Notes something that is so many seconds old."""

    def note(field: str, last: float = 0, first: float | None = None, **told: Any) -> None:
        kind, _, name = field.partition(":")
        gov.internal.fleet.note(kind, name, EVERY, told)
        begun, noted, text = plain_redis.hget("govredis:fleet", field).split(" ", 2)
        begun = int(begun) - (last if first is None else first) * 1000
        plain_redis.hset("govredis:fleet", field, f"{begun:.0f} {int(noted) - last * 1000:.0f} {text}")

    return note


def refuse(*_: Any, **__: Any) -> None:
    raise BackendUnavailable("away")


def seen(gov: GovRedis, name: str) -> Check | None:
    gov.health.renew_after_fork()  # what was seen last is forgotten
    return next((check for check in gov.health.check().checks if check.name == name), None)


def found(gov: GovRedis, name: str) -> Check:
    check = seen(gov, name)
    assert check is not None
    return check


class TestWorkers:
    def test_nothing_is_said_where_there_never_was_one(self, gov: GovRedis) -> None:
        assert {check.name for check in gov.health.check().checks} == {"redis", "postgres", "counters"}

    def test_that_live_are_counted(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("worker:a", 1900)
        plant("worker:b")
        assert found(gov, "workers") == Check("workers", "pass", "", {"alive": 2, "lost": 0})

    def test_that_are_silent_for_two_intervals_are_named(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("worker:a\n", 2100)
        plant("worker:b")
        check = found(gov, "workers")
        assert (check.status, check.data) == ("warn", {"alive": 1, "lost": 1})
        assert re.match(r"a\\n was last heard 21\d\d s ago: killed", check.output)

    def test_many_are_named_in_part(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        for n in range(9):
            plant(f"worker:{n}", 2100)
        assert found(gov, "workers").output.count("was last heard") == 5
        assert "and 4 more" in found(gov, "workers").output

    def test_that_end_by_themselves_are_not_missed(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("worker:a", 2100)
        gov.internal.fleet.leave("worker", "a")
        assert seen(gov, "workers") is None

    def test_are_forgotten_after_ten_intervals_and_removed_by_a_heartbeat(
        self, gov: GovRedis, plant: Callable[..., None], plain_redis: Any
    ) -> None:
        plant("worker:a", 10_100)
        plant("worker:b", 9900)
        plant("beat:c", 10_100)
        plain_redis.hset("govredis:fleet", "worker:foreign", "x")
        assert found(gov, "workers").data == {"alive": 0, "lost": 1}
        gov.health.beat(EVERY)
        assert set(plain_redis.hkeys("govredis:fleet")) == {"worker:b", "beat:c"}

    def test_the_state_ends_a_day_after_the_last_note(self, gov: GovRedis, plain_redis: Any) -> None:
        gov.internal.fleet.note("worker", "a", 15, {})
        assert 80_000 < plain_redis.ttl("govredis:fleet") <= 86_400


class TestBeats:
    def test_one_passes(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("beat:host:1", lag=0.25)
        assert found(gov, "beat") == Check("beat", "pass", "", {"beats": 1, "lag": 0.25})

    def test_two_are_both_named(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("beat:one:1", 900, first=5000, lag=0)
        plant("beat:two:1", 0, first=1000, lag=0)
        check = found(gov, "beat")
        assert (check.status, check.data) == ("warn", {"beats": 2})
        assert check.output == "2 beats run, and publish each periodic task so often: one:1 and two:1; stop all but one"

    def test_a_third_that_has_just_been_started_hides_no_two(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("beat:one:1", 900, first=5000, lag=0)
        plant("beat:two:1", 800, first=4000, lag=0)
        plant("beat:three:1", 0, lag=0)
        assert "one:1 and two:1" in found(gov, "beat").output

    def test_one_that_was_started_anew_is_one(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("beat:host:1", 900, first=5000, lag=0)
        plant("beat:host:2", 100, first=700, lag=0)
        assert found(gov, "beat").status == "pass"

    def test_that_is_gone_or_wedged_is_named(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("beat:host:1", 5000, lag=0)
        plant("beat:host:2", 2100, lag=0)
        check = found(gov, "beat")
        assert (check.status, check.data) == ("warn", {"beats": 0})
        assert re.match(r"beat host:2 was last heard 21\d\d s ago: it is gone, stuck, or cannot pub", check.output)

    def test_a_schedule_that_lags_is_said(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("beat:host:1", lag=EVERY + 1)
        check = found(gov, "beat")
        assert (check.status, check.data["lag"]) == ("warn", EVERY + 1)
        assert "was 1001.0 s late" in check.output

    def test_the_heartbeat_s_findings_stand_beside(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("beat:one:1", 900, first=5000, lag=0)
        plant("beat:two:1", 0, first=1000, lag=0)
        for _ in range(2):
            gov.internal.heartbeat.note_published(EVERY, "mine")
        check = found(gov, "beat")
        assert "no worker has run the last 2 heartbeats" in check.output
        assert "one:1 and two:1" in check.output


class TestQueues:
    def test_their_depths_and_whether_they_are_read(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("worker:a", broker=BROKER, queues=["read"])
        plant("worker:gone", 2100, broker=BROKER, queues=["late"])
        plant("worker:other", broker="redis://other:6379/0", queues=["mail"])
        plant(f"queues:{BROKER}", depths={"read": 3, "mail": 12, "late": 1, "empty": 0}, unacked=4, oldest_unacked=1.5)
        check = found(gov, "celery")
        assert check.status == "warn"
        assert check.output == (
            "queue 'late' holds 1 messages, queue 'mail' holds 12 messages, and no worker reads them (-Q)"
        )
        assert check.data["mail"] == {"depth": 12, "read": False}
        assert check.data["read"] == {"depth": 3, "read": True}
        assert check.data["empty"] == {"depth": 0, "read": False}
        broker = found(gov, "broker")
        assert (broker.status, broker.data["unacked"], broker.data["oldest_unacked"]) == ("pass", 4, 1.5)
        assert 0 <= broker.data["age"] < EVERY
        gov.health.renew_after_fork()
        gov.health.snapshot()
        (point,) = gov.health.history()
        assert (point.values["celery.mail.depth"], point.values["broker.unacked"]) == (12, 4)

    def test_an_old_look_says_nothing(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant(f"queues:{BROKER}", 2100, depths={"mail": 12})
        assert seen(gov, "celery") is None
        assert seen(gov, "broker") is None

    def test_a_broker_that_does_not_tell_is_unknown(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        plant("queues:sqs://x/", unknown="NotImplementedError: no")
        broker = found(gov, "broker")
        assert (broker.status, broker.output) == ("pass", "unknown: sqs://x/: NotImplementedError: no")
        assert seen(gov, "celery") is None

    def test_note_says_when_a_broker_was_looked_at(self, gov: GovRedis, plant: Callable[..., None]) -> None:
        fleet = gov.internal.fleet
        assert fleet.note("worker", "a", EVERY, {}, BROKER) is None
        plant(f"queues:{BROKER}", 500, depths={})
        since = fleet.note("worker", "a", EVERY, {}, BROKER)
        assert since is not None
        assert 500 <= since < EVERY


class TestFaults:
    @pytest.mark.parametrize(
        "planted",
        ["x", "1 2", "1 2 []", '1 2 {"every": 0}', '1 x {"every": 1}', '1 2 {"every": 1, "depths": [1]}',
         '1 2 {"every": 1, "queues": 5}', '1 2 {"every": 1, "depths": {"a": "x"}}', "1 2 " + "[" * 100_000],
    )  # fmt: skip
    def test_what_govredis_has_not_written_is_passed_over(
        self, gov: GovRedis, plain_redis: Any, plant: Callable[..., None], planted: str
    ) -> None:
        for field in "worker:x", "beat:x", "queues:x", "y":
            plain_redis.hset("govredis:fleet", field, planted)
        plant("worker:a")
        assert found(gov, "workers").data == {"alive": 1, "lost": 0}
        assert gov.counters.get("health.unreadable") == 4
        json.dumps(gov.health.check().as_dict(), allow_nan=False)

    def test_who_lives_is_told_on_the_return_of_redis(
        self, gov: GovRedis, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        teller = gov.internal.context.teller
        for kind, name in ("worker", "a"), ("worker", "left"), ("beat", "b"), ("worker", "killed"):
            plant(f"{kind}:{name}", last=3 * EVERY)
        with monkeypatch.context() as away:
            away.setattr(gov.internal.context.redis, "_round_trip", refuse)
            for kind, name in ("worker", "a"), ("worker", "left"), ("beat", "b"), ("queues", BROKER):
                gov.internal.fleet.note(kind, name, EVERY, {"lag": 0.1})
            gov.internal.fleet.leave("worker", "left")
            teller.flush()
            assert gov.internal.fleet.has_pending()
            assert gov.internal.fleet.take(last=True) == [], "a process that ends does not live"
        teller.flush()
        assert not gov.internal.fleet.has_pending()
        assert found(gov, "beat").status == "pass"
        assert found(gov, "workers").data == {"alive": 1, "lost": 2}
        assert seen(gov, "celery") is None, "depths of then are none of now"

    def test_redis_away_hinders_nobody(self, make_gov: MakeGov) -> None:
        for options, counted in (({"redis_url": REDIS_AWAY}, 2), ({"redis_enabled": False}, 0)):
            gov = make_gov(**options)
            assert gov.internal.fleet.note("worker", "a", EVERY, {}) is None
            gov.internal.fleet.leave("worker", "a")
            assert gov.counters.get("health.degraded.fleet") == counted
