"""A process of test_metadata_endurance.py: `metadata_worker.py ROLE REDIS_URL DATABASE_URL X FILE`, until SIGTERM.

Writes a line for each thing done. Instants are of CLOCK_MONOTONIC, which all processes of a host share.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import psycopg2

from govredis import BackendUnavailable, Config, GovRedis

#: Few enough to be found in the cache, and so many that a stale one would be read before it is written to again.
AGENTS = [f"agent-{n}" for n in range(100)]


def read(gov: GovRedis, url: str, out: TextIO) -> Iterator[None]:
    """ "read START AGENT VERSION" for each."""
    while True:
        agent = random.choice(AGENTS)
        start = time.monotonic()
        try:
            record = gov.metadata.get_or_load(agent, gov.agents.get)
        except BackendUnavailable:  # PostgreSQL had no answer in time, on a busy machine
            continue
        assert record is not None
        out.write(f"read {start} {agent} {record['version']}\n")
        yield


def local(gov: GovRedis, url: str, out: TextIO) -> Iterator[None]:
    """As `read`, with the values kept in the process; not as fast as it could, for what it would write."""
    for _ in read(gov, url, out):
        time.sleep(0.001)
        yield


def write(gov: GovRedis, url: str, out: TextIO) -> Iterator[None]:
    """ "wrote COMMITTED AGENT VERSION": COMMITTED is a moment later than the commit."""
    for n in itertools.count():
        time.sleep(random.uniform(0, 0.1))
        try:
            record = gov.agents.update_metadata(random.choice(AGENTS), n=n)
        except BackendUnavailable:
            continue
        assert record is not None
        out.write(f"wrote {time.monotonic()} {record['agent_id']} {record['version']}\n")
        yield


def psql(gov: GovRedis, url: str, out: TextIO) -> Iterator[None]:
    """As `write`; some of them rolled back, some a while open."""
    connection = psycopg2.connect(url)
    while True:
        time.sleep(random.uniform(0, 0.1))
        agent = random.choice(AGENTS)
        with connection.cursor() as cursor:
            cursor.execute("UPDATE govredis_agents SET metadata = '{}' WHERE agent_id = %s RETURNING version", (agent,))
            ((version,),) = cursor.fetchall()
        time.sleep(random.choice((0, 0, 0.3)))
        if random.random() < 0.2:
            connection.rollback()
            continue
        connection.commit()
        out.write(f"wrote {time.monotonic()} {agent} {version}\n")
        yield


def drain(gov: GovRedis, url: str, out: TextIO) -> Iterator[None]:
    while True:
        assert gov.internal.freshness is not None
        gov.internal.freshness.drain()
        time.sleep(0.3)
        yield


ROLES: dict[str, Callable[[GovRedis, str, TextIO], Iterator[None]]] = {
    "read": read, "local": local, "write": write, "psql": psql, "drain": drain,
}  # fmt: skip


def main(role: str, redis_url: str, database_url: str, x: str, file: str) -> None:
    logging.getLogger("govredis").disabled = True
    ended: list[Any] = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    config = Config(
        redis_url=redis_url, database_url=database_url, metadata_staleness=float(x), socket_timeout=0.5,
        connect_timeout=0.5, postgres_timeout=5, metadata_ttl=60,
        local_cache=role == "local",
    )  # fmt: skip
    with open(file, "w") as out, GovRedis(config) as gov:
        for _ in ROLES[role](gov, database_url, out):
            if ended:
                break
        counts = {**gov.counters.read(), "local_hits": gov.metadata.stats().get("local_hits", 0)}
        out.write(f"counts {json.dumps(counts)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
