"""A log that an async service writes too: it prunes by its window at each check, and its TTL is that window and a
minute. Entries that its TTL says it still counts stay there, whatever is called here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from govredis import GovRedis, Limit
from govredis.keys import sibling
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.limits.replication import Admission

KEY = "rate_limit:default:i"
WINDOW = sibling(KEY, "window")
SECOND = 1_000_000
HOUR, DAY, YEAR = 3600, 86_400, 366 * 86_400


def copy(gov: GovRedis) -> None:
    backend = gov.limits._decider.backends.redis
    assert isinstance(backend, RedisLimitBackend)
    assert backend.replicate([Admission(KEY, 99.0, 1, 60 * SECOND, "told")], 100.0) == (0, None)


#: Whatever writes to a log, with a window of a minute.
WRITES: dict[str, Callable[[GovRedis], Any]] = {
    "hit": lambda gov: gov.limits.hit("i", "5/minute"),
    "require": lambda gov: gov.limits.require("i", "5/minute"),
    "wait": lambda gov: gov.limits.wait("i", "5/minute", timeout=0),
    "hit_many": lambda gov: gov.limits.hit_many([("i", "5/minute"), ("i", "5/minute")]),
    "record": lambda gov: gov.limits.record("i", 60, cost=3),
    "a denial": lambda gov: gov.limits.hit("i", "1/minute"),
    "a refund": lambda gov: gov.limits.hit("i", "5/minute").refund(),
    "a counter": lambda gov: gov.limits.hit("i", Limit(5, 60, "sliding_window_counter")),
    "reserved, admitted": lambda gov: gov.limits.hit_or_reserve("i", "5/minute", reservation="b", operation="default"),
    "reserved": lambda gov: [
        gov.limits.hit_or_reserve("i", "1/minute", reservation=f"b{n}", operation="default") for n in range(3)
    ],
    "copy": copy,
}


def their_hour(redis: Any, *, ttl: int, newest: float = 30.0) -> dict[bytes, float]:
    """Ten entries of the hour before their newest, which is so many seconds old; and the TTL."""
    now = time.time()
    redis.zadd(KEY, {f"theirs-{n}": now - newest - n * 300 for n in range(10)})
    if ttl:
        redis.expire(KEY, ttl)
    return dict(redis.zrange(KEY, 0, -1, withscores=True))


@pytest.mark.parametrize("write", WRITES)
def test_no_call_takes_an_entry_of_theirs_or_shortens_the_ttl(gov: GovRedis, plain_redis: Any, write: str) -> None:
    theirs = their_hour(plain_redis, ttl=DAY + 60)
    for _ in range(3):
        WRITES[write](gov)
        assert theirs.items() <= dict(plain_redis.zrange(KEY, 0, -1, withscores=True)).items()
        assert plain_redis.ttl(KEY) >= DAY + 60 - 30


def test_their_window_is_told_by_the_ttl_and_by_when_they_last_wrote(gov: GovRedis, plain_redis: Any) -> None:
    """An hour ago; since then the TTL has run down, and their oldest entry is 23.5 hours old."""
    now = time.time()
    plain_redis.zadd(KEY, {"oldest": now - 23.5 * HOUR, "newest": now - HOUR})
    plain_redis.expire(KEY, DAY + 60 - HOUR)
    for _ in range(2):
        assert gov.limits.hit("i", "5/minute")
        assert plain_redis.zcard(KEY) >= 3
    assert plain_redis.ttl(KEY) >= DAY - 30, "for as long as they count what was written now"


def test_entries_that_nobody_counts_go(gov: GovRedis, plain_redis: Any) -> None:
    now = time.time()
    plain_redis.zadd(KEY, {"over": now - DAY - 300, "counts": now - DAY + 300, "new": now})
    plain_redis.expire(KEY, DAY + 60)
    gov.limits.hit("i", "5/minute")
    assert plain_redis.zscore(KEY, "over") is None
    assert plain_redis.zscore(KEY, "counts")


def test_a_ttl_that_they_set_after_our_first_hit_counts_too(gov: GovRedis, plain_redis: Any) -> None:
    gov.limits.hit("i", "5/minute")
    theirs = their_hour(plain_redis, ttl=HOUR + 60)
    gov.limits.hit("i", "5/minute")
    assert theirs.items() <= dict(plain_redis.zrange(KEY, 0, -1, withscores=True)).items()
    assert plain_redis.ttl(KEY) >= HOUR


@pytest.mark.parametrize("write", ["reserved", "leased"])
def test_entries_to_come_hide_no_longer_window_of_theirs(gov: GovRedis, plain_redis: Any, write: str) -> None:
    """They raise the sibling's TTL above the one that another client gives the key."""
    if write == "reserved":
        for n in range(9):
            gov.limits.hit_or_reserve("i", "1/minute", reservation=f"b{n}", operation="default")
        window = 120
    else:
        limit = Limit(100, 60, lease=6)
        while not gov.counters.get("limits.leased"):
            assert gov.limits.hit("i", limit)
        window = 64
    now = time.time()
    plain_redis.zadd(KEY, {"theirs": now - window + 3, "newest": now})
    plain_redis.expire(KEY, window + 60)
    assert plain_redis.ttl(KEY) <= plain_redis.ttl(WINDOW)
    for _ in range(2):
        gov.limits.hit("i", "1000/minute")
        assert plain_redis.zscore(KEY, "theirs")


