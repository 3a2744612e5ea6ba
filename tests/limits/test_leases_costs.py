"""Leases: what they cost, and how processes share."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from leasing import LEASE, Process, limit
from support import redis_of

from govredis import GovRedis
from govredis.limits.backends.backend import CounterEntries
from govredis.limits.backends.redis_leases import LeasedEntries
from govredis.testing.servers import RedisServer


class TestSharing:
    def test_a_burst_in_each_of_8_processes_leaves_no_process_with_nothing(self, gov: GovRedis, algorithm: Any) -> None:
        """16 calls in all, of 24 that are allowed."""
        rate, processes = limit(24, algorithm), [Process(gov) for _ in range(8)]
        found = [one.hits(2, rate) for one in processes]
        for one in processes:
            one.limiter.close()
        assert all(found)


class TestGivingBack:
    def test_a_busy_counters_rest_is_given_back_without_a_number_for_each(self) -> None:
        """A million integers take 35 MB, and 0.1 s of the interpreter's lock."""
        lease = LeasedEntries("m", 1_000_000, CounterEntries(0, (1,), "m"), "o")
        tracemalloc.start()
        try:
            assert lease.part().arguments(900_000)[0] == "900000"
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()

    def test_a_slow_identity_costs_no_more_round_trips_than_without_lease(
        self, gov: GovRedis, redis_server: RedisServer, algorithm: Any
    ) -> None:
        """A call or two in each lease: a batch would go back unspent, at the cost of another round trip."""
        one, rate = Process(gov), limit(1000, algorithm)
        one.hits(1, rate)
        before = _commands(redis_server)
        for _ in range(20):
            one.now += LEASE
            # As the thread, at the lease's end.
            one.leases._give_back([batch for batch in list(one.leases._ending) if one.now >= batch.end])
            one.hits(1, rate)
        one.limiter.close()
        assert _commands(redis_server) - before <= 20 + 2


def _commands(server: RedisServer) -> int:
    """Scripts, and refunds of logs, that Redis ran."""
    stats = server.command("INFO", "commandstats")
    return sum(int(stats[name]["calls"]) for name in ("cmdstat_evalsha", "cmdstat_zrem") if name in stats)


class TestManyIdentities:
    def test_the_end_of_a_process_gives_back_many_in_few_round_trips(
        self, gov: GovRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has one second, and a round trip for each of 3,000 identities takes longer."""
        one, rate = Process(gov), limit(1000)
        for n in range(50):
            for _ in range(3):
                one.limiter.hit(f"k{n}", rate)
        assert one.leases.has_pending()
        client = redis_of(gov)
        exchange, trips = client._round_trip, []

        def counted(*args: Any, **options: Any) -> Any:
            trips.append(args)
            return exchange(*args, **options)

        monkeypatch.setattr(client, "_round_trip", counted)
        one.limiter.close()
        assert not one.leases.has_pending()
        assert 1 <= len(trips) < 10
