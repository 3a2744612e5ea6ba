"""The long form: `python -m tests.async_service --operations 20000 --seeds 1,2,3`, with and without PostgreSQL."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time

from govredis import Config, GovRedis
from govredis.testing.servers import PostgresServer, RedisServer

from .mixed import MACHINES, run
from .world import World


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.async_service", description=__doc__)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=None)
    parser.add_argument("--only", choices=MACHINES, default="all")
    parser.add_argument("--postgres", choices=["with", "without"], help="one of the two modes only")
    asked = parser.parse_args()
    logging.getLogger("govredis").setLevel(logging.ERROR)  # locks are lost, and Redis goes away, again and again
    failed = False
    with RedisServer() as redis, PostgresServer() as postgres:
        with GovRedis(Config(redis_enabled=False, database_url=postgres.url)) as gov:
            gov.postgres.migrate()
        for mode in [asked.postgres] if asked.postgres else ["without", "with"]:
            for seed in asked.seeds or [random.SystemRandom().randrange(1_000_000)]:
                world = World(redis.url, postgres.url if mode == "with" else None)
                began = time.monotonic()
                try:
                    found = run(world, asked.operations, seed, MACHINES[asked.only])
                finally:
                    world.close()
                failed |= bool(found.disagreements)
                print(
                    f"{mode} PostgreSQL, seed {seed}: {found.operations:,} operations,"
                    f" {len(found.disagreements)} disagreements, {time.monotonic() - began:.0f} s"
                )
                for disagreement in found.disagreements:
                    print(f"  {disagreement}".replace("\n", "\n  "))
                sys.stdout.flush()
    sys.exit(failed)


main()
