"""The scripts of semaphores and read/write locks on a real Redis, step by step beside an oracle in plain Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis as redis_py
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from govredis import GovRedis
from govredis.keys import sibling
from govredis.locks.backends.redis_backend import RedisLockBackend
from govredis.locks.shared_locks import shared_lock_keys
from govredis.testing.servers import RedisServer, redis_binaries

pytestmark = pytest.mark.once

DAY = 86_400_000
READERS = 1_000_000_000
#: Longer than any test: whatever the machine, time passes only where a rule says so.
FROZEN_MS = 600_000

ALL_TTLS = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do found[#found + 1] = {key, redis.call('PTTL', key)} end
return found
"""


@dataclass
class Outcome:
    """A script's reply, and the state of Redis right after it. `before` and `now` are the server's clock."""

    reply: Any
    holders: dict[str, int]
    queue: list[str]
    seen: dict[str, int]
    fence: str | None
    ttls: dict[str, int]
    before: int
    now: int
    woken: dict[str, list[int]]

    def lasts(self, owner: str, ms: int) -> bool:
        """Was its lease given just now, for so long?"""
        return self.before + ms * 1000 <= self.holders[owner] <= self.now + ms * 1000


class Scripts:
    """Runs them for owners that live in no process, on one lock of a kind."""

    def __init__(self, backend: RedisLockBackend, plain: Any, slots: int | None) -> None:
        self._backend, self.plain = backend, plain
        self.keys = shared_lock_keys("lock:x", "semaphore" if slots else "rwlock")
        self.holders, self.fence, self.queue, self.waiters = self.keys
        self._slots = slots or READERS

    def acquire(self, owner: str, waits: bool = True, ttl: int = 60_000, floor: int = 0) -> Outcome:
        return self._run(self._backend.acquire_script, owner, ttl, floor, DAY, int(waits))

    def extend(self, owner: str, token: int, ttl: int = 60_000) -> Outcome:
        return self._run(self._backend.extend_script, owner, ttl, token, DAY)

    def release(self, owner: str, token: int) -> Outcome:
        return self._run(self._backend.release_script, owner, token, DAY)

    def time(self) -> int:
        seconds, micros = self.plain.time()
        return int(seconds) * 1_000_000 + int(micros)

    def _run(self, script: Any, *args: str | int) -> Outcome:
        before, keys = self.time(), (*self.keys, f"{self.queue}:{args[0]}")
        with self.plain.pipeline(transaction=True) as pipe:
            pipe.eval(script.source, len(keys), *keys, *args, self._slots)
            pipe.zrange(self.holders, 0, -1, withscores=True)
            pipe.zrange(self.queue, 0, -1)
            pipe.hgetall(self.waiters)
            pipe.get(self.fence)
            pipe.eval(ALL_TTLS, 0)
            reply, holders, queue, seen, fence, ttls = pipe.execute()
        lists = [key for key, _ in ttls if key.startswith(self.queue + ":")]
        return Outcome(
            reply,
            {owner: int(end) for owner, end in holders},
            queue,
            {owner: int(at) for owner, at in seen.items() if owner},
            fence,
            dict(ttls),
            before,
            self.time(),
            {key.removeprefix(self.queue + ":"): [*map(int, self.plain.lrange(key, 0, -1))] for key in lists},
        )


@dataclass
class Client:
    """An owner token, and the beliefs of its process."""

    whole: bool
    doing: str = "out"  # or queued, holds, lapsed (its lease ended without a release)
    token: int = 0
    #: Data losses before its grant.
    era: int = 0
    #: The last release, and in which era.
    released: tuple[int, int] = (0, -1)


