"""What an identity's window takes in Redis, full, for each algorithm: `python -m tests.bench.memory`."""

from __future__ import annotations

from typing import get_args

from govredis import Config, GovRedis, Limit
from govredis.keys import sibling
from govredis.limits.rates import Algorithm
from govredis.testing.servers import RedisServer, redis_binaries

COUNTS = (20, 1_000, 100_000)
WINDOW = 3600.0


def fill(gov: GovRedis, limit: Limit) -> None:
    """Use up the limit, one hit at a time: for a log, that is what takes most."""
    hits = [("agent-123", limit)] * min(limit.count, 1_000)
    for _ in range(limit.count // len(hits)):
        assert all(gov.limits.hit_many(hits))


def memory(server: RedisServer) -> int:
    key = "rate_limit:default:agent-123"
    keys = (key, sibling(key, "window"), sibling(key, "counter"))
    return sum(server.command("MEMORY", "USAGE", key, "SAMPLES", 0) or 0 for key in keys)


def main() -> None:
    print(f"bytes of one identity's keys, after N hits within a window of {WINDOW:g} s")
    for binary in redis_binaries().values():
        with RedisServer(binary=binary) as server, GovRedis(Config(redis_url=server.url, socket_timeout=10)) as gov:
            print(f"\nRedis {server.command('INFO', 'server')['redis_version']}")
            print(f"{'':24}" + "".join(f"{f'N = {count:,}':>16}" for count in COUNTS))
            for algorithm in get_args(Algorithm):
                used = []
                for count in COUNTS:
                    server.command("FLUSHALL")
                    fill(gov, Limit(count, WINDOW, algorithm=algorithm))
                    used.append(memory(server))
                print(f"{algorithm:24}" + "".join(f"{bytes_:>16,}" for bytes_ in used))


if __name__ == "__main__":
    main()
