"""PostgreSQL statements for 1,000 operations, counted at the pool: the table in docs/performance.md.

Without govredis each operation is one statement, at best. Those of the relay and of the AgentStore are counted too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from govredis import GovRedis
from govredis.testing.servers import PostgresServer, RedisServer

pytestmark = [pytest.mark.once, pytest.mark.one_redis]

OPERATIONS = 1000


def sessions(gov: GovRedis) -> int:
    """Ten logins, 98 requests each, which slide its TTL, and the logouts."""
    for n in range(10):
        gov.sessions.bind(f"s{n}", "agent", ttl=3200)  # the first request finds a tenth of the TTL gone
    for _ in range(98):
        for n in range(10):
            assert gov.sessions.get_agent_id(f"s{n}", touch=True) == "agent"
    for n in range(10):
        gov.sessions.unbind(f"s{n}")
    return 10 * (1 + 98 + 1)


def limits(gov: GovRedis) -> int:
    """Half of them are refused."""
    admitted = sum(bool(gov.limits.hit(f"agent-{n % 10}", "50/hour", operation="op")) for n in range(OPERATIONS))
    assert admitted == OPERATIONS / 2
    return OPERATIONS


def metadata(gov: GovRedis) -> int:
    """40 agents, created before; 990 reads and ten updates."""
    for n in range(10):
        gov.agents.update_metadata(f"agent-{n}", n=n)
        for k in range(99):
            assert gov.metadata.get_or_load(f"agent-{k % 40}", gov.agents.get) is not None
    return 10 * (1 + 99)


@pytest.mark.parametrize(
    ("workload", "saved"), [(sessions, 0.90), (limits, 0.95), (metadata, 0.80)], ids=lambda x: getattr(x, "__name__", x)
)
def test_statements_saved(
    make_gov: Callable[..., GovRedis],
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    workload: Callable[[GovRedis], int],
    saved: float,
) -> None:
    gov = make_gov(redis_url=redis_server.url, database_url=postgres_server.url)
    if workload is metadata:
        for n in range(40):
            gov.agents.create(f"agent-{n}", {"n": 0})
    before = gov.postgres.statements
    assert workload(gov) == OPERATIONS
    spent = gov.postgres.statements - before
    assert spent <= OPERATIONS * (1 - saved)
