"""`python -m tests.bench.floors`: what each promise of a hit, a counter and a lock costs Redis.

Each script does a little more than the one before it, and the last is ours. So each difference is a promise's price.
They decide nothing, and none of them could take the place of ours. One client sends all, the peer's too: the longer
a client thinks between two calls, the more a call costs Redis, whose process falls asleep.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

from redis.lock import Lock

from govredis.client import Script
from govredis.keys import sibling
from govredis.locks.backends.redis_backend import EXCLUSIVE
from govredis.locks.resource import lock_keys
from govredis.testing.servers import RedisServer

from .costs import ServerCost
from .instructions import CountingServer
from .machine import awake_cores
from .samples import figure, ratio
from .sites import Call, Site

ROUNDS, TURN = 40, 200
LOG, LOCK = "rate_limit:op:agent", "lock:resource"

NOTHING = "return 1"
CLOCK = "local time = redis.call('TIME') local now = time[1] * 1000000 + time[2] "
REPLY = "return {1, 1, 999999, 0, 3600000000}"
COUNTED = """
local before = redis.call('ZCOUNT', KEYS[1], '-inf', (now - ARGV[6]) / 1000000)
local used = redis.call('ZCARD', KEYS[1]) - before
redis.call('ZADD', KEYS[1], 'NX', now / 1000000, ARGV[3] .. '-1') """
TO_COME = "redis.call('ZCOUNT', KEYS[1], now / 1000000, '+inf') "
TTLS = "redis.call('GET', KEYS[2]) redis.call('PTTL', KEYS[2]) redis.call('PTTL', KEYS[1]) "
HITS = {
    "a script that does nothing": NOTHING,
    "+ the server's clock, and a reply of five numbers": CLOCK + REPLY,
    "+ entries counted, and one added": CLOCK + COUNTED + REPLY,
    "+ entries that are still to come": CLOCK + TO_COME + COUNTED + REPLY,
    "+ windows and TTLs of others": CLOCK + TO_COME + TTLS + COUNTED + REPLY,
    "ours: + several limits, retry_after, TTLs": Script("govredis.limits", "clock.lua", "log.lua", "window.lua").source,
}

HELD = "local held = redis.call('HMGET', KEYS[1], 'calls', 'origin', ARGV[6]) "
BUCKETS = "ARGV[6], '29408591 1{} |b'".format(" 0" * 59)
NOTED = "string.sub((held[1] or ' ') .. ARGV[3] .. ' ', -512)"
COUNTERS = {
    "a script that does nothing": NOTHING,
    "+ the server's clock, and a reply of six numbers": CLOCK + REPLY.replace("{", "{1, "),
    "+ 60 buckets read, and others written": CLOCK + HELD + f"redis.call('HSET', KEYS[1], {BUCKETS}) " + REPLY,
    "+ calls that arrive twice": CLOCK + HELD + f"redis.call('HSET', KEYS[1], 'calls', {NOTED}, {BUCKETS}) " + REPLY,
    "ours: + several limits, retry_after, leases": Script(
        "govredis.limits", "clock.lua", "counter.lua", "counter_limits.lua", "counter_window.lua"
    ).source,
}

SET = "redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) "
FENCE = "redis.call('SET', KEYS[2], string.format('%d', now), 'PX', string.format('%d', ARGV[2] + ARGV[4])) "
MINE = "if redis.call('GET', KEYS[1]) == ARGV[1] then "
DEL = "return redis.call('DEL', KEYS[1]) end"
LAST = "redis.call('GET', KEYS[2]) "
RAISED = "redis.call('SET', KEYS[2], string.format('%d', ARGV[2] + 1), 'PX', ARGV[3]) "
CYCLES = {
    "two scripts that do nothing": (NOTHING, NOTHING),
    "+ SET NX; GET, DEL": (SET + "return 1", MINE + DEL),
    "+ a fence": (SET + LAST + CLOCK + FENCE + "return {1, now}", MINE + LAST + RAISED + DEL),
    "ours: + the queue, and tokens of the host": (
        Script("govredis.locks", *EXCLUSIVE.acquire).source,
        Script("govredis.locks", *EXCLUSIVE.release).source,
    ),
}


class Contestants:
    """The calls of one client, by operation and name. The first of each is the peer's."""

    def __init__(self, site: Site) -> None:
        self._call = site.client.call
        self._numbers = itertools.count()

    def all(self) -> dict[str, dict[str, Call]]:
        import limits

        scripts = Path(limits.__file__).parent / "resources" / "redis" / "lua_scripts"
        moving, sliding = (
            self._loaded((scripts / f"acquire_{name}_window.lua").read_text()) for name in ("moving", "sliding")
        )
        release, counts = self._loaded(Lock.LUA_RELEASE_SCRIPT), ("LIMITS:counted/-1", "LIMITS:counted")

        def cycle() -> None:
            owner = f"{next(self._numbers):032x}"
            self._call("SET", "peer", owner, "NX", "PX", "30000")
            self._run(release, ("peer",), owner)

        return {
            "limits.hit, one busy identity": {
                "limits": lambda: self._run(moving, ("LIMITS:moving",), str(time.time()), "1000000", "3600", "1"),
                **{name: self._hit(text, (f"{LOG}{n}", sibling(f"{LOG}{n}", "window")))
                   for n, (name, text) in enumerate(HITS.items())},
            },
            "limits.hit, a counter": {
                "limits": lambda: self._run(sliding, counts, "1000000", "3600", "1"),
                **{name: self._hit(text, (sibling(f"{LOG}{n}", "counter"),))
                   for n, (name, text) in enumerate(COUNTERS.items())},
            },
            "locks.acquire + release": {
                "redis-py": cycle,
                **{name: self._cycle(*texts, f"{LOCK}{n}") for n, (name, texts) in enumerate(CYCLES.items())},
            },
        }  # fmt: skip

    def _loaded(self, text: str) -> str:
        return str(self._call("SCRIPT", "LOAD", text).decode())

    def _run(self, sha: str, keys: tuple[str, ...], *args: str) -> object:
        return self._call("EVALSHA", sha, str(len(keys)), *keys, *args)

    def _hit(self, text: str, keys: tuple[str, ...]) -> Call:
        sha, member, numbers = self._loaded(text), "1764515487123456-0123456789ab", self._numbers
        return lambda: self._run(sha, keys, "hit", "1", f"{member}{next(numbers)}", "", "1000000", "3600000000")

    def _cycle(self, acquire: str, release: str, key: str) -> Call:
        grant, end, keys = self._loaded(acquire), self._loaded(release), lock_keys(key)

        def call() -> None:
            owner = f"a-host-of-20-letters:12345:0123456789ab-{next(self._numbers)}"
            granted = self._run(grant, (*keys, f"{keys[2]}:{owner}"), owner, "30001", "0", "3600000", "1")
            token = granted[1] if isinstance(granted, list) else granted
            self._run(end, keys, owner, str(token), "3600000")

        return call


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with CountingServer(config=["hz 1", "dynamic-hz no"]) as server:
            site, counted = Site(server.url, folder), {}
            for operation, calls in Contestants(site).all().items():
                for name, call in calls.items():
                    for _ in range(2):  # the first makes the keys
                        server.instructions()
                        for _ in range(TURN):
                            call()
                    counted[operation, name] = server.instructions() / TURN
            site.close()
        with RedisServer() as plain, awake_cores():
            site, cost = Site(plain.url, folder), ServerCost(plain.url)
            spent: dict[tuple[str, str], list[float]] = {of: [] for of in counted}
            contestants = Contestants(site).all()
            for _ in range(ROUNDS):
                for operation, calls in contestants.items():
                    for name, call in calls.items():
                        before = cost.cpu()
                        for _ in range(TURN):
                            call()
                        spent[operation, name].append((cost.cpu() - before) / TURN)
            cost.close()
            site.close()
    print("| | instructions | CPU, µs | to the peer |\n| --- | --- | --- | --- |")
    peers: dict[str, str] = {}
    for (operation, name), samples in spent.items():
        if operation not in peers:
            print(f"| **{operation}** | | | |")
        peer = peers.setdefault(operation, name)
        to_peer, mine = ratio(samples, spent[operation, peer]), figure(samples)
        print(
            f"| {name} | {counted[operation, name]:,.0f} | {mine['median']} |"
            f" {to_peer['median']:.2f} ({to_peer['low']:.2f} to {to_peer['high']:.2f}) |"
        )


if __name__ == "__main__":
    main()