@dataclass
class Oracle:
    """The behaviour that the scripts promise: a queue, holders, and tokens."""

    slots: int | None
    clients: dict[str, Client]
    holders: list[str] = field(default_factory=list)
    queue: list[str] = field(default_factory=list)
    unseen: set[str] = field(default_factory=set)
    last: int = 0
    whole: int = 0
    era: int = 0

    def fits(self, owner: str) -> bool:
        if not self.holders:
            return True
        if self.slots is None:
            return not self.clients[owner].whole and not any(self.clients[h].whole for h in self.holders)
        return len(self.holders) < self.slots

    def first(self) -> str | None:
        while self.queue and self.queue[0] in self.unseen:
            self.leave(self.queue[0])
        return self.queue[0] if self.queue else None

    def leave(self, owner: str) -> None:
        if owner in self.queue:
            self.queue.remove(owner)
        self.unseen.discard(owner)

    def hand_over(self) -> list[str]:
        """Returns the new holders, in order."""
        handed = []
        while (first := self.first()) is not None and self.fits(first):
            self.leave(first)
            self.holders.append(first)
            handed.append(first)
        return handed

    def acquire(self, owner: str, waits: bool) -> tuple[bool, list[str]]:
        if owner in self.holders:
            return True, []
        handed = self.hand_over() if self.fits(owner) else []
        if owner in self.holders:
            return True, handed
        if self.fits(owner) and self.first() is None:
            self.holders.append(owner)
            return True, handed
        if waits:
            if owner not in self.queue:
                self.queue.append(owner)
            self.unseen.discard(owner)
        return False, handed

    def extend(self, owner: str) -> bool:
        client = self.clients[owner]
        if owner not in self.holders:
            if client.era == self.era:
                return False  # nothing was lost since
            if (self.last if client.whole else self.whole) > client.token or not self.fits(owner):
                return False
            self.holders.append(owner)
        self.last = max(self.last, client.token)
        if client.whole:
            self.whole = max(self.whole, client.token)
        return True

    def release(self, owner: str, token: int) -> tuple[bool, list[str]]:
        self.leave(owner)
        if owner not in self.holders:
            if self.clients[owner].released == (token, self.era):
                return True, []
            return False, self.hand_over()
        self.holders.remove(owner)
        self.clients[owner].released = token, self.era
        return True, self.hand_over()