@pytest.mark.parametrize("ttl", [YEAR + 60, 10 * YEAR])
def test_the_longest_ttl_stays_and_entries_of_more_than_a_year_go(gov: GovRedis, plain_redis: Any, ttl: int) -> None:
    """No window is longer: that bounds a log."""
    now = time.time()
    plain_redis.zadd(KEY, {"over": now - YEAR - 60, "counts": now - YEAR + 600, "new": now})
    plain_redis.expire(KEY, ttl)
    gov.limits.hit("i", "5/minute")
    assert plain_redis.zscore(KEY, "over") is None
    assert plain_redis.zscore(KEY, "counts")
    assert plain_redis.ttl(KEY) >= ttl - 30
    assert plain_redis.ttl(WINDOW) >= plain_redis.ttl(KEY)


@pytest.mark.parametrize("write", [write for write in WRITES if write not in ("a denial", "a counter")])
def test_no_ttl_stays_none(gov: GovRedis, plain_redis: Any, write: str) -> None:
    """Theirs is on its way, or they died before they set it: nobody knows how long they count."""
    theirs = their_hour(plain_redis, ttl=0)
    plain_redis.zadd(KEY, {"over": time.time() - YEAR - 60})
    WRITES[write](gov)
    assert theirs.items() <= dict(plain_redis.zrange(KEY, 0, -1, withscores=True)).items()
    assert plain_redis.zscore(KEY, "over") is None
    assert plain_redis.ttl(KEY) == -1
    assert plain_redis.get(WINDOW) == str(60 * SECOND)
    plain_redis.expire(KEY, HOUR + 60)
    WRITES[write](gov)
    assert theirs.items() <= dict(plain_redis.zrange(KEY, 0, -1, withscores=True)).items()
    assert plain_redis.ttl(KEY) >= HOUR


def test_a_reservation_is_known_for_as_long_as_it_is_in_a_log_without_ttl(gov: GovRedis, plain_redis: Any) -> None:
    plain_redis.zadd(KEY, {"theirs": time.time()})
    for n in range(3):
        gov.limits.hit_or_reserve("i", "1/2 days", reservation=f"b{n}", operation="default")
    assert plain_redis.ttl(sibling(KEY, "booked")) >= 6 * DAY


