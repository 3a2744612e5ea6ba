"""The memory of an identity's windows in Redis when they are full, by algorithm: `python -m tests.bench.memory`."""

from __future__ import annotations

import time
from collections.abc import Callable

from govredis import Config, GovRedis, Limit
from govredis.keys import sibling
from govredis.limits.backends.redis_backend import RedisLimitBackend
from govredis.testing.servers import RedisServer, redis_binaries

COUNTS = (20, 1_000, 100_000)
WINDOW = 3600
KEY = "rate_limit:default:agent-123"


def fill_log(gov: GovRedis, count: int) -> None:
    hits = [("agent-123", Limit(count, WINDOW))] * min(count, 1_000)
    for _ in range(count // len(hits)):
        assert all(gov.limits.hit_many(hits))


def fill_counter(gov: GovRedis, count: int) -> None:
    """Over the whole window, for that is what takes most: by the script, which takes the time as an argument."""
    assert gov.internal.context.redis is not None
    backend = RedisLimitBackend(gov.internal.context.redis)
    last, at_once = time.time_ns() // 1000, max(1, count // 50)
    for n in range(count // at_once):
        now = str(last + n * WINDOW * 1_000_000 * at_once // count)
        arguments = ("hit", str(at_once), f"{now}-0123456789ab{n}", now, str(count), str(WINDOW * 1_000_000))
        assert gov.internal.context.redis.run(backend._counter_script, (sibling(KEY, "counter"),), *arguments)[0] == 1


FILL: dict[str, Callable[[GovRedis, int], None]] = {
    "sliding_window_log": fill_log,
    "sliding_window_counter": fill_counter,
}


def memory(server: RedisServer) -> int:
    keys = (KEY, sibling(KEY, "window"), sibling(KEY, "counter"))
    return sum(server.command("MEMORY", "USAGE", key, "SAMPLES", 0) or 0 for key in keys)


def main() -> None:
    print(f"bytes of one identity's keys after N hits within a window of {WINDOW} s")
    for binary in redis_binaries().values():
        with RedisServer(binary=binary) as server, GovRedis(Config(redis_url=server.url, socket_timeout=10)) as gov:
            print(f"\nRedis {server.command('INFO', 'server')['redis_version']}")
            print(f"{'':24}" + "".join(f"{f'N = {count:,}':>16}" for count in COUNTS))
            for algorithm, fill in FILL.items():
                used = []
                for count in COUNTS:
                    server.command("FLUSHALL")
                    fill(gov, count)
                    used.append(memory(server))
                print(f"{algorithm:24}" + "".join(f"{held:>16,}" for held in used))


if __name__ == "__main__":
    main()