class Machine(RuleBasedStateMachine):
    """Steps in any order. The clock stands still but for what a rule makes late."""

    backend: RedisLockBackend
    plain: Any

    @initialize(
        slots=st.sampled_from([None, None, None, 1, 2, 3]),
        arrivals=st.lists(st.integers(0, 5), min_size=4, max_size=8),
    )
    def begin(self, slots: int | None, arrivals: list[int]) -> None:
        self.plain.flushall()
        names = ["read:a", "write:b", "read:c", "write:d", "read:e", "read:f"]
        if slots:
            names = [f"semaphore:{n}" for n in "abcdef"]
        self.scripts = Scripts(self.backend, self.plain, slots)
        self.oracle = Oracle(slots, {name: Client(name.startswith("write")) for name in names})
        self.names = names
        self.highest = 0
        for n in arrivals:
            self.acquire(n, True)

    def does(self, *doing: str) -> bool:
        return self.pick(0, *doing) is not None

    def pick(self, n: int, *doing: str) -> str | None:
        """A client that does so."""
        found = [name for name in self.names if self.oracle.clients[name].doing in doing]
        return found[n % len(found)] if found else None

    # -- what can happen

    @precondition(lambda self: self.does("out"))
    @rule(n=st.integers(0, 5), waits=st.sampled_from([True, True, False]))
    def arrive(self, n: int, waits: bool) -> None:
        self.acquire(n, waits)

    def acquire(self, n: int, waits: bool) -> None:
        if (name := self.pick(n, "out")) is not None:
            self._acquire(name, waits)

    @precondition(lambda self: self.does("queued"))
    @rule(n=st.integers(0, 5), waits=st.sampled_from([True, True, False]))
    def ask_again(self, n: int, waits: bool) -> None:
        if (name := self.pick(n, "queued")) is not None:
            self._acquire(name, waits)

    @precondition(lambda self: self.oracle.holders)
    @rule(n=st.integers(0, 5))
    def confirm(self, n: int) -> None:
        """Or ask again though it has it: the reply was lost."""
        self._acquire(self.oracle.holders[n % len(self.oracle.holders)], False)

    def _acquire(self, name: str, waits: bool) -> None:
        granted, handed = self.oracle.acquire(name, waits)
        seen = self.scripts.acquire(name, waits)
        assert bool(seen.reply[0]) == granted
        self.hand(handed, seen)
        client = self.oracle.clients[name]
        if granted:
            self.grant(name, seen.reply[1])
        elif waits:
            client.doing = "queued"
        elif client.doing != "queued":
            client.doing = "out"
        self.check(seen)

    @precondition(lambda self: self.does("holds", "lapsed"))
    @rule(n=st.integers(0, 5))
    def release(self, n: int) -> None:
        if (name := self.pick(n, "holds", "lapsed")) is not None:
            self._release(name, self.oracle.clients[name].token)

    @precondition(lambda self: self.does("queued"))
    @rule(n=st.integers(0, 5))
    def give_up(self, n: int) -> None:
        if (name := self.pick(n, "queued")) is not None:
            self._release(name, 0)

    @precondition(lambda self: self.does("out"))
    @rule(n=st.integers(0, 5))
    def release_again(self, n: int) -> None:
        """It arrives a second time: the reply was lost."""
        if (name := self.pick(n, "out")) is not None and self.oracle.clients[name].released[0]:
            self._release(name, self.oracle.clients[name].released[0])

    def _release(self, name: str, token: int) -> None:
        released, handed = self.oracle.release(name, token)
        seen = self.scripts.release(name, token)
        assert bool(seen.reply) == released
        self.oracle.clients[name].doing = "out"
        self.hand(handed, seen)
        self.check(seen)

    @precondition(lambda self: self.does("holds"))
    @rule(n=st.integers(0, 5))
    def extend(self, n: int) -> None:
        """In any order, whatever was lost."""
        name = self.pick(n, "holds")
        if name is None:
            return
        client = self.oracle.clients[name]
        extended = self.oracle.extend(name)
        seen = self.scripts.extend(name, client.token)
        assert bool(seen.reply) == extended
        if not extended:
            client.doing = "out"
        self.check(seen)

    @precondition(lambda self: self.does("lapsed"))
    @rule(n=st.integers(0, 5))
    def extend_too_late(self, n: int) -> None:
        name = self.pick(n, "lapsed")
        if name is None or self.oracle.clients[name].era < self.oracle.era:
            return  # by its own clock too it is over
        seen = self.scripts.extend(name, self.oracle.clients[name].token)
        assert not seen.reply
        self.check(seen)

    @precondition(lambda self: self.oracle.queue)
    @rule(n=st.integers(0, 5))
    def do_not_see(self, n: int) -> None:
        """For a second one that waits is not heard of."""
        self.oracle.unseen.add(self.oracle.queue[n % len(self.oracle.queue)])
        self.freeze()

    @precondition(lambda self: self.oracle.holders)
    @rule(n=st.integers(0, 5))
    def lapse(self, n: int) -> None:
        """A lease ends without a release."""
        name = self.oracle.holders.pop(n % len(self.oracle.holders))
        self.oracle.clients[name].doing = "lapsed"
        self.plain.zadd(self.scripts.holders, {name: self.scripts.time() - 1})

    @precondition(lambda self: self.oracle.holders)
    @rule(rarely=st.integers(0, 2))
    def lose_data(self, rarely: int) -> None:
        """Those that hold do not know it."""
        if rarely:
            return
        self.plain.flushall()
        oracle = self.oracle
        oracle.holders, oracle.queue, oracle.unseen = [], [], set()
        oracle.last = oracle.whole = 0
        oracle.era += 1
        for client in oracle.clients.values():
            if client.doing == "queued":
                client.doing = "out"

    # -- what must be so

    def grant(self, name: str, token: int) -> None:
        assert token > self.highest, "tokens rise, and none is given twice"
        self.highest = self.oracle.last = token
        client = self.oracle.clients[name]
        client.doing, client.token, client.era = "holds", token, self.oracle.era
        if client.whole:
            self.oracle.whole = token

    def hand(self, handed: list[str], seen: Outcome) -> None:
        for name in handed:
            (token,) = seen.woken[name]
            self.grant(name, token)

    def check(self, seen: Outcome) -> None:
        oracle = self.oracle
        assert set(seen.holders) == set(oracle.holders)
        assert seen.queue == oracle.queue
        assert set(seen.seen) == set(oracle.queue)
        whole = [name for name in seen.holders if oracle.clients[name].whole]
        assert len(seen.holders) <= (oracle.slots or READERS)
        assert not whole or len(seen.holders) == 1, "a writer is alone"
        if oracle.last:
            last, of_the_whole, made = map(int, str(seen.fence).split())
            assert (last, of_the_whole) == (oracle.last, oracle.whole)
            assert made <= seen.now
        assert all(ttl > 0 for ttl in seen.ttls.values()), seen.ttls
        if seen.holders:
            assert seen.ttls[self.scripts.holders] * 1000 >= max(seen.holders.values()) - seen.now - 2000
            assert seen.ttls[self.scripts.fence] > DAY - 60_000
        self.freeze()

    def freeze(self) -> None:
        scripts, oracle = self.scripts, self.oracle
        later = scripts.time() + FROZEN_MS * 1000
        with self.plain.pipeline(transaction=True) as pipe:
            for name in oracle.holders:
                pipe.zadd(scripts.holders, {name: later})
            for name in oracle.queue:
                pipe.hset(scripts.waiters, name, 0 if name in oracle.unseen else later)
            for key in [*scripts.keys, *(f"{scripts.queue}:{name}" for name in oracle.clients)]:
                pipe.pexpire(key, FROZEN_MS)
            pipe.pexpire(scripts.fence, DAY + FROZEN_MS)
            pipe.execute()