def test_a_counter_shortens_nothing_either(gov: GovRedis, plain_redis: Any) -> None:
    counted, counter = Limit(5, 60, "sliding_window_counter"), sibling(KEY, "counter")
    gov.limits.hit("i", counted)
    for ttl in 10 * YEAR, DAY:
        plain_redis.expire(counter, ttl)
        gov.limits.hit("i", counted)
        assert plain_redis.ttl(counter) >= ttl - 30
    plain_redis.persist(counter)
    gov.limits.hit("i", counted)
    assert plain_redis.ttl(counter) == -1


# -- in the course of time -------------------------------------------------------------------------------------------

#: As if so many milliseconds had passed for the TTLs of all keys; in the order in which log.lua sets them.
_PASS = """
local left = {}
for i = #KEYS, 1, -1 do left[i] = redis.call('PTTL', KEYS[i]) end
for i = 1, #KEYS do
  if left[i] >= 0 then redis.call('PEXPIRE', KEYS[i], left[i] - ARGV[1]) end
end
"""


class Theirs:
    """The async service's client, in its own time."""

    def __init__(self, clocked: Any, window: int) -> None:
        self._clocked, self._window = clocked, window
        self._members = 0

    def check(self) -> int:
        now = self._clocked.now / SECOND
        self._clocked.command("ZREMRANGEBYSCORE", "k", 0, now - self._window)
        return int(self._clocked.command("ZCARD", "k"))

    def record(self) -> None:
        self._members += 1
        self._clocked.command("ZADD", "k", f"{self._clocked.now / SECOND:.6f}", f"theirs-{self._members}")
        self._clocked.command("EXPIRE", "k", self._window + 60)


def passes(clocked: Any, seconds: int) -> None:
    clocked.now += seconds * SECOND
    clocked.command("EVAL", _PASS, 2, "k", sibling("k", "window"), seconds * 1000)


@pytest.mark.parametrize("seed", range(4))
def test_they_count_all_that_their_window_spans_whatever_happens_here(clocked_redis: Any, seed: int) -> None:
    chance, window = random.Random(seed), [300, HOUR, HOUR, DAY][seed]
    theirs, counted = Theirs(clocked_redis, window), 0
    theirs.record()  # before that nobody knows of them
    log = [clocked_redis.now]
    for _ in range(150):
        passes(clocked_redis, chance.choice([1, 20, window // 10, window // 2]))
        now = clocked_redis.now
        log = [at for at in log if at > now - window * SECOND]
        if chance.random() < 0.3:
            assert theirs.check() == len(log)
            counted += len(log) > 3
            if chance.random() < 0.5:
                theirs.record()
                log.append(now)
        else:
            outcome = clocked_redis.backend.decide("k", [Limit(5, chance.choice([1, 60]))], 1, "hit")
            if outcome.admitted:
                if chance.random() < 0.2:
                    clocked_redis.backend.refund("k", outcome.entries, 1)
                else:
                    log.append(now)
    assert counted > 3


def test_the_window_that_we_know_of_them_does_not_grow_by_itself(clocked_redis: Any) -> None:
    """Neither by hits that are given back, nor by a sibling that was lost, more than once."""
    theirs = Theirs(clocked_redis, HOUR)
    theirs.record()
    clocked_redis.backend.decide("k", [Limit(5, 60)], 1, "hit")
    known = int(clocked_redis.command("GET", sibling("k", "window")))
    assert HOUR * SECOND <= known <= (HOUR + 60) * SECOND
    for _ in range(20):
        passes(clocked_redis, 100)
        outcome = clocked_redis.backend.decide("k", [Limit(5, 60)], 1, "hit")
        clocked_redis.backend.refund("k", outcome.entries, 1)
    assert int(clocked_redis.command("GET", sibling("k", "window"))) == known
    theirs.record()
    clocked_redis.backend.decide("k", [Limit(5, 60)], 1, "hit")
    assert int(clocked_redis.command("GET", sibling("k", "window"))) == known
