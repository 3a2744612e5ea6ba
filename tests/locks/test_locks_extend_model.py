"""Every order of events that may befall a held lock's keys, by the real scripts: which leases end, and which come back.

The oracle is told the events, and not the content of the keys. Each rule of extend.lua is taken away in turn, and the
check fails.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import redis as redis_py

from govredis.keys import sibling
from govredis.locks import DistributedLock
from govredis.testing.servers import RedisServer

pytestmark = pytest.mark.once

KEY = "lock:x"
KEYS = KEY, *(sibling(KEY, name) for name in ("fence", "queue", "waiters"))
FENCE = KEYS[1]
DAY, TTL = 86_400_000, 60_000
STEPS = 3


@pytest.fixture
def locks(make_gov: Any, redis_server: RedisServer) -> DistributedLock:
    return make_gov(redis_url=redis_server.url).locks


@dataclass
class Truth:
    """The holder in Redis, and Redis's memory of the grant whose lease runs.

    It remembers nothing, an earlier time, that it runs, that it has ended, or a later grant.
    """

    holder: str | None = "me"
    memory: str = "runs"

    def renewed(self) -> int:
        """The promised reply to the holder whose lease runs."""
        if self.holder == "another" or (self.holder is None and self.memory in ("runs", "later")):
            return 0
        self.holder, self.memory = "me", "runs"
        return 1


class Story:
    """Events, for Redis and for the oracle."""

    def __init__(self, locks: DistributedLock, extend: str, token: int) -> None:
        self.truth = Truth()
        self.token = token
        self.commands: list[tuple[Any, ...]] = [("FLUSHALL",)]
        self.promised: dict[int, int] = {}
        self._backend, self._force, self._extend = locks._backend, locks._backend.force_script, extend
        self._fence(token, TTL + DAY)
        self._do("SET", KEY, "me", "PX", TTL)

    def _do(self, *command: Any) -> None:
        self.commands.append(command)

    def _fence(self, token: int, ms: int) -> None:
        self._do("SET", FENCE, token, "PX", ms)

    def _run(self, source: str, *args: Any) -> None:
        self._do("EVAL", source, len(KEYS), *KEYS, *args)

    def renew(self) -> None:
        self.promised[len(self.commands)] = self.truth.renewed()
        self._run(self._extend, "me", TTL, self.token, DAY)

    def take_away_the_key(self) -> None:
        """DEL, or an eviction."""
        self._do("DEL", KEY)
        self.truth.holder = None

    def evict_the_fence(self) -> None:
        self._do("DEL", FENCE)
        self.truth.memory = "nothing"

    def lose_all(self) -> None:
        self._do("FLUSHALL")
        self.truth = Truth(None, "nothing")

    def go_back_before_the_grant(self) -> None:
        self._do("FLUSHALL")
        self._fence(self.token - 5, DAY)
        self.truth = Truth(None, "an earlier time")

    def go_back_to_anothers_lease(self) -> None:
        self.go_back_before_the_grant()
        self._fence(self.token - 5, TTL + DAY)
        self._do("SET", KEY, "another", "PX", TTL)
        self.truth.holder = "another"

    def go_back_before_the_last_renewal(self) -> None:
        """To data by which the lease has ended."""
        self._do("FLUSHALL")
        self._fence(self.token, DAY)
        self.truth = Truth(None, "has ended")

    def force(self) -> None:
        self._run(self._force.source, DAY)
        if self.truth.holder is not None:
            self.truth = Truth(None, "later")

    def another_takes_it(self) -> None:
        self._run(self._backend.acquire_script.source, "another", TTL, 0, DAY, 0)
        if self.truth.holder is None:
            self.truth = Truth("another", "later")

    def another_releases_it(self) -> None:
        if self.truth.holder == "another":
            self._run(self._backend.release_script.source, "another", 0, DAY)
            # Without a fence it does not know its token, nor leaves one.
            self.truth.holder = None


EVENTS = [
    Story.take_away_the_key,
    Story.evict_the_fence,
    Story.lose_all,
    Story.go_back_before_the_grant,
    Story.go_back_to_anothers_lease,
    Story.go_back_before_the_last_renewal,
    Story.force,
    Story.another_takes_it,
    Story.another_releases_it,
    Story.renew,
]


def broken(locks: DistributedLock, server: RedisServer, extend: str) -> list[str]:
    """The first story that goes otherwise than promised; none where all are kept."""
    with redis_py.Redis.from_url(server.url) as client:
        # By the server's clock, as a grant's, and a little before any that follows.
        seconds, micros = client.time()
        token = seconds * 1_000_000 + micros - 1_000_000
        for events in itertools.product(EVENTS, repeat=STEPS):
            story = Story(locks, extend, token)
            for event in (*events, Story.renew):
                event(story)
            with client.pipeline(transaction=False) as pipe:
                for command in story.commands:
                    pipe.execute_command(*command)
                replies = pipe.execute()
            if any(replies[at] != promised for at, promised in story.promised.items()):
                return [event.__name__ for event in events]
    return []


def test_a_lock_taken_by_force_is_lost_and_a_loss_of_data_ends_no_lock(
    locks: DistributedLock, redis_server: RedisServer
) -> None:
    assert broken(locks, redis_server, locks._backend.extend_script.source) == []


RULES = {
    "what is another's is refused": ("if holder and holder ~= ARGV[1] then return 0 end", ""),
    "what another has had is refused": ("if last > token then return 0 end", ""),
    "what was taken away is not given back": ("if last == token and", "if false and"),
    "an older fence ends nobody": ("if last == token and", "if last > 0 and"),
    "a lease that has ended in older data ends nobody": ("> tonumber(ARGV[4])", "> 0"),
    "what is lost is restored": ("if not holder then", "if not holder then return 0 end\nif not holder then"),
    "what was restored is remembered": ("redis.call('SET', KEYS[2], ARGV[3], 'PX',", "local _ = string.format("),
}


@pytest.mark.one_redis
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_missed(locks: DistributedLock, redis_server: RedisServer, rule: str) -> None:
    source = locks._backend.extend_script.source
    before, after = RULES[rule]
    assert source.count(before) == 1
    assert broken(locks, redis_server, source.replace(before, after))


def test_a_handed_over_lock_counts_its_wait_too(locks: DistributedLock, plain_redis: Any) -> None:
    """Its fence outlives the second for which it is handed over, as that of every lease."""
    backend = locks._backend
    for owner, waits in ("first", 0), ("second", 1):
        keys = (*KEYS, f"{KEYS[2]}:{owner}")  # with the list that wakes it
        plain_redis.eval(backend.acquire_script.source, len(keys), *keys, owner, TTL, 0, DAY, waits)
    assert plain_redis.eval(backend.release_script.source, len(KEYS), *KEYS, "first", plain_redis.get(FENCE), DAY) == 1
    assert plain_redis.get(KEY) == "second"
    token = plain_redis.get(FENCE)
    plain_redis.delete(KEY)
    assert plain_redis.eval(backend.extend_script.source, len(KEYS), *KEYS, "second", TTL, token, DAY) == 0
    assert not plain_redis.exists(KEY)