@pytest.fixture
def backend(make_gov: Callable[..., GovRedis], redis_server: RedisServer) -> RedisLockBackend:
    return make_gov(redis_url=redis_server.url).locks._shared_backend


def test_scripts_agree_with_the_oracle_in_any_order_of_steps(
    backend: RedisLockBackend, plain_redis: Any, redis_binary: str
) -> None:
    @seed([*redis_binaries().values()].index(redis_binary))  # each server runs half of the examples
    class On(Machine):
        def __init__(self) -> None:
            self.backend, self.plain = backend, plain_redis
            super().__init__()

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        On,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# -- what time does ----------------------------------------------------------------------------------------------------


@pytest.fixture
def semaphore(backend: RedisLockBackend, plain_redis: Any) -> Callable[[int], Scripts]:
    return lambda slots: Scripts(backend, plain_redis, slots)


@pytest.fixture
def rwlock(backend: RedisLockBackend, plain_redis: Any) -> Scripts:
    return Scripts(backend, plain_redis, None)


def test_a_lease_ends_after_its_ttl_and_not_with_a_shorter_one_of_another(rwlock: Scripts) -> None:
    seen = rwlock.acquire("read:long", ttl=60_000)
    assert seen.lasts("read:long", 60_000)
    assert DAY + 59_000 < seen.ttls[rwlock.fence] <= DAY + 60_000
    seen = rwlock.acquire("read:short", ttl=5_000)
    assert seen.lasts("read:short", 5_000)
    assert seen.ttls[rwlock.holders] > 55_000
    seen = rwlock.extend("read:short", seen.reply[1], ttl=100_000)
    assert seen.lasts("read:short", 100_000)
    assert 99_000 < seen.ttls[rwlock.holders] <= 100_000
    assert DAY + 99_000 < seen.ttls[rwlock.fence] <= DAY + 100_000
    seen = rwlock.extend("read:short", int(seen.fence.split()[0]), ttl=1_000)  # type: ignore[union-attr]
    assert seen.lasts("read:short", 1_000)
    assert seen.ttls[rwlock.holders] > 90_000


def test_a_handed_over_lock_is_held_for_a_second_until_confirmed_with_the_whole_ttl(rwlock: Scripts) -> None:
    _, token = rwlock.acquire("write:me").reply
    for name in "read:a", "read:b", "write:c":
        assert rwlock.acquire(name).reply == [0, 0]
    seen = rwlock.release("write:me", token)
    assert set(seen.holders) == set(seen.woken) == {"read:a", "read:b"}
    assert all(seen.lasts(name, 1_000) for name in seen.holders)
    assert all(0 < seen.ttls[f"{rwlock.queue}:{name}"] <= 1000 for name in seen.woken)
    assert 0 < seen.ttls[rwlock.waiters] <= 10_000
    seen = rwlock.acquire("read:a", waits=False)
    assert seen.reply[0] == 1
    assert seen.lasts("read:a", 60_000)


def test_a_waiter_is_kept_for_seconds_and_passed_over_after_one(rwlock: Scripts) -> None:
    _, token = rwlock.acquire("read:me").reply
    rwlock.acquire("write:dead")
    rwlock.acquire("read:alive")
    seen = rwlock.acquire("write:alive")
    assert 9_000 < seen.ttls[rwlock.queue] <= 10_000
    assert 9_000 < seen.ttls[rwlock.waiters] <= 10_000
    assert rwlock.acquire("read:late", waits=False).reply == [0, 0]
    rwlock.plain.hset(rwlock.waiters, "write:dead", seen.seen["write:dead"] - 1_100_000)
    seen = rwlock.acquire("read:late", waits=False)
    assert seen.reply == [0, 0], "there is a writer that lives"
    assert set(seen.holders) == {"read:me", "read:alive"}
    assert seen.queue == ["write:alive"]
    rwlock.release("read:me", token)
    assert set(rwlock.release("read:alive", 0).holders) == {"write:alive"}


@pytest.mark.parametrize("kind", ["write", "semaphore"])
def test_a_caller_that_notices_a_free_lock_does_not_get_it_before_a_waiter(
    semaphore: Callable[[int], Scripts], rwlock: Scripts, kind: str
) -> None:
    scripts = rwlock if kind == "write" else semaphore(1)
    scripts.acquire(f"{kind}:me")
    scripts.acquire(f"{kind}:first")
    scripts.plain.zadd(scripts.holders, {f"{kind}:me": 1})
    seen = scripts.acquire(f"{kind}:new")
    assert seen.reply == [0, 0]
    assert set(seen.holders) == set(seen.woken) == {f"{kind}:first"}
    assert seen.queue == [f"{kind}:new"]
    (token,) = seen.woken[f"{kind}:first"]
    assert seen.fence is not None
    assert seen.fence.startswith(f"{token} {token if kind == 'write' else 0} ")


@pytest.mark.parametrize("kind", ["write", "semaphore"])
def test_waiters_that_were_all_stopped_keep_their_order(
    semaphore: Callable[[int], Scripts], rwlock: Scripts, kind: str
) -> None:
    scripts = rwlock if kind == "write" else semaphore(1)
    _, token = scripts.acquire(f"{kind}:me").reply
    names = [f"{kind}:a", f"{kind}:b", f"{kind}:c"]
    for name in names:
        scripts.acquire(name)
    for name in names:
        scripts.plain.hincrby(scripts.waiters, name, -2_000_000)
    for name in reversed(names):
        assert scripts.acquire(name).queue == names
    assert scripts.release(f"{kind}:me", token).queue == names[1:]


def test_arrivals_within_one_microsecond_or_on_a_clock_set_back_keep_their_order(
    semaphore: Callable[[int], Scripts],
) -> None:
    scripts = semaphore(1)
    _, token = scripts.acquire("semaphore:me").reply
    scripts.acquire("semaphore:z")
    scripts.plain.zadd(scripts.queue, {"semaphore:z": 2e15 + 1e14})  # it came while the clock was ahead
    for name in "semaphore:y", "semaphore:x":
        scripts.acquire(name)
    assert scripts.release("semaphore:me", token).queue == ["semaphore:y", "semaphore:x"]


def test_the_floor_raises_the_token(rwlock: Scripts) -> None:
    now = rwlock.acquire("read:a").now
    ahead = now + 10**12
    assert rwlock.acquire("read:b", floor=ahead).reply == [1, ahead + 1]
    seen = rwlock.acquire("read:a", floor=now)
    assert seen.reply == [1, ahead + 2]
    assert seen.fence is not None
    assert seen.fence.startswith(f"{ahead + 2} 0 ")


# -- what was lost -----------------------------------------------------------------------------------------------------


def test_after_a_loss_of_data_all_get_their_places_back_in_any_order(semaphore: Callable[[int], Scripts]) -> None:
    scripts = semaphore(3)
    held = [(f"semaphore:{n}", scripts.acquire(f"semaphore:{n}").reply[1]) for n in "abc"]
    for order in held, held[::-1], [held[1], held[2], held[0]]:
        scripts.plain.flushall()
        for name, token in order:
            assert scripts.extend(name, token).reply == 1
        seen = scripts.acquire("semaphore:d", waits=False)
        assert seen.reply == [0, 0]
        assert set(seen.holders) == {name for name, _ in held}
    scripts.plain.flushall()
    newer = scripts.acquire("semaphore:d").reply[1]
    assert newer > max(token for _, token in held)
    assert [scripts.extend(name, token).reply for name, token in held] == [1, 1, 0], "there were three"


def test_readers_get_it_back_unless_a_writer_had_it_and_a_writer_unless_anybody_had(rwlock: Scripts) -> None:
    readers = [(f"read:{n}", rwlock.acquire(f"read:{n}").reply[1]) for n in "ab"]
    rwlock.plain.flushall()
    newer = rwlock.acquire("read:new").reply[1]
    for name, token in readers:
        assert rwlock.extend(name, token).reply == 1
    for name, token in [*readers, ("read:new", newer)]:
        rwlock.release(name, token)
    _, token = rwlock.acquire("write:a").reply
    rwlock.plain.flushall()
    assert rwlock.extend("write:a", token).reply == 1
    assert rwlock.acquire("read:a").reply == [0, 0]
    rwlock.release("read:a", 0)
    rwlock.plain.flushall()
    newer = rwlock.acquire("read:a").reply[1]
    assert rwlock.extend("write:a", token).reply == 0, "it is held"
    rwlock.release("read:a", newer)
    assert rwlock.extend("write:a", token).reply == 0, "it was"
    readers = [(f"read:{n}", rwlock.acquire(f"read:{n}").reply[1]) for n in "ab"]
    rwlock.plain.flushall()
    assert rwlock.extend(*readers[0]).reply == 1
    rwlock.release(*readers[0])
    newer = rwlock.acquire("write:a").reply[1]
    rwlock.release("write:a", newer)
    assert rwlock.extend(*readers[1]).reply == 0


def test_a_writer_that_was_handed_the_lock_is_remembered_like_one_that_took_it(rwlock: Scripts) -> None:
    lost = rwlock.acquire("read:lost").reply[1]
    rwlock.plain.flushall()
    token = rwlock.acquire("read:a").reply[1]
    rwlock.acquire("write:b")
    seen = rwlock.release("read:a", token)
    assert seen.fence is not None
    handed = seen.woken["write:b"][0]
    assert seen.fence.startswith(f"{handed} {handed} ")
    rwlock.release("write:b", handed)
    assert rwlock.extend("read:lost", lost).reply == 0


def test_a_writer_that_got_it_back_is_remembered_too(rwlock: Scripts) -> None:
    reader = rwlock.acquire("read:lost").reply[1]
    rwlock.plain.flushall()
    writer = rwlock.acquire("write:a").reply[1]
    rwlock.plain.flushall()
    assert rwlock.extend("write:a", writer).reply == 1
    assert rwlock.release("write:a", writer).reply == 1
    assert rwlock.extend("read:lost", reader).reply == 0


@contextlib.contextmanager
def data_of_now(server: RedisServer) -> Iterator[Callable[[], None]]:
    """Takes the server back to it."""
    with redis_py.Redis.from_url(server.url) as client:
        kept = [(key, client.pttl(key), client.dump(key)) for key in client.keys("*")]

        def go_back() -> None:
            client.flushall()
            for key, left, value in kept:
                client.restore(key, left, value)

        yield go_back


def test_after_a_failover_to_older_data_all_get_their_places_back_in_any_order(
    semaphore: Callable[[int], Scripts], redis_server: RedisServer
) -> None:
    scripts = semaphore(4)
    before = scripts.acquire("semaphore:before").reply[1]
    with data_of_now(redis_server) as go_back:
        held = [(f"semaphore:{n}", scripts.acquire(f"semaphore:{n}").reply[1]) for n in "abc"]
        for order in held, held[::-1], [held[1], held[2], held[0]]:
            go_back()
            for name, token in order:
                assert scripts.extend(name, token).reply == 1
            assert scripts.extend("semaphore:before", before).reply == 1
            assert scripts.acquire("semaphore:d", waits=False).reply == [0, 0]


@pytest.mark.parametrize("kind", ["read", "write", "semaphore"])
def test_a_slot_taken_away_while_the_fence_stood_is_not_given_back(
    semaphore: Callable[[int], Scripts], rwlock: Scripts, kind: str
) -> None:
    scripts = semaphore(2) if kind == "semaphore" else rwlock
    token = scripts.acquire(f"{kind}:me").reply[1]
    scripts.plain.delete(scripts.holders)
    seen = scripts.extend(f"{kind}:me", token)
    assert seen.reply == 0
    assert not seen.holders
    token = scripts.acquire(f"{kind}:me").reply[1]
    scripts.plain.delete(scripts.holders, scripts.fence)
    assert scripts.extend(f"{kind}:me", token).reply == 1, "the fence was evicted too: nobody is ended by mistake"


def test_a_holder_whose_lease_ended_gets_nothing_back(semaphore: Callable[[int], Scripts]) -> None:
    scripts = semaphore(2)
    token = scripts.acquire("semaphore:a").reply[1]
    scripts.plain.zadd(scripts.holders, {"semaphore:a": 1})
    assert scripts.extend("semaphore:a", token).reply == 0
    scripts.acquire("semaphore:b")
    assert scripts.extend("semaphore:a", token).reply == 0


@pytest.mark.parametrize("kind", ["read", "write", "semaphore"])
def test_an_extension_that_arrives_after_the_release_brings_no_ghost(
    semaphore: Callable[[int], Scripts], rwlock: Scripts, kind: str
) -> None:
    scripts = semaphore(2) if kind == "semaphore" else rwlock
    me = f"{kind}:me"
    token = scripts.acquire(me).reply[1]
    scripts.release(me, token)
    assert scripts.extend(me, token).reply == 0
    token = scripts.acquire(me).reply[1]
    scripts.plain.flushall()
    for _ in range(2):
        assert scripts.release(me, token).reply == 0, "it was not its any more"
    seen = scripts.extend(me, token)
    assert seen.reply == 0
    assert not seen.holders
    assert 0 < seen.ttls[scripts.waiters] <= 10_000
    newer = scripts.acquire(me).reply[1]
    scripts.plain.flushall()
    scripts.release(me, token)
    assert scripts.extend(me, newer).reply == 1, "that was of an earlier grant"


def test_a_release_that_arrives_again_counts_also_after_those_of_others(semaphore: Callable[[int], Scripts]) -> None:
    scripts = semaphore(3)
    tokens = {name: scripts.acquire(name).reply[1] for name in ("semaphore:a", "semaphore:b", "semaphore:c")}
    for name, token in tokens.items():
        assert scripts.release(name, token).reply == 1
    for name, token in tokens.items():
        assert scripts.release(name, token).reply == 1
        assert scripts.release(name, token + 1).reply == 0, "another grant's"
    assert scripts.release("semaphore:d", tokens["semaphore:a"]).reply == 0
    for _ in range(100):
        scripts.release("semaphore:a", scripts.acquire("semaphore:a").reply[1])
    assert len(scripts.plain.hget(scripts.waiters, "")) <= 1000, "the last ones"


def test_the_keys_are_those_of_the_kind_in_one_slot() -> None:
    base = sibling("lock:x", "rwlock")
    assert shared_lock_keys("lock:x", "rwlock") == (base, f"{base}:fence", f"{base}:queue", f"{base}:waiters")
    assert not set(shared_lock_keys("lock:x", "rwlock")) & set(shared_lock_keys("lock:x", "semaphore"))
